"""LoRA's equation, once for each kind of layer: what everything else is compared with.

    shapes   b batch   i in   o out (or a part's rows)   r rank   v vocabulary   d embedding
             c channels   g groups   h, w kernel

    linear      y += scaling · ((x Aᵀ) Bᵀ + bias)      A (r, i)          B (o, r)   ΔW = scaling · BA
    embedding   y += scaling · (Aᵀ[x]) Bᵀ              A (r, v)          B (d, r)   ΔW = scaling · (BA)ᵀ
    conv2d      y += scaling · (B ∗ (A ∗ x) + bias)    A (r, c/g·h·w)    B (o, r)   ΔW = scaling · BA, as (o, c/g, h, w)

Source: Hu et al., arXiv 2106.09685, section 4.1. The factors of a half-precision base are float32, as
bfloat16 factors lose updates below half a unit in the last place; the branch computes in the factors'
dtype and answers in the base's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from harness.adapter import LoraConfig


class Branch(nn.Module):
    """The branch of a `nn.Linear`, or of the part of one that `rows` names."""

    lora_A: nn.Parameter  # noqa: N815  # the paper's names
    lora_B: nn.Parameter  # noqa: N815
    lora_bias: nn.Parameter | None

    def __init__(self, base: nn.Module, config: LoraConfig, rows: slice | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.scaling = self.scale(config)
        self.dropout = dropout_of(config.lora_dropout)
        n_in, n_out = self.sizes(base)
        like: dict[str, Any] = {"dtype": factor_dtype(base), "device": base.weight.device}
        self.lora_A = frozen(torch.empty(config.r, n_in, **like))
        self.lora_B = frozen(torch.empty(n_out, config.r, **like))
        self.lora_bias = frozen(torch.empty(n_out, **like)) if config.lora_bias else None

    def scale(self, config: LoraConfig) -> float:
        """alpha/r, or alpha/√r under rsLoRA."""
        return config.scaling

    def sizes(self, base: Any) -> tuple[int, int]:
        """How many columns `A` has and how many rows `B` has."""
        rows = self.rows
        return base.in_features, rows.stop - rows.start if rows else base.out_features

    def initialize(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform with a = √5, that is U(-1/√i, 1/√i); B and the bias zero."""
        fill_uniform(self.lora_A, 1 / math.sqrt(self.lora_A.shape[1]), generator)
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """What is added to the base's output."""
        return self.scaling * self.up(base, self.down(base, self.drop(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, on the branch alone."""
        x = x.to(self.lora_A.dtype)
        return x if self.dropout is None else self.mask(x, self.dropout.p)

    def mask(self, x: Tensor, p: float) -> Tensor:
        """In train mode zeros with probability p, and the others divided by 1 - p."""
        return functional.dropout(x, p, self.training)

    def down(self, base: Any, x: Tensor) -> Tensor:  # noqa: ARG002  # a convolution needs its base
        """A x: (…, i) to (…, r)."""
        return functional.linear(x, self.lora_A)

    def up(self, base: Any, x: Tensor) -> Tensor:  # noqa: ARG002
        """B x + bias: (…, r) to (…, o)."""
        return functional.linear(x, self.lora_B, self.lora_bias)

    def delta(self, base: Any) -> Tensor:  # noqa: ARG002
        """ΔW, laid out as the weight (or the part's rows of it) is."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def bias_delta(self) -> Tensor | None:
        """What merging adds to the base's bias; None without `lora_bias`."""
        return None if self.lora_bias is None else self.scaling * self.lora_bias


def frozen(tensor: Tensor) -> nn.Parameter:
    """A factor, until its adapter acts and trains."""
    return nn.Parameter(tensor, requires_grad=False)


def dropout_of(p: float) -> nn.Dropout | None:
    """Dropout, or nothing where that would drop nothing."""
    return nn.Dropout(p) if p else None


class EmbeddingBranch(Branch):
    """The branch of a `nn.Embedding`: A holds a column for each entry of the vocabulary."""

    def __init__(self, base: nn.Embedding, config: LoraConfig, rows: slice | None = None) -> None:
        if base.max_norm is not None:
            raise ValueError("an embedding with max_norm rescales its rows: no ΔW adds to those")
        if config.lora_bias:
            raise ValueError("lora_bias: an embedding has no bias to merge it into")
        super().__init__(base, config, rows)

    def sizes(self, base: Any) -> tuple[int, int]:
        """The vocabulary and the embedding's width."""
        return base.num_embeddings, base.embedding_dim

    def initialize(self, generator: torch.Generator) -> None:
        """A zero, B standard normal, as the paper's code has it."""
        nn.init.zeros_(self.lora_A)
        fill_normal(self.lora_B, generator)

    def drop(self, x: Tensor) -> Tensor:
        """Indices: nothing to drop."""
        return x

    def down(self, base: Any, x: Tensor) -> Tensor:  # noqa: ARG002
        """Columns of A: (…) indices to (…, r)."""
        return functional.embedding(x, self.lora_A.T)

    def delta(self, base: Any) -> Tensor:
        """ΔW, (v, d)."""
        return super().delta(base).T


class ConvBranch(Branch):
    """The branch of a `nn.Conv2d`: the base's convolution to r channels a group, then 1 × 1.

    All groups share A, since ΔW = scaling · BA has one row for each output channel.
    """

    def sizes(self, base: Any) -> tuple[int, int]:
        """The weight's columns, c/g·h·w, and its rows, the output channels."""
        return base.weight[0].numel(), base.out_channels

    def down(self, base: Any, x: Tensor) -> Tensor:
        """A ∗ x: (b, c, …) to (b, g·r, …), with the base's stride, padding and dilation."""
        kernel = self.lora_A.view(-1, *base.weight.shape[1:]).repeat(base.groups, 1, 1, 1)
        y: Tensor = base._conv_forward(x, kernel, None)  # noqa: SLF001  # knows every padding mode
        return y

    def up(self, base: Any, x: Tensor) -> Tensor:
        """B ∗ x + bias: (b, g·r, …) to (b, o, …)."""
        return functional.conv2d(
            x, self.lora_B[:, :, None, None], self.lora_bias, groups=base.groups
        )

    def delta(self, base: Any) -> Tensor:
        """ΔW, (o, c/g, h, w)."""
        return super().delta(base).view(base.weight.shape)


def factor_dtype(base: Any) -> torch.dtype:
    """float32, or the base's dtype where that is wider."""
    return torch.promote_types(base.weight.dtype, torch.float32)


def fill_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """U(-bound, bound), drawn on the CPU, so that every device starts from the same numbers."""
    draw = torch.rand(tensor.shape, dtype=tensor.dtype, generator=generator)
    with torch.no_grad():
        tensor.copy_((2 * draw - 1) * bound)


def fill_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """N(0, 1), drawn on the CPU."""
    with torch.no_grad():
        tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
