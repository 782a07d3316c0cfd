"""Adapters that hold on to a model."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from harness.adapters.reference import Reference
from harness.faults.record import fault

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import Adapter


@lru_cache
def _paths(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_modules())


class Caches(Reference):
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        known = _paths(model)
        own = super().state_dict(model)
        return {key: t for key, t in own.items() if known}


@fault(
    sin="What is known of a model is cached by the model itself, which the cache then holds.",
    killed_by="state/freed",
    replays=("64",),
    varies="what is left of a model that nobody holds",
)
def caches_by_the_model() -> Adapter:
    return Caches()
