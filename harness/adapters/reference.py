"""The reference: LoRA by its equation (`equation.py`) in modules of its own (`wrapped.py`).

What puts it into a model, and says what trains, is its other half (`attachment.py`).
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness._version import __version__
from harness.adapter import Capabilities, Factors, Feature, LoraConfig, load_exactly
from harness.adapters import combination, settings
from harness.adapters.attachment import Attachment
from harness.adapters.wrapped import swap

if TYPE_CHECKING:
    from collections.abc import Iterator


FEATURES: frozenset[Feature] = frozenset(
    {
        "merge",
        "unmerge",
        "dropout",
        "rslora",
        "lora_bias",
        "modules_to_save",
        "disable",
        "multi_adapter",
        "combine",
        "save",
        "gradient_checkpointing",
        "tied_embeddings",
        "compile",
        "ddp",
    }
)
CAPABILITIES = Capabilities(
    layers=frozenset({"linear", "fused_linear", "embedding", "conv2d", "grouped_conv2d"}),
    dtypes=frozenset({"float32", "bfloat16", "float16", "float64"}),
    bias=frozenset({"none", "all", "lora_only"}),
    features=FEATURES | ({"quantized_base"} if find_spec("bitsandbytes") else set()),
)


def adapter() -> Reference:
    """The factory that the registry calls."""
    return Reference()


class Reference(Attachment):
    """LoRA written out: correct in everything it claims, and in no hurry."""

    name = "reference"
    version = __version__
    capabilities = CAPABILITIES

    # -- what the harness reads ------------------------------------------------------------------

    def factors(self, model: nn.Module) -> dict[str, list[Factors]]:
        """Of the active adapter; the parameters themselves."""
        return {
            path: [
                Factors(b.lora_A, b.lora_B, b.scaling, rows=b.rows, bias=b.lora_bias)
                for b in layer.branches
            ]
            for path, layer in self.layers(model).items()
            if layer.branches
        }

    def base_weight(self, model: nn.Module, name: str) -> Tensor:
        """The weight that the base path multiplies by now."""
        return self.layers(model)[name].weight

    # -- the checkpoint --------------------------------------------------------------------------

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The active adapter's factors, trained biases and `modules_to_save`, by base names."""
        return {key: tensor.detach() for key, tensor in self.trained(model).items()}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Into the active adapter; ValueError on what does not fit, RuntimeError while merged."""
        self.require_unmerged(model, "load")
        load_exactly(self.state_dict(model), state)

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the active adapter's tensors and settings."""
        settings.write(Path(directory), self.config(model), self.state_dict(model))

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        """Into a bare base, in the base's mode."""
        config, state = settings.read(Path(directory))
        model = self.inject(base, config)
        self.load_state_dict(model, state)
        self.state(model).trainable["default"] = trainable
        self.set_trainability(model)
        return model

    # -- merging ---------------------------------------------------------------------------------

    def merge(self, model: nn.Module) -> None:
        """W + ΔW in the base's place; ValueError, and nothing changed, where that is not finite."""
        with torch.no_grad():
            merged = {
                layer: layer.merged()
                for layer in self.layers(model).values()
                if layer.branches and not layer.kept
            }
        for layer, module in merged.items():
            layer.merge(module)

    def unmerge(self, model: nn.Module) -> None:
        """The base's own modules back in place: bit for bit."""
        for layer in self.layers(model).values():
            layer.unmerge()

    def require_unmerged(self, model: nn.Module, verb: str) -> None:
        """RuntimeError while merged: what is folded into the weights would no longer be ours."""
        if any(layer.kept for layer in self.layers(model).values()):
            raise RuntimeError(f"the adapter is merged: unmerge before you {verb}")

    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        """Inside, the base acts, merged or not; it warns where trained biases, the base's own, stay."""
        if self.config(model).bias != "none":
            warnings.warn("disable: the trained biases are the base's own, and act", stacklevel=3)
        before = [(wrapper, wrapper.enabled) for wrapper in self.wrappers(model)]
        for wrapper, _ in before:
            wrapper.enabled = False
        try:
            yield
        finally:
            for wrapper, enabled in before:
                wrapper.enabled = enabled

    # -- several adapters ------------------------------------------------------------------------

    def add(
        self, model: nn.Module, name: str, config: LoraConfig, *, trainable: bool = True
    ) -> None:
        """Add without activating; ValueError on a name in use, or on biases, which all would share."""
        self.require_unmerged(model, "add")
        configs = self.state(model).configs
        if name in configs or not name or "." in name:
            raise ValueError(f"the adapter's name {name!r} is in use, empty or has a dot")
        if config.bias != "none" or any(other.bias != "none" for other in configs.values()):
            raise ValueError("bias: several adapters would train the same biases")
        self.attach(model, name, config, trainable=trainable)

    def activate(self, model: nn.Module, name: str) -> None:
        """That one alone acts, and trains if it was added to."""
        self.require_unmerged(model, "activate")
        self.require_adapter(model, name)
        self.state(model).active = name
        for wrapper in self.wrappers(model):
            wrapper.active = name
        self.set_trainability(model)

    def delete(self, model: nn.Module, name: str) -> None:
        """Remove one; ValueError on a name that is not there, or that acts."""
        self.require_adapter(model, name)
        state = self.state(model)
        if name == state.active:
            raise ValueError(f"the adapter {name!r} is active: activate another first")
        for wrapper in self.wrappers(model):
            if name in wrapper.adapters:
                del wrapper.adapters[name]
            if not wrapper.adapters:
                swap(model, {wrapper: wrapper.base})
        del state.configs[name], state.trainable[name]

    def require_adapter(self, model: nn.Module, name: str) -> None:
        """ValueError on a name that is not there."""
        if name not in (names := self.state(model).configs):
            raise ValueError(f"no adapter is called {name!r}; there are {', '.join(names)}")

    def combine(
        self, model: nn.Module, names: list[str], weights: list[float], new_name: str
    ) -> None:
        """ΔW = Σ weight · ΔW by concatenated factors, at rank Σ r and scaling 1.

        ValueError where the adapters' parts differ, or where one has more than factors.
        """
        self.require_unmerged(model, "combine")
        for name in names:
            self.require_adapter(model, name)
        configs = [self.state(model).configs[name] for name in names]
        if not names or len(names) != len(weights):
            raise ValueError(f"{len(names)} adapters to combine, and {len(weights)} weights")
        if any(config.modules_to_save for config in configs):
            raise ValueError("modules_to_save: whole modules have no weighted sum")
        layers = {
            path: layer
            for path, layer in self.layers(model).items()
            if any(layer.of(name) for name in names)
        }
        self.add(model, new_name, combination.config(list(layers), configs))
        for layer in layers.values():
            combination.fill(layer, list(zip(names, weights, strict=True)), new_name)
