"""Adapters whose checkpoint is right, and is loaded into the wrong place or taken with whatever it lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.checkpoint import ROUND_TRIP, Selects
from harness.faults.merge import with_layer
from harness.faults.record import fault
from harness.faults.unmerge import Subtracts

if TYPE_CHECKING:
    from torch import Tensor

    from harness.adapter import Adapter


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


class LoadsForGood(Reference):
    capabilities = replace(
        Reference.capabilities, features=Reference.capabilities.features - {"unmerge"}
    )

    def require_unmerged(self, model: nn.Module, verb: str) -> None:
        if verb != "load":
            super().require_unmerged(model, verb)


@fault(
    sin="What cannot be unmerged takes a checkpoint while merged, and goes on with the old update.",
    killed_by="checkpoint/two-stage-load",
    replays=("46",),
    varies="a load while merged, without unmerge",
)
def loads_while_merged_for_good() -> Adapter:
    return LoadsForGood()


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


class ByPosition(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = self.state_dict(model)
        if own.keys() == state.keys():
            state = dict(zip(own, state.values(), strict=True))
        super().load_state_dict(model, state)


@fault(
    sin="Entries are taken one after the other, whatever their names.",
    killed_by="checkpoint/complete",
    varies="a checkpoint whose entries come in another order",
)
def loads_by_position() -> Adapter:
    return ByPosition()


class Turns(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        square = {k: t.T for k, t in state.items() if t.dim() == 2 and t.shape[0] == t.shape[1]}
        super().load_state_dict(model, state | square)


@fault(
    sin="A square factor is loaded transposed.",
    killed_by=ROUND_TRIP,
    varies="a rank as large as the layer is wide",
)
def turns_square_factors() -> Adapter:
    return Turns()


class Aliases(Reference):
    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().load_state_dict(model, state)
        for key, tensor in self.trained(model).items():
            if tensor.dtype == state[key].dtype:
                tensor.data = state[key]


@fault(
    sin="The model goes on with the very tensors of the checkpoint it was given.",
    killed_by=ROUND_TRIP,
    varies="a checkpoint that is written to after it was loaded",
)
def lives_on_in_the_checkpoint() -> Adapter:
    return Aliases()


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
