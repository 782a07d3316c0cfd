"""Adapters that load what was saved, and leave it in the wrong mode or trainability."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from harness.adapters import settings
from harness.adapters.reference import Reference
from harness.faults.record import fault

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from harness.adapter import Adapter

TRAINS = "checkpoint/load-trainability"
BESIDE = "checkpoint/load-trainability-beside-factors"
MODE = "checkpoint/load-keeps-mode"


class Opposite(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        return super().load(base, directory, trainable=True)


@fault(
    sin="An adapter loaded for inference is trainable.",
    killed_by=TRAINS,
    replays=("54", "142"),
    varies="load with trainable=False",
)
def loads_an_adapter_that_trains_unasked() -> Adapter:
    return Opposite()


class Frozen(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        return super().load(base, directory, trainable=False)


@fault(
    sin="An adapter loaded to be trained on is frozen.",
    killed_by=TRAINS,
    replays=("56",),
    varies="load with trainable=True",
)
def loads_a_frozen_adapter_to_train() -> Adapter:
    return Frozen()


class Thaws(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        return model.requires_grad_(trainable)


@fault(
    sin="Loading to train on frees the base, too.",
    killed_by=TRAINS,
    replays=("58",),
    varies="load with trainable=True",
)
def loading_frees_the_base() -> Adapter:
    return Thaws()


class FactorsAlone(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        for tensor in (self.biases(model) | self.whole_tensors(model)).values():
            tensor.requires_grad_(False)
        return model


@fault(
    sin="Of an adapter loaded to be trained on the factors train, its biases and modules do not.",
    killed_by=BESIDE,
    varies="load with trainable=True, with biases or modules_to_save",
)
def loading_frees_the_factors_alone() -> Adapter:
    return FactorsAlone()


class FreezesFactors(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=True)
        for tensor in self.factor_tensors(model).values():
            tensor.requires_grad_(trainable)
        return model


@fault(
    sin="Of an adapter loaded for inference the factors are frozen, its biases and modules train.",
    killed_by=BESIDE,
    varies="load with trainable=False, with biases or modules_to_save",
)
def loading_freezes_the_factors_alone() -> Adapter:
    return FreezesFactors()


class ForgetsOnB(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        for key, tensor in self.factor_tensors(model).items():
            tensor.requires_grad_(trainable and "lora_bias" not in key)
        return model


@fault(
    sin="The bias on B of an adapter loaded to be trained on is frozen.",
    killed_by=BESIDE,
    varies="load with trainable=True, under lora_bias",
)
def loading_freezes_the_bias_on_b() -> Adapter:
    return ForgetsOnB()


class FilePerLayer(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        for path in self.layers(model):
            (directory / f"{path}.layer").touch()

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        config, state = settings.read(directory)
        found = sorted(file.stem for file in directory.glob("*.layer"))
        model = self.inject(base, replace(config, target_modules=tuple(found)))
        self.load_state_dict(model, self.state_dict(model) | state)
        self.state(model).trainable["default"] = trainable
        self.set_trainability(model)
        return model


@fault(
    sin="Each layer has its file, and those of an adapter that was saved there before are loaded, too.",
    killed_by="checkpoint/load-reads-what-is-there",
    varies="saving over an adapter of more layers",
)
def loads_the_layers_of_an_older_file() -> Adapter:
    return FilePerLayer()


class Eval(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        return super().load(base, directory, trainable=trainable).eval()


@fault(
    sin="Loading always ends in eval mode: training goes on without dropout.",
    killed_by=MODE,
    replays=("55",),
    varies="a base in train mode",
)
def loading_ends_in_eval_mode() -> Adapter:
    return Eval()


class LeftInTrain(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        for layer in self.layers(model).values():
            layer.adapters.train()
        return model


@fault(
    sin="The loaded adapter's own modules are left in train mode: dropout acts at inference.",
    killed_by=MODE,
    replays=("54", "119"),
    varies="a base in eval mode",
)
def loading_leaves_the_adapter_in_train_mode() -> Adapter:
    return LeftInTrain()
