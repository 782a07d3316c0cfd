"""Adapters taken away, and adapters while one is merged: what is left acts as it should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.several import DESIGN, activate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from harness.trial import Trial


@spec(
    "several/delete",
    claim="Deleting an adapter MUST take its parameters off the model and its name away, and leave the "
    "others acting as before.",
    why="A deleted adapter that still acts, or still takes memory, is not deleted.",
    source=(
        DESIGN,
        "BUGS 97, 140",
        "https://github.com/huggingface/peft/issues/738",
        "https://github.com/huggingface/peft/pull/2466",
    ),
    needs=("several/other-settings", "several/switch-saved-modules"),
    features=("multi_adapter",),
    cases=(
        Case(),
        Case(way="names-alike"),
        Case(specimen="headless", way="targets"),
        Case(specimen="stack", way="modules_to_save"),
        Case(specimen="conv2d"),
        Case(specimen="stack"),
        Case(specimen="embedding"),
        Case(specimen="fused"),
    ),
    more_cases=(Case(specimen="tiny"),),
)
def delete(trial: Trial) -> None:
    """Judge parameters, outputs, that the name is gone, and that it can be given again."""
    if trial.case.way == "names-alike":
        _delete_among_alike(trial)
        return
    x = trial.inputs()
    whole = trial.case.way == "modules_to_save"
    if whole and not trial.claims("modules_to_save"):
        trial.notes.append("modules_to_save is not claimed")
        return
    config = trial.config(modules_to_save=("lm_head",)) if whole else trial.config()
    elsewhere = trial.case.way == "targets"  # in another layer than the first
    second = trial.config(target_modules=("embed_out",)) if elsewhere else config
    model = trial.adapted(config=config)
    adapter: Any = trial.adapter
    before, sizes = trial.call(model, x), _sizes(model)
    adapter.add(model, "second", second)
    activate(trial, model, "second")
    fresh = trial.call(model, x)
    trial.randomize(model, seed=1)
    activate(trial, model, "default")
    adapter.delete(model, "second")
    trial.unmerged(model)

    trial.same_bits(trial.call(model, x), before, "outputs after deleting the other adapter")
    if _sizes(model) != sizes:
        left = sum(_sizes(model)) - sum(sizes)
        fail(
            "count",
            expected=f"{sum(sizes)} elements of parameters, as before the adapter was added",
            actual=f"{left} more" if left > 0 else f"{-left} fewer",
        )
    try:
        adapter.activate(model, "second")
    except Exception:  # noqa: BLE001  # any exception is loud
        if not elsewhere:
            _add_again(trial, model, fresh)
        return
    fail("silent", expected="activating a deleted adapter to raise", actual="nothing was raised")


def _add_again(trial: Trial, model: nn.Module, fresh: Tensor) -> None:
    """Under the deleted name another adapter is what it is asked to be: fresh, frozen, of its own scaling."""
    import torch

    from harness import tolerance

    adapter: Any = trial.adapter
    others = {p for p in model.parameters() if p.requires_grad}
    config = trial.config(r=trial.case.r + 1, lora_alpha=3 * trial.case.alpha)
    adapter.add(model, "second", config, trainable=False)
    activate(trial, model, "second")
    what = "outputs of a fresh adapter under the deleted name"
    trial.same_bits(trial.call(model, trial.inputs()), fresh, what)
    allowed = tolerance.unit_roundoff(torch.float32) * config.scaling
    for name, parts in trial.factors(model).items():
        for f in parts:
            if abs(float(f.scaling) - config.scaling) > allowed:
                fail(
                    "value",
                    expected=f"scaling {config.scaling:g} under the deleted name",
                    actual=f"{float(f.scaling):g}",
                    where=name,
                )
    if any(p.requires_grad and p not in others for p in model.parameters()):
        fail("state", expected="a frozen adapter under the deleted name", actual="it trains")


def _delete_among_alike(trial: Trial) -> None:
    """Delete an adapter whose name is at the beginning and at the end of others' names."""
    x = trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    before = {"default": trial.call(model, x)}
    for seed, name in enumerate(("task", "task2", "my_task"), start=1):
        adapter.add(model, name, trial.config())
        activate(trial, model, name)
        trial.randomize(model, seed=seed)
        before[name] = trial.call(model, x)
    activate(trial, model, "task2")  # neither the first nor the last, and later than what goes
    adapter.delete(model, "task")
    del before["task"]
    trial.unmerged(model)
    what = "outputs of task2, which acts, after deleting task"
    trial.same_bits(trial.call(model, x), before["task2"], what)
    for name, outputs in before.items():
        activate(trial, model, name)
        trial.same_bits(trial.call(model, x), outputs, f"outputs of {name} after deleting task")


def _sizes(model: nn.Module) -> list[int]:
    return sorted(parameter.numel() for parameter in model.parameters())


@spec(
    "several/deleted-is-freed",
    claim="Nothing SHOULD hold the factors of a deleted adapter.",
    why="A server that loads and deletes adapters all day fills its memory.",
    source=("BUGS 140", "https://github.com/huggingface/peft/issues/738"),
    needs=(
        "initialization/factors-not-shared",
        "several/delete",
    ),
    features=("multi_adapter",),
    cases=(Case(), Case(specimen="stack")),
)
def deleted_is_freed(trial: Trial) -> None:
    """Judge by weak references to the parameters that came with the adapter."""
    import gc
    import weakref

    model = trial.adapted()
    adapter: Any = trial.adapter
    old = {id(parameter) for parameter in model.parameters()}
    adapter.add(model, "second", trial.config())
    activate(trial, model, "second")
    activate(trial, model, "default")
    ghosts = [(n, weakref.ref(p)) for n, p in model.named_parameters() if id(p) not in old]
    adapter.delete(model, "second")
    gc.collect()

    held = [name for name, ghost in ghosts if ghost() is not None]
    if held:
        fail(
            "state",
            expected="no parameter of the deleted adapter alive",
            actual=f"{len(held)} of {len(ghosts)} are",
            where=held[0],
        )


@spec(
    "several/while-merged",
    claim="Adding, activating or deleting an adapter while one is merged MUST be right or raise.",
    why="The merged one's update stays in the weights, under the other's or without any, or acts twice.",
    source=(
        "DESIGN.md: what is done while merged is right or raises",
        "BUGS 42",
        "https://github.com/huggingface/peft/issues/3504",
    ),
    needs=("several/switch", "several/delete", "merge/same-output"),
    features=("multi_adapter", "merge"),
    cases=(
        *(Case(specimen=s, way="activate") for s in ("linear", "embedding", "conv2d", "fused")),
        Case(way="activate-same"),
        Case(way="add"),
        Case(way="delete"),
        Case(way="delete-other"),
        Case(specimen="stack", way="delete"),
    ),
    more_cases=(
        Case(specimen="stack", way="add"),
        Case(specimen="embedding", way="add"),
        Case(specimen="fused", way="add"),
    ),
)
def while_merged(trial: Trial) -> None:
    """Judge the outputs of the second, and once more when the first, that was merged, is deleted."""
    if trial.case.way in {"add", "activate-same", "delete-other"}:
        _the_first_stays(trial)
        return
    x = trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    activate(trial, model, "second")
    factors = trial.randomize(model, seed=1)
    activate(trial, model, "default")
    base = trial.base()
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    # What was merged may come out of the weights again: one rounding of the larger sum more.
    budget = budget + trial.budget(base, trial.snapshot(model), x)
    adapter.merge(model)
    try:
        adapter.activate(model, "second")
        if trial.case.way == "delete":
            adapter.delete(model, "default")
    except Exception:  # noqa: BLE001  # raising is an answer
        return

    trial.close(trial.call(model, x), truth, budget, f"output after {trial.case.way} while merged")


def _the_first_stays(trial: Trial) -> None:
    """Judge the first, merged and, where `unmerge` is claimed, unmerged; and one that was added."""
    base, x, way = trial.base(), trial.inputs(), trial.case.way
    model = trial.adapted()
    adapter: Any = trial.adapter
    first = trial.snapshot(model)
    truth, budget = trial.truth(base, first, x), trial.budget(base, first, x)
    if way == "delete-other":
        adapter.add(model, "second", trial.config())
    adapter.merge(model)
    ways: dict[str, tuple[str, Callable[[], object]]] = {
        "add": ("adding another", lambda: adapter.add(model, "second", trial.config())),
        "activate-same": ("activating it again", lambda: adapter.activate(model, "default")),
        "delete-other": ("deleting another", lambda: adapter.delete(model, "second")),
    }
    doing, act = ways[way]
    try:
        act()
    except Exception as error:  # noqa: BLE001  # raising is an answer
        trial.notes.append(f"{doing} while merged is refused: {type(error).__name__}")
        return
    # The weights may keep the roundings of going in and coming out, each of the merged sum.
    left = 2 * budget
    what = f"output of a merged adapter after {doing}"
    trial.close(trial.call(model, x), truth, budget + left, what)
    if not trial.claims("unmerge"):
        return
    one_layer.unmerge(trial, model)  # what was done may have done it already
    trial.unmerged(model)
    trial.close(trial.call(model, x), truth, budget + left, f"{what}, then unmerged")
    if way != "add":
        return
    activate(trial, model, "second")
    second = trial.randomize(model, seed=1)
    truth, budget = trial.truth(base, second, x), trial.budget(base, second, x)
    trial.close(trial.call(model, x), truth, budget + left, "output of the one that was added")


@spec(
    "several/merges-the-active",
    claim="Merging MUST fold the adapter that acts, and unmerging MUST take that one out again.",
    why="What is deployed is what was merged: a merge of the first, whichever acts, serves another task.",
    source=(DESIGN, "DESIGN.md, merge"),
    needs=("several/other-settings", "merge/same-output", "merge/restores-base"),
    features=("multi_adapter", "merge"),
    cases=(
        Case(),
        Case(specimen="headless", way="targets"),
        Case(specimen="embedding"),
        Case(specimen="conv2d"),
    ),
    more_cases=(Case(specimen="stack"), Case(specimen="fused")),
)
def merges_the_active(trial: Trial) -> None:
    """Judge merged outputs of the second and, where `unmerge` is claimed, both adapters after it."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    first = trial.snapshot(model)
    # In another layer than the first.
    other: dict[str, Any] = (
        {"target_modules": ("embed_out",)} if trial.case.way == "targets" else {}
    )
    adapter.add(model, "second", trial.config(lora_alpha=3 * trial.case.alpha, **other))
    activate(trial, model, "second")
    second = trial.randomize(model, seed=1)
    truth, budget = trial.truth(base, second, x), trial.budget(base, second, x)
    adapter.merge(model)
    trial.close(trial.call(model, x), truth, budget, "merged output of the second adapter")
    if not trial.claims("unmerge"):
        return
    adapter.unmerge(model)
    trial.unmerged(model)
    # The weights may keep the roundings of going in and coming out, each of the merged sum.
    left = 2 * budget
    trial.close(trial.call(model, x), truth, budget + left, "output of the second, unmerged")
    activate(trial, model, "default")
    truth, budget = trial.truth(base, first, x), trial.budget(base, first, x)

    trial.close(trial.call(model, x), truth, budget + left, "output of the first, after unmerging")
