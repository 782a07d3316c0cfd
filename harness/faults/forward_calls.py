"""Adapters whose calls write to the base, that remember a dtype, add in place, or lose an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from harness.adapters.equation import Branch
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_branches, with_layer
from harness.faults.record import fault
from harness.faults.wrong import after_injection

if TYPE_CHECKING:
    from harness.adapter import Adapter, LoraConfig


class AddsAndSubtracts(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches if self.enabled and not self.kept else ():
            weight: Tensor = self.weight.data
            shift = (branch.lora_B.abs().mean() * branch.lora_A[0]).detach()  # (i,)
            if shift.shape == weight.shape[1:] and weight.is_floating_point():
                weight.add_(shift).sub_(shift)
        return super().forward(x)


@fault(
    sin="Each call adds an update to the base's weight and takes it out again, and so rounds it.",
    killed_by="forward/base-unchanged",
    varies="the bits of the base after a call",
)
def calls_round_the_base() -> Adapter:
    return with_layer(AddsAndSubtracts)


class Notes(Branch):
    def __init__(self, base: nn.Module, config: LoraConfig, rows: slice | None = None) -> None:
        super().__init__(base, config, rows)
        self.noted = self.lora_A.dtype

    def drop(self, x: Tensor) -> Tensor:
        return super().drop(x).to(self.noted)


@fault(
    sin="Inputs of the branch are cast to the dtype that its factors had when they were made.",
    killed_by="forward/after-a-cast",
    varies="a cast after injection",
)
def remembers_the_first_dtype() -> Adapter:
    return with_branches({nn.Linear: Notes})


class AddsToTheBranch(Adapted):
    def add(self, y: Tensor, update: Tensor, rows: slice | None) -> Tensor:
        if rows is not None or update.dtype != y.dtype:
            return super().add(y, update, rows)
        update += y
        return update


@fault(
    sin="The base's output is added in place to what a module of the adapter's own gives.",
    killed_by="forward/backward-hooks",
    replays=("10",),
    varies="backward hooks on every module, from after injection",
)
def adds_in_place_to_its_own_output() -> Adapter:
    return with_layer(AddsToTheBranch)


@fault(
    sin="A wrapper hands on the arguments that it names, which positions are not among.",
    killed_by="forward/called-like-the-base",
    varies="a call at positions of the caller's",
)
def hands_on_what_it_names() -> Adapter:
    """Packed conversations then go on where the one before ended."""
    return after_injection(
        lambda _, model: model.register_forward_pre_hook(_without_positions, with_kwargs=True)
    )


def _without_positions(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """At the top of the module, where pickle finds it."""
    return args, {name: v for name, v in kwargs.items() if name != "position_ids"}
