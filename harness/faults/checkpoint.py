"""Adapters that save too little or too much, or give back something else than was saved."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.adapter import load_exactly
from harness.adapters.reference import Reference
from harness.faults.record import fault

if TYPE_CHECKING:
    from torch import Tensor

    from harness.adapter import Adapter

COMPLETE = "checkpoint/complete"
EVERY_LAYER = "checkpoint/every-layer"
ROUND_TRIP = "checkpoint/round-trip-bits"


class Selects(Reference):
    """Saves and loads what `_chosen` names, and is silent about the rest."""

    def _chosen(self, model: nn.Module, key: str) -> bool:
        """Whether a key is saved and loaded."""
        raise NotImplementedError

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = super().state_dict(model)
        return {key: tensor for key, tensor in own.items() if self._chosen(model, key)}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(self.state_dict(model), state)


# -- what is saved ---------------------------------------------------------------------------------


class LastLayer(Selects):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        last = list(self.layers(model))[-1]
        return key not in self.factor_tensors(model) or key.startswith(f"{last}.")


@fault(
    sin="Only the last layer's factors are saved.",
    killed_by=EVERY_LAYER,
    replays=("P-8",),
    varies="several layers",
)
def saves_only_the_last_layer() -> Adapter:
    return LastLayer()


class Nothing(Selects):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        return False


@fault(
    sin="The filter of keys runs twice, and the file is empty.",
    killed_by=COMPLETE,
    replays=("47", "62"),
    varies="factors that matter",
)
def saves_an_empty_checkpoint() -> Adapter:
    return Nothing()


class NoEmbedding(Selects):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        layer = self.layers(model).get(key.rsplit(".", 1)[0])
        return layer is None or not isinstance(layer.original, torch.nn.Embedding)


@fault(
    sin="An embedding's factors are not saved.",
    killed_by=COMPLETE,
    replays=("61",),
    varies="an adapted embedding",
)
def leaves_the_embedding_out() -> Adapter:
    return NoEmbedding()


class NoWhole(Selects):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        return key not in self.whole_tensors(model)


@fault(
    sin="Modules that are trained whole are not saved.",
    killed_by=EVERY_LAYER,
    replays=("29",),
    varies="modules_to_save",
)
def leaves_saved_modules_out() -> Adapter:
    return NoWhole()


class ByName(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        named = {k: t for k, t in model.state_dict().items() if k.endswith("lora_gate.weight")}
        return super().state_dict(model) | named

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        ours = {k: t for k, t in state.items() if not k.endswith("lora_gate.weight")}
        load_exactly(super().state_dict(model), ours)


@fault(
    sin="Whatever has `lora_` in its name is saved, the base's own gate too.",
    killed_by="checkpoint/only-lora",
    replays=("59",),
    varies="a base with `lora_` in a name",
)
def saves_all_that_is_called_lora() -> Adapter:
    return ByName()


class WithBase(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        tables = {
            f"{path}.base.weight": layer.original.weight.detach()
            for path, layer in self.layers(model).items()
            if isinstance(layer.original, torch.nn.Embedding)
        }
        return super().state_dict(model) | tables

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        ours = {key: tensor for key, tensor in state.items() if ".base." not in key}
        load_exactly(super().state_dict(model), ours)


@fault(
    sin="The checkpoint of an adapted embedding holds the whole table, too.",
    killed_by="checkpoint/only-lora",
    replays=("60",),
    varies="an adapted embedding",
)
def saves_the_table_it_adapts() -> Adapter:
    return WithBase()


class WithBuffers(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = super().state_dict(model)
        held = {tensor.data_ptr() for tensor in own.values()}
        return own | {k: b for k, b in model.named_buffers() if b.data_ptr() not in held}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(self.state_dict(model), state)


@fault(
    sin="All that is no frozen parameter is saved: the base's running statistics too.",
    killed_by="checkpoint/only-lora",
    varies="a base with buffers",
)
def saves_the_buffers_of_the_base() -> Adapter:
    return WithBuffers()


class Drags(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = super().state_dict(model)
        base = torch.cat([p.detach().flatten().float() for p in model.parameters()])
        return {
            key: torch.cat([base.to(t.dtype), t.flatten()])[len(base) :].view(t.shape)
            for key, t in own.items()
        }

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(super().state_dict(model), state)


@fault(
    sin="Entries are views of one large buffer that holds the base: the file holds it too.",
    killed_by="checkpoint/only-lora",
    replays=("P-17",),
    varies="the size of what is written",
)
def drags_the_base_along() -> Adapter:
    return Drags()


class Lossy(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return {k: t.bfloat16().to(t.dtype) for k, t in super().state_dict(model).items()}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(super().state_dict(model), state)


@fault(
    sin="Saving goes through bfloat16 and back.",
    killed_by=COMPLETE,
    replays=("67",),
    varies="factors that bfloat16 cannot hold",
)
def saves_through_half_precision() -> Adapter:
    return Lossy()


class Cached(Reference):
    """Remembers the live tensors of the first model of each shape, as long as that one lives."""

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = super().state_dict(model)
        key = tuple((name, tensor.shape) for name, tensor in own.items())
        first = _REMEMBERED[key]() if key in _REMEMBERED else None
        if first is None:
            _REMEMBERED[key] = weakref.ref(model)
            return own
        return super().state_dict(first)


_REMEMBERED: dict[object, weakref.ref[nn.Module]] = {}


@fault(
    sin="A cache across models answers with the tensors of another model of the same shape.",
    killed_by=ROUND_TRIP,
    replays=("64",),
    varies="two models in one process",
)
def answers_for_another_model() -> Adapter:
    return Cached()


class Doubles(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        merged = any(layer.kept for layer in self.layers(model).values())
        own = super().state_dict(model)
        return {k: 2 * t if merged and "lora_B" in k else t for k, t in own.items()}


@fault(
    sin="What is saved while merged counts the update twice.",
    killed_by="checkpoint/same-merged-or-not",
    replays=("P-7",),
    varies="a checkpoint made while merged",
)
def saves_the_update_twice_while_merged() -> Adapter:
    return Doubles()


class NoBias(Selects):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        return "lora_bias" not in key


@fault(
    sin="The trained bias on B is left out of the checkpoint.",
    killed_by=COMPLETE,
    replays=("43",),
    varies="lora_bias",
)
def leaves_the_bias_on_b_out() -> Adapter:
    return NoBias()


class NoBuffers(Selects):
    def _chosen(self, model: nn.Module, key: str) -> bool:
        kept = self.whole_tensors(model).get(key)
        return kept is None or isinstance(kept, nn.Parameter)


@fault(
    sin="Of a module that is saved whole the parameters are saved, and its buffers are not.",
    killed_by="checkpoint/saved-module-buffers",
    varies="a batch norm in modules_to_save, in eval mode",
)
def leaves_the_buffers_of_saved_modules_out() -> Adapter:
    return NoBuffers()
