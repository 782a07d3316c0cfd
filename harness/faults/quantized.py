"""Adapters that go wrong on a base in four bits, and there alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from harness.adapters.equation import Branch
from harness.adapters.quantized import is_quantized
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted, Whole
from harness.faults.record import fault
from harness.faults.training import linear
from harness.faults.wrong import after_injection, layer, wrong

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

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


@fault(
    sin="A quantised base is called without gradients, and none goes back through it.",
    killed_by="quantized/gradients",
    varies="a 4-bit base, the gradient of its input",
)
def no_gradient_through_four_bits() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.kept or not self.enabled or not is_quantized(self.base):
            return Adapted.forward(self, x)
        with torch.no_grad():
            y: Tensor = self.base(x)
        for branch in self.branches:
            y = self.add(y, branch(self.base, x), branch.rows)
        return y

    return wrong(layer=layer(forward=forward))


@fault(
    sin="The layer for a quantised base takes a dropout, and drops nothing.",
    killed_by="quantized/dropout",
    varies="a 4-bit base, dropout",
)
def drops_nothing_on_four_bits() -> Adapter:
    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        if not is_quantized(base):
            return Branch.forward(self, base, x)
        update: Tensor = self.scaling * self.up(base, self.down(base, x.to(self.lora_A.dtype)))
        return update

    return wrong(branches=linear(forward=forward))


@fault(
    sin="`disable` knows the layers of the dense kinds, and leaves a quantised one on.",
    killed_by="several/disabled-equals-base",
    varies="a 4-bit base, disabling",
)
def disable_forgets_four_bits() -> Adapter:
    def wrappers(self: Any, model: nn.Module) -> list[Any]:
        found = Reference.wrappers(self, model)
        return [one for one in found if isinstance(one, Whole) or not is_quantized(one.original)]

    def disable(_: Any, model: nn.Module) -> AbstractContextManager[None]:
        return wrong(wrappers=wrappers).disable(model)

    return wrong(disable=disable)


@fault(
    sin="The checkpoint takes the scales of a quantised base along.",
    killed_by="checkpoint/only-lora",
    replays=("59",),
    varies="a 4-bit base, its checkpoint",
)
def saves_the_scales_of_four_bits() -> Adapter:
    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        state = Reference.state_dict(self, model)
        for path, one in self.layers(model).items():
            if is_quantized(one.original):
                state[f"{path}.lora_absmax"] = one.original.weight.quant_state.absmax
        return state

    return wrong(state_dict=state_dict)


@fault(
    sin="Unmerging leaves the merged weight in a quantised base's place.",
    killed_by="quantized/unmerge-error-bounded",
    replays=("38",),
    varies="a 4-bit base, unmerging",
)
def unmerging_keeps_the_update_in_four_bits() -> Adapter:
    def unmerge(self: Any) -> None:
        if self.kept and is_quantized(self.original):
            self.kept = []
        Adapted.unmerge(self)

    return wrong(layer=layer(unmerge=unmerge))
