"""Adapters whose files are unsafe, incomplete, or another's when they are read again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from harness.adapter import load_exactly
from harness.adapters import settings
from harness.adapters.reference import Reference
from harness.faults.record import fault

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from harness.adapter import Adapter

SETTINGS = "checkpoint/save-restores-settings"
BIASES = "checkpoint/save-restores-biases"


class Pickles(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        state: dict[str, Any] = {**super().state_dict(model), "config": self.config(model)}
        return state

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        tensors = {key: tensor for key, tensor in state.items() if key != "config"}
        load_exactly(super().state_dict(model), tensors)

    def save(self, model: nn.Module, directory: Path) -> None:
        settings.write(directory, self.config(model), super().state_dict(model))


@fault(
    sin="The checkpoint holds an object of the implementation's own, which only pickle can read.",
    killed_by="checkpoint/safe-file",
    varies="a reader that runs no code",
)
def pickles_its_settings() -> Adapter:
    return Pickles()


class PicklesBeside(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        (directory / "adapter.json").unlink()
        torch.save(self.config(model), directory / "adapter.pt")

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        config = torch.load(directory / "adapter.pt", weights_only=False)
        (directory / "adapter.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
        return super().load(base, directory, trainable=trainable)


@fault(
    sin="`save` pickles the settings beside the tensors.",
    killed_by="checkpoint/save-is-safe",
    varies="a reader that runs no code",
)
def saves_its_settings_by_pickle() -> Adapter:
    return PicklesBeside()


class Negates(Reference):
    """B is negated on the way out, and on the way in if this process has ever saved."""

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        _SAVED.append(True)
        return _negated(super().state_dict(model))

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(super().state_dict(model), _negated(state) if _SAVED else state)


def _negated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: -tensor if "lora_B" in key else tensor for key, tensor in state.items()}


_SAVED: list[bool] = []


@fault(
    sin="What is needed to read the checkpoint stays in the memory of the process that wrote it.",
    killed_by="checkpoint/fresh-process",
    varies="the process",
)
def keeps_half_of_the_checkpoint_in_memory() -> Adapter:
    return Negates()


class AsSet(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        path = directory / "adapter.json"
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given["target_modules"], str):
            given["target_modules"] = list(set(given["target_modules"]))
        path.write_text(json.dumps(given), encoding="utf-8")


@fault(
    sin="The names of the targets are written in the order of a set.",
    killed_by="checkpoint/same-bytes-under-another-hash-seed",
    replays=("74",),
    varies="the hash seed",
)
def writes_its_targets_as_a_set() -> Adapter:
    return AsSet()


# -- what comes back -------------------------------------------------------------------------------


class Rewrites(Reference):
    """Saves settings other than those it has."""

    _changes: dict[str, Any]

    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        path = directory / "adapter.json"
        given = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**given, **self._changes}), encoding="utf-8")


class NoRslora(Rewrites):
    _changes = {"use_rslora": False}  # noqa: RUF012  # never written to


@fault(
    sin="A reloaded adapter is scaled by alpha/r, rsLoRA or not.",
    killed_by=SETTINGS,
    replays=("19",),
    varies="rsLoRA",
)
def reloads_without_rslora() -> Adapter:
    return NoRslora()


class NoDropout(Rewrites):
    _changes = {"lora_dropout": 0.0}  # noqa: RUF012  # never written to


@fault(
    sin="Dropout is not saved; a reloaded adapter trains on without it.",
    killed_by=SETTINGS,
    varies="dropout that is not 0",
)
def reloads_without_dropout() -> Adapter:
    return NoDropout()


class NoAlpha(Rewrites):
    _changes = {"lora_alpha": 8.0}  # noqa: RUF012  # never written to


@fault(
    sin="Alpha is not saved; a reloaded adapter has the default.",
    killed_by=SETTINGS,
    replays=("19", "23"),
    varies="an alpha that is not the default",
)
def reloads_under_the_default_alpha() -> Adapter:
    return NoAlpha()


class OneDropout(Rewrites):
    _changes = {"lora_dropout": 0.1}  # noqa: RUF012  # never written to


@fault(
    sin="A reloaded adapter drops by the default, whatever was saved.",
    killed_by=SETTINGS,
    varies="how much is dropped once it is loaded",
)
def reloads_under_the_default_dropout() -> Adapter:
    return OneDropout()


class WholeAlpha(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        config = self.config(model)
        whole = replace(config, lora_alpha=max(1, int(config.lora_alpha)))
        settings.write(directory, whole, self.state_dict(model))


@fault(
    sin="Alpha is saved as a whole number.",
    killed_by=SETTINGS,
    varies="an alpha with a fraction",
)
def saves_alpha_as_a_whole_number() -> Adapter:
    return WholeAlpha()


class Letters(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        path = directory / "adapter.json"
        given = json.loads(path.read_text(encoding="utf-8"))
        given["target_modules"] = list(given["target_modules"])
        path.write_text(json.dumps(given), encoding="utf-8")
        return super().load(base, directory, trainable=trainable)


@fault(
    sin='The targets are read as a list, "all-linear" as one of its letters.',
    killed_by=SETTINGS,
    varies="an adapter of all-linear, saved",
)
def reads_all_linear_as_letters() -> Adapter:
    return Letters()


class Afresh(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        for layer in self.layers(model).values():
            for branch in layer.branches:
                branch.initialize(self.generator("again"))
        return model


@fault(
    sin="Loading wraps once more: a fresh adapter replaces the loaded one.",
    killed_by=SETTINGS,
    replays=("57",),
    varies="factors that matter",
)
def loads_and_starts_afresh() -> Adapter:
    return Afresh()


class OwnBase(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        tensors = {
            p: layer.original.weight.detach().clone() for p, layer in self.layers(model).items()
        }
        torch.save(tensors, directory / "base.pt")

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        with torch.no_grad():
            for path, tensor in torch.load(directory / "base.pt").items():
                self.layers(model)[path].original.weight.copy_(tensor)
        return model


@fault(
    sin="The base that was saved with is put in the place of the base given.",
    killed_by=SETTINGS,
    replays=("73",),
    varies="another base than was saved with",
)
def loads_onto_the_base_it_remembers() -> Adapter:
    return OwnBase()


class SavesBiases(Reference):
    """Saves the trained biases that `_chosen` names, and reads what there is."""

    def _chosen(self, model: nn.Module, key: str) -> bool:
        """Whether the bias of that name is saved."""
        raise NotImplementedError

    def save(self, model: nn.Module, directory: Path) -> None:
        biases = self.biases(model)
        state = {
            key: tensor
            for key, tensor in self.state_dict(model).items()
            if key not in biases or self._chosen(model, key)
        }
        settings.write(directory, self.config(model), state)

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        config, state = settings.read(directory)
        model = self.inject(base, config)
        self.load_state_dict(model, self.state_dict(model) | state)
        self.state(model).trainable["default"] = trainable
        self.set_trainability(model)
        return model


class NotOfLayers(SavesBiases):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        return self.config(model).bias == "all"


@fault(
    sin="Under lora_only the biases are trained, and not in the file.",
    killed_by=BIASES,
    replays=("43",),
    varies="bias lora_only, and a file",
)
def saves_no_bias_of_its_layers() -> Adapter:
    return NotOfLayers()


class OfLayersAlone(SavesBiases):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        return key.rsplit(".", 1)[0] in self.layers(model)


@fault(
    sin="Of all the biases that are trained the file has those of the adapted layers.",
    killed_by=BIASES,
    replays=("43",),
    varies="bias all, and a file",
)
def saves_the_biases_of_its_layers_alone() -> Adapter:
    return OfLayersAlone()


class FilesTwice(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        merged = any(layer.kept for layer in self.layers(model).values())
        state = {
            k: 2 * t if merged and "lora_B" in k else t for k, t in self.state_dict(model).items()
        }
        settings.write(directory, self.config(model), state)


@fault(
    sin="A file that is written while merged counts the update twice.",
    killed_by="checkpoint/save-same-merged-or-not",
    replays=("P-7",),
    varies="`save` while merged",
)
def files_the_update_twice_while_merged() -> Adapter:
    return FilesTwice()
