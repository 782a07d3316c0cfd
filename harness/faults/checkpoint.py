"""Adapters that save too little or too much, or give back something else than was saved."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.adapter import load_exactly
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_layer
from harness.faults.record import fault
from harness.faults.unmerge import Subtracts

if TYPE_CHECKING:
    from torch import Tensor

    from harness.adapter import Adapter

COMPLETE = "checkpoint/complete"
ROUND_TRIP = "checkpoint/round-trip-bits"


class Selects(Reference):
    """Saves and loads what `chosen` names, and is silent about the rest."""

    def chosen(self, model: nn.Module, key: str) -> bool:
        """Whether a key is saved and loaded."""
        raise NotImplementedError

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = super().state_dict(model)
        return {key: tensor for key, tensor in own.items() if self.chosen(model, key)}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(self.state_dict(model), state)


# -- what is saved ---------------------------------------------------------------------------------


class LastLayer(Selects):
    def chosen(self, model: nn.Module, key: str) -> bool:
        last = list(self.layers(model))[-1]
        return key not in self.factor_tensors(model) or key.startswith(f"{last}.")


@fault(
    sin="Only the last layer's factors are saved.",
    killed_by=COMPLETE,
    replays=("P-8",),
    varies="several layers",
)
def saves_only_the_last_layer() -> Adapter:
    return LastLayer()


class Nothing(Selects):
    def chosen(self, model: nn.Module, key: str) -> bool:
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
    def chosen(self, model: nn.Module, key: str) -> bool:
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
    def chosen(self, model: nn.Module, key: str) -> bool:
        return key not in self.whole_tensors(model)


@fault(
    sin="Modules that are trained whole are not saved.",
    killed_by=COMPLETE,
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


# -- names -----------------------------------------------------------------------------------------


class NoWeights(Selects):
    def chosen(self, model: nn.Module, key: str) -> bool:
        return "weight" not in key.rsplit(".", 1)[0]


@fault(
    sin="A key with `weight` in its module's name is taken for one of the base and left out.",
    killed_by="checkpoint/odd-names",
    replays=("51",),
    varies="a module called weight_proj",
)
def leaves_out_modules_called_weight() -> Adapter:
    return NoWeights()


class BeginsAlike(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().load_state_dict(model, state)
        with torch.no_grad():
            for key, tensor in self.whole_tensors(model).items():
                path, name = key.rsplit(".", 1)
                for other in sorted(state):
                    if other.startswith(path) and other.endswith(f".{name}"):
                        tensor.copy_(state[other])


@fault(
    sin="A module trained whole gets what belongs to another whose name begins with its own.",
    killed_by="checkpoint/odd-names",
    replays=("52",),
    varies="`foo` beside `foobar` in modules_to_save",
)
def takes_a_module_for_another_that_begins_alike() -> Adapter:
    return BeginsAlike()


class OddAdapter(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        if "weight" not in self.state(model).active:
            super().load_state_dict(model, state)


@fault(
    sin="Nothing is loaded into an adapter whose own name has `weight` in it.",
    killed_by="checkpoint/odd-names",
    replays=("51",),
    varies="an adapter called after a weight",
)
def loads_nothing_into_adapters_called_weight() -> Adapter:
    return OddAdapter()


class ByText(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        ours = self.factor_tensors(model)
        given = (state[key] for key in sorted(key for key in state if key in ours))
        super().load_state_dict(model, state | dict(zip(ours, given, strict=True)))

    def factor_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        found = super().factor_tensors(model)
        return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(key: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


@fault(
    sin="Entries are assigned in the order of their text: layer 10 before layer 2.",
    killed_by="checkpoint/many-layers",
    replays=("P-9",),
    varies="more than ten layers",
)
def loads_layers_in_the_order_of_their_text() -> Adapter:
    return ByText()


# -- loading ---------------------------------------------------------------------------------------


class TakesDtype(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().load_state_dict(model, state)
        for key, tensor in self.trained(model).items():
            tensor.data = state[key].clone()


@fault(
    sin="Loaded factors take the dtype of the checkpoint.",
    killed_by="checkpoint/dtype-kept",
    replays=("68",),
    varies="a checkpoint in another dtype",
)
def takes_the_dtype_of_the_checkpoint() -> Adapter:
    return TakesDtype()


class Decodes(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = self.state_dict(model)
        read = {
            k: t.view(torch.int16) if k in own and t.dtype == torch.bfloat16 != own[k].dtype else t
            for k, t in state.items()
        }
        super().load_state_dict(model, read)


@fault(
    sin="The bytes of a bfloat16 checkpoint are read as numbers of another kind.",
    killed_by="checkpoint/dtype-kept",
    replays=("67",),
    varies="a checkpoint in another dtype",
)
def reads_the_bytes_of_another_dtype() -> Adapter:
    return Decodes()


class Loads(Reference):
    layer = Subtracts

    def require_unmerged(self, model: nn.Module, verb: str) -> None:
        if verb != "load":
            super().require_unmerged(model, verb)


@fault(
    sin="Loading while merged leaves the old update in W, and unmerging takes out the new one.",
    killed_by="checkpoint/two-stage-load",
    replays=("46",),
    varies="a load while merged",
)
def loads_while_merged() -> Adapter:
    return Loads()


class Renames(Adapted):
    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


@fault(
    sin="The base's weights get other names, and its own checkpoint reaches none of them.",
    killed_by="checkpoint/base-keys-kept",
    replays=("45", "65"),
    varies="the base's weights loaded after injection",
)
def renames_the_keys_of_the_base() -> Adapter:
    return with_layer(Renames)


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
            if k in own and t.shape[1:] == own[k].shape[1:] and len(t) == 1
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
