"""The reference with some of its seams replaced: how a sin is written in a few lines."""

from __future__ import annotations

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
        base: type(own.__name__, (own,), seams) if issubclass(own, kind) else own
        for base, own in Reference.branches.items()
    }


def layer(**seams: Any) -> type[Adapted]:
    """The reference's adapted layer with these members in the place of its own."""
    return type("Wrong", (Adapted,), seams)


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
