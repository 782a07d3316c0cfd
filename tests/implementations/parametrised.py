"""LoRA as a weight parametrisation: the model computes with W + scaling·B·A, and has no branch at all.

Written from the paper alone, to be judged: nothing here is shared with the harness's reference.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from harness import Capabilities, Factors, load_exactly

LAYERS = (nn.Linear, nn.Embedding, nn.Conv2d)


class Update(nn.Module):
    """W -> W + scaling·B·A, in the shape of W, for each adapted part of its rows."""

    def __init__(self, layer, config, rows):
        super().__init__()
        weight = layer.weight
        self.scaling, self.rows, self.on = config.scaling, rows, True
        self.bias = config.bias
        self.transposed = isinstance(layer, nn.Embedding)
        flat = weight.T if self.transposed else weight.flatten(1)  # (o, n)
        like = {"device": weight.device, "dtype": weight.dtype}
        outs = [range(flat.shape[0])[part] for part in rows]
        self.lora_A = nn.ParameterList(
            nn.Parameter(
                nn.init.kaiming_uniform_(torch.empty(config.r, flat.shape[1], **like), a=5**0.5)
            )
            for _ in rows
        )
        self.lora_B = nn.ParameterList(
            nn.Parameter(torch.zeros(len(out), config.r, **like)) for out in outs
        )

    def forward(self, W):
        if not self.on:
            return W
        flat = W.T if self.transposed else W.flatten(1)
        flat = flat.clone()
        for part, A, B in zip(self.rows, self.lora_A, self.lora_B, strict=True):
            flat[part] = flat[part] + (self.scaling * (B @ A)).to(W.dtype)
        return flat.T if self.transposed else flat.view_as(W)


class Adapter:
    name, version = "parametrised", "1"
    capabilities = Capabilities(
        layers={"linear", "fused_linear", "embedding", "conv2d", "grouped_conv2d"},
        dtypes={"float32", "bfloat16", "float16", "float64"},
        bias={"none", "all", "lora_only"},
        features={"rslora", "merge", "unmerge", "tied_embeddings"},
    )

    def inject(self, model, config):
        targets = config.targets(model)
        model.requires_grad_(False)
        for name, layer in targets.items():
            if parametrize.is_parametrized(layer):
                raise ValueError(f"{name} is adapted already")
            rows = config.parts(name) or [slice(None)]
            # A weight that another module shares must not be parametrised there too.
            if isinstance(layer, LAYERS):
                parametrize.register_parametrization(
                    layer, "weight", Update(layer, config, rows), unsafe=True
                )
                layer.parametrizations.weight.original.requires_grad_(False)
            layer.requires_grad_(False)
            for parameter in self._update(layer).parameters():
                parameter.requires_grad_(True)
            if config.bias == "lora_only" and layer.bias is not None:
                layer.bias.requires_grad_(True)
        if config.bias == "all":
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.requires_grad_(True)
        return model

    def _update(self, layer):
        return layer.parametrizations.weight[0]

    def _layers(self, model):
        return {n: m for n, m in model.named_modules() if parametrize.is_parametrized(m, "weight")}

    def factors(self, model):
        found = {}
        for name, layer in self._layers(model).items():
            u = self._update(layer)
            whole = [None] if u.rows == [slice(None)] else u.rows
            found[name] = [
                Factors(A, B, u.scaling, rows)
                for A, B, rows in zip(u.lora_A, u.lora_B, whole, strict=True)
            ]
        return found

    def state_dict(self, model):
        layers = self._layers(model).values()
        ours = {p for layer in layers for p in self._update(layer).parameters()}
        bias = {self._update(layer).bias for layer in layers}
        if "all" in bias:
            ours |= {p for n, p in model.named_parameters() if n.endswith("bias")}
        if "lora_only" in bias:
            ours |= {layer.bias for layer in layers if layer.bias is not None}
        return {n: p.detach() for n, p in model.named_parameters() if p in ours}

    def load_state_dict(self, model, state):
        self.unmerge(model)
        load_exactly(self.state_dict(model), state)

    def merge(self, model):
        """The sum is kept beside the original: taking it out again costs no rounding."""
        for name, layer in self._layers(model).items():
            if not torch.isfinite(layer.weight).all():
                raise ValueError(f"{name}: the sum is not finite")
        for layer in self._layers(model).values():
            u = self._update(layer)
            if u.on:
                held = layer.parametrizations.weight
                u.kept = held.original.detach().clone()
                with torch.no_grad():
                    held.original = nn.Parameter(u(held.original), requires_grad=False)
                u.on = False

    def unmerge(self, model):
        for layer in self._layers(model).values():
            u = self._update(layer)
            if not u.on:
                layer.parametrizations.weight.original = nn.Parameter(u.kept, requires_grad=False)
                u.on = True


def adapter():
    return Adapter()
