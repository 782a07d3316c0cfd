"""Adapters whose merged model trains the base, or answers otherwise in train mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_layer
from harness.faults.record import fault

if TYPE_CHECKING:
    from harness.adapter import Adapter


class NewParameter(Adapted):
    def merge(self, merged: nn.Module) -> None:
        merged.weight = nn.Parameter(merged.weight)  # type: ignore[arg-type]  # it is a tensor
        super().merge(merged)


@fault(
    sin="The merged weight is a new parameter, which trains, as parameters do unless they are told.",
    killed_by="merge/base-stays-frozen",
    varies="what trains once it is merged",
)
def merges_into_a_parameter_that_trains() -> Adapter:
    return with_layer(NewParameter)


class DropsMerged(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        if self.kept and self.enabled and isinstance(self.base, nn.Conv2d):
            for p in {branch.dropout.p for branch in self.branches if branch.dropout is not None}:
                x = functional.dropout(x, p, self.training)
        return super().forward(x)


@fault(
    sin="Merged, in train mode, dropout falls on the input of the whole convolution.",
    killed_by="merge/train-mode",
    replays=("P-11",),
    varies="train mode while merged, with dropout",
)
def drops_inputs_of_the_merged_weight() -> Adapter:
    return with_layer(DropsMerged)


class TrainsBeside(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for branch in self.branches if self.kept and self.enabled and self.training else ():
            y = self.add(y, branch(self.base, x), branch.rows)
        return y


@fault(
    sin="In train mode the branch acts, merged or not.",
    killed_by="merge/same-output",
    replays=("26",),
    varies="train mode while merged",
)
def adds_the_merged_branch_in_train_mode() -> Adapter:
    return with_layer(TrainsBeside)
