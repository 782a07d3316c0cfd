"""Adapters whose checkpoint is right, and is loaded into the wrong place or in the wrong state."""

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
    def _chosen(self, model: nn.Module, key: str) -> bool:
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
