"""The modules that specimens are: one layer, or several under names that are traps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class One(nn.Module):
    """A model of one layer, `proj`: its outputs are the layer's."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.proj(x)
        return y


class Block(nn.Module):
    """One layer of `Stack`: names that end alike, contain each other, or hold `weight` and `lora_`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.v_proj = nn.Linear(width, inner)
        self.qkv_proj = nn.Linear(width, inner)
        self.foo = nn.Linear(inner, width)
        self.foobar = nn.Linear(inner, width)
        self.weight_proj = nn.Linear(inner, width, bias=False)
        self.lora_gate = nn.Linear(width, inner, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.norm(x)
        inner = torch.tanh(self.v_proj(h) + self.qkv_proj(h)) * torch.sigmoid(self.lora_gate(h))
        y: Tensor = x + self.foo(inner) + self.foobar(inner) + self.weight_proj(inner)
        return y


class Stack(nn.Module):
    """Twelve `Block`s in nested ModuleLists, `groups.1.4` after `groups.0.5`, and a head."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(12))
        self.groups = nn.ModuleList(nn.ModuleList([nn.Linear(width, width + 1)]) for _ in range(2))
        self.lm_head = nn.Linear(width, inner + 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for layer in self.layers:
            x = layer(x)
        for group in self.groups:
            for proj in group:  # type: ignore[attr-defined]  # a ModuleList iterates
                x = x + proj(x)[..., 1:]
        y: Tensor = self.lm_head(x)
        return y


class Tied(nn.Module):
    """An embedding and an output head that share one weight, as in Phi-3-small."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(num, dim)
        self.mix = nn.Linear(dim, dim + 2)
        self.back = nn.Linear(dim + 2, dim)
        self.lm_head = nn.Linear(dim, num, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:  # noqa: D102
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.embed_tokens(x)
        y: Tensor = self.lm_head(h + self.back(torch.tanh(self.mix(h))))
        return y


class Shared(nn.Module):
    """One nn.Linear reached under two names, `first` and `second`."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first = nn.Linear(i, o)
        self.back = nn.Linear(o, i)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.second(torch.tanh(self.back(self.first(x))))
        return y


class Headless(nn.Module):
    """Three layers, of which none is an output head, whatever they are called."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.head_proj = nn.Linear(i, o)
        self.my_lm_head = nn.Linear(o, i)
        self.embed_out = nn.Linear(i, o + 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.embed_out(torch.tanh(self.my_lm_head(torch.tanh(self.head_proj(x)))))
        return y


class Headed(Headless):
    """The same, whose head is the last, as in GPT-NeoX."""

    def get_output_embeddings(self) -> nn.Module:  # noqa: D102
        return self.embed_out


class Normed(nn.Module):
    """A layer, a batch norm, whose running statistics no gradient moves, and a head without a bias."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.proj = nn.Linear(i, o)
        self.norm = nn.BatchNorm1d(o)
        self.head = nn.Linear(o, i, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.proj(x).transpose(1, 2)  # (b, o, t)
        y: Tensor = self.head(torch.tanh(self.norm(h).transpose(1, 2)))
        return y


class Underscored(nn.Module):
    """Two linear layers whose names are one where dots become underscores."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_c, self.a_b.c = nn.Linear(i, o), nn.Linear(i, o)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.a.b_c(x) - torch.tanh(self.a_b.c(x))  # type: ignore[operator]  # children of a bare module
        return y


MODELS: dict[str, type[nn.Module]] = {
    "stack": Stack,
    "tied": Tied,
    "shared": Shared,
    "headless": Headless,
    "headed": Headed,
    "normed": Normed,
    "underscored": Underscored,
}
"""The specimens of more than one layer."""
