"""What merging folds into the base, and what unmerging takes out again.

    merge      W ← W + ΔW, rounded once to the dtype of W
    unmerge    W ← W again, within the roundings of going in and coming out

A merged layer is judged by function: on one-hot inputs its outputs are the entries of its weight,
with no rounding. Where the implementation offers `base_weight`, that is judged as well.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from harness.oracle import Snapshot
    from harness.trial import Trial

PAPER = "LoRA, section 4.1: no added latency when merged, https://arxiv.org/abs/2106.09685"
CYCLES = 50

EACH_LAYER = (
    Case(specimen="bare"),
    Case(specimen="bare", dtype="bfloat16"),
    Case(specimen="bare", dtype="float16"),
    Case(specimen="embedding"),
    Case(specimen="embedding", shape=(6, 6)),
    Case(specimen="conv2d"),
    Case(specimen="grouped"),
    Case(specimen="fused"),
)


# -- one layer, by function ------------------------------------------------------------------------


def _layer(trial: Trial) -> nn.Module:
    """The base with its bias set to zero, so that a one-hot input shows an entry of W as it is."""
    base = trial.base()
    proj: Any = base.proj
    if getattr(proj, "bias", None) is not None:
        proj.bias.detach().zero_()
    return base


def _weight(base: nn.Module) -> Tensor:
    """W of the one layer, float64."""
    proj: Any = base.proj
    doubled: Tensor = proj.weight.detach().cpu().double()
    return doubled


def _basis(trial: Trial) -> Tensor:
    """Every one-hot input of the one layer: indices, vectors or images."""
    import torch

    if trial.case.specimen == "embedding":
        return torch.arange(_weight(trial.base()).shape[0], device=trial.case.device)
    one = trial.inputs()
    shape = one.shape[1:] if trial.case.specimen in {"conv2d", "grouped"} else one.shape[-1:]
    eye = torch.eye(shape.numel(), dtype=trial.dtype, device=trial.case.device)
    return eye.view(-1, *shape)


def _spread(base: nn.Module, weight: Tensor, given: Tensor) -> Tensor:
    """Float64 outputs of the one layer with `weight` in the place of W and no bias."""
    import copy

    import torch

    model = copy.deepcopy(base).double()
    proj: Any = model.proj
    with torch.no_grad():
        proj.weight.copy_(weight)
        if getattr(proj, "bias", None) is not None:
            proj.bias.zero_()
        out: Tensor = model(given.double() if given.is_floating_point() else given)
    return out


def _delta(base: nn.Module, factors: Snapshot) -> tuple[Tensor, Tensor]:
    """ΔW of the one layer, and the magnitude its roundings scale with."""
    from harness import oracle

    proj: Any = base.proj
    return oracle.delta(proj, factors["proj"]), oracle.delta(proj, factors["proj"], absolute=True)


def _check_weight(
    trial: Trial, model: nn.Module, base: nn.Module, *, W: Tensor, budget: Tensor, what: str
) -> None:
    """The weight in effect is W within the budget: by function, and through `base_weight`."""
    basis = _basis(trial)
    found = trial.call(model, basis)
    trial.close(found, _spread(base, W, basis), _spread(base, budget, basis), what)
    read = getattr(trial.adapter, "base_weight", None)
    if read is not None:
        held = read(model, "proj")
        if held.dtype != trial.dtype:
            fail(
                "dtype",
                expected=f"the weight stays {trial.dtype}",
                actual=str(held.dtype),
                where="proj",
            )
        trial.close(held, W, budget, f"{what}, as base_weight gives it")


def _rank(factors: Snapshot) -> int:
    return int(max(f.A.shape[0] for parts in factors.values() for f in parts))


def _restored(trial: Trial, base: nn.Module, factors: Snapshot, cycles: int = 1) -> Tensor:
    """The budget of the one layer's weight after cycles."""
    from harness import tolerance

    return tolerance.restored(
        _weight(base),
        _delta(base, factors)[1],
        r=_rank(factors),
        dtype=trial.dtype,
        factor_dtype=trial.factor_dtype,
        cycles=cycles,
    )


def _silence(trial: Trial, model: nn.Module) -> None:
    """ΔW = 0, so that the outputs are the base's: B zero, and the bias on it."""
    import torch

    with torch.no_grad():
        for parts in trial.factors(model).values():
            for f in parts:
                f.B.zero_()
                if f.bias is not None:
                    f.bias.zero_()


def _is_an_adapter_still(
    trial: Trial, model: nn.Module, base: nn.Module, restored: Tensor, what: str
) -> None:
    """Factors written now act as they would on the base, less what rounding moved W by."""
    trial.randomize(model, seed=1)
    _acts(trial, model, base, restored, what)


def _acts(trial: Trial, model: nn.Module, base: nn.Module, restored: Tensor, what: str) -> None:
    """The outputs are those of the base with its factors, less what rounding moved W by."""
    given = trial.inputs()
    factors = trial.snapshot(model)
    far = given.abs() if given.is_floating_point() else given
    budget = trial.budget(base, factors, given) + _spread(base, restored, far)
    trial.close(trial.call(model, given), trial.truth(base, factors, given), budget, what)


def _or_raises(act: Callable[[], object]) -> None:
    """Asked for what is done already: nothing happens, or an exception."""
    with contextlib.suppress(Exception):
        act()


# -- specs -----------------------------------------------------------------------------------------


@spec(
    "merge/same-output",
    claim="Merged outputs MUST equal x·(W + scaling·B·A)ᵀ + bias within the rounding of the dtypes.",
    why="A merged model is what gets deployed: a wrong merge serves another model than was trained.",
    source=(
        PAPER,
        "BUGS 3, 5, 7, 11, 19, 21, 22, 25, 26, 31, 32",
        "https://github.com/microsoft/LoRA/pull/107",
    ),
    features=("merge",),
    needs=("forward/equals-oracle",),
    tier="smoke",
    cases=(
        Case(),
        Case(dtype="bfloat16"),
        Case(dtype="float16"),
        Case(dtype="float64", r=13),
        Case(way="rslora"),
        *(case for case in EACH_LAYER if case.specimen != "bare"),
    ),
)
def same_output(trial: Trial) -> None:
    """Merge random factors and compare the outputs with the equation."""
    base, given = trial.base(), trial.inputs()
    rslora = trial.case.way == "rslora" and trial.claims("rslora")
    model = trial.adapted(config=trial.config(use_rslora=rslora))
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    plain = trial.truth(base, {}, given)
    if bool(((truth - plain).abs() <= budget).all()):
        trial.notes.append("vacuous: rounding is as large as the adapter's effect")
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it

    trial.close(trial.call(model, given), truth, budget, "merged output")


@spec(
    "merge/weight-equals-oracle",
    claim="A merged weight MUST be W + scaling·B·A in the base's dtype, as near as one rounding allows.",
    why="A merge that folds nothing, or rounds twice, is not seen in one output, but is deployed.",
    source=(
        PAPER,
        "BUGS 2, 6, 8, 12, P-16",
        "https://github.com/microsoft/LoRA/issues/34",
        "https://github.com/huggingface/peft/issues/1388",
    ),
    features=("merge",),
    needs=("merge/same-output",),
    cases=(
        *EACH_LAYER,
        Case(specimen="fused-unequal"),
        Case(specimen="bare", way="autocast"),
        Case(specimen="bare", dtype="bfloat16", way="faint"),
        Case(specimen="bare", dtype="float16", way="faint"),
    ),
)
def weight_equals_oracle(trial: Trial) -> None:
    """Merge, then read the weight entry by entry; `faint` factors are lost in half precision."""
    import torch

    from harness import tolerance

    base = _layer(trial)
    try:
        model = trial.inject(_layer(trial))
    except (NotImplementedError, ValueError) as refusal:
        if trial.case.specimen != "fused-unequal":
            raise
        # As in forward/fused-parts: who cuts the rows equally may say so.
        trial.notes.append(f"parts of unequal size are refused: {refusal}")
        return
    # Small updates show what is lost of the update, and what autocast takes from W.
    effect = {"faint": 3e-3, "autocast": 3e-2}.get(trial.case.way, 0.5)
    factors = trial.randomize(model, effect=effect)
    delta, magnitude = _delta(base, factors)
    autocast = trial.case.way == "autocast"
    # Under autocast ΔW may be computed in half precision; W itself may not.
    coarse = torch.bfloat16 if autocast else trial.factor_dtype
    budget = tolerance.weights(
        _weight(base) + delta, magnitude, r=_rank(factors), dtype=trial.dtype, factor_dtype=coarse
    )
    lost = float(budget.norm() / delta.norm())
    if lost > 1:
        trial.notes.append(
            f"vacuous at {trial.case}: one rounding may take {lost:.1f} of the adapter's effect"
        )
    with torch.autocast(trial.case.device.split(":")[0], torch.bfloat16, enabled=autocast):
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it

    _check_weight(trial, model, base, W=_weight(base) + delta, budget=budget, what="merged weight")


@spec(
    "merge/restores-base",
    claim="Merging and unmerging MUST give back the base within rounding, and an adapter that acts.",
    why="Who merges to evaluate and unmerges to train on would train on another base each time.",
    source=(
        "BUGS 9, 38, 42; P5",
        "https://github.com/huggingface/peft/pull/3166",
        "https://github.com/microsoft/LoRA/issues/96",
    ),
    features=("merge", "unmerge"),
    needs=("merge/same-output", "forward/embedding", "forward/sees-factors-now"),
    cases=(Case(), *EACH_LAYER, Case(specimen="bare", way="untrained")),
)
def restores_base(trial: Trial) -> None:
    """One cycle, with random factors or with those of a fresh adapter; then look at the base."""
    base = _layer(trial)
    model = trial.inject(_layer(trial))
    factors = trial.snapshot(model) if trial.case.way == "untrained" else trial.randomize(model)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # the feature brings it

    budget = _restored(trial, base, factors)
    _silence(trial, model)
    _check_weight(
        trial, model, base, W=_weight(base), budget=budget, what="base weight after unmerging"
    )
    _is_an_adapter_still(trial, model, base, budget, "output of the unmerged adapter")
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    _acts(trial, model, base, budget, "output of the adapter merged again")


@spec(
    "merge/no-drift",
    claim="Fifty cycles of merging and unmerging MUST leave the base within the rounding of a few.",
    why="Evaluation every few hundred steps merges and unmerges: what drifts ends as another base.",
    source=(
        "BUGS section 6.3; P5",
        "https://github.com/huggingface/trl/issues/6688",
        "Reiser and Knuth, 1975: (((x + y) - y) + y) - y = (x + y) - y, rounded to nearest even",
    ),
    features=("merge", "unmerge"),
    needs=("merge/restores-base",),
    cases=(Case(specimen="bare"), Case(specimen="embedding")),
)
def no_drift(trial: Trial) -> None:
    """Fifty cycles with the same random factors."""
    _cycle(trial)


@spec(
    "merge/no-drift-in-half-precision",
    claim="In half precision too, fifty cycles of merging and unmerging SHOULD leave the base within "
    "the rounding of a few.",
    why="Where ΔW is held wider than the base, adding it and taking it out round differently each "
    "time and the base wanders; rounding ΔW to the base's dtype first, or keeping a copy, ends that.",
    source=(
        "BUGS 38; P5",
        "https://github.com/huggingface/peft/pull/3166",
        "Reiser and Knuth, 1975, for which x and y are of one format",
    ),
    features=("merge", "unmerge"),
    needs=("merge/no-drift",),
    # How far an element wanders is chance: among this many, some always goes far.
    cases=tuple(
        Case(specimen="bare", shape=(40, 33), dtype=dtype) for dtype in ("bfloat16", "float16")
    ),
)
def no_drift_in_half_precision(trial: Trial) -> None:
    """The same on a base of fewer bits than the factors may have."""
    _cycle(trial)


def _cycle(trial: Trial) -> None:
    """Merge and unmerge `CYCLES` times; the base is as after one, give or take a rounding."""
    base = _layer(trial)
    model = trial.inject(_layer(trial))
    factors = trial.randomize(model)
    for _ in range(CYCLES):
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
        trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # the feature brings it

    budget = _restored(trial, base, factors, CYCLES)
    _silence(trial, model)
    _check_weight(
        trial,
        model,
        base,
        W=_weight(base),
        budget=budget,
        what=f"base weight after {CYCLES} cycles",
    )


@spec(
    "merge/idempotent",
    claim="Merging what is merged, or unmerging what is not, MUST change nothing or raise.",
    why="Evaluation code merges, export code merges: the second one would add ΔW again.",
    source=("BUGS 1", "https://github.com/huggingface/peft/pull/1355"),
    features=("merge",),
    needs=("merge/same-output", "merge/restores-base"),
    cases=(Case(), Case(specimen="embedding"), Case(specimen="fused")),
)
def idempotent(trial: Trial) -> None:
    """Merge twice; where it is claimed, unmerge before that and twice after."""
    base, given = trial.base(), trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    merge: Any = trial.adapter.merge  # type: ignore[attr-defined]  # the feature brings it
    if trial.claims("unmerge"):
        unmerge: Any = trial.adapter.unmerge  # type: ignore[attr-defined]  # claimed
        _or_raises(lambda: unmerge(model))
        trial.close(trial.call(model, given), truth, budget, "output after unmerging unmerged")
    merge(model)
    _or_raises(lambda: merge(model))
    trial.close(trial.call(model, given), truth, budget, "output after merging twice")
    if trial.claims("unmerge"):
        unmerge(model)
        _or_raises(lambda: unmerge(model))
        restored = _restored(trial, base, factors)
        _is_an_adapter_still(trial, model, base, restored, "output after unmerging twice")
