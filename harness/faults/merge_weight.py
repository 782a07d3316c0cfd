"""Adapters that merge wrongly where few outputs tell: it is seen in the weight, entry by entry."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_branches, with_layer
from harness.faults.record import fault

if TYPE_CHECKING:
    from harness.adapter import Adapter

WEIGHT = "merge/weight-equals-oracle"
OVERFLOW = "merge/overflow-on-the-way"


class MergesNothing(Reference):
    def merge(self, model: nn.Module) -> None:
        """Outputs stay right, but where the branch drops out: it goes on."""


@fault(
    sin="Merging is dead code: nothing is folded, and the branch goes on acting.",
    killed_by="merge/same-output",
    replays=("2",),
    varies="a merged call in train mode with dropout",
)
def merge_is_dead_code() -> Adapter:
    return MergesNothing()


class WithoutDropout(MergesNothing):
    capabilities = replace(
        Reference.capabilities, features=Reference.capabilities.features - {"dropout"}
    )


@fault(
    sin="Merging is dead code, and there is no dropout to tell.",
    killed_by="merge/same-output",
    replays=("2",),
    varies="the gradient of a merged call",
)
def merge_is_dead_code_without_dropout() -> Adapter:
    return WithoutDropout()


class ModesMergeNothing(Reference):
    eval_merges = True

    def merge(self, model: nn.Module) -> None:
        """In eval mode dropout is off: no output tells."""
        model.eval()

    def unmerge(self, model: nn.Module) -> None:
        model.train()


@fault(
    sin="`eval()` is said to merge, and does not: the branch goes on acting.",
    killed_by="merge/same-output",
    replays=("2",),
    varies="the gradient of a merged call",
)
def eval_merges_nothing() -> Adapter:
    return ModesMergeNothing()


class EqualParts(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        if rows is not None:
            part = len(weight) // 3
            start = rows.start // part * part
            rows = slice(start, start + len(delta))
        return super().merge_weight(weight, delta, rows)


@fault(
    sin="A part is taken to begin at a third or two of the rows, as if q, k and v were equal.",
    killed_by=WEIGHT,
    replays=("7", "8"),
    varies="a grouped-query projection",
)
def merges_parts_as_if_they_were_equal() -> Adapter:
    return with_layer(EqualParts)


class WithoutK(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        k = len(self.branches) == 3 and rows == self.branches[1].rows
        return weight if k else super().merge_weight(weight, delta, rows)


@fault(
    sin="Of q, k and v the middle one is left out of the merge.",
    killed_by=WEIGHT,
    varies="a fused projection of which every part is adapted",
)
def merges_q_and_v_alone() -> Adapter:
    return with_layer(WithoutK)


class Truncates(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        total = weight.to(torch.promote_types(weight.dtype, delta.dtype), copy=True)
        total[rows or slice(None)] += delta
        near = total.to(weight.dtype)
        far = near.to(total.dtype).abs() > total.abs()
        return torch.where(far, torch.nextafter(near, torch.zeros_like(near)), near)


@fault(
    sin="The sum is cut to the base's dtype, not rounded: small updates never round up.",
    killed_by=WEIGHT,
    replays=("12",),
    varies="half precision, and an update near its last place",
)
def truncates_when_merging() -> Adapter:
    return with_layer(Truncates)


class Saturates(Branch):
    def delta(self, base: Any) -> Tensor:
        top = torch.finfo(torch.float16).max
        return self.scaling * (self.lora_B @ self.lora_A).clamp(-top, top)


@fault(
    sin="What of B·A does not fit float16 is cut to its largest number, before it is scaled.",
    killed_by=OVERFLOW,
    varies="factors whose product overflows before it is scaled",
)
def cuts_off_what_overflows() -> Adapter:
    return with_branches({nn.Linear: Saturates})


class ScalesFirst(Branch):
    def delta(self, base: Any) -> Tensor:
        top = torch.finfo(torch.float16).max
        return (self.scaling * self.lora_B).clamp(-top, top) @ self.lora_A


@fault(
    sin="B is scaled first, and what of it does not fit float16 is cut to its largest number.",
    killed_by=OVERFLOW,
    varies="a scaling of some thousands",
)
def cuts_off_what_overflows_when_scaled() -> Adapter:
    return with_branches({nn.Linear: ScalesFirst})


class Downcasts(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            weight = weight.to(torch.get_autocast_dtype("cpu")).to(weight.dtype)
        return super().merge_weight(weight, delta, rows)


@fault(
    sin="Merging under autocast rounds W to autocast's dtype.",
    killed_by=WEIGHT,
    replays=("P-16",),
    varies="a merge under autocast",
)
def merge_under_autocast_downcasts_the_weight() -> Adapter:
    return with_layer(Downcasts)
