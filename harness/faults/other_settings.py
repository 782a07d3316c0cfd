"""Adapters that forgot a setting in one call: the bias on B, or those of a second adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_layer
from harness.faults.record import fault
from harness.faults.training import linear
from harness.faults.wrong import answering, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter, LoraConfig
    from harness.adapters.equation import Branch


def biased(adapted: Adapted) -> list[Branch]:
    """The acting branches of a plain linear layer that have a bias on B."""
    return [b for b in adapted.branches if b.lora_bias is not None and b.rows is None]


def _answering(wrongs: Any) -> Adapter:
    """A reference whose layers answer with the bias on B once more where `wrongs(layer)`."""

    def act(layer: Adapted, _: Tensor, y: Tensor) -> Tensor:
        linear_layer = isinstance(layer.original, nn.Linear)
        for branch in biased(layer) if linear_layer and wrongs(layer) else ():
            assert branch.lora_bias is not None
            y = layer.add(y, branch.scaling * branch.lora_bias, None)
        return y

    return answering(act)


@fault(
    sin="`disable` takes B·A out and leaves the bias on B.",
    killed_by="several/disabled-equals-base",
    varies="lora_bias, disabled",
)
def disable_leaves_the_bias_on_b() -> Adapter:
    return _answering(lambda layer: not layer.enabled and not layer.kept)


@fault(
    sin="Disabled while merged, the bias on B goes on acting.",
    killed_by="merge/disabled-while-merged",
    varies="lora_bias, disabled while merged",
)
def disabling_a_merged_layer_leaves_the_bias_on_b() -> Adapter:
    return _answering(lambda layer: not layer.enabled and bool(layer.kept))


class WidensByBias(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for branch in biased(self) if self.enabled and not self.kept else ():
            assert branch.lora_bias is not None
            y = y.to(torch.promote_types(y.dtype, branch.lora_bias.dtype))
        return y


@fault(
    sin="The bias on B is added in its own dtype, which the output then has.",
    killed_by="forward/output-dtype",
    replays=("126",),
    varies="lora_bias on a bfloat16 base",
)
def bias_on_b_widens_the_output() -> Adapter:
    return with_layer(WidensByBias)


@fault(
    sin="The checkpoint leaves out the bias on B of convolutions and of all parts but the first.",
    killed_by="checkpoint/complete",
    replays=("43",),
    varies="lora_bias on a fused projection",
)
def saves_no_bias_of_parts() -> Adapter:
    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        left_out = {
            id(branch.lora_bias)
            for adapted in self.layers(model).values()
            for number, branch in enumerate(adapted.branches)
            if number or isinstance(adapted.original, nn.Conv2d)
        }
        return {
            key: tensor.detach()
            for key, tensor in self.trained(model).items()
            if id(tensor) not in left_out
        }

    return wrong(state_dict=state_dict)


class MergesBiasAgain(Reference):
    def merge(self, model: nn.Module) -> None:
        again = [layer for layer in self.layers(model).values() if layer.kept]
        super().merge(model)
        for layer in again:
            base: Any = layer.base
            for branch in biased(layer):
                bias = layer.merge_bias(base.weight, base.bias, branch.bias_delta(), None)
                assert bias is not None
                base.bias = nn.Parameter(bias.detach(), requires_grad=False)


@fault(
    sin="Merging what is merged adds the bias on B again.",
    killed_by="merge/idempotent",
    replays=("1",),
    varies="lora_bias, merged twice",
)
def merging_twice_adds_the_bias_again() -> Adapter:
    return MergesBiasAgain()


class KeepsFirstBias(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.enabled or self.kept or self.active == "default":
            return y
        for branch in self.of("default"):
            if branch.lora_bias is not None and isinstance(self.base, nn.Linear):
                y = self.add(y, branch.scaling * branch.lora_bias, branch.rows)
        return y


@fault(
    sin="The bias on B of the first adapter goes on acting under a second.",
    killed_by="several/other-settings",
    varies="lora_bias of the first of two adapters",
)
def the_firsts_bias_goes_on_acting() -> Adapter:
    return with_layer(KeepsFirstBias)


@fault(
    sin="A second adapter's bias on B is added without its scaling.",
    killed_by="several/other-settings",
    varies="lora_bias of the second of two adapters",
)
def the_seconds_bias_is_not_scaled() -> Adapter:
    def up(self: Any, base: Any, x: Tensor) -> Tensor:  # noqa: ARG001
        bias = self.lora_bias
        if bias is not None and self.is_second:
            bias = bias / self.scaling
        return functional.linear(x, self.lora_B, bias)

    return wrong(branches=linear(up=up), make_branches=_marks_the_second)


def _marks_the_second(
    self: Any, path: str, base: nn.Module, adapter: str, config: LoraConfig
) -> list[Branch]:
    made = Reference.make_branches(self, path, base, adapter, config)
    for branch in made:
        branch.is_second = adapter != "default"  # type: ignore[assignment]
    return made


@fault(
    sin="A second adapter's convolution and parts have no dropout.",
    killed_by="several/dropout-of-its-own",
    replays=("117",),
    varies="dropout of a second adapter on a convolution",
)
def a_second_convolution_drops_nothing() -> Adapter:
    def make_branches(
        self: Any, path: str, base: nn.Module, adapter: str, config: LoraConfig
    ) -> list[Branch]:
        made = Reference.make_branches(self, path, base, adapter, config)
        for branch in made if adapter != "default" else ():
            if branch.rows is not None or isinstance(base, nn.Conv2d):
                branch.dropout = None
        return made

    return wrong(make_branches=make_branches)


class MergesByFirst(Adapted):
    def merged(self) -> nn.Module:
        own = [branch.scaling for branch in self.branches]
        for branch, first in zip(self.branches, self.of("default"), strict=False):
            branch.scaling = first.scaling
        try:
            return super().merged()
        finally:
            for branch, scaling in zip(self.branches, own, strict=True):
                branch.scaling = scaling


@fault(
    sin="Merging goes by the first adapter's scaling, whichever acts.",
    killed_by="several/merges-the-active",
    replays=("23",),
    varies="a second adapter of another alpha, merged",
)
def merges_by_the_firsts_scaling() -> Adapter:
    return with_layer(MergesByFirst)


class GoesBackByFirst(Adapted):
    def add(self, y: Tensor, update: Tensor, rows: slice | None) -> Tensor:
        first = self.of("default")
        k = first[0].scaling / self.branches[0].scaling if first else 1.0
        return super().add(y, update.detach() + k * (update - update.detach()), rows)


@fault(
    sin="The backward pass goes by the first adapter's scaling, whichever acts.",
    killed_by="several/gradients-of-the-active",
    replays=("112",),
    varies="a second adapter of another alpha, trained",
)
def goes_back_by_the_firsts_scaling() -> Adapter:
    return with_layer(GoesBackByFirst)


class HalvesAfterACycle(Adapted):
    cycled = False

    def unmerge(self) -> None:
        self.cycled = self.cycled or bool(self.kept)
        super().unmerge()

    def add(self, y: Tensor, update: Tensor, rows: slice | None) -> Tensor:
        if self.cycled:
            update = (update + update.detach()) / 2
        return super().add(y, update, rows)


@fault(
    sin="Once merged and unmerged, the branch gets half its gradient.",
    killed_by="merge/gradients-after-a-cycle",
    varies="training after merging and unmerging",
)
def a_cycle_halves_the_gradients() -> Adapter:
    return with_layer(HalvesAfterACycle)
