"""Adapters that keep in their class what belongs to one model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import branches, layer, wrong

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from harness.adapter import Adapter

TWO_MODELS = "state/two-models"


@fault(
    sin="Disabling one model disables every model there is.",
    killed_by=TWO_MODELS,
    varies="a second model in the process",
)
def disables_every_model() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.original(x) if kind.off else Adapted.forward(self, x)
        return out

    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        with Reference.disable(self, model):
            kind.off = True
            try:
                yield
            finally:
                kind.off = False

    kind: Any = layer(forward=forward, off=False)
    return wrong(layer=kind, disable=disable)


@fault(
    sin="The scaling is kept in the class: the model injected last sets it for all.",
    killed_by=TWO_MODELS,
    varies="a second model of another alpha",
)
def scales_by_the_model_injected_last() -> Adapter:
    latest: dict[str, float] = {}

    def scale(self: Any, config: Any) -> float:
        latest["scaling"] = config.scaling
        return Branch.scale(self, config)

    def forward(self: Any, base: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = latest["scaling"] * self.up(base, self.down(base, self.drop(x)))
        return out

    return wrong(branches=branches(scale=scale, forward=forward))
