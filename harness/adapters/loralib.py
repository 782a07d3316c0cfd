"""Microsoft's loralib, driven the way its README has it, from 0.1.0 on.

Glue and nothing else: loralib merges in `eval()` and takes the merge back in `train()`, so its unmerged
state is train mode; its faults are left as they are, as they are what the harness is there to show.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import loralib
from torch import nn

from harness.adapter import Capabilities, Factors

if TYPE_CHECKING:
    from torch import Tensor

    from harness.adapter import Layer, LoraConfig, Parts


def adapter() -> Loralib:
    """The factory that the registry calls."""
    return Loralib()


class Loralib:
    """`loralib.Linear`, `MergedLinear`, `Embedding` and `Conv2d` in the place of torch's."""

    name = "loralib"
    eval_merges = True

    def __init__(self) -> None:
        self.version = version("loralib")
        layers: set[Layer] = {"linear", "fused_linear", "embedding", "conv2d"}
        if hasattr(loralib, "ConvLoRA"):  # groups work from 0.1.2, with this class
            layers.add("grouped_conv2d")
        self.capabilities = Capabilities(
            layers=frozenset(layers),
            dtypes=frozenset({"float32", "bfloat16", "float16", "float64"}),
            bias=frozenset({"none", "all", "lora_only"}),
            features=frozenset({"merge", "unmerge", "dropout"}),
        )

    def inject(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        """Replace the layers, each with its base's own weight, and mark what trains.

        ValueError on a layer that loralib has no counterpart for, nothing replaced.
        """
        if config.use_rslora or config.lora_bias or config.modules_to_save:
            raise ValueError("loralib has no use_rslora, lora_bias or modules_to_save")
        made = {name: _layer(name, base, config) for name, base in config.targets(model).items()}
        config.replace(model, lambda name, _: made[name])
        loralib.mark_only_lora_as_trainable(model, bias=config.bias)
        model.loralib_bias = config.bias  # type: ignore[assignment]  # `lora_state_dict` wants it again
        return model

    def factors(self, model: nn.Module) -> dict[str, list[Factors]]:
        """`lora_A` and `lora_B`; of a fused layer the slices that each part has of them."""
        return {name: _factors(layer) for name, layer in _layers(model).items()}

    def base_weight(self, model: nn.Module, name: str) -> Tensor:
        """The layer's weight; from 0.1.2 a convolution keeps it in `conv`."""
        layer = _layers(model)[name]
        weight: Tensor = getattr(layer, "conv", layer).weight
        return weight

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """`lora_state_dict`, in the bias mode of the injection."""
        state: dict[str, Tensor] = loralib.lora_state_dict(model, bias=model.loralib_bias)
        return state

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """`load_state_dict(strict=False)`; ValueError on what that calls unexpected, or misses of ours."""
        own = self.state_dict(model).keys()
        result = model.load_state_dict(state, strict=False)
        missing = [key for key in result.missing_keys if key in own]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit: missing {missing[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )

    def merge(self, model: nn.Module) -> None:
        """`eval()` of the LoRA layers."""
        for layer in _layers(model).values():
            layer.eval()

    def unmerge(self, model: nn.Module) -> None:
        """`train()` of the LoRA layers."""
        for layer in _layers(model).values():
            layer.train()


def _layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers by name: the names are the base's."""
    return {name: m for name, m in model.named_modules() if isinstance(m, loralib.LoRALayer)}


def _layer(name: str, base: nn.Module, config: LoraConfig) -> nn.Module:
    """Loralib's counterpart of a layer, holding that layer's own weight and bias."""
    given: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "dtype": base.weight.dtype,
        "device": base.weight.device,
    }
    match base:
        case nn.Linear():
            given |= {"lora_dropout": config.lora_dropout, "bias": base.bias is not None}
            sizes = (base.in_features, base.out_features)
            parts = config.layout(name)
            if parts is None:
                layer = loralib.Linear(*sizes, **given)
            else:
                layer = loralib.MergedLinear(*sizes, enable_lora=_enabled(name, parts), **given)
        case nn.Embedding():
            for key in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
                given[key] = getattr(base, key)
            layer = loralib.Embedding(base.num_embeddings, base.embedding_dim, **given)
        case nn.Conv2d():
            for key in ("stride", "padding", "dilation", "groups", "padding_mode"):
                given[key] = getattr(base, key)
            given |= {"lora_dropout": config.lora_dropout, "bias": base.bias is not None}
            kernel, *others = set(base.kernel_size)
            if others:
                raise ValueError(
                    f"{name}: loralib's Conv2d has square kernels only, this one is "
                    f"{'×'.join(map(str, base.kernel_size))}"
                )
            layer = loralib.Conv2d(base.in_channels, base.out_channels, kernel, **given)
        case _:
            raise ValueError(
                f"{name} is a {type(base).__name__}; loralib has Linear, Embedding and Conv2d"
            )
    holder = getattr(layer, "conv", layer)
    holder.weight = base.weight
    if getattr(base, "bias", None) is not None:
        holder.bias = base.bias
    return layer  # type: ignore[no-any-return]


def _enabled(name: str, parts: Parts) -> list[bool]:
    """Which parts MergedLinear adapts; ValueError where their sizes differ: it cuts the rows equally."""
    sizes = [size for size, _ in parts]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"enable_lora: the parts of {name} are {', '.join(map(str, sizes))} rows; loralib's "
            "MergedLinear needs parts of equal size, so it cannot adapt a grouped-query projection"
        )
    return [want for _, want in parts]


def _factors(layer: Any) -> list[Factors]:
    """The handles on one layer's update."""
    if not isinstance(layer, loralib.MergedLinear):
        return [Factors(layer.lora_A, layer.lora_B, layer.scaling)]
    size, r = layer.out_features // len(layer.enable_lora), layer.r
    wanted = [part for part, want in enumerate(layer.enable_lora) if want]
    return [
        Factors(
            layer.lora_A[place * r : (place + 1) * r],
            layer.lora_B[place * size : (place + 1) * size],
            layer.scaling,
            rows=slice(part * size, (part + 1) * size),
        )
        for place, part in enumerate(wanted)
    ]
