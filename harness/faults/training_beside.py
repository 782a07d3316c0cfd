"""Adapters that are wrong under a setting, or about what trains beside A and B."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.adapter import matches
from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted, Whole
from harness.faults.record import fault
from harness.faults.training import linear
from harness.faults.wrong import layer, named, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter, LoraConfig

SETTINGS = "forward/gradients-under-settings"
BESIDE = "training/update-beside-factors"


class ForgetsRsloraBackward(Branch):
    def __init__(self, base: nn.Module, config: LoraConfig, rows: slice | None = None) -> None:
        super().__init__(base, config, rows)
        self.backward_scaling = config.lora_alpha / config.r

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = super().forward(base, x)
        k = self.backward_scaling / self.scaling
        return y if k == 1 else y.detach() + k * (y - y.detach())


@fault(
    sin="The backward pass goes by alpha/r, rsLoRA or not.",
    killed_by=SETTINGS,
    replays=("19", "112"),
    varies="a backward pass under rsLoRA",
)
def goes_back_by_alpha_over_r() -> Adapter:
    return wrong(branches={**Reference.branches, nn.Linear: ForgetsRsloraBackward})


def _with_bias(change: Any) -> Adapter:
    """A reference whose linear branches add `change(branch, bias)` in the bias's place."""

    def up(self: Any, base: Any, x: Tensor) -> Tensor:  # noqa: ARG001
        bias = self.lora_bias
        return functional.linear(x, self.lora_B, None if bias is None else change(self, bias))

    return wrong(branches=linear(up=up))


@fault(
    sin="The bias on B gets no gradient.",
    killed_by=SETTINGS,
    varies="a backward pass under lora_bias",
)
def bias_on_b_is_detached() -> Adapter:
    return _with_bias(lambda _, bias: bias.detach())


@fault(
    sin="The gradient of the bias on B leaves out the scaling.",
    killed_by=SETTINGS,
    replays=("112",),
    varies="a backward pass under lora_bias",
)
def gradient_of_the_bias_without_scaling() -> Adapter:
    return _with_bias(lambda branch, bias: bias.detach() + (bias - bias.detach()) / branch.scaling)


@fault(
    sin="A fused backward pass gives the base's bias no gradient, though it trains.",
    killed_by=BESIDE,
    replays=("43",),
    varies="bias other than none, trained",
)
def a_training_bias_gets_no_gradient() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = Adapted.forward(self, x)
        bias = self.base.bias if isinstance(self.base, nn.Linear) else None
        if bias is None or not bias.requires_grad or not torch.is_grad_enabled():
            return y
        return y - (bias - bias.detach())

    return wrong(layer=layer(forward=forward))


@fault(
    sin="A linear module that is trained whole gets half its gradient.",
    killed_by=BESIDE,
    replays=("109",),
    varies="modules_to_save, trained",
)
def a_saved_module_gets_half_its_gradient() -> Adapter:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        acting = self.acting
        if not isinstance(acting, nn.Linear):
            return acting(*args, **kwargs)
        weight = (acting.weight + acting.weight.detach()) / 2
        return functional.linear(args[0], weight, acting.bias)

    return wrong(whole=named(Whole, {"forward": forward}))


@fault(
    sin="A name in modules_to_save that matches nothing is passed over.",
    killed_by="targeting/unmatched-saved-module-is-loud",
    replays=("86",),
    varies="a misspelt name in modules_to_save",
)
def passes_over_absent_modules_to_save() -> Adapter:
    def whole_modules(self: Any, model: nn.Module, config: LoraConfig, targets: Any) -> list[str]:
        paths = [path for path, _ in model.named_modules()]
        there = tuple(
            name for name in config.modules_to_save if any(matches(path, name) for path in paths)
        )
        return Reference.whole_modules(self, model, replace(config, modules_to_save=there), targets)

    return wrong(whole_modules=whole_modules)
