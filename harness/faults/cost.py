"""Adapters that are right and cost too much: copies kept, ΔW made whole, work that is not needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_branches, with_layer
from harness.faults.record import fault

if TYPE_CHECKING:
    from harness.adapter import Adapter


class KeepsTheBase(Adapted):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.spare = [p.detach().clone() for p in base.parameters()]


@fault(
    sin="Injection keeps a copy of every weight it adapts, for an unmerge that does not need it.",
    killed_by="cost/inject-allocates-little",
    replays=("140",),
    varies="the base is larger than the adapter",
)
def injection_copies_the_base() -> Adapter:
    return with_layer(KeepsTheBase)


class WholeDelta(Branch):
    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = functional.linear(self.drop(x), self.delta(base))
        return y if self.lora_bias is None else y + self.scaling * self.lora_bias


@fault(
    sin="The forward multiplies B by A first, an in × out product at every step.",
    killed_by="cost/no-full-delta-in-forward",
    replays=("135",),
    varies="in × out is larger than tokens × (in + out)",
)
def forward_makes_delta_whole() -> Adapter:
    return with_branches({nn.Linear: WholeDelta})


class RunsOn(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.kept and self.enabled:
            for branch in self.branches:
                branch(self.base, x)
        return y


@fault(
    sin="While merged the branch still runs, and what it gives is thrown away.",
    killed_by="cost/merged-costs-what-the-base-costs",
    replays=("145",),
    varies="the operations of a merged forward",
)
def merged_branch_still_runs() -> Adapter:
    return with_layer(RunsOn)


class Hoards(Adapted):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.hoard: list[Tensor] = []

    def merge(self, merged: nn.Module) -> None:
        self.hoard = [p.detach().clone() for p in merged.parameters()]
        super().merge(merged)


@fault(
    sin="A merge keeps a copy of the merged weights that no unmerge lets go.",
    killed_by="cost/merge-in-place",
    replays=("140",),
    varies="memory after a cycle of merge and unmerge",
)
def merge_leaves_copies() -> Adapter:
    return with_layer(Hoards)


class InDouble(Branch):
    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        down = functional.linear(self.drop(x).double(), self.lora_A.double())
        up = functional.linear(down, self.lora_B.double())
        if self.lora_bias is not None:
            up = up + self.lora_bias.double()
        return (self.scaling * up).to(self.lora_A.dtype)


@fault(
    sin="The branch computes in float64 on a float32 base.",
    killed_by="cost/no-needless-upcast",
    replays=("134",),
    varies="the dtype of what a forward makes",
)
def branch_computes_in_double() -> Adapter:
    return with_branches({nn.Linear: InDouble})


class Drags(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        state: dict[str, Any] = super().state_dict(model)
        for tensor in state.values():
            # torch.save writes what hangs on a tensor along with it
            tensor.average = torch.zeros(16, *tensor.shape)
        return state


@fault(
    sin="A running average hangs on each tensor of the checkpoint, and torch.save writes it along.",
    killed_by="cost/checkpoint-size",
    replays=("P-17",),
    varies="the size of the file",
)
def checkpoint_drags_averages() -> Adapter:
    return Drags()


class Remembers(Adapted):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen.append(x.detach().clone())
        return super().forward(x)


@fault(
    sin="Every training forward keeps its input for good.",
    killed_by="cost/step-memory",
    replays=("141",),
    varies="memory from step to step",
)
def training_keeps_every_input() -> Adapter:
    return with_layer(Remembers)


class NeedsAGradient(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        frozen = not any(p.requires_grad for p in self.parameters())
        if frozen and torch.is_grad_enabled() and x.is_floating_point() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return super().forward(x)


@fault(
    sin="With everything frozen the input is made to need a gradient, so that inference keeps a graph.",
    killed_by="cost/inference-keeps-no-graph",
    replays=("142",),
    varies="a forward outside no_grad with nothing to train",
)
def inference_keeps_a_graph() -> Adapter:
    return with_layer(NeedsAGradient)
