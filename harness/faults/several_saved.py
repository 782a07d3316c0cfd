"""Adapters that save one of several under settings of another."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from harness.adapters import settings
from harness.adapters.reference import Reference
from harness.faults.record import fault
from harness.faults.wrong import wrong

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from harness.adapter import Adapter

SAVES = "several/saves-one-adapter"


def saving_with_the_first(*names: str) -> Adapter:
    """A reference that writes these settings of the first adapter for whichever acts."""

    def save(self: Any, model: nn.Module, directory: Path) -> None:
        first = self.state(model).configs["default"]
        mixed = {name: getattr(first, name) for name in names}
        config = dataclasses.replace(self.config(model), **mixed)
        settings.write(directory, config, self.state_dict(model))

    return wrong(save=save)


@fault(
    sin="`save` writes the values of the adapter that acts beside the settings of the first.",
    killed_by=SAVES,
    varies="saving a second adapter of another alpha",
)
def saves_with_the_first_settings() -> Adapter:
    return saving_with_the_first("r", "lora_alpha", "lora_dropout", "use_rslora")


@fault(
    sin="`save` writes the dropout of the first adapter for the one that acts.",
    killed_by=SAVES,
    varies="saving a second adapter of another dropout",
)
def saves_with_the_first_dropout() -> Adapter:
    return saving_with_the_first("lora_dropout")


@fault(
    sin="`save` writes the use_rslora of the first adapter for the one that acts.",
    killed_by=SAVES,
    varies="saving a second adapter under rsLoRA",
)
def saves_with_the_first_rslora() -> Adapter:
    return saving_with_the_first("use_rslora")


@fault(
    sin="`save` writes the target_modules of the first adapter for the one that acts.",
    killed_by=SAVES,
    varies="saving a second adapter of other targets",
)
def saves_with_the_first_targets() -> Adapter:
    return saving_with_the_first("target_modules")


@fault(
    sin="The checkpoint leaves out the layers that only a later adapter is in.",
    killed_by="several/isolation",
    varies="loading a second adapter of other targets",
)
def checkpoint_misses_later_layers() -> Adapter:
    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        late = [f"{path}." for path, of in self.layers(model).items() if not of.of("default")]
        own = Reference.state_dict(self, model)
        return {key: tensor for key, tensor in own.items() if not key.startswith(tuple(late))}

    def save(self: Any, model: nn.Module, directory: Path) -> None:
        settings.write(directory, self.config(model), Reference.state_dict(self, model))

    return wrong(state_dict=state_dict, save=save)


@fault(
    sin="A combined adapter keeps, beside the rank that it has, the settings of its first source.",
    killed_by="several/combination",
    varies="a combined adapter, saved and loaded",
)
def combines_under_the_first_settings() -> Adapter:
    def combine(self: Any, model: nn.Module, names: Any, weights: Any, new: str) -> None:
        Reference.combine(self, model, names, weights, new)
        configs = self.state(model).configs
        kept = {name: getattr(configs[new], name) for name in ("r", "target_modules")}
        configs[new] = dataclasses.replace(configs[names[0]], **kept)

    return wrong(combine=combine)
