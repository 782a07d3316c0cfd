"""A layer's weight as numbers, whole or quantised by bitsandbytes, and a like layer with others.

A quantised layer is merged into a dense one, so that merging costs no second rounding; the quantised
layer itself is kept beside it, and comes back when unmerged.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Dense(nn.Linear):
    """A `nn.Linear` in a quantised one's place: it takes any float, and answers in that."""

    def forward(self, x: Tensor) -> Tensor:
        """X Wᵀ + bias, computed in the weight's dtype."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def is_quantized(base: Any) -> bool:
    """Whether bitsandbytes holds the weight in 4 or 8 bits."""
    return type(base.weight).__name__ in {"Params4bit", "Int8Params"}


def dense(base: Any) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias, as numbers; of a quantised one in float32."""
    bias: Tensor | None = getattr(base, "bias", None)
    if not is_quantized(base):
        return base.weight.detach(), bias
    from bitsandbytes import functional

    if type(base.weight).__name__ == "Params4bit":
        weight = functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    else:
        # The first forward moves both from the weight to the layer's state.
        rows, scales = (
            getattr(base.state, name)
            if getattr(base.weight, name, None) is None
            else getattr(base.weight, name)
            for name in ("CB", "SCB")
        )
        weight = functional.int8_vectorwise_dequant(rows, scales)
    return weight.float(), None if bias is None else bias.float()


def with_weight(base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer like `base` with another weight, and its very bias where that is not another."""
    if is_quantized(base):
        module: Any = Dense(base.in_features, base.out_features, device="meta")
        module.bias = None
    else:
        module = copy.copy(base)
        module._parameters = dict(base._parameters)  # noqa: SLF001  # a shallow copy shares it
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not getattr(module, "bias", None):
        module.bias = nn.Parameter(torch.as_tensor(bias).detach(), requires_grad=False)
    module.train(base.training)
    return module  # type: ignore[no-any-return]
