"""Adapters that go wrong on a base in four bits, and there alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from harness.adapters.equation import Branch
from harness.adapters.quantized import is_quantized
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.training import linear
from harness.faults.wrong import after_injection, layer, wrong

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import Adapter


@fault(
    sin="Preparing the quantised base after injection freezes the factors too.",
    killed_by="quantized/only-lora",
    replays=("105",),
    varies="a 4-bit base",
)
def preparing_freezes_the_factors() -> Adapter:
    def act(adapter: Any, model: nn.Module) -> None:
        if any(is_quantized(one.original) for one in adapter.layers(model).values()):
            model.requires_grad_(False)

    return after_injection(act)


@fault(
    sin="The branch's input is cast to the storage dtype of the weight.",
    killed_by="quantized/forward-equals-dequantised-oracle",
    replays=("125",),
    varies="a 4-bit base",
)
def input_is_cast_to_the_storage_dtype() -> Adapter:
    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        stored = x.to(base.weight.dtype).to(x.dtype) if is_quantized(base) else x
        return Branch.forward(self, base, stored)

    return wrong(branches=linear(forward=forward))


@fault(
    sin="Each training call quantises the base again, with scales a little smaller.",
    killed_by="quantized/base-bits-unchanged",
    varies="a 4-bit base, training",
)
def training_quantises_the_base_again() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        base = self.original
        if self.training and torch.is_grad_enabled() and is_quantized(base):
            base.weight.quant_state.absmax.mul_(0.999)
        return Adapted.forward(self, x)

    return wrong(layer=layer(forward=forward))


@fault(
    sin="Merging into a quantised base adds twice the update.",
    killed_by="quantized/merge-error-bounded",
    replays=("28",),
    varies="a 4-bit base, merging",
)
def merges_twice_the_update_into_four_bits() -> Adapter:
    def delta(self: Any, base: Any) -> Tensor:
        return Branch.delta(self, base) * (2 if is_quantized(base) else 1)

    return wrong(branches=linear(delta=delta))
