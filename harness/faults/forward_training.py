"""Adapters whose dropout or whose gradients are wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import branches, layer, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter

ON = "forward/dropout-on-in-train"
GRADIENTS = "forward/gradients"


def _dropped(drop: Any) -> Adapter:
    """A reference whose branches do `drop(x, p, training)`; an embedding's have nothing to drop."""

    def mask(self: Any, x: Tensor, p: float) -> Tensor:
        y: Tensor = drop(x, p, self.training)
        return y

    adapter: Adapter = wrong(branches=branches(mask=mask))
    return adapter


@fault(
    sin="Dropout stays on in eval mode.",
    killed_by="forward/dropout-off-in-eval",
    replays=("119",),
    varies="eval mode with dropout",
)
def drops_out_in_eval() -> Adapter:
    """The function's default is training=True."""
    return _dropped(lambda x, p, _: functional.dropout(x, p))


@fault(
    sin="The probability is taken and never applied.",
    killed_by=ON,
    replays=("44", "117"),
    varies="train mode with dropout",
)
def ignores_dropout() -> Adapter:
    """As loralib's convolutions do."""
    return _dropped(lambda x, _, __: x)


@fault(
    sin="The probability given is that of keeping an input.",
    killed_by=ON,
    varies="a probability other than a half",
)
def drops_what_it_should_keep() -> Adapter:
    """Zeroes 1 - p."""
    return _dropped(lambda x, p, training: functional.dropout(x, 1 - p, training))


@fault(
    sin="The second of three parts has no dropout.",
    killed_by=ON,
    varies="dropout on a fused projection of which every part is adapted",
)
def leaves_dropout_out_of_k() -> Adapter:
    """Unbiased, and the others draw."""

    def make_branches(self: Any, *args: Any) -> list[Branch]:
        made = Reference.make_branches(self, *args)
        for branch in made[1:2] if len(made) == 3 else ():
            branch.dropout = None
        return made

    return wrong(make_branches=make_branches)


@fault(
    sin="What is kept is not divided by 1 - p.",
    killed_by=ON,
    varies="train mode with dropout",
)
def drops_without_dividing() -> Adapter:
    """Biased: the branch is weaker in train mode than in eval mode."""
    return _dropped(
        lambda x, p, training: functional.dropout(x, p, training) * (1 - p if training else 1)
    )


def _dropped_undivided(fits: Any) -> Adapter:
    """A reference whose branches that fit do not divide what they keep."""

    def mask(self: Any, x: Tensor, p: float) -> Tensor:
        y = Branch.mask(self, x, p)
        return y * (1 - p) if fits(self) and self.training else y

    adapter: Adapter = wrong(branches=branches(mask=mask))
    return adapter


@fault(
    sin="In a convolution what is kept is not divided by 1 - p.",
    killed_by=ON,
    varies="a convolution in train mode with dropout",
)
def drops_without_dividing_in_a_convolution() -> Adapter:
    """A mask of its own."""
    return _dropped_undivided(lambda branch: isinstance(branch, ConvBranch))


@fault(
    sin="In a fused projection what is kept is not divided by 1 - p.",
    killed_by=ON,
    varies="a fused projection in train mode with dropout",
)
def drops_without_dividing_in_parts() -> Adapter:
    """A mask of its own."""
    return _dropped_undivided(lambda branch: branch.rows is not None)


def _dropped_at_a_tenth(fits: Any) -> Adapter:
    """A reference whose branches that fit drop a tenth, whatever was asked."""

    def mask(self: Any, x: Tensor, p: float) -> Tensor:
        return functional.dropout(x, 0.1, self.training) if fits(self) else Branch.mask(self, x, p)

    adapter: Adapter = wrong(branches=branches(mask=mask))
    return adapter


@fault(
    sin="A convolution drops a tenth of its inputs, whatever was asked.",
    killed_by=ON,
    replays=("44",),
    varies="the share of a convolution's inputs that are dropped",
)
def drops_a_tenth_in_a_convolution() -> Adapter:
    """Unbiased, and afresh in each call."""
    return _dropped_at_a_tenth(lambda branch: isinstance(branch, ConvBranch))


@fault(
    sin="A fused projection drops a tenth of its inputs, whatever was asked.",
    killed_by=ON,
    replays=("44",),
    varies="the share of a fused projection's inputs that are dropped",
)
def drops_a_tenth_in_parts() -> Adapter:
    """Unbiased, and afresh in each call."""
    return _dropped_at_a_tenth(lambda branch: branch.rows is not None)


@fault(
    sin="The first mask is kept for ever.",
    killed_by=ON,
    replays=("P-12",),
    varies="more than one call",
)
def draws_one_mask_for_ever() -> Adapter:
    """From a seed of its own."""

    def drop(x: Tensor, p: float, training: bool) -> Tensor:
        if not training:
            return x
        drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        return x * (drawn >= p).to(x) / (1 - p)

    return _dropped(drop)


@fault(
    sin="The base's path is given the dropped input, too.",
    killed_by=ON,
    replays=("P-11",),
    varies="train mode with dropout",
)
def drops_the_bases_input() -> Adapter:
    """One dropout before both."""

    def forward(self: Any, x: Tensor) -> Tensor:
        p = max((getattr(branch.dropout, "p", 0.0) for branch in self.branches), default=0.0)
        if p and x.is_floating_point() and not self.kept and self.enabled:
            x = functional.dropout(x, p, self.training)
        y: Tensor = Adapted.forward(self, x)
        return y

    return wrong(layer=layer(forward=forward))


@fault(
    sin="Gradients pass dropout as if nothing had been dropped.",
    killed_by="forward/dropout-gradients",
    replays=("118",),
    varies="train mode with dropout, and an input that needs a gradient",
)
def forgets_the_mask_backward() -> Adapter:
    """As a fused kernel's dX that leaves the mask out."""

    def drop(x: Tensor, p: float, training: bool) -> Tensor:
        return x + (functional.dropout(x, p, training) - x).detach()

    return _dropped(drop)


@fault(
    sin="The branch's input is detached.",
    killed_by=GRADIENTS,
    varies="an input that needs a gradient",
)
def detaches_the_branchs_input() -> Adapter:
    """Earlier layers learn from the base's path alone."""

    def drop(self: Any, x: Tensor) -> Tensor:
        return x if isinstance(self, EmbeddingBranch) else Branch.drop(self, x.detach())

    return wrong(branches=branches(drop=drop))


@fault(
    sin="What A gives is detached, so that A never learns.",
    killed_by=GRADIENTS,
    replays=("101",),
    varies="a backward pass",
)
def detaches_A() -> Adapter:  # noqa: N802
    """A checkpointed segment that is cut off."""

    def up(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = super(type(self), self).up(base, x.detach())
        return y

    return wrong(branches=branches(up=up))


@fault(
    sin="The update is added to the base's output in place.",
    killed_by="forward/backward-hooks",
    replays=("10",),
    varies="a backward hook on the base's layer",
)
def adds_in_place() -> Adapter:
    """What autograd knows as that output is overwritten."""

    def add(self: Any, y: Tensor, update: Tensor, rows: slice | None) -> Tensor:
        if rows is not None:
            return Adapted.add(self, y, update, rows)
        y += update.to(y.dtype)
        return y

    return wrong(layer=layer(add=add))
