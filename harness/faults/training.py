"""Adapters that compute the right outputs and train wrongly."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import after_injection, named, wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.adapter import Adapter

UPDATE = "training/update-equivalence"
CHECKPOINTING = "training/checkpointing-same-update"


def factors_of(adapter: Any, model: nn.Module) -> Iterator[tuple[Branch, nn.Parameter]]:
    """Every factor of a model, with its branch."""
    for adapted in adapter.layers(model).values():
        for branch in adapted.branches:
            yield branch, branch.lora_A
            yield branch, branch.lora_B


def linear(**seams: Any) -> dict[type[nn.Module], type[Branch]]:
    """The reference's branches, that of a `nn.Linear` with these members in place of its own."""
    return {**Reference.branches, nn.Linear: named(Branch, seams)}


def with_hooks(
    make: Callable[[Branch, nn.Parameter], Callable[[Tensor], Tensor] | None],
) -> Reference:
    """A reference whose factors' gradients go through a hook each."""

    def act(adapter: Any, model: nn.Module) -> None:
        for branch, factor in factors_of(adapter, model):
            if hook := make(branch, factor):
                factor.register_hook(hook)  # type: ignore[no-untyped-call]

    return after_injection(act)


@fault(
    sin="In train mode the output head is read past its adapter, as a fused loss does.",
    killed_by="training/gradients-reach-every-factor-and-no-other",
    replays=("109",),
    varies="an adapted head, train mode",
)
def head_is_bypassed_in_training() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        past = self.training and getattr(self, "is_head", False)
        return self.base(x) if past else Adapted.forward(self, x)

    def inject(self: Any, model: Any, config: Any) -> Any:
        model = Reference.inject(self, model, config)
        for path, adapted in self.layers(model).items():
            adapted.is_head = path.endswith("lm_head")
        return model

    return wrong(layer=named(Adapted, {"forward": forward}), inject=inject)


@fault(
    sin="A factor's elements that are zero get no gradient: B never leaves zero.",
    killed_by="training/loss-goes-down",
    replays=("101",),
    varies="the start that `inject` gives",
)
def zeros_stay_zero() -> Adapter:
    return with_hooks(lambda _, factor: lambda slope: slope * (factor.detach() != 0))


@fault(
    sin="From the third training call on, ΔW is added to the base and taken out again: it drifts.",
    killed_by="training/base-unchanged",
    replays=("58",),
    varies="several steps",
)
def base_drifts_by_rounding_in_training() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 2:
                with torch.no_grad():
                    self.base.weight.mul_(3).div_(3).mul_(7).div_(7)
        return Adapted.forward(self, x)

    return wrong(layer=named(Adapted, {"forward": forward}))


@fault(
    sin="Dropout draws from a generator that the operating system seeds.",
    killed_by="training/deterministic",
    replays=("P-15",),
    varies="two runs from one seed",
)
def dropout_seeded_by_the_system() -> Adapter:
    def mask(self: Any, x: Tensor, p: float) -> Tensor:
        if not self.training:
            return x
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
        keep = torch.rand(x.shape, generator=generator) >= p
        return x * keep.to(x.device) / (1 - p)

    return wrong(branches=linear(mask=mask))


@fault(
    sin="Factors are stored in the base's bfloat16, where small steps are rounded away.",
    killed_by="training/small-steps-count",
    replays=("107", "108"),
    varies="a bfloat16 base, a small learning rate",
)
def factors_in_the_dtype_of_the_base() -> Adapter:
    def act(adapter: Any, model: nn.Module) -> None:
        for adapted in adapter.layers(model).values():
            for branch in adapted.branches:
                if adapted.original.weight.is_floating_point():
                    branch.to(adapted.original.weight.dtype)

    return after_injection(act)


@fault(
    sin="A's gradient leaves out the scaling: one global rate for every rank and alpha.",
    killed_by="forward/gradients",
    replays=("112",),
    varies="alpha other than r",
)
def gradient_of_a_without_scaling() -> Adapter:
    return with_hooks(
        lambda branch, factor: (
            (lambda slope: slope / branch.scaling) if factor is branch.lora_A else None
        )
    )


@fault(
    sin="A gradient that meets an earlier one counts double.",
    killed_by=UPDATE,
    varies="accumulation",
)
def accumulated_gradients_count_double() -> Adapter:
    return with_hooks(lambda _, factor: lambda slope: slope if factor.grad is None else 2 * slope)


@fault(
    sin="No hook lets a reentrant checkpoint's input need a gradient.",
    killed_by=CHECKPOINTING,
    replays=("99",),
    varies="reentrant checkpoints",
)
def forgets_the_inputs_of_checkpoints() -> Adapter:
    return wrong(checkpoint_inputs=lambda self, model: unhook(model))  # noqa: ARG005


@fault(
    sin="The inputs of checkpoints need gradients only where checkpointing was on at injection.",
    killed_by=CHECKPOINTING,
    replays=("100",),
    varies="checkpointing enabled after injection",
)
def looks_for_checkpointing_at_injection_only() -> Adapter:
    def checkpoint_inputs(self: Any, model: Any) -> None:
        if getattr(model, "is_gradient_checkpointing", False):
            Reference.checkpoint_inputs(self, model)
        else:
            unhook(model)

    return wrong(checkpoint_inputs=checkpoint_inputs)


def unhook(model: Any) -> None:
    """Take away the help of transformers 5, which lets inputs need gradients by itself."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads = str


@fault(
    sin="A branch keeps what the checkpoint's first pass computed, and gives that in the second.",
    killed_by=CHECKPOINTING,
    replays=("101",),
    varies="reentrant checkpoints",
)
def reuses_what_a_checkpoint_computed() -> Adapter:
    def forward(self: Any, base: nn.Module, x: Tensor) -> Tensor:
        kept, self.kept = getattr(self, "kept", None), None
        if kept is not None and self.training and torch.is_grad_enabled():
            return kept  # type: ignore[no-any-return]
        out = Branch.forward(self, base, x)
        if getattr(self.model, "is_gradient_checkpointing", False) and not torch.is_grad_enabled():
            self.kept = out
        return out

    def make_branches(self: Any, path: str, base: Any, adapter: str, config: Any) -> Any:
        made = Reference.make_branches(self, path, base, adapter, config)
        for branch in made:
            object.__setattr__(branch, "model", self.model)  # no submodule of the branch
        return made

    def inject(self: Any, model: Any, config: Any) -> Any:
        self.model = model
        return Reference.inject(self, model, config)

    return wrong(branches=linear(forward=forward), make_branches=make_branches, inject=inject)


@fault(
    sin="Masks are drawn by a generator of the layer's own, which no checkpoint sets back.",
    killed_by="training/checkpointing-same-masks",
    replays=("118",),
    varies="dropout under checkpointing",
)
def recomputes_with_other_masks() -> Adapter:
    def mask(self: Any, x: Tensor, p: float) -> Tensor:
        if not self.training:
            return x
        if not hasattr(self, "seeds"):
            self.seeds = count()
        generator = torch.Generator().manual_seed(next(self.seeds))
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator) / (1 - p)

    return wrong(branches=linear(mask=mask))


@fault(
    sin="A stops training once an optimizer has stepped.",
    killed_by="training/same-trajectory-as-reference",
    varies="several steps",
)
def stops_training_a_after_the_first_step() -> Adapter:
    def make(branch: Branch, factor: nn.Parameter) -> Callable[[Tensor], Tensor] | None:
        seen: list[int] = []

        def hook(slope: Tensor) -> Tensor:
            seen.append(factor._version)  # what a step raises
            return slope if factor._version == seen[0] else 0 * slope

        return hook if factor is branch.lora_A else None

    return with_hooks(make)


@fault(
    sin="Loading puts new parameters in the place of those that the optimizer holds.",
    killed_by="training/resume-equals-uninterrupted",
    replays=("56", "57", "P-5"),
    varies="an optimizer made before the load",
)
def loading_makes_new_parameters() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        Reference.load_state_dict(self, model, state)
        for adapted in self.layers(model).values():
            for branch in adapted.branches:
                for name, old in list(branch.named_parameters()):
                    setattr(branch, name, nn.Parameter(old.detach().clone(), old.requires_grad))

    return wrong(load_state_dict=load_state_dict)
