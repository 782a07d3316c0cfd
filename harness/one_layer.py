"""A layer that merges, looked at through its outputs.

On one-hot inputs a layer without a bias answers with the entries of its weight, with no rounding: so
the weight in effect is read off a layer whose weight may lie anywhere. Where the implementation offers
`base_weight`, that is read as well while nothing is merged.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from harness.failure import fail

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.oracle import Snapshot
    from harness.trial import Trial


def unbiased(trial: Trial) -> nn.Module:
    """The base with its bias set to zero, so that a one-hot input shows an entry of W as it is."""
    base = trial.base()
    proj: Any = base.proj
    if getattr(proj, "bias", None) is not None:
        proj.bias.detach().zero_()
    return base


def adapted(trial: Trial) -> nn.Module | None:
    """That base with a fresh adapter; None, and noted, where parts of unequal size are refused.

    As in forward/fused-parts: who cuts the rows equally may say so.
    """
    try:
        return trial.inject(unbiased(trial))
    except (NotImplementedError, ValueError) as refusal:
        if trial.case.specimen != "fused-unequal":
            raise
        trial.notes.append(f"parts of unequal size are refused: {refusal}")
        return None


def weight_of(base: nn.Module) -> Tensor:
    """W of the one layer, float64."""
    proj: Any = base.proj
    doubled: Tensor = proj.weight.detach().cpu().double()
    return doubled


def basis(trial: Trial) -> Tensor:
    """Every one-hot input of the one layer: indices, vectors or images."""
    import torch

    if trial.case.specimen == "embedding":
        return torch.arange(weight_of(trial.base()).shape[0], device=trial.case.device)
    one = trial.inputs()
    shape = one.shape[1:] if trial.case.specimen in {"conv2d", "grouped"} else one.shape[-1:]
    eye = torch.eye(shape.numel(), dtype=trial.dtype, device=trial.case.device)
    return eye.view(-1, *shape)


def spread(base: nn.Module, weight: Tensor, given: Tensor) -> Tensor:
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


def delta(base: nn.Module, factors: Snapshot) -> tuple[Tensor, Tensor]:
    """ΔW of the one layer, and the magnitude its roundings scale with."""
    from harness import oracle

    proj: Any = base.proj
    return oracle.delta(proj, factors["proj"]), oracle.delta(proj, factors["proj"], absolute=True)


def check_weight(
    trial: Trial,
    model: nn.Module,
    base: nn.Module,
    *,
    W: Tensor,
    budget: Tensor,
    what: str,
    merged: bool = False,
) -> None:
    """The weight in effect is W within the budget: by function and, unmerged, through `base_weight`.

    While merged `base_weight` is not asked: it is the frozen weight, and may be that before merging.
    """
    shown = basis(trial)
    if shown.is_floating_point():
        added = trial.call(model, shown[:1] * 0)
        trial.close(
            added,
            added.new_zeros(added.shape),
            0.0,
            f"bias beside the {what}, seen in the output of zeros,",
        )
    found = trial.call(model, shown)
    trial.close(found, spread(base, W, shown), spread(base, budget, shown), what)
    read = getattr(trial.adapter, "base_weight", None)
    if read is not None and not merged:
        held = read(model, "proj")
        if held.dtype != trial.dtype:
            fail(
                "dtype",
                expected=f"the weight stays {trial.dtype}",
                actual=str(held.dtype),
                where="proj",
            )
        trial.close(held, W, budget, f"{what}, as base_weight gives it")


def rank(factors: Snapshot) -> int:
    """The largest of the factors' ranks."""
    return int(max(f.A.shape[0] for parts in factors.values() for f in parts))


def restored(trial: Trial, base: nn.Module, factors: Snapshot, cycles: int = 1) -> Tensor:
    """The budget of the one layer's weight after cycles."""
    from harness import tolerance

    return tolerance.restored(
        weight_of(base),
        delta(base, factors)[1],
        r=rank(factors),
        dtype=trial.dtype,
        factor_dtype=trial.factor_dtype,
        cycles=cycles,
    )


def silence(trial: Trial, model: nn.Module) -> None:
    """ΔW = 0, so that the outputs are the base's: B zero, and the bias on it."""
    import torch

    with torch.no_grad():
        for parts in trial.factors(model).values():
            for f in parts:
                f.B.zero_()
                if f.bias is not None:
                    f.bias.zero_()


def unmerge(trial: Trial, model: nn.Module) -> None:
    """Unmerged, whether a call before has seen to it, and the adapter says so, or not."""
    with contextlib.suppress(Exception):
        trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # whoever asks has seen it claimed


def gives_back_the_base(trial: Trial, model: nn.Module, budget: Tensor, what: str) -> None:
    """Unmerged and without ΔW, a model of any layers answers as its base does."""
    trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # whoever asks has seen it claimed
    silence(trial, model)
    given = trial.inputs()
    trial.close(trial.call(model, given), trial.truth(trial.base(), {}, given), budget, what)


def acts(
    trial: Trial,
    model: nn.Module,
    base: nn.Module,
    *,
    factors: Snapshot,
    restored: Tensor,
    what: str,
) -> None:
    """The outputs are those of the base with these factors, less what rounding moved W by."""
    given = trial.inputs()
    far = given.abs() if given.is_floating_point() else given
    budget = trial.budget(base, factors, given) + spread(base, restored, far)
    trial.close(trial.call(model, given), trial.truth(base, factors, given), budget, what)
