"""Hugging Face PEFT, driven through its public calls, from 0.3 on.

Glue and nothing else: no call is repeated, skipped or repaired for PEFT, as its faults are what the
harness is there to show. What a release does not have is not claimed of it, by looking for the feature.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import peft.utils
import torch
from peft.tuners import lora

from harness.adapter import Bias, Capabilities, Dtype, Factors, Feature, Layer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from harness.adapter import LoraConfig


def adapter() -> Peft:
    """The factory that the registry calls."""
    return Peft()


class Peft:
    """LoRA as the installed PEFT has it."""

    name = "peft"

    def __init__(self) -> None:
        self.version = version("peft")
        self.capabilities = capabilities()

    def inject(self, model: nn.Module, config: LoraConfig) -> Any:
        """`get_peft_model`; a model without a `config`, which that needed at first, `PeftModel`."""
        wrap = peft.get_peft_model if hasattr(model, "config") else peft.PeftModel
        return wrap(model, settings(model, config))

    def factors(self, model: Any) -> dict[str, list[Factors]]:
        """The weights of the active adapter's `lora_A` and `lora_B`, by names in the base."""
        return factors(model.get_base_model(), model.active_adapter)

    def base_weight(self, model: Any, name: str) -> Tensor:
        """Of the base layer that the LoRA layer holds or, before 0.7, is."""
        return base_weight(model.get_base_model(), name)

    def state_dict(self, model: Any) -> dict[str, Tensor]:
        """`get_peft_model_state_dict` of the active adapter."""
        state: dict[str, Tensor] = peft.get_peft_model_state_dict(
            model, adapter_name=model.active_adapter
        )
        return state

    def load_state_dict(self, model: Any, state: dict[str, Tensor]) -> None:
        """`set_peft_model_state_dict` of the active adapter."""
        load_state(model, state, model.active_adapter)

    def merge(self, model: Any) -> None:
        """`merge_adapter`."""
        model.base_model.merge_adapter()

    def unmerge(self, model: Any) -> None:
        """`unmerge_adapter`."""
        model.base_model.unmerge_adapter()

    def disable(self, model: Any) -> AbstractContextManager[object]:
        """`disable_adapter`."""
        context: AbstractContextManager[object] = model.disable_adapter()
        return context

    def add(self, model: Any, name: str, config: LoraConfig, *, trainable: bool = True) -> None:
        """`add_adapter`; a frozen one is in PEFT's inference mode."""
        model.add_adapter(name, settings(model.get_base_model(), config, inference=not trainable))

    def activate(self, model: Any, name: str) -> None:
        """`set_adapter`, which frees what it activates: a frozen one is frozen again."""
        model.set_adapter(name)
        freeze_if_inference(model, name)

    def delete(self, model: Any, name: str) -> None:
        """`delete_adapter`."""
        model.delete_adapter(name)

    def combine(self, model: Any, names: list[str], weights: list[float], new_name: str) -> None:
        """`add_weighted_adapter` by `cat`, the one type whose ΔW is the weighted sum."""
        model.base_model.add_weighted_adapter(names, weights, new_name, combination_type="cat")

    def save(self, model: Any, directory: Path) -> None:
        """`save_pretrained` of the active adapter."""
        only: dict[str, Any] = {}
        if "selected_adapters" in inspect.signature(model.save_pretrained).parameters:
            only["selected_adapters"] = [model.active_adapter]
        model.save_pretrained(str(directory), **only)

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> Any:
        """`PeftModel.from_pretrained`; all but "default" lie in a folder of their name."""
        found = next(iter(sorted(Path(directory).rglob("adapter_config.json"))), None)
        where = str(found.parent if found else directory)
        return peft.PeftModel.from_pretrained(base, where, is_trainable=trainable)


def settings(model: nn.Module, config: LoraConfig, *, inference: bool = False) -> Any:
    """PEFT's own LoraConfig; a setting that the release has not raises its TypeError."""
    if config.enable_lora:
        raise ValueError("PEFT has no enable_lora: it adapts a fused projection whole")
    given: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _targets(model, config),
        "bias": config.bias,
        "modules_to_save": list(config.modules_to_save) or None,
        "inference_mode": inference,
    }
    if hasattr(model, "prepare_inputs_for_generation"):
        given["task_type"] = "CAUSAL_LM"
    if config.use_rslora:
        given["use_rslora"] = True
    if config.lora_bias:
        given["lora_bias"] = True
    return peft.LoraConfig(**given)


def factors(base: nn.Module, name: str) -> dict[str, list[Factors]]:
    """One adapter's weights in the layers that PEFT put into a base, by names in the base."""
    return {
        path: [_factors(layer, name)]
        for path, layer in base.named_modules()
        if isinstance(layer, lora.LoraLayer) and name in _downs(layer)
    }


def base_weight(base: nn.Module, name: str) -> Tensor:
    """The frozen weight of an adapted layer of a base."""
    layer: Any = base.get_submodule(name)
    weight: Tensor = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
    return weight


def load_state(model: Any, state: dict[str, Tensor], name: str) -> None:
    """Into the adapter of that name; ValueError where PEFT itself tells of a misfit, from 0.14 on."""
    result = peft.set_peft_model_state_dict(model, dict(state), adapter_name=name)
    if not _tells_misfits():
        return
    # `PeftModel.load_adapter` picks the adapter's own out of the missing keys by this rule.
    missing = [key for key in result.missing_keys if "lora_" in key and name in key]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit: missing {missing[:3]}, "
            f"unexpected {result.unexpected_keys[:3]}"
        )


def freeze_if_inference(model: Any, name: str) -> None:
    """Freeze an adapter that is in inference mode, as the docstring of PEFT's `set_adapter` says."""
    if model.peft_config[name].inference_mode:
        for key, parameter in model.named_parameters():
            if f".{name}" in key and ("lora_" in key or "modules_to_save" in key):
                parameter.requires_grad = False


def capabilities() -> Capabilities:
    """What the installed release offers."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    features: set[Feature] = {
        "merge",
        "unmerge",
        "dropout",
        "modules_to_save",
        "disable",
        "save",
        "gradient_checkpointing",
        # Merging tied weights is warned of, not refused: users do it (BUGS 14).
        "tied_embeddings",
    }
    if hasattr(lora.LoraModel, "delete_adapter"):
        features.add("multi_adapter")
    if "use_rslora" in fields:
        features.add("rslora")
    if "lora_bias" in fields:
        features.add("lora_bias")
    if '"cat"' in _source(lora.LoraModel):
        features.add("combine")
    if _merges_four_bits():
        features.add("quantized_base")
    layers: set[Layer] = {"linear", "embedding"}
    if hasattr(lora, "Conv2d"):
        layers.add("conv2d")
    dtypes: set[Dtype] = {"float32", "bfloat16", "float16", "float64"}
    biases: set[Bias] = {"none", "all", "lora_only"}
    return Capabilities(
        layers=frozenset(layers),
        dtypes=frozenset(dtypes),
        bias=frozenset(biases),
        features=frozenset(features),
    )


def _merges_four_bits() -> bool:
    """Whether a 4-bit layer can be merged here.

    It cannot in the first releases; it exists where bitsandbytes is installed; and from 0.11 to 0.13
    it is moved to a GPU for it, whether or not there is one.
    """
    if not find_spec("bitsandbytes") or not hasattr(getattr(lora, "Linear4bit", None), "merge"):
        return False
    integrations = getattr(peft.utils, "integrations", None)
    dequantize = getattr(integrations, "dequantize_bnb_weight", None)
    needs_gpu = dequantize and 'torch.device("cuda")' in inspect.getsource(dequantize)
    return not needs_gpu or torch.cuda.is_available()


def _targets(model: nn.Module, config: LoraConfig) -> list[str] | str:
    """As given; where PEFT does not take "all-linear", the names that it stands for."""
    if not isinstance(config.target_modules, str):
        return list(config.target_modules)
    from transformers import PreTrainedModel

    if hasattr(peft.utils, "INCLUDE_LINEAR_LAYERS_SHORTHAND") and isinstance(
        model, PreTrainedModel
    ):
        return config.target_modules
    return list(dict.fromkeys(_bare(model, list(config.targets(model)))))


def _bare(model: nn.Module, names: list[str]) -> Iterator[str]:
    """Of layers found in a model that is adapted already: the base's names for the base's own."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)]
    for name in names:
        owner = next((layer for layer in layers if f"{name}.".startswith(f"{layer}.")), None)
        if owner is None:
            yield name
        elif name in {owner, f"{owner}.base_layer"} and owner.split(".")[-1] != "lm_head":
            yield owner


def _downs(layer: Any) -> Any:
    """Where a layer keeps its `A`s: an embedding's stand by themselves."""
    return layer.lora_A if len(layer.lora_A) else layer.lora_embedding_A


def _factors(layer: Any, name: str) -> Factors:
    """The handles on one layer; a convolution's A (r, n) and B (o, r) are views of its kernels."""
    scaling = float(layer.scaling[name])
    if name in layer.lora_embedding_A:
        return Factors(layer.lora_embedding_A[name], layer.lora_embedding_B[name], scaling)
    down, up = layer.lora_A[name], layer.lora_B[name]
    return Factors(down.weight.flatten(1), up.weight.flatten(1), scaling, bias=up.bias)


def _tells_misfits() -> bool:
    """Whether PEFT warns its user of a checkpoint that misses keys: from 0.14."""
    return "missing adapter keys" in _source(peft.PeftModel)


@cache
def _source(of: Any) -> str:
    """The text of the module that something comes from: read, where a class's own is parsed for."""
    return inspect.getsource(sys.modules[of.__module__])
