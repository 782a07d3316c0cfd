"""Adapters that merge wrongly: the wrong ΔW, into the wrong place, at the wrong time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.quantized import with_weight
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.adapter import Adapter, LoraConfig

SAME = "merge/same-output"


def with_layer(layer: type[Adapted]) -> Reference:
    """The reference with another wrapper of layers."""
    made = Reference()
    made.layer = layer
    return made


def with_branches(branches: Mapping[type[nn.Module], type[Branch]]) -> Reference:
    """The reference with other branches."""
    made = Reference()
    made.branches = {**Reference.branches, **branches}  # type: ignore[misc]  # of this object alone
    return made


class InPlace(Adapted):
    """Correct but for tied weights: it writes W + ΔW into the base's own tensor, and W back again."""

    def merge(self, merged: nn.Module) -> None:
        """Write; what is kept is a copy."""
        self.kept = [_twin(self.base)]
        _write(self.base, merged)

    def unmerge(self) -> None:
        """Write back."""
        if self.kept:
            _write(self.base, self.kept.pop())


def _twin(base: Any) -> nn.Module:
    return with_weight(
        base, base.weight.detach().clone(), base.bias if hasattr(base, "bias") else None
    )


def _write(base: Any, source: Any) -> None:
    with torch.no_grad():
        base.weight.copy_(source.weight)
    if "bias" in base._parameters:
        base.bias = source.bias


# -- the wrong update ------------------------------------------------------------------------------


class WithoutRslora(Branch):
    def __init__(self, base: nn.Module, config: LoraConfig, rows: slice | None = None) -> None:
        super().__init__(base, config, rows)
        self.merged_scaling = config.lora_alpha / config.r

    def delta(self, base: Any) -> Tensor:
        return super().delta(base) / self.scaling * self.merged_scaling


@fault(
    sin="Merging folds alpha/r in, rsLoRA or not.",
    killed_by=SAME,
    replays=("19",),
    varies="rsLoRA",
)
def merges_without_rslora() -> Adapter:
    return with_branches({nn.Linear: WithoutRslora})


class ScalesTwice(Branch):
    def delta(self, base: Any) -> Tensor:
        return self.scaling * super().delta(base)


@fault(
    sin="Merging multiplies by the scaling, although the forward pass has done so to B.",
    killed_by=SAME,
    replays=("P-1",),
    varies="alpha is not r",
)
def scale_applied_twice_on_merge() -> Adapter:
    return with_branches({nn.Linear: ScalesTwice})


class IgnoresScaling(Branch):
    def delta(self, base: Any) -> Tensor:
        return self.lora_B @ self.lora_A


@fault(
    sin="Merging folds B·A without its scaling.",
    killed_by=SAME,
    replays=("21",),
    varies="alpha is not r",
)
def merge_ignores_scaling() -> Adapter:
    return with_branches({nn.Linear: IgnoresScaling})


class Untransposed(EmbeddingBranch):
    def delta(self, base: Any) -> Tensor:
        right = super().delta(base)
        return right.T if right.shape[0] == right.shape[1] else right


@fault(
    sin="An embedding's ΔW is merged as B·A, not transposed: silent where the table is square.",
    killed_by=SAME,
    replays=("3", "4"),
    varies="a square embedding",
)
def merges_an_embedding_untransposed() -> Adapter:
    return with_branches({nn.Embedding: Untransposed})


class RowsScattered(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        return super().merge_weight(weight, delta if rows is None else delta.flip(0), rows)


@fault(
    sin="The rows of a part are scattered in another order than they have.",
    killed_by=SAME,
    replays=("5", "6"),
    varies="a fused projection",
)
def scatters_the_rows_of_a_part() -> Adapter:
    return with_layer(RowsScattered)


class PartsDivided(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        return super().merge_weight(weight, delta / len(self.branches), rows)


@fault(
    sin="Parts are fused into one adapter of a higher rank with the alpha of one: each is divided.",
    killed_by=SAME,
    replays=("23",),
    varies="a fused projection with several parts",
)
def divides_each_part_by_their_number() -> Adapter:
    return with_layer(PartsDivided)


class OtherGroup(ConvBranch):
    def delta(self, base: Any) -> Tensor:
        return super().delta(base).roll(base.out_channels // base.groups, 0)


@fault(
    sin="A grouped convolution's ΔW is merged into the channels of the next group.",
    killed_by=SAME,
    replays=("32",),
    varies="a convolution of two groups",
)
def ignores_groups_when_merging() -> Adapter:
    return with_branches({nn.Conv2d: OtherGroup})


class SkipsOtherDtypes(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        return super().merge_weight(weight, delta, rows) if weight.dtype == delta.dtype else weight


@fault(
    sin="A base whose dtype is not that of the factors is left out of the merge.",
    killed_by=SAME,
    replays=("11",),
    varies="a bfloat16 base under float32 factors",
)
def skips_the_merge_where_dtypes_differ() -> Adapter:
    return with_layer(SkipsOtherDtypes)


class HalfPrecision(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        half = super().merge_weight(weight.bfloat16(), delta.bfloat16(), rows)
        return half.to(weight.dtype)


@fault(
    sin="Merging happens in bfloat16, whatever the dtype of the base.",
    killed_by=SAME,
    replays=("12",),
    varies="a float32 base",
)
def merges_in_half_precision() -> Adapter:
    return with_layer(HalfPrecision)


class OtherCopy(Adapted):
    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        return super().merge_weight(weight.to(torch.float16).to(weight.dtype), delta, rows)


@fault(
    sin="ΔW is merged into another copy of the base, which is the same to three digits.",
    killed_by=SAME,
    replays=("28",),
    varies="a base that float16 cannot hold",
)
def merges_into_another_copy_of_the_base() -> Adapter:
    return with_layer(OtherCopy)


class Never(Adapted):
    def merge(self, merged: nn.Module) -> None:
        self.kept = [self.base]


@fault(
    sin="The merged weight is written to a copy, and the layer in use has no adapter any more.",
    killed_by=SAME,
    replays=("25", "31"),
    varies="factors that matter",
)
def drops_the_adapter_unmerged() -> Adapter:
    return with_layer(Never)


class Forgets(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        for branch in self.branches if self.kept and self.enabled else ():
            y = self.add(y, branch(self.base, x), branch.rows)
        return y


@fault(
    sin="The forward pass adds the branch although it is merged.",
    killed_by=SAME,
    replays=("26",),
    varies="factors that matter",
)
def forward_forgets_that_it_is_merged() -> Adapter:
    return with_layer(Forgets)


class Thinned(Branch):
    def delta(self, base: Any) -> Tensor:
        p = self.dropout.p if self.training and self.dropout is not None else 0.0
        return (1 - p) * super().delta(base)


@fault(
    sin="In train mode a merge folds in what dropout leaves of the update.",
    killed_by=SAME,
    varies="merging in train mode, with dropout",
)
def merges_what_dropout_leaves() -> Adapter:
    return with_branches({nn.Linear: Thinned})
