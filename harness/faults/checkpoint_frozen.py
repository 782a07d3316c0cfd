"""Adapters whose checkpoint goes by what trains, or by names made flat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.adapter import load_exactly
from harness.adapters.reference import Reference
from harness.faults.record import fault

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import Adapter


class WhatTrains(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        trained = self.trained(model).items()
        return {key: tensor.detach() for key, tensor in trained if tensor.requires_grad}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(super().state_dict(model), state)


@fault(
    sin="What is saved is what trains: of a frozen model, nothing.",
    killed_by="checkpoint/same-frozen-or-not",
    varies="a model that was frozen",
)
def saves_what_trains() -> Adapter:
    return WhatTrains()


class FactorsAndWhatTrains(WhatTrains):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        factors = self.factor_tensors(model).items()
        return super().state_dict(model) | {key: tensor.detach() for key, tensor in factors}


@fault(
    sin="Factors are saved by their names, and what is trained beside them if it trains.",
    killed_by="checkpoint/same-frozen-or-not",
    varies="a frozen model with biases or modules that were trained",
)
def saves_beside_the_factors_what_trains() -> Adapter:
    return FactorsAndWhatTrains()


class Flattens(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return {key.replace(".", "_"): t for key, t in super().state_dict(model).items()}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(self.state_dict(model), state)


@fault(
    sin="Dots of a name become underscores in its key, so that two layers share one.",
    killed_by="checkpoint/odd-names",
    varies="names that differ in dots and underscores alone",
)
def flattens_names_into_keys() -> Adapter:
    return Flattens()
