"""transformers' own PEFT integration, from 4.46 on: `add_adapter` and `load_adapter` of its models.

Glue and nothing else, as in `harness.adapters.peft`: the layers and the settings are PEFT's, what adds,
loads, activates and disables them is transformers'. It has no merging.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel

from harness.adapters import peft

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from harness.adapter import Capabilities, Factors, Feature, LoraConfig


def adapter() -> Transformers:
    """The factory that the registry calls."""
    return Transformers()


class Transformers:
    """LoRA as the models of the installed transformers have it."""

    name = "transformers"

    def __init__(self) -> None:
        self.version = version("transformers")
        self.capabilities = capabilities()

    def inject(self, model: nn.Module, config: LoraConfig) -> Any:
        """`add_adapter`."""
        made = shelled(model)
        made.add_adapter(peft.settings(model, config))
        return made

    def factors(self, model: Any) -> dict[str, list[Factors]]:
        """The weights of the active adapter's `lora_A` and `lora_B`, by names in the base."""
        return peft.factors(base(model), active(model))

    def base_weight(self, model: Any, name: str) -> Tensor:
        """Of the base layer that the LoRA layer holds."""
        return peft.base_weight(base(model), name)

    def state_dict(self, model: Any) -> dict[str, Tensor]:
        """`get_adapter_state_dict`, of the active adapter."""
        state: dict[str, Tensor] = model.get_adapter_state_dict()
        return state

    def load_state_dict(self, model: Any, state: dict[str, Tensor]) -> None:
        """PEFT's `set_peft_model_state_dict`: `load_adapter` adds an adapter, and swaps none in place.

        Its `hotswap` makes parameters of the very tensors that it is given: see
        https://github.com/huggingface/transformers/pull/45682.
        """
        peft.load_state(model, state, active(model))

    @contextmanager
    def disable(self, model: Any) -> Iterator[None]:
        """`disable_adapters`, then `enable_adapters` where they were enabled."""
        enabled = not any(
            layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)
        )
        model.disable_adapters()
        try:
            yield
        finally:
            if enabled:
                model.enable_adapters()

    def add(self, model: Any, name: str, config: LoraConfig, *, trainable: bool = True) -> None:
        """`add_adapter`, which activates, then `set_adapter` of the one that was active."""
        before = active(model)
        model.add_adapter(peft.settings(base(model), config, inference=not trainable), name)
        self.activate(model, before)

    def activate(self, model: Any, name: str) -> None:
        """`set_adapter`, which frees what it activates: a frozen one is frozen again."""
        model.set_adapter(name)
        peft.freeze_if_inference(model, name)

    def delete(self, model: Any, name: str) -> None:
        """`delete_adapter`."""
        model.delete_adapter(name)

    def save(self, model: Any, directory: Path) -> None:
        """`save_pretrained`, which writes the active adapter alone."""
        model.save_pretrained(str(directory))

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> Any:
        """`load_adapter`; before 4.47 it cannot be told whether to train."""
        model = shelled(base)
        told = "is_trainable" in inspect.signature(model.load_adapter).parameters
        model.load_adapter(str(directory), **({"is_trainable": trainable} if told else {}))
        return model


class Shell(PreTrainedModel):  # type: ignore[misc]  # transformers has no types
    """A plain module as a model of transformers: called like it, and nothing added.

    It holds the module as `model`, as most of them hold their layers: from 5.0 to 5.4 `load_adapter` reaches
    no others (https://github.com/huggingface/peft/issues/3110).
    """

    config_class = PretrainedConfig

    def __init__(self, base: nn.Module) -> None:
        super().__init__(PretrainedConfig(tie_word_embeddings=False))
        self.model = base
        self.training = base.training
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base."""
        return self.model(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """The base has its weights."""


def shelled(model: nn.Module) -> Any:
    """A model of transformers as it is, any other in a shell."""
    return model if isinstance(model, PreTrainedModel) else Shell(model)


def base(model: nn.Module) -> nn.Module:
    """What was given to be adapted."""
    return model.model if isinstance(model, Shell) else model


def active(model: Any) -> str:
    """The name of the adapter that acts."""
    name: str = model.active_adapters()[0]
    return name


def capabilities() -> Capabilities:
    """What the integration hands on of PEFT's, and has itself."""
    features: set[Feature] = {
        "dropout",
        "rslora",
        "lora_bias",
        "modules_to_save",
        "disable",
        "save",
        "gradient_checkpointing",
        "quantized_base",
    }
    if hasattr(PreTrainedModel, "delete_adapter"):  # 4.46 has none
        features.add("multi_adapter")
    offered = peft.capabilities()
    return dataclasses.replace(offered, features=offered.features & features)
