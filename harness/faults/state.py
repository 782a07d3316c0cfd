"""Adapters that leave something behind: a mode, a flag, a hook, a tensor that is no parameter."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch

from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.merge import with_layer
from harness.faults.record import fault
from harness.faults.wrong import after_injection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from harness.adapter import Adapter, LoraConfig

READS = "state/read-only-calls"


class NoFinally(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        for wrapper in self.wrappers(model):
            wrapper.enabled = False
        yield
        for wrapper in self.wrappers(model):
            wrapper.enabled = True


@fault(
    sin="An exception inside `disable` leaves the adapter disabled.",
    killed_by=READS,
    replays=("P-20",),
    varies="an exception inside",
)
def stays_disabled_after_an_exception() -> Adapter:
    return NoFinally()


class LeavesFloat64(Reference):
    def inject(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        torch.set_default_dtype(torch.float64)
        return super().inject(model, config)


@fault(
    sin="Factors are drawn under another default dtype, which stays torch's.",
    killed_by="state/surroundings-left-alone",
    varies="what is made after it",
)
def leaves_another_default_dtype() -> Adapter:
    return LeavesFloat64()


@fault(
    sin="Injection sets torch's float32 precision of products to medium, for every model there is.",
    killed_by="state/surroundings-left-alone",
    varies="the products of other models, on hardware that rounds them",
)
def leaves_products_of_medium_precision() -> Adapter:
    def lower(*_: Any) -> None:
        torch.set_float32_matmul_precision("medium")

    return after_injection(lower)


class Frees(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        with super().disable(model):
            yield
        self.set_trainability(model)


@fault(
    sin="Leaving `disable` makes the factors trainable, frozen before or not.",
    killed_by=READS,
    varies="an adapter that was frozen",
)
def disabling_frees_what_was_frozen() -> Adapter:
    return Frees()


class Unregisters(Adapted):
    def unmerge(self) -> None:
        merged = bool(self.kept)
        super().unmerge()
        base: Any = self.base
        if merged:
            weight = base.weight.detach()
            del base.weight
            base.weight = weight


@fault(
    sin="After a cycle of merging the weight is a plain tensor, not a parameter.",
    killed_by=READS,
    replays=("41",),
    varies="the names of the parameters after a cycle",
)
def unmerging_loses_the_parameter() -> Adapter:
    return with_layer(Unregisters)


class SavesInEval(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model.eval(), directory)


@fault(
    sin="Saving leaves the model in eval mode: the rest of the run has no dropout.",
    killed_by=READS,
    replays=("55",),
    varies="train mode",
)
def saving_leaves_eval_mode() -> Adapter:
    return SavesInEval()


class ReturnsNone(Adapted):
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        return None  # type: ignore[return-value]  # the sin


@fault(
    sin="`train()` of an adapted layer returns None.",
    killed_by="state/mode-calls-return-self",
    replays=("127",),
    varies="what the call returns",
)
def train_returns_none() -> Adapter:
    return with_layer(ReturnsNone)


class Lambda(Adapted):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.shape: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shape(x))


@fault(
    sin="A layer holds a lambda, which cannot be pickled.",
    killed_by="state/deepcopy-and-pickle",
    replays=("128",),
    varies="pickle",
)
def holds_a_lambda() -> Adapter:
    return with_layer(Lambda)


class Hooks(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        for layer in self.layers(model).values():
            layer.register_forward_hook(_idle)
        with super().disable(model):
            yield


def _idle(module: nn.Module, args: object, output: Tensor) -> None:
    """A hook that does nothing but stay."""


@fault(
    sin="Each `disable` leaves a hook on every layer.",
    killed_by="state/attributes-left-behind",
    replays=("140",),
    varies="how often it is called",
)
def each_disable_leaves_a_hook() -> Adapter:
    return Hooks()


class Remembers(Reference):
    def add(
        self, model: nn.Module, name: str, config: LoraConfig, *, trainable: bool = True
    ) -> None:
        super().add(model, name, config, trainable=trainable)
        state: Any = self.state(model)
        if not hasattr(model, "history"):
            model.history = []  # type: ignore[assignment]  # the sin
        model.history.append((name, state.configs[name]))  # type: ignore[operator,union-attr]  # the sin


@fault(
    sin="A deleted adapter stays in a list of all there ever were.",
    killed_by="state/attributes-left-behind",
    replays=("140",),
    varies="adding and deleting again and again",
)
def remembers_every_deleted_adapter() -> Adapter:
    return Remembers()
