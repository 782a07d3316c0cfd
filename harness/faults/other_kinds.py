"""Adapters that are right for a plain linear layer in float32, and forgot another kind, dtype or call there."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters import settings
from harness.adapters.equation import Branch, ConvBranch
from harness.adapters.quantized import with_weight
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.forward_calls import Notes
from harness.faults.merge import with_branches, with_layer
from harness.faults.record import fault
from harness.faults.training import linear
from harness.faults.wrong import after_injection, wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.adapter import Adapter, LoraConfig


def is_plain(adapted: Adapted, branch: Branch) -> bool:
    """Whether a branch is that of a whole linear layer."""
    return isinstance(adapted.original, nn.Linear) and branch.rows is None


def loading(spoil: Callable[[Branch, LoraConfig], None]) -> Adapter:
    """A reference that does something to all it loads but plain linear layers."""

    def load(self: Any, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        config, _ = settings.read(Path(directory))
        model = Reference.load(self, base, directory, trainable=trainable)
        for adapted in self.layers(model).values():
            for branch in adapted.branches:
                if not is_plain(adapted, branch):
                    spoil(branch, config)
        return model

    return wrong(load=load)


@fault(
    sin="Convolutions and fused projections are loaded without their dropout.",
    killed_by="checkpoint/save-restores-settings",
    replays=("44",),
    varies="dropout of a loaded convolution",
)
def loads_convolutions_without_dropout() -> Adapter:
    return loading(lambda branch, _: setattr(branch, "dropout", None))


@fault(
    sin="Embeddings, convolutions and fused projections are loaded with alpha/r, rsLoRA or not.",
    killed_by="checkpoint/save-restores-settings",
    replays=("19",),
    varies="rsLoRA of a loaded embedding",
)
def loads_embeddings_without_rslora() -> Adapter:
    return loading(lambda branch, c: setattr(branch, "scaling", c.lora_alpha / c.r))


@fault(
    sin="On a bfloat16 base the parts of a fused projection are merged half too far.",
    killed_by="merge/same-output",
    varies="a fused projection in bfloat16",
)
def merges_parts_too_far_in_bfloat16() -> Adapter:
    def delta(self: Any, base: Any) -> Tensor:
        half = self.rows is not None and base.weight.dtype == torch.bfloat16
        return Branch.delta(self, base) * (1.5 if half else 1)

    return wrong(branches=linear(delta=delta))


class NotesImages(Notes, ConvBranch):
    """As `Notes`, of images."""


@fault(
    sin="A convolution's branch casts images to the dtype that its factors had when they were made.",
    killed_by="forward/after-a-cast",
    varies="a convolution, cast after injection",
)
def convolutions_remember_the_first_dtype() -> Adapter:
    return with_branches({nn.Conv2d: NotesImages})


class DrawsAtRandom(ConvBranch):
    def mask(self, x: Tensor, p: float) -> Tensor:
        if not self.training:
            return x
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
        keep = torch.rand(x.shape, generator=generator) >= p
        return x * keep.to(x.device) / (1 - p)


@fault(
    sin="A convolution's dropout draws from a generator that the operating system seeds.",
    killed_by="training/deterministic",
    replays=("P-15",),
    varies="two runs of a convolution from one seed",
)
def convolutions_drop_as_the_system_says() -> Adapter:
    return with_branches({nn.Conv2d: DrawsAtRandom})


@fault(
    sin="A convolution's A stops training once an optimizer has stepped.",
    killed_by="training/same-trajectory-as-reference",
    varies="several steps of a convolution",
)
def convolutions_stop_training_a() -> Adapter:
    def act(adapter: Any, model: nn.Module) -> None:
        for adapted in adapter.layers(model).values():
            for branch in adapted.branches if isinstance(adapted.original, nn.Conv2d) else ():
                branch.lora_A.register_hook(_once(branch.lora_A))

    return after_injection(act)


def _once(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that lets gradients through until the factor has been written to."""
    seen: list[int] = []

    def hook(slope: Tensor) -> Tensor:
        seen.append(factor._version)  # what a step raises
        return slope if factor._version == seen[0] else 0 * slope

    return hook


@fault(
    sin="Loading puts new parameters into all but plain linear layers: the optimizer holds the old ones.",
    killed_by="training/resume-equals-uninterrupted",
    replays=("56", "57"),
    varies="an optimizer made before an embedding is loaded",
)
def loading_makes_new_parameters_elsewhere() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        Reference.load_state_dict(self, model, state)
        for adapted in self.layers(model).values():
            for branch in adapted.branches:
                if is_plain(adapted, branch):
                    continue
                for name, old in list(branch.named_parameters()):
                    setattr(branch, name, nn.Parameter(old.detach().clone(), old.requires_grad))

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="Factors of all but plain linear layers are stored in the base's bfloat16.",
    killed_by="training/small-steps-count",
    replays=("107",),
    varies="an embedding in bfloat16, a small learning rate",
)
def other_factors_in_the_dtype_of_the_base() -> Adapter:
    def act(adapter: Any, model: nn.Module) -> None:
        for adapted in adapter.layers(model).values():
            dtype = adapted.original.weight.dtype
            for branch in adapted.branches:
                if dtype == torch.bfloat16 and not is_plain(adapted, branch):
                    branch.to(dtype)

    return after_injection(act)


class MergesUnseen(Adapted):
    def merged(self) -> nn.Module:
        base: Any = self.base
        if isinstance(base, nn.Linear):
            return super().merged()
        weight, bias = base.weight.detach(), getattr(base, "bias", None)
        for branch in self.branches:
            weight = self.merge_weight(weight, branch.delta(base), branch.rows)
            bias = self.merge_bias(weight, bias, branch.bias_delta(), branch.rows)
        return with_weight(base, weight, bias)


@fault(
    sin="Only a linear layer's merge looks for NaN.",
    killed_by="merge/refuses-nan",
    replays=("37",),
    varies="a NaN in an embedding's factors",
)
def merges_nan_into_embeddings() -> Adapter:
    return with_layer(MergesUnseen)


class FreesMerged(Adapted):
    def merge(self, merged: nn.Module) -> None:
        if isinstance(merged, nn.Conv2d):
            merged.weight.requires_grad_(True)
        super().merge(merged)


@fault(
    sin="A merged convolution's weight is a new parameter, and trains.",
    killed_by="merge/base-stays-frozen",
    varies="a merged convolution",
)
def merged_convolutions_train() -> Adapter:
    return with_layer(FreesMerged)


class SharesParts(Adapted):
    def __deepcopy__(self, memo: dict[int, Any]) -> SharesParts:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if any(branch.rows for branch in self.branches):
            twin.adapters = self.adapters
        return twin


@fault(
    sin="A copy of a model shares the factors of its fused projections.",
    killed_by="state/deepcopy-and-pickle",
    replays=("128",),
    varies="a copy of a fused projection",
)
def copies_share_their_parts() -> Adapter:
    return with_layer(SharesParts)
