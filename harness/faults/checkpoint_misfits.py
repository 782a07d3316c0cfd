"""Adapters that take a checkpoint which does not fit, or half of it before they find out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.adapters.reference import Reference
from harness.faults.record import fault

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import Adapter


class Ignores(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = self.state_dict(model)
        super().load_state_dict(model, own | {k: t for k, t in state.items() if k in own})


@fault(
    sin="Keys that do not fit, and keys that are missing, are ignored.",
    killed_by="checkpoint/misfit-is-loud",
    replays=("48", "49"),
    varies="a wrong prefix",
)
def ignores_keys_that_do_not_fit() -> Adapter:
    return Ignores()


class Filters(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = self.state_dict(model)
        fits = {
            k: t if k not in own or t.shape == own[k].shape else own[k] for k, t in state.items()
        }
        super().load_state_dict(model, fits)


@fault(
    sin="Entries of another shape are dropped before loading.",
    killed_by="checkpoint/misfit-is-loud",
    replays=("P-10",),
    varies="a checkpoint of another rank",
)
def drops_entries_of_another_shape() -> Adapter:
    return Filters()


class Stretches(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = self.state_dict(model)
        rows = {
            k: t.expand_as(own[k])
            if k in own and t.shape[1:] == own[k].shape[1:] and t.shape[:1] == (1,)
            else t
            for k, t in state.items()
        }
        super().load_state_dict(model, rows)


@fault(
    sin="A single row is copied to all of them.",
    killed_by="checkpoint/misfit-is-loud",
    replays=("P-10",),
    varies="an entry whose shape broadcasts",
)
def stretches_a_row() -> Adapter:
    return Stretches()


class KeepsWhole(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = {key: tensor.detach() for key, tensor in self.whole_tensors(model).items()}
        super().load_state_dict(model, own | state)


@fault(
    sin="A module to be trained whole that the checkpoint has not stays as it was.",
    killed_by="checkpoint/misfit-is-loud",
    replays=("29",),
    varies="modules_to_save, and a checkpoint without it",
)
def lets_a_whole_module_be_missing() -> Adapter:
    return KeepsWhole()


class KeepsBiases(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = {key: tensor.detach() for key, tensor in self.biases(model).items()}
        super().load_state_dict(model, own | state)


@fault(
    sin="A trained bias that the checkpoint has not stays as it was.",
    killed_by="checkpoint/misfit-is-loud",
    replays=("43",),
    varies="trained biases, and a checkpoint without them",
)
def lets_a_bias_be_missing() -> Adapter:
    return KeepsBiases()


class WritesFirst(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        own = self.state_dict(model)
        with torch.no_grad():
            for key, tensor in own.items():
                if key in state and state[key].shape == tensor.shape:
                    tensor.copy_(state[key])
        super().load_state_dict(model, state)


@fault(
    sin="What fits is written before the rest is found not to.",
    killed_by="checkpoint/misfit-changes-nothing",
    replays=("P-10",),
    varies="one entry of another shape among many",
)
def writes_before_it_checks() -> Adapter:
    return WritesFirst()


class Reshapes(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = self.state_dict(model)
        fitted = {
            k: t.reshape(own[k].shape) if k in own and own[k].numel() == t.numel() else t
            for k, t in state.items()
        }
        super().load_state_dict(model, fitted)


@fault(
    sin="An entry of another shape is taken if it has as many numbers.",
    killed_by="checkpoint/misfit-is-loud",
    varies="a factor that is transposed",
)
def reshapes_what_does_not_fit() -> Adapter:
    return Reshapes()
