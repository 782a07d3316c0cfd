"""Adapters taken away, merged and combined: what is left acts as it should."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.several import DESIGN, activate
from harness.specs.several_settings import number

if TYPE_CHECKING:
    from torch import nn

    from harness.oracle import Snapshot
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
    needs=("several/switch",),
    features=("multi_adapter",),
    cases=(Case(), Case(specimen="stack"), Case(specimen="embedding")),
    more_cases=(Case(specimen="fused"), Case(specimen="tiny")),
)
def delete(trial: Trial) -> None:
    """Judge parameters, outputs, that the name is gone, and that it can be given again."""
    x = trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    before, sizes = trial.call(model, x), _sizes(model)
    adapter.add(model, "second", trial.config())
    activate(trial, model, "second")
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
        adapter.add(model, "second", trial.config())
        activate(trial, model, "second")
        trial.same_bits(
            trial.call(model, x),
            trial.call(trial.base(), x),
            "outputs of a fresh adapter under the deleted name",
        )
        return
    fail("silent", expected="activating a deleted adapter to raise", actual="nothing was raised")


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
    claim="Activating another adapter while one is merged MUST be right or raise.",
    why="The merged one's update stays in the weights, under the other's or without any.",
    source=(
        "DESIGN.md: what is done while merged is right or raises",
        "BUGS 42",
        "https://github.com/huggingface/peft/issues/3504",
    ),
    needs=("several/switch", "several/delete", "merge/same-output"),
    features=("multi_adapter", "merge"),
    cases=(Case(way="activate"), Case(way="delete"), Case(specimen="stack", way="delete")),
)
def while_merged(trial: Trial) -> None:
    """Judge the outputs of the second, and once more when the first, that was merged, is deleted."""
    x = trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    activate(trial, model, "second")
    factors = trial.randomize(model, seed=1)
    activate(trial, model, "default")
    base = trial.base()
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    adapter.merge(model)
    # What was merged may come out of the weights again: one rounding of the larger sum more.
    budget = budget + trial.budget(base, trial.snapshot(model), x)
    try:
        adapter.activate(model, "second")
        if trial.case.way == "delete":
            adapter.delete(model, "default")
    except Exception:  # noqa: BLE001  # raising is an answer
        return

    trial.close(trial.call(model, x), truth, budget, f"output after {trial.case.way} while merged")


@spec(
    "several/merges-the-active",
    claim="Merging MUST fold the adapter that acts, and unmerging MUST take that one out again.",
    why="What is deployed is what was merged: a merge of the first, whichever acts, serves another task.",
    source=(DESIGN, "DESIGN.md, merge"),
    needs=("several/switch", "merge/same-output", "merge/restores-base"),
    features=("multi_adapter", "merge"),
    cases=(Case(),),
    more_cases=(Case(specimen="stack"), Case(specimen="embedding"), Case(specimen="fused")),
)
def merges_the_active(trial: Trial) -> None:
    """Judge merged outputs of the second and, where `unmerge` is claimed, both adapters after it."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    first = trial.snapshot(model)
    adapter.add(model, "second", trial.config())
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


@spec(
    "several/combination",
    claim="The ΔW of a combined adapter MUST be the weighted sum of the ΔWs it is made of.",
    why="Adding up A and B apart gives cross terms, and a scale that is lost gives another adapter.",
    source=(
        "DESIGN.md, combine",
        "BUGS 33, 35, P-18",
        "https://github.com/huggingface/peft/pull/1169",
        "https://github.com/huggingface/peft/issues/2512",
    ),
    needs=("several/other-settings", "trainable/count"),
    features=("multi_adapter", "combine"),
    cases=(
        Case(),
        Case(way="alike"),
        Case(way="negative"),
        Case(way="three"),
        Case(specimen="embedding", way="negative"),
        Case(specimen="fused", way="three"),
        Case(specimen="stack", way="negative"),
        Case(specimen="stack", way="targets"),
    ),
    more_cases=(
        Case(specimen="conv2d"),
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
    model = trial.adapted()
    terms = _terms(trial, model)
    adapter: Any = trial.adapter
    names = [name for name, _, _ in terms]
    try:
        adapter.combine(model, names, [weight for _, weight, _ in terms], "both")
    except Exception as error:  # any exception is loud
        if trial.case.way != "targets":
            raise
        trial.notes.append(f"adapters of other targets are not combined: {type(error).__name__}")
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
        none = torch.zeros_like(oracle.weight_of(module), dtype=torch.float64)
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


def _terms(trial: Trial, model: nn.Module) -> list[tuple[str, float, Snapshot]]:
    """The adapters to combine, with weights and values, added to the model: of other ranks or alike."""
    weights = {
        "": (0.7, 0.6),
        "alike": (0.7, 0.6),
        "negative": (1.5, -0.8),
        "one": (1.0,),
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
        if trial.case.way == "targets":
            other["target_modules"] = ("foo", "qkv_proj")
        adapter.add(model, name, trial.config(**other))
        activate(trial, model, name)
        terms.append((name, weight, trial.randomize(model, seed=k)))
    activate(trial, model, "default")
    return terms


@spec(
    "several/combination-leaves-its-sources",
    claim="Combining adapters MUST leave each of them as it was: values, scaling, outputs and settings; "
    "and so MUST writing to the combination.",
    why="A combination that writes its rank or alpha into a source's settings changes that source when "
    "it is saved and loaded again; one that shares factors with it, when it is trained on.",
    source=("BUGS 36", "https://github.com/huggingface/peft/issues/654"),
    needs=("several/combination", "checkpoint/save-restores-settings"),
    features=("multi_adapter", "combine"),
    cases=(Case(), Case(way="one"), Case(specimen="stack", way="negative")),
)
def combination_leaves_its_sources(trial: Trial) -> None:
    """Judge factors and outputs in place and, where `save` is claimed, what a saved source loads as."""
    from harness import descent

    x = trial.inputs()
    model = trial.adapted()
    terms = _terms(trial, model)
    before = trial.call(model, x)
    adapter: Any = trial.adapter
    adapter.combine(model, [name for name, _, _ in terms], [w for _, w, _ in terms], "both")
    activate(trial, model, "both")
    trial.randomize(model, seed=9)
    for name, _, values in terms:
        activate(trial, model, name)
        now = trial.snapshot(model)
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
