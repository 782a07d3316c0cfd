"""Adapters that start from the wrong place, or touch what is not theirs on the way there."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.adapters.equation import Branch, fill_normal, fill_uniform
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import after_injection, layer, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter

NO_OP = "initialization/no-op"
BASE = "initialization/base-untouched"
IN_PLACE = "initialization/base-in-place"


def _initialized(act: Any) -> Adapter:
    """A reference that does `act(branch, generator)` to each branch once that is initialised."""

    def make_branches(self: Any, path: str, *args: Any) -> list[Branch]:
        made = Reference.make_branches(self, path, *args)
        for branch in made:
            with torch.no_grad():
                act(branch, self.generator(path))
        return made

    adapter: Adapter = wrong(make_branches=make_branches)
    return adapter


@fault(
    sin="A and B are both drawn at random.",
    killed_by=NO_OP,
    replays=("P-3",),
    varies="nothing",
)
def draws_both_factors() -> Adapter:
    """A fresh adapter already has an effect."""

    def act(branch: Branch, generator: torch.Generator) -> None:
        for factor in (branch.lora_A, branch.lora_B):
            if not factor.any():
                fill_uniform(factor, 0.1, generator)

    return _initialized(act)


@fault(
    sin="At rank 1 and at ranks above the width, B is drawn at random too.",
    killed_by=NO_OP,
    varies="the rank",
)
def draws_both_factors_at_odd_ranks() -> Adapter:
    """A start of another kind, for the ranks that it is not made for."""

    def act(branch: Branch, generator: torch.Generator) -> None:
        r, n_in = branch.lora_A.shape
        if r == 1 or r > min(n_in, len(branch.lora_B)):
            fill_uniform(branch.lora_B, 0.1, generator)

    return _initialized(act)


@fault(
    sin="The norms' epsilon becomes 1e-6.",
    killed_by=NO_OP,
    replays=("121",),
    varies="a model with norms",
)
def changes_the_norms_epsilon() -> Adapter:
    """A rebuilt model with another library's default."""

    def act(_: Any, model: nn.Module) -> None:
        for module in model.modules():
            for name in ("eps", "variance_epsilon"):
                if hasattr(module, name):
                    setattr(module, name, 1e-6)

    return after_injection(act)


@fault(
    sin="The base's path is written anew, without its bias.",
    killed_by=NO_OP,
    replays=("122",),
    varies="a linear layer with a bias",
)
def forgets_the_bases_bias() -> Adapter:
    """W alone; what merging does with the bias is right."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Adapted.forward(self, x)
        plain = isinstance(self.base, nn.Linear) and self.base.bias is not None and self.enabled
        return y - self.base.bias if plain and not self.kept else y

    return wrong(layer=layer(forward=forward))


@fault(
    sin="A convolution without a bias is built anew with one, drawn at random.",
    killed_by=NO_OP,
    varies="a convolution without a bias",
)
def gives_a_convolution_a_bias() -> Adapter:
    """As PEFT 0.5.0 does; linear layers are right."""

    def act(adapter: Any, model: nn.Module) -> None:
        for adapted in adapter.layers(model).values():
            if isinstance(adapted.base, nn.Conv2d) and adapted.base.bias is None:
                bias = torch.empty(adapted.base.out_channels, dtype=adapted.base.weight.dtype)
                fill_uniform(bias, 0.1, adapter.generator("bias"))
                adapted.base.bias = nn.Parameter(bias, requires_grad=False)

    return after_injection(act)


@fault(
    sin="A and B both start at zero.",
    killed_by="initialization/not-both-zero",
    replays=("P-3", "101"),
    varies="nothing",
)
def starts_both_factors_at_zero() -> Adapter:
    """Both gradients are zero for ever."""

    def act(branch: Branch, _: torch.Generator) -> None:
        branch.lora_A.zero_()
        branch.lora_B.zero_()

    return _initialized(act)


@fault(
    sin="At rank 1 both factors start at zero.",
    killed_by="initialization/not-both-zero",
    varies="rank 1",
)
def starts_at_zero_at_rank_one() -> Adapter:
    """A spread over r - 1 is none."""

    def act(branch: Branch, generator: torch.Generator) -> None:
        Branch.initialize(branch, generator)
        if len(branch.lora_A) == 1:
            branch.lora_A.zero_()

    return _initialized(act)


@fault(
    sin="The base's layer is copied.",
    killed_by=IN_PLACE,
    replays=("28", "45"),
    varies="a base that is held elsewhere",
)
def copies_the_base() -> Adapter:
    """What was held of the base is no longer what the model computes with."""

    def __init__(self: Any, base: nn.Module) -> None:  # noqa: N807
        Adapted.__init__(self, copy.deepcopy(base))

    return wrong(layer=layer(__init__=__init__))


@fault(
    sin="The base's weights are moved into memory of their own.",
    killed_by=IN_PLACE,
    varies="a view of a base's weight that is held elsewhere",
)
def moves_the_base() -> Adapter:
    """The parameters are the same objects, with the same bits."""

    def act(adapter: Any, model: nn.Module) -> None:
        for adapted in adapter.layers(model).values():
            adapted.base.weight.data = adapted.base.weight.data.clone()

    return after_injection(act)


@fault(
    sin="The base's weights go through bfloat16.",
    killed_by=BASE,
    replays=("68",),
    varies="a base in more than bfloat16",
)
def rounds_the_base() -> Adapter:
    """Cast down to build, and back."""

    def act(adapter: Any, model: nn.Module) -> None:
        with torch.no_grad():
            for adapted in adapter.layers(model).values():
                weight = adapted.base.weight
                if weight.is_floating_point():
                    weight.copy_(weight.bfloat16())

    return after_injection(act)


@fault(
    sin="The factors are bfloat16, and the base's path takes its input in that too.",
    killed_by=NO_OP,
    varies="factors coarser than the base",
)
def casts_the_bases_input_to_the_factors_dtype() -> Adapter:
    """Once the branch acts, its own rounding is as large: only a fresh adapter shows the base's."""

    def make_branches(self: Any, path: str, *args: Any) -> list[Branch]:
        return [branch.bfloat16() for branch in Reference.make_branches(self, path, *args)]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Adapted.forward(
            self, x.bfloat16().to(x.dtype) if x.is_floating_point() else x
        )
        return y

    return wrong(make_branches=make_branches, layer=layer(forward=forward))


@fault(
    sin="A is drawn from the system's entropy, not by torch's seed.",
    killed_by="initialization/seeded",
    replays=("66",),
    varies="two injections after one seed",
)
def draws_from_the_system() -> Adapter:
    """Numbers that no run has twice, as in memory that was never filled."""

    def generator(self: Any, key: str) -> torch.Generator:  # noqa: ARG001
        drawn = torch.Generator()
        drawn.seed()
        return drawn

    return wrong(generator=generator)


@fault(
    sin="Layers of one shape share their A.",
    killed_by="initialization/factors-not-shared",
    replays=("P-4",),
    varies="more than one layer",
)
def shares_A_between_layers() -> Adapter:  # noqa: N802
    """The last layer trained speaks for all."""

    def attach(self: Any, *args: Any, **more: Any) -> None:
        self.pool = {}
        Reference.attach(self, *args, **more)

    def make_branches(self: Any, *args: Any) -> list[Branch]:
        made = Reference.make_branches(self, *args)
        for branch in made if len(made) == 1 else ():
            key = (branch.lora_A.shape, branch.lora_A.dtype)
            branch.lora_A = self.pool.setdefault(key, branch.lora_A)
        return made

    return wrong(attach=attach, make_branches=make_branches)


@fault(
    sin="A is standard normal, over the rank.",
    killed_by="initialization/distribution",
    varies="nothing",
)
def draws_A_from_a_normal() -> Adapter:  # noqa: N802
    """N(0, 1/r²): another learning rate."""

    def act(branch: Branch, generator: torch.Generator) -> None:
        if branch.lora_A.any():
            fill_normal(branch.lora_A, generator)
            branch.lora_A.div_(len(branch.lora_A))

    return _initialized(act)


@fault(
    sin="The factors are drawn from torch's global state.",
    killed_by="initialization/global-rng-left-alone",
    replays=("P-15",),
    varies="something drawn after injection",
)
def draws_from_the_global_state() -> Adapter:
    """As most implementations do."""
    return wrong(generator=lambda _, __: torch.default_generator)
