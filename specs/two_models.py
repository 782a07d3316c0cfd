"""Two models in one process: what is done to one is nothing to the other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.spec import spec
from harness.specs.checkpoint import same_factors
from harness.specs.several import activate

if TYPE_CHECKING:
    from torch import Tensor

    from harness.trial import Trial


@spec(
    "state/two-models",
    claim="Injecting, activating, merging, unmerging, disabling, saving and loading one model MUST leave another "
    "model in the process as it was, and act on each by its own settings and on its own base.",
    why="A server and a comparison of two runs hold several models; what an implementation keeps in a "
    "class or a cache is then the last one's.",
    source=("BUGS 64", "https://github.com/pytorch/torchtune/issues/907"),
    needs=(
        "forward/sees-factors-now",
        "forward/scaling",
        "checkpoint/save-restores-settings",
        "merge/only-targets-change",
        "merge/restores-base",
        "several/switch",
    ),
    cases=(
        Case(),
        Case(specimen="stack"),
        *(Case(way=way) for way in ("activate", "unmerge", "save")),
    ),
)
def two_models(trial: Trial) -> None:
    """Judge the first against its own outputs, and the second, of another rank and alpha, by the truth."""
    ways: Any = {"activate": _activate_in_one, "unmerge": _unmerge_each, "save": _save_each}
    more = ways.get(trial.case.way)
    if more:
        more(trial)
        return
    x, adapter = trial.inputs(), trial.adapter
    alone = _merged_alone(trial) if trial.claims("merge") else None
    first = trial.adapted()
    want = trial.call(first, x)
    other = trial.config(r=trial.case.r + 2, lora_alpha=3 * trial.case.alpha)
    second = trial.adapted(config=other)
    trial.same_bits(trial.call(first, x), want, "outputs of the first once the second is injected")
    base, factors = trial.base(), trial.snapshot(second)
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    trial.close(trial.call(second, x), truth, budget, "output of the second")
    adapter.load_state_dict(second, dict(adapter.state_dict(trial.adapted(config=other))))
    trial.same_bits(trial.call(first, x), want, "outputs of the first once the second is loaded")
    if trial.claims("disable"):
        disabling: Any = adapter
        with disabling.disable(second):
            trial.same_bits(trial.call(first, x), want, "outputs of the first, the second disabled")
    if alone is not None:
        merging: Any = adapter
        merging.merge(second)
        trial.same_bits(trial.call(first, x), want, "outputs of the first, the second merged")
        merging.merge(first)
        what = "outputs of the first, merged after the second, as if merged alone"
        trial.same_bits(trial.call(first, x), alone, what)


def _merged_alone(trial: Trial) -> Tensor:
    """What the first answers merged, while there is no other model."""
    model = trial.adapted()
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # whoever asks has seen it claimed
    return trial.call(model, trial.inputs())


def _unmerge_each(trial: Trial) -> None:
    """Merge two models of other bases, unmerge both, and judge each by its own base."""
    if not trial.claims("unmerge"):
        trial.notes.append("unmerge is not claimed")
        return
    beside = dataclasses.replace(trial, case=trial.case.with_(seed=trial.case.seed + 1))
    models = [(own, own.adapted()) for own in (trial, beside)]
    left = [2 * own.budget(own.base(), own.snapshot(m), own.inputs()) for own, m in models]
    merging: Any = trial.adapter
    for _, model in reversed(models):
        merging.merge(model)
    for (own, model), budget in zip(models, left, strict=True):
        what = "base's output, each of two models unmerged"
        one_layer.gives_back_the_base(own, model, budget, what)


def _activate_in_one(trial: Trial) -> None:
    """Judge a model whose second adapter acts, once another model, that has one adapter, is injected."""
    if not trial.claims("multi_adapter"):
        trial.notes.append("multi_adapter is not claimed")
        return
    x, model = trial.inputs(), trial.adapted()
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config(r=trial.case.r + 2))
    activate(trial, model, "second")
    factors = trial.randomize(model, seed=1)
    want = trial.call(model, x)
    trial.adapted()

    same_factors(trial, model, factors, "factors of the adapter that acts, another model injected")
    trial.same_bits(trial.call(model, x), want, "outputs once another model is injected")


def _save_each(trial: Trial) -> None:
    """Save two models of other alphas, the first one last, and load each into a bare base."""
    if not trial.claims("save"):
        trial.notes.append("save is not claimed")
        return
    x, adapter = trial.inputs(), trial.adapter
    saving: Any = adapter
    configs = trial.config(), trial.config(lora_alpha=3 * trial.case.alpha)
    models = [trial.adapted(config=config) for config in configs]
    for which, model in zip(("second", "first"), reversed(models), strict=True):
        want, folder = trial.call(model, x), trial.folder()
        saving.save(model, folder)
        loaded = saving.load(trial.base(), folder)
        trial.unmerged(loaded)
        what = f"outputs of the {which} of two models, saved and loaded"
        trial.same_bits(trial.call(loaded, x), want, what)
