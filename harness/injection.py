"""A base with LoRA in it: which modules, put in, loaded into, and evaluated without merging.

An implementation whose `eval()` merges, as loralib's does, would fold ΔW into the base before every
evaluation and take it out again after: rounding then changes the base (4–35 % of float32 weights in
one cycle, depending on B). Fine-tuning here therefore evaluates such a
model unmerged: `evaluating` puts every module but the merging layers in eval mode, and dropout with
them. loralib's own way to the same end is `merge_weights=False`, which an adapter cannot be asked for.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import nn

from harness import checkpoint
from harness.adapter import matches
from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from harness.adapter import Adapter, LoraConfig
    from harness.recipe import Recipe


def check_claims(adapter: Adapter, recipe: Recipe) -> None:
    """Raise UsageError where the recipe asks for what the implementation does not claim."""
    able, asked = adapter.capabilities, recipe.peft_config
    wanted = {
        "quantized_base": recipe.model["load_in_4bit"],
        "rslora": asked["use_rslora"],
        "lora_bias": asked["lora_bias"],
        "modules_to_save": asked["modules_to_save"],
        "dropout": asked["lora_dropout"],
    }
    for feature, on in wanted.items():
        if on and feature not in able.features:
            raise UsageError(
                f"adapter {adapter.name}: does not claim {feature}, which the recipe asks for; "
                "choose another --adapter, or --set the recipe without it"
            )
    if asked.get("enable_lora") and "fused_linear" not in able.layers:
        raise UsageError(
            f"adapter {adapter.name}: does not claim fused_linear, which peft_config.enable_lora asks "
            "for; choose another --adapter, or leave enable_lora out"
        )
    if asked["bias"] not in able.bias:
        raise UsageError(f"adapter {adapter.name}: does not claim bias={asked['bias']!r}")
    if recipe.model["dtype"] not in able.dtypes:
        raise UsageError(
            f"adapter {adapter.name}: does not claim a {recipe.model['dtype']} base; "
            f"--set model.dtype={min(able.dtypes)}"
        )


def fitted(base: nn.Module, config: LoraConfig, *, partial: bool) -> tuple[LoraConfig, list[str]]:
    """The config with the target names that the base has, and notes on those it has not.

    Raises UsageError where a name matches nothing (unless `partial` and another one matches) or what
    is neither linear nor an embedding, where the rank is above the width of a layer (B·A could never have it), where `enable_lora` names what
    is no target, and where `modules_to_save` names what has nothing to train.
    """
    notes: list[str] = []
    names = config.target_modules
    if not isinstance(names, str):
        counts = {
            name: sum(matches(found, name) for found, _ in base.named_modules()) for name in names
        }
        missing = [name for name, count in counts.items() if not count]
        matched = [name for name, count in counts.items() if count]
        if missing:
            told = (
                f"matched are {_counted(counts, matched)}; no module is called {', '.join(missing)}"
            )
            if not partial or not matched:
                raise UsageError(
                    f"peft_config.target_modules: {told}; this model's linear layers are "
                    f"{', '.join(_linear(base))}: name those, or go on with --allow-partial-targets"
                )
            notes.append(f"peft_config.target_modules: {told}")
            config = dataclasses.replace(config, target_modules=tuple(matched))
    try:
        found = config.targets(base)
    except ValueError as error:
        raise UsageError(f"peft_config.{error}") from error
    for name, module in found.items():
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise UsageError(
                f"peft_config.target_modules: {name} is a {type(module).__name__}, to which LoRA is not "
                f"put; this model's linear layers are {', '.join(_linear(base))}"
            )
    for part in config.enable_lora or ():
        if not any(matches(name, part) for name in found):
            raise UsageError(
                f"peft_config.enable_lora: no module that target_modules names is called {part}; "
                f"those are {', '.join(_ends(found))}"
            )
    modules = base.named_modules(remove_duplicate=False)
    holders = [name for name, m in modules if next(m.parameters(), None) is not None]
    for word in config.modules_to_save:
        if not any(matches(name, word) for name in holders):
            raise UsageError(
                f"peft_config.modules_to_save: no module with parameters is called {word}; this "
                f"model's are {', '.join(_ends(holders))}"
            )
    for name, module in found.items():
        width = min(sizes(module)) if isinstance(module, nn.Linear) else config.r
        if config.r > width:
            raise UsageError(
                f"peft_config.r: {config.r} is above the width of {name}, {width}: no update of it has "
                f"a higher rank; use {width} or less"
            )
    return config, notes


def sizes(module: nn.Linear) -> tuple[int, int]:
    """in_features and out_features: a quantised layer's weight does not show them."""
    return module.in_features, module.out_features


def evaluating(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put the model in eval mode, unmerged, and return it; see the module for why.

    Where `eval()` merges, the model's own `train` and `eval` are held to the same until `release`:
    trainers and generation call them, too.
    """
    hold(model, adapter)
    return model.eval()


def hold(model: nn.Module, adapter: Adapter) -> None:
    """Make `model.eval()` leave an implementation that merges there unmerged, until `release`."""
    if not getattr(adapter, "eval_merges", False):
        return

    def train(mode: bool = True) -> nn.Module:
        type(model).train(model, True)  # unmerges what is merged
        if not mode:
            for module in model.modules():
                own = any(p.requires_grad for p in module.parameters(recurse=False))
                if not (own and type(module).train is not nn.Module.train):
                    module.training = (
                        False  # by hand: train(False) walks into the layers that merge
                    )
        return model

    model.train = train  # type: ignore[method-assign]  # the instance's own, before the class's


def release(model: nn.Module) -> None:
    """Give the model its own `train` and `eval` back."""
    model.__dict__.pop("train", None)


def load(adapter: Adapter, injected: nn.Module, path: Path) -> None:
    """Read a checkpoint into the injected model. Raises UsageError on one that does not fit."""
    state = checkpoint.read(path)
    device = next(p.device for p in injected.parameters() if p.requires_grad)
    try:
        adapter.load_state_dict(injected, {key: value.to(device) for key, value in state.items()})
    except (ValueError, KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:160]
        raise UsageError(
            f"checkpoint {path}: is of another rank or model ({line}); use the recipe it was made with"
        ) from error


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _counted(counts: dict[str, int], names: list[str]) -> str:
    return ", ".join(f"{name} ({counts[name]} modules)" for name in names) or "none"


def _linear(base: nn.Module) -> list[str]:
    return _ends(name for name, m in base.named_modules() if isinstance(m, nn.Linear))


def _ends(names: Iterable[str]) -> list[str]:
    """The last words of dotted names, each once, in the model's order; numbers of layers apart."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return [end for end in ends if end and not end.isdigit()]
