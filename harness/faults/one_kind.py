"""Adapters whose code for one kind of layer, or for one shape of a batch, forgot what the others do."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_branches, with_layer
from harness.faults.record import fault
from harness.faults.wrong import branches, wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.adapter import Adapter, LoraConfig

GRADIENTS = "forward/any-batch-gradients"


class LookedUpWithoutRslora(EmbeddingBranch):
    def __init__(self, base: nn.Embedding, config: LoraConfig, rows: slice | None = None) -> None:
        super().__init__(base, config, rows)
        self.merged_scaling = config.lora_alpha / config.r

    def delta(self, base: Any) -> Tensor:
        return super().delta(base) / self.scaling * self.merged_scaling


@fault(
    sin="Merging an embedding folds alpha/r in, rsLoRA or not.",
    killed_by="merge/same-output",
    replays=("19",),
    varies="rsLoRA on an embedding, merged",
)
def merges_an_embedding_without_rslora() -> Adapter:
    return with_branches({nn.Embedding: LookedUpWithoutRslora})


class MergesConvolutionsAgain(Reference):
    def merge(self, model: nn.Module) -> None:
        again = [
            layer
            for layer in self.layers(model).values()
            if layer.kept and isinstance(layer.base, nn.Conv2d)
        ]
        super().merge(model)
        for layer in again:
            layer.base = layer.merged()


@fault(
    sin="Merging a merged convolution adds ΔW again.",
    killed_by="merge/idempotent",
    replays=("1",),
    varies="a second merge of a convolution",
)
def merges_convolutions_twice() -> Adapter:
    return MergesConvolutionsAgain()


class ConvolvesBeside(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        beside = self.kept and self.enabled and self.training and isinstance(self.base, nn.Conv2d)
        for branch in self.branches if beside else ():
            y = self.add(y, branch(self.base, x), branch.rows)
        return y


@fault(
    sin="In train mode a convolution's branch acts, merged or not.",
    killed_by="merge/train-mode",
    replays=("26",),
    varies="train mode while a convolution is merged",
)
def adds_a_convolutions_merged_branch_in_train_mode() -> Adapter:
    return with_layer(ConvolvesBeside)


class MergesNoBias(ConvBranch):
    def bias_delta(self) -> Tensor | None:
        return None


@fault(
    sin="Merging a convolution leaves the bias on B out.",
    killed_by="merge/bias-scaled",
    replays=("17",),
    varies="lora_bias on a convolution",
)
def merges_a_convolution_without_its_bias() -> Adapter:
    return with_branches({nn.Conv2d: MergesNoBias})


class ReadsChannelsFirst(ConvBranch):
    def drop(self, x: Tensor) -> Tensor:
        dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return super().drop(x.movedim(1, -1).reshape(x.shape) if dense and x.dim() == 4 else x)


@fault(
    sin="A convolution's branch reads channels-last images as channels-first.",
    killed_by="forward/any-batch",
    varies="an image in channels_last",
)
def reads_channels_last_as_channels_first() -> Adapter:
    """What a kernel without strides does."""
    return with_branches({nn.Conv2d: ReadsChannelsFirst})


class LooksUpLongs(EmbeddingBranch):
    def down(self, base: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.int64:
            raise TypeError("indices must be int64")
        return super().down(base, x)


@fault(
    sin="An adapted embedding takes 64-bit indices alone.",
    killed_by="forward/any-batch",
    varies="32-bit indices",
)
def refuses_short_indices() -> Adapter:
    """The base takes both."""
    return with_branches({nn.Embedding: LooksUpLongs})


def _backward(change: Callable[[Tensor], Tensor]) -> Adapter:
    """A reference whose linear branches are given `change(gradient)` to go on from."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        if y.requires_grad:
            y.register_hook(change)  # type: ignore[no-untyped-call]
        return y

    made = {nn.Linear: branches(forward=forward)[nn.Linear]}
    adapter: Adapter = wrong(branches={**Reference.branches, **made})
    return adapter


@fault(
    sin="The branch's backward pass knows (batch, tokens, features) alone.",
    killed_by=GRADIENTS,
    varies="inputs of two or four dimensions, in training",
)
def backward_knows_three_dimensions() -> Adapter:
    """Of others only the first row's gradient comes back."""
    return _backward(lambda g: g if g.dim() == 3 else torch.cat([g[:1], 0 * g[1:]]))


@fault(
    sin="The branch's backward pass reads the gradient as if it were contiguous.",
    killed_by=GRADIENTS,
    varies="a gradient that comes back with strides",
)
def backward_reads_gradients_as_contiguous() -> Adapter:
    """What a kernel without strides does."""

    def read(g: Tensor) -> Tensor:
        whole = g.untyped_storage().nbytes() == g.numel() * g.element_size()
        return g.as_strided(g.shape, torch.empty(g.shape, device="meta").stride()) if whole else g

    return _backward(read)


@fault(
    sin="The factors that autocast has cast are kept for the next call.",
    killed_by="forward/autocast",
    varies="a call without gradient under autocast, before training",
)
def keeps_what_autocast_cast() -> Adapter:
    """Cast without gradient, they take none back."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return Branch.forward(self, base, x)
        if not hasattr(self, "_cast"):
            self._cast = [t.to(torch.bfloat16) for t in (self.lora_A, self.lora_B)]
        A, B = self._cast
        return self.scaling * nn.functional.linear(nn.functional.linear(x, A), B)  # type: ignore[no-any-return]

    made = {nn.Linear: branches(forward=forward)[nn.Linear]}
    return wrong(branches={**Reference.branches, **made})


class Unsaves(Reference):
    def unmerge(self, model: nn.Module) -> None:
        super().unmerge(model)
        for wrapper in self.wrappers(model):
            if not isinstance(wrapper, Adapted):
                kept = wrapper.adapters[wrapper.active]
                kept.load_state_dict(wrapper.base.state_dict())


@fault(
    sin="Unmerging gives the modules that were trained whole their old weights back.",
    killed_by="merge/keeps-saved-modules",
    replays=("29",),
    varies="modules_to_save, merged and unmerged",
)
def unmerging_resets_saved_modules() -> Adapter:
    return Unsaves()


class ForgetsWhatIsMerged(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        found = super().state_dict(model)
        for layer in self.layers(model).values():
            layer.kept = layer.kept and [layer.base]
        return found


@fault(
    sin="Saving a merged model forgets the weights that it was merged into.",
    killed_by="checkpoint/same-merged-or-not",
    varies="unmerging after saving while merged",
)
def saving_keeps_it_merged() -> Adapter:
    """What was folded in stays."""
    return ForgetsWhatIsMerged()


class ForgetsOnceDisabled(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        with super().disable(model):
            yield
        for layer in self.layers(model).values():
            layer.kept = layer.kept and [layer.base]


@fault(
    sin="Disabling a merged model forgets the weights that it was merged into.",
    killed_by="merge/disabled-while-merged",
    varies="unmerging after disabling while merged",
)
def disabling_keeps_it_merged() -> Adapter:
    """What was folded in stays."""
    return ForgetsOnceDisabled()


class KnowsMergedLinear(Reference):
    def require_unmerged(self, model: nn.Module, verb: str) -> None:
        others = [m for m in self.layers(model).values() if not isinstance(m.base, nn.Linear)]
        if verb != "load" or not any(layer.kept for layer in others):
            super().require_unmerged(model, verb)


@fault(
    sin="Only linear layers are looked at before loading: a merged embedding or convolution is loaded into.",
    killed_by="checkpoint/two-stage-load",
    replays=("46",),
    varies="a load into a merged embedding",
)
def loads_into_merged_embeddings() -> Adapter:
    """The old update goes on acting."""
    return KnowsMergedLinear()


class DisablesMergedLinear(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        with super().disable(model):
            for layer in self.layers(model).values():
                layer.enabled = bool(layer.kept) and not isinstance(layer.base, nn.Linear)
            yield


@fault(
    sin="Inside `disable` a merged embedding or convolution keeps its merged weight.",
    killed_by="merge/disabled-while-merged",
    varies="disabling a merged embedding",
)
def disables_merged_linear_layers_alone() -> Adapter:
    """Unmerged, all are disabled."""
    return DisablesMergedLinear()


class AdaptsTwice(Reference):
    def make_branches(
        self, path: str, base: nn.Module, adapter: str, config: LoraConfig
    ) -> list[Branch]:
        made = super().make_branches(path, base, adapter, config)
        names = [] if isinstance(config.target_modules, str) else config.target_modules
        if sum(path == name or path.endswith(f".{name}") for name in names) > 1:
            made[0].again = super().make_branches(path, base, adapter, config)[0]
        return made


@fault(
    sin="A module that two of the names mean is adapted twice.",
    killed_by="targeting/dotted-names",
    varies="names that overlap",
)
def adapts_twice_what_two_names_mean() -> Adapter:
    """The second adapter trains beside the first."""
    return AdaptsTwice()
