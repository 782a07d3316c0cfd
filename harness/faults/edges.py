"""Adapters that are wrong for tensors, names and bases of a kind that is seldom met."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapter import load_exactly
from harness.adapters import settings
from harness.adapters.equation import Branch, EmbeddingBranch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import branches, layer, wrong

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from harness.adapter import Adapter

ROUND_TRIP = "checkpoint/round-trip-bits"
BESIDE = "trainable/beside-factors"
NAMES = "checkpoint/odd-names"


@fault(
    sin="The branch stops after the first 1,024 positions.",
    killed_by="forward/any-batch",
    varies="an input with more than 1,024 positions",
)
def stops_after_1024_positions() -> Adapter:
    """As a kernel whose grid has one block."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        if y.dim() == 3:  # (b, t, o)
            y = torch.cat([y[:, :1024], torch.zeros_like(y[:, 1024:])], 1)
        return y

    return wrong(branches={**branches(forward=forward), nn.Embedding: EmbeddingBranch})


def _write_over(x: Tensor, gradient: Tensor) -> None:
    x.data.copy_(gradient)


@fault(
    sin="The backward pass writes the input's gradient over the input.",
    killed_by="forward/gradients",
    varies="the input after the backward pass",
)
def reuses_the_input_for_its_gradient() -> Adapter:
    """To save its memory: right while nothing else needs the input, as in a test of one layer."""

    def drop(self: Any, x: Tensor) -> Tensor:
        if x.requires_grad and x.is_leaf:
            x.register_hook(partial(_write_over, x))  # type: ignore[no-untyped-call]
        return Branch.drop(self, x)

    return wrong(branches={**branches(drop=drop), nn.Embedding: EmbeddingBranch})


@fault(
    sin="Loading reads the numbers of an entry as they lie in memory, whatever its strides.",
    killed_by=ROUND_TRIP,
    varies="a checkpoint of views",
)
def loads_memory_in_a_row() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        raw = {k: t.as_strided(t.shape, torch.empty(t.shape).stride()) for k, t in state.items()}
        Reference.load_state_dict(self, model, raw)

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="Loading sets every factor to zero before it copies: of the model's own live tensors nothing is left.",
    killed_by=ROUND_TRIP,
    varies="loading the live tensors of the model itself",
)
def zeroes_before_it_loads() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        Reference.load_state_dict(self, model, state)
        for tensor in self.state_dict(model).values():
            tensor.zero_()
        load_exactly(self.state_dict(model), state)

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="A merge adds to a reshaped weight, which is a copy where its numbers do not lie in a row.",
    killed_by="merge/any-strides",
    varies="a base's weight in other strides",
)
def merges_into_a_reshaped_copy() -> Adapter:
    def merge_weight(self: Any, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:  # noqa: ARG001
        total = weight.to(torch.promote_types(weight.dtype, delta.dtype), copy=True)
        total.reshape(len(total), -1)[rows or slice(None)] += delta.reshape(len(delta), -1)
        return total.to(weight.dtype)

    return wrong(layer=layer(merge_weight=merge_weight))


def _on_a_frozen_base(tensors: Any) -> Adapter:
    """A reference that leaves those tensors frozen where nothing of the base trained before."""

    def inject(self: Any, model: nn.Module, config: Any) -> nn.Module:
        frozen = not any(p.requires_grad for p in model.parameters())
        model = Reference.inject(self, model, config)
        for tensor in tensors(self, model).values() if frozen else ():
            tensor.requires_grad_(False)
        return model

    adapter: Adapter = wrong(inject=inject)
    return adapter


@fault(
    sin="Factors take `requires_grad` from the weight: on a base that was frozen before, none trains.",
    killed_by="trainable/only-lora",
    varies="a base that was frozen before it is injected",
)
def factors_of_a_frozen_base_are_frozen() -> Adapter:
    return _on_a_frozen_base(Reference.factor_tensors)


@fault(
    sin="A module to save is a copy of the base's: of a base that was frozen before, it stays frozen.",
    killed_by=BESIDE,
    varies="modules to save of a base that was frozen before it is injected",
)
def saved_modules_of_a_frozen_base_are_frozen() -> Adapter:
    return _on_a_frozen_base(Reference.whole_tensors)


@fault(
    sin="Modules to save are found by how their names end, with a dot before it or without.",
    killed_by=BESIDE,
    varies="a module whose name ends as that of one to save",
)
def finds_saved_modules_by_their_ends() -> Adapter:
    """As PEFT 0.21 does: https://github.com/huggingface/peft/issues/1917."""

    def whole_modules(self: Any, model: nn.Module, config: Any, targets: Any) -> list[str]:
        Reference.whole_modules(self, model, config, targets)
        ends = tuple(config.modules_to_save)
        return [path for path, _ in model.named_modules() if ends and path.endswith(ends)]

    return wrong(whole_modules=whole_modules)


@fault(
    sin="A module saved whole whose name has `lora_` in it is not loaded.",
    killed_by=NAMES,
    varies="a module to save called `lora_gate`",
)
def does_not_load_modules_called_lora() -> Adapter:
    """As PEFT up to 0.20 does: https://github.com/huggingface/peft/issues/3433."""

    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        own = {k: t for k, t in self.whole_tensors(model).items() if "lora_" in k}
        Reference.load_state_dict(self, model, {**state, **{k: t.detach() for k, t in own.items()}})

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="The checkpoint leaves out the layers that another adapter is called as.",
    killed_by=NAMES,
    varies="an adapter with the name of a module",
)
def leaves_out_what_another_is_called() -> Adapter:
    """As PEFT up to 0.20 does: https://github.com/huggingface/peft/issues/3584."""

    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        others = {*self.state(model).configs} - {self.state(model).active}
        found = Reference.state_dict(self, model)
        return {key: t for key, t in found.items() if not others & {*key.split(".")}}

    return wrong(state_dict=state_dict)


@fault(
    sin="`load` takes what the file has, and leaves the rest of the adapter as it was drawn.",
    killed_by="checkpoint/load-of-less-is-loud",
    replays=("48", "49"),
    varies="a file that lacks a tensor",
)
def loads_what_the_file_has() -> Adapter:
    def load(self: Any, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        config, state = settings.read(directory)
        model: nn.Module = self.inject(base, config)
        own = self.state_dict(model)
        self.load_state_dict(model, {key: state.get(key, own[key]) for key in own})
        self.state(model).trainable["default"] = trainable
        self.set_trainability(model)
        return model

    return wrong(load=load)


@fault(
    sin="Layers are kept under their names with underscores for dots, so that one replaces another.",
    killed_by="targeting/dotted-names",
    varies="`a.b_c` beside `a_b.c`",
)
def keeps_layers_by_flattened_names() -> Adapter:
    def factors(self: Any, model: nn.Module) -> dict[str, Any]:
        found = Reference.factors(self, model)
        by_name = {path.replace(".", "_"): (path, parts) for path, parts in found.items()}
        return dict(by_name.values())

    return wrong(factors=factors)


@fault(
    sin="In train mode without gradient, as old log-probabilities are taken, the branch is left out.",
    killed_by="forward/equals-oracle",
    varies="a call in train mode without gradient",
)
def no_branch_in_train_without_gradient() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training and not torch.is_grad_enabled():
            return self.original(x)  # type: ignore[no-any-return]
        return Adapted.forward(self, x)

    return wrong(layer=layer(forward=forward))


@fault(
    sin="An embedding's factors are saved in the base's dtype.",
    killed_by="checkpoint/dtype-kept",
    varies="an embedding in half precision",
)
def saves_embeddings_in_the_bases_dtype() -> Adapter:
    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        found = Reference.state_dict(self, model)
        for path, adapted in self.layers(model).items():
            if isinstance(adapted.original, nn.Embedding):
                for key in (k for k in found if k.startswith(f"{path}.lora_")):
                    found[key] = found[key].to(adapted.weight.dtype)
        return found

    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(Reference.state_dict(self, model), state)

    return wrong(state_dict=state_dict, load_state_dict=load_state_dict)


@fault(
    sin="Merging folds what trains, and marks the rest as merged: an adapter that is served is gone.",
    killed_by="merge/same-output",
    varies="merging a model that is frozen",
)
def merges_what_trains() -> Adapter:
    def merge(self: Any, model: nn.Module) -> None:
        if any(p.requires_grad for p in model.parameters()):
            Reference.merge(self, model)
            return
        for adapted in self.layers(model).values():
            adapted.merge(adapted.base)

    return wrong(merge=merge)


@fault(
    sin="Unmerging takes out what trains: of a frozen adapter the update stays, and acts beside the branch.",
    killed_by="merge/restores-base",
    varies="unmerging a model that is frozen",
)
def unmerges_what_trains() -> Adapter:
    def unmerge(self: Any, model: nn.Module) -> None:
        if any(p.requires_grad for p in model.parameters()):
            Reference.unmerge(self, model)
            return
        for adapted in self.layers(model).values():
            adapted.kept = []

    return wrong(unmerge=unmerge)
