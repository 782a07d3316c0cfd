"""Adapters combined into one, and what is left of those it was made of."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.several import activate, look
from harness.specs.several_settings import number

if TYPE_CHECKING:
    from torch import nn

    from harness.oracle import Snapshot
    from harness.trial import Trial


@spec(
    "several/combination",
    claim="The ΔW of a combined adapter MUST be the weighted sum of the ΔWs it is made of, saved and loaded "
    "too.",
    why="Adding up A and B apart gives cross terms, and a scale that is lost, then or in a file, gives "
    "another adapter.",
    source=(
        "DESIGN.md, combine",
        "BUGS 33, 35, P-18",
        "https://github.com/huggingface/peft/pull/1169",
        "https://github.com/huggingface/peft/issues/2512",
    ),
    needs=("several/other-settings", "trainable/count", "checkpoint/save-restores-settings"),
    features=("multi_adapter", "combine"),
    cases=(
        Case(),
        Case(way="alike"),
        Case(way="negative"),
        Case(way="three"),
        Case(way="rslora"),
        Case(way="nothing"),
        Case(way="twice"),
        Case(specimen="conv2d"),
        Case(specimen="embedding", way="negative"),
        Case(specimen="fused", way="three"),
        Case(specimen="stack", way="negative"),
        Case(specimen="stack", way="targets"),
    ),
    more_cases=(
        Case(specimen="tiny", way="three"),
        Case(dtype="bfloat16", way="negative"),
    ),
)
def combination(trial: Trial) -> None:
    """Judge ΔW, adapters of other ranks, alphas or targets combined, and that outputs follow it.

    A module that only some adapt has the weighted sum of those; refusing other targets is loud, too.
    """
    import torch

    from harness import oracle, specimen, storage, tolerance
    from harness.trial import Trial

    x = trial.inputs()
    if trial.case.way == "rslora" and not trial.claims("rslora"):
        trial.notes.append("rslora is not claimed")
        return
    model = trial.adapted(config=trial.config(use_rslora=trial.case.way == "rslora"))
    terms = _terms(trial, model)
    if trial.case.way == "twice":
        terms.append((terms[0][0], 0.5, terms[0][2]))
    adapter: Any = trial.adapter
    names = [name for name, _, _ in terms]
    try:
        adapter.combine(model, names, [weight for _, weight, _ in terms], "both")
    except Exception as error:  # any exception is loud
        if trial.case.way not in {"targets", "twice"}:
            raise
        trial.notes.append(f"refused, {trial.case.way}: {type(error).__name__}")
        return
    activate(trial, model, "both")
    made = trial.snapshot(model)
    # The combined adapter may be stored in a coarser dtype than what it is made of.
    stored = max(
        (t.dtype for t in storage.handles(trial.factors(model))), key=tolerance.unit_roundoff
    )
    base = specimen.pristine(trial.case)
    for path in dict.fromkeys(chain(made, *(each for _, _, each in terms))):
        module = base.get_submodule(path)
        here = [(w, each[path]) for _, w, each in terms if path in each]
        size = oracle.weight_of(module).shape
        none = torch.zeros(size, dtype=torch.float64)  # on the CPU, as the truth is
        truth = sum((w * oracle.delta(module, parts) for w, parts in here), none)
        sizes = (abs(w) * oracle.delta(module, parts, absolute=True) for w, parts in here)
        ranks = sum(f.A.shape[0] for _, parts in here for f in parts)
        budget = tolerance.combined(sum(sizes, none), r=ranks, factor_dtype=stored)
        found = oracle.delta(module, made[path]) if path in made else none
        trial.close(found, truth, budget, f"ΔW of {path}, combined")
    alone = Trial(trial.adapter, trial.case)
    alone.factors(model)  # budgets follow the dtype that is seen first: here the combined one's
    truth, allowed = alone.truth(base, made, x), alone.budget(base, made, x)

    trial.close(trial.call(model, x), truth, allowed, "output of the combined adapter")
    if (
        trial.claims("save")
        and trial.case.specimen == "linear"
        and trial.case.way in {"", "rslora"}
    ):
        try:
            adapter.save(model, folder := trial.folder())
        except Exception as error:  # noqa: BLE001  # any exception is loud
            trial.notes.append(f"a combined adapter is not saved: {type(error).__name__}")
            return
        loaded = adapter.load(trial.base(), folder)
        trial.unmerged(loaded)
        trial.close(trial.call(loaded, x), truth, allowed, "output of it, saved and loaded")


def _terms(
    trial: Trial, model: nn.Module, *, frozen: str = ""
) -> list[tuple[str, float, Snapshot]]:
    """The adapters to combine, with weights and values, added to the model: of other ranks or alike."""
    weights = {
        "": (0.7, 0.6),
        "alike": (0.7, 0.6),
        "negative": (1.5, -0.8),
        "one": (1.0,),
        "rslora": (0.7, 0.6),
        "nothing": (0.7, 0.0),
        "twice": (0.7, 0.6),
        "three": (0.4, -1.1, 0.9),
        "targets": (0.7, -0.6),
    }[trial.case.way]
    terms = [("default", weights[0], trial.snapshot(model))]
    adapter: Any = trial.adapter
    for k, weight in enumerate(weights[1:], start=1):
        name = f"adapter{k}"
        # Of one rank and alpha, factors can be added up apart without an error.
        other: dict[str, Any] = {"r": trial.case.r + 2 * k, "lora_alpha": 3.0 * k}
        if trial.case.way == "alike":
            other = {}
        if trial.case.way == "rslora":
            other["use_rslora"] = True
        if trial.case.way == "targets":
            other["target_modules"] = ("foo", "qkv_proj")
        adapter.add(model, name, trial.config(**other), trainable=name != frozen)
        activate(trial, model, name)
        terms.append((name, weight, trial.randomize(model, seed=k)))
    activate(trial, model, "default")
    return terms


@spec(
    "several/combination-leaves-its-sources",
    claim="Combining adapters MUST leave each of them as it was: values, scaling, outputs, trainability and "
    "settings; and so MUST writing to the combination.",
    why="A combination that writes its rank or alpha into a source's settings changes that source when "
    "it is saved and loaded again; one that shares factors with it, when it is trained on.",
    source=("BUGS 36", "https://github.com/huggingface/peft/issues/654"),
    needs=("several/combination", "checkpoint/save-restores-settings"),
    features=("multi_adapter", "combine"),
    cases=(Case(way="three"), Case(way="one"), Case(specimen="stack", way="negative")),
)
def combination_leaves_its_sources(trial: Trial) -> None:
    """Judge factors and outputs in place and, where `save` is claimed, what a saved source loads as."""
    from harness import descent

    x = trial.inputs()
    model = trial.adapted()
    terms = _terms(trial, model, frozen="adapter1")
    before = trial.call(model, x)
    trained = {name: look(trial, model, name)[1] for name, _, _ in terms}
    adapter: Any = trial.adapter
    adapter.combine(model, [name for name, _, _ in terms], [w for _, w, _ in terms], "both")
    activate(trial, model, "both")
    trial.randomize(model, seed=9)
    for name, _, values in terms:
        now, trains = look(trial, model, name)
        if trains is not trained[name]:
            fail(
                "state",
                expected=f"{name} {'trainable' if trained[name] else 'frozen'}, as before combining",
                actual="trainable" if trains else "frozen",
                where=name,
            )
        for where, (new, old) in descent.pairs(now, values):
            trial.same_bits(new, old, f"{where} of {name} after combining")
        for path, parts in values.items():
            for is_, was in zip(now[path], parts, strict=True):
                what = f"scaling of {path} in {name} after combining"
                trial.same_bits(number(is_.scaling), number(was.scaling), what)
    activate(trial, model, "default")
    trial.same_bits(trial.call(model, x), before, "outputs of the first source after combining")
    if trial.claims("save"):
        folder = trial.folder()
        adapter.save(model, folder)
        loaded = adapter.load(trial.base(), folder)
        trial.unmerged(loaded)
        trial.same_bits(
            trial.call(loaded, x), before, "outputs of the first source, saved and loaded"
        )
