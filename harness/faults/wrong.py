"""The reference with some of its seams replaced: how a sin is written in a few lines."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def wrong(**seams: Any) -> Reference:
    """A reference with these members in the place of its own."""
    adapter: Reference = type("Wrong", (Reference,), seams)()
    return adapter


def branches(kind: type[Branch] = Branch, **seams: Any) -> dict[type[nn.Module], type[Branch]]:
    """The reference's branches, those that are a `kind` with these members in place of their own."""
    return {
        base: named(own, seams) if issubclass(own, kind) else own
        for base, own in Reference.branches.items()
    }


def layer(**seams: Any) -> type[Adapted]:
    """The reference's adapted layer with these members in the place of its own."""
    return named(Adapted, seams)


def named(base: type[Any], seams: dict[str, Any]) -> type[Any]:
    """A subclass with these members, which pickle can find: being made here is no sin of its own."""
    return findable(type("Wrong", (base,), seams))


def findable(made: type[Any]) -> type[Any]:
    """The class, under a name in this module by which pickle finds it again."""
    name = f"Wrong{next(_NUMBERS)}"
    made.__module__, made.__qualname__ = __name__, name
    globals()[name] = made
    return made


_NUMBERS = count()


def after_injection(act: Callable[[Any, Any], object]) -> Reference:
    """A reference that does `act(adapter, model)` once the model is adapted."""

    def inject(self: Any, model: Any, config: Any) -> Any:
        model = Reference.inject(self, model, config)
        act(self, model)
        return model

    return wrong(inject=inject)


def answering(act: Callable[[Any, Any, Any], Any]) -> Reference:
    """A reference whose adapted layers answer `act(layer, x, y)`, y being the right answer."""

    def forward(self: Any, x: Any) -> Any:
        return act(self, x, Adapted.forward(self, x))

    return wrong(layer=layer(forward=forward))
