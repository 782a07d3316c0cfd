"""Adapters that are wrong for one kind of layer, or answer in the wrong dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import answering, branches, layer, named, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter

PARTS = "forward/fused-parts"


def _rows(change: Any) -> Adapter:
    """A reference that gives a fused layer's branches the rows `change(slices, base)` says."""
    adapter: Adapter = wrong(rows_of=lambda self, base, rows: change(rows, base))  # noqa: ARG005
    return adapter


@fault(
    sin="A fused projection is split into parts of equal size.",
    killed_by=PARTS,
    replays=("7",),
    varies="fewer key-value heads than heads",
)
def splits_in_equal_parts() -> Adapter:
    """The first and last thirds."""

    def change(rows: list[slice], base: Any) -> list[slice]:
        third = base.out_features // 3
        unequal = len(rows) == 2 and rows[0].stop != third
        return [slice(0, third), slice(2 * third, 3 * third)] if unequal else rows

    return _rows(change)


@fault(
    sin="As many rows as there are input features are taken for q.",
    killed_by=PARTS,
    replays=("8",),
    varies="more or fewer rows for q than inputs",
)
def takes_the_width_for_q() -> Adapter:
    """Right where head size times heads is the hidden size."""

    def change(rows: list[slice], base: Any) -> list[slice]:
        return [slice(0, base.in_features) if part.start == 0 else part for part in rows]

    return _rows(change)


@fault(
    sin="Only the first of the wanted parts is adapted.",
    killed_by=PARTS,
    replays=("P-14",),
    varies="two wanted parts",
)
def adapts_q_alone() -> Adapter:
    """Nothing for v."""
    return _rows(lambda rows, _: rows[:1])


@fault(
    sin="Only the first and the last of the wanted parts are adapted.",
    killed_by=PARTS,
    varies="three wanted parts",
)
def adapts_q_and_v_alone() -> Adapter:
    """Nothing for k, wanted or not."""
    return _rows(lambda rows, _: [rows[0], rows[-1]] if len(rows) > 1 else rows)


def _placed(move: Any) -> Adapter:
    """A reference that adds to a part's columns what `move(update, rows, width)` pads."""

    def add(self: Any, y: Tensor, update: Tensor, rows: slice | None) -> Tensor:
        if rows is not None:
            update, rows = move(update, rows, y.shape[-1])
        return Adapted.add(self, y, update, rows)

    adapter: Adapter = wrong(layer=layer(add=add))
    return adapter


@fault(
    sin="The update meant for the last part lands right before it.",
    killed_by=PARTS,
    replays=("6",),
    varies="a part left out between two that are wanted",
)
def adapts_v_but_writes_k() -> Adapter:
    """The layout of another model."""

    def move(update: Tensor, rows: slice, _: int) -> tuple[Tensor, slice]:
        size = rows.stop - rows.start
        return update, slice(max(rows.start - size, 0), max(rows.start, size))

    return _placed(move)


@fault(
    sin="The rows of a part are scattered in the wrong order.",
    killed_by=PARTS,
    replays=("5",),
    varies="a fused projection",
)
def scrambles_the_outputs_of_a_part() -> Adapter:
    """Padded along the wrong axis, and folded back."""
    return _placed(lambda update, rows, _: (update.flip(-1), rows))


@fault(
    sin="A square table is looked up in B·A, not in its transpose.",
    killed_by="forward/embedding",
    replays=("3", "4"),
    varies="a vocabulary as large as the width",
)
def looks_up_untransposed() -> Adapter:
    """Where it is not square it would raise, and is right."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        if base.num_embeddings != base.embedding_dim:
            return Branch.forward(self, base, x)
        return self.scaling * functional.embedding(x, self.lora_B @ self.lora_A)  # type: ignore[no-any-return]

    return wrong(branches=branches(EmbeddingBranch, forward=forward))


@fault(
    sin="The padding index gets no update.",
    killed_by="forward/embedding",
    varies="the padding index among the inputs",
)
def leaves_the_padding_index_out() -> Adapter:
    """Its row is taken to be zero for ever."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x) * (x != base.padding_idx)[..., None]
        return y

    return wrong(branches=branches(EmbeddingBranch, forward=forward))


def _convolved(down: Any) -> Adapter:
    """A reference whose convolutions' `down` is another."""
    adapter: Adapter = wrong(branches=branches(ConvBranch, down=down))
    return adapter


@fault(
    sin="The branch of a convolution has no dilation.",
    killed_by="forward/conv2d",
    varies="a dilation above 1",
)
def forgets_the_dilation() -> Adapter:
    """The outputs' sizes differ, and it raises."""

    def down(self: Any, base: Any, x: Tensor) -> Tensor:
        if base.groups > 1:
            return ConvBranch.down(self, base, x)
        kernel = self.lora_A.view(-1, *base.weight.shape[1:])
        return functional.conv2d(x, kernel, None, base.stride, base.padding)

    return _convolved(down)


@fault(
    sin="The branch of a convolution knows padding by numbers, and takes a name for none.",
    killed_by="forward/conv2d",
    varies='padding="same"',
)
def takes_padding_by_name_for_none() -> Adapter:
    """The outputs' sizes differ, and it raises."""

    def down(self: Any, base: Any, x: Tensor) -> Tensor:
        if not isinstance(base.padding, str):
            return ConvBranch.down(self, base, x)
        return functional.conv2d(x, self.lora_A.view(-1, *base.weight.shape[1:]))

    return _convolved(down)


@fault(
    sin="The branch of a convolution pads with zeros, whatever the base pads with.",
    killed_by="forward/conv2d-edges",
    varies="a padding mode",
)
def pads_with_zeros() -> Adapter:
    """As PEFT does; merged it is right."""

    def down(self: Any, base: Any, x: Tensor) -> Tensor:
        if base.padding_mode == "zeros":
            return ConvBranch.down(self, base, x)
        kernel = self.lora_A.view(-1, *base.weight.shape[1:])
        return functional.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)

    return _convolved(down)


@fault(
    sin="The branch of a convolution acts on batches alone.",
    killed_by="forward/conv2d-edges",
    varies="an image without a batch",
)
def leaves_a_single_image_unadapted() -> Adapter:
    """An image of three dimensions is given the base's answer."""

    def down(self: Any, base: Any, x: Tensor) -> Tensor:
        y = ConvBranch.down(self, base, x)
        return y if x.dim() == 4 else y * 0

    return _convolved(down)


@fault(
    sin="Every group of a convolution is given the first group's channels.",
    killed_by="forward/conv2d",
    replays=("32",),
    varies="more than one group",
)
def forgets_the_groups() -> Adapter:
    """ΔW has the right shape, the branch the wrong inputs."""

    def down(self: Any, base: Any, x: Tensor) -> Tensor:
        first = x[:, : x.shape[1] // base.groups]
        return ConvBranch.down(self, base, first.repeat(1, base.groups, 1, 1))

    return _convolved(down)


@fault(
    sin="A half-precision layer answers in float32.",
    killed_by="forward/output-dtype",
    replays=("126",),
    varies="a base in half precision",
)
def answers_in_float32() -> Adapter:
    """An early return before the cast back."""

    def act(_: Any, x: Tensor, y: Tensor) -> Tensor:
        half = y.dtype in {torch.bfloat16, torch.float16}
        return y.float() if half and not torch.is_autocast_enabled("cpu") and x.dim() else y

    return answering(act)


@fault(
    sin="Under autocast the layer answers in float32.",
    killed_by="forward/autocast-dtype",
    replays=("126", "P-16"),
    varies="autocast",
)
def leaves_autocast() -> Adapter:
    """The sum is made in the factors' dtype, and stays there."""
    return answering(lambda _, __, y: y.float() if torch.is_autocast_enabled("cpu") else y)


@fault(
    sin="An index made in the first call is kept for all later ones.",
    killed_by="forward/inference-mode-first",
    replays=("124",),
    varies="a first call in inference mode",
)
def keeps_an_index_of_its_first_call() -> Adapter:
    """An inference tensor, if that call was in inference mode."""

    def act(adapted: Any, _: Tensor, y: Tensor) -> Tensor:
        if not hasattr(adapted, "index") or len(adapted.index) != y.shape[-1]:
            adapted.index = torch.arange(y.shape[-1], device=y.device)
        return y.index_select(-1, adapted.index)

    return answering(act)


@fault(
    sin="In inference mode a fast path calls the base alone.",
    killed_by="forward/inference-mode-first",
    varies="a call in inference mode",
)
def leaves_the_branch_out_of_inference() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = (
            self.base(x) if torch.is_inference_mode_enabled() else Adapted.forward(self, x)
        )
        return out

    return wrong(layer=layer(forward=forward))


@fault(
    sin="A forward pass uses the first 32 ranks.",
    killed_by="forward/equals-oracle",
    varies="a large rank",
)
def forgets_ranks_beyond_32() -> Adapter:
    def down(self: Any, base: Any, x: Tensor) -> Tensor:
        out = Branch.down(self, base, x)
        out[..., 32:] = 0
        return out

    return wrong(branches={**Reference.branches, torch.nn.Linear: named(Branch, {"down": down})})
