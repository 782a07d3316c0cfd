"""Adapters whose calls forgot a kind of layer: what is saved, loaded, deleted or done while merged."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters import settings
from harness.adapters.reference import Reference
from harness.faults.other_kinds import is_plain, loading
from harness.faults.record import fault
from harness.faults.wrong import wrong

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.adapter import Adapter
    from harness.adapters.equation import Branch
    from harness.adapters.wrapped import Adapted


def is_fused(layer: Adapted) -> bool:
    """Whether it is adapted by parts."""
    return any(branch.rows is not None for branch in layer.branches)


def other_branches(adapter: Any, model: nn.Module) -> Iterator[tuple[Adapted, Branch]]:
    """Every branch but those of plain linear layers."""
    for layer in adapter.layers(model).values():
        for branch in layer.branches:
            if not is_plain(layer, branch):
                yield layer, branch


@fault(
    sin="Under bias='lora_only' a fused projection's bias stays frozen, and is not saved.",
    killed_by="trainable/bias-modes",
    replays=("44",),
    varies="bias='lora_only' on a fused projection",
)
def a_fused_bias_stays_frozen() -> Adapter:
    def biases(self: Any, model: nn.Module) -> dict[str, Tensor]:
        fused = {f"{path}.bias" for path, one in self.layers(model).items() if is_fused(one)}
        return {k: t for k, t in Reference.biases(self, model).items() if k not in fused}

    return wrong(biases=biases)


@fault(
    sin="What is loaded frozen trains all the same, but for plain linear layers.",
    killed_by="checkpoint/load-trainability",
    replays=("54",),
    varies="an embedding, loaded frozen",
)
def loads_trainable_embeddings() -> Adapter:
    def free(branch: Branch, _: object) -> None:
        branch.requires_grad_(True)

    return loading(free)


@fault(
    sin="Convolutions and fused projections are loaded with no bias on B.",
    killed_by="checkpoint/save-restores-settings",
    replays=("43",),
    varies="lora_bias of a loaded convolution",
)
def loads_convolutions_without_the_bias_on_b() -> Adapter:
    def empty(branch: Branch, _: object) -> None:
        if branch.lora_bias is not None:
            branch.lora_bias.data.zero_()

    return loading(empty)


@fault(
    sin="Loading gives the factors of all but plain linear layers the checkpoint's dtype.",
    killed_by="checkpoint/dtype-kept",
    replays=("68",),
    varies="an embedding's checkpoint in another dtype",
)
def embeddings_take_the_checkpoints_dtype() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        Reference.load_state_dict(self, model, state)
        for _, branch in other_branches(self, model):
            for parameter in branch.parameters():
                parameter.data = parameter.data.to(next(iter(state.values())).dtype)

    return wrong(load_state_dict=load_state_dict)


def _without_what_is_merged(self: Any, model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint, B zero where it is folded into anything but a plain linear layer's weight."""
    folded = {id(b.lora_B) for layer, b in other_branches(self, model) if layer.kept}
    return {
        key: torch.zeros_like(tensor) if id(tensor) in folded else tensor.detach()
        for key, tensor in self.trained(model).items()
    }


@fault(
    sin="While merged, the checkpoint of all but plain linear layers is empty: it is in the weight.",
    killed_by="checkpoint/same-merged-or-not",
    replays=("P-7",),
    varies="the checkpoint of a merged embedding",
)
def saves_no_merged_embeddings() -> Adapter:
    return wrong(state_dict=_without_what_is_merged)


@fault(
    sin="While merged, `save` writes nothing of all but plain linear layers.",
    killed_by="checkpoint/save-same-merged-or-not",
    replays=("P-7",),
    varies="saving a merged embedding",
)
def writes_no_merged_embeddings() -> Adapter:
    def save(self: Any, model: nn.Module, directory: Path) -> None:
        settings.write(Path(directory), self.config(model), _without_what_is_merged(self, model))

    return wrong(save=save)


def _lets(fits: Any, verb: str) -> Adapter:
    """A reference that does what `verb` says while layers that fit are merged."""

    def require_unmerged(self: Any, model: nn.Module, asked: str) -> None:
        merged = [layer for layer in self.layers(model).values() if layer.kept]
        if asked != verb or not any(map(fits, merged)):
            Reference.require_unmerged(self, model, asked)

    return wrong(require_unmerged=require_unmerged)


@fault(
    sin="A merged fused projection is loaded into: the old update goes on acting.",
    killed_by="checkpoint/two-stage-load",
    replays=("46",),
    varies="a load into a merged fused projection",
)
def loads_into_merged_parts() -> Adapter:
    return _lets(is_fused, "load")


@fault(
    sin="Another adapter is activated while an embedding or a convolution is merged, whose weight stays.",
    killed_by="several/while-merged",
    replays=("42",),
    varies="activating while an embedding is merged",
)
def activates_beside_merged_embeddings() -> Adapter:
    return _lets(lambda layer: not isinstance(layer.original, nn.Linear), "activate")


class DisablesMergedWhole(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        with super().disable(model):
            for layer in self.layers(model).values():
                layer.enabled = bool(layer.kept) and is_fused(layer)
            yield


@fault(
    sin="Inside `disable` a merged fused projection keeps its merged weight.",
    killed_by="merge/disabled-while-merged",
    varies="disabling a merged fused projection",
)
def disable_forgets_merged_parts() -> Adapter:
    return DisablesMergedWhole()


class KeepsDeletedParts(Reference):
    def delete(self, model: nn.Module, name: str) -> None:
        held = {
            layer: layer.adapters[name]
            for layer in self.layers(model).values()
            if name in layer.adapters and is_fused(layer)
        }
        super().delete(model, name)
        for layer, branches in held.items():
            layer.deleted = branches


@fault(
    sin="Deleting an adapter leaves its parts of fused projections in the model.",
    killed_by="several/delete",
    replays=("140",),
    varies="deleting an adapter of a fused projection",
)
def deleted_parts_stay() -> Adapter:
    return KeepsDeletedParts()
