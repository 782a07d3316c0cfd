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


@fault(
    sin="What was merged into is kept on the adapter, by the layer's name.",
    killed_by=TWO_MODELS,
    varies="unmerging two models of other bases",
)
def keeps_what_was_merged_by_name() -> Adapter:
    kept: dict[str, nn.Module] = {}

    def merge(self: Any, model: nn.Module) -> None:
        Reference.merge(self, model)
        kept.update({path: adapted.original for path, adapted in self.layers(model).items()})

    def unmerge(self: Any, model: nn.Module) -> None:
        for path, adapted in self.layers(model).items():
            if adapted.kept:
                adapted.base, adapted.kept = kept[path], []

    return wrong(merge=merge, unmerge=unmerge)


@fault(
    sin="Whether it is merged is known of the adapter, not of the model: the second merge does nothing.",
    killed_by=TWO_MODELS,
    varies="merging two models",
)
def merges_one_model_only() -> Adapter:
    merged: set[str] = set()

    def inject(self: Any, model: nn.Module, config: Any) -> nn.Module:
        merged.clear()
        return Reference.inject(self, model, config)

    def merge(self: Any, model: nn.Module) -> None:
        if not merged:
            Reference.merge(self, model)
        merged.add("merged")

    def unmerge(self: Any, model: nn.Module) -> None:
        Reference.unmerge(self, model)
        merged.clear()

    return wrong(inject=inject, merge=merge, unmerge=unmerge)


@fault(
    sin="Which adapter acts is known of the adapter object, not of the model.",
    killed_by=TWO_MODELS,
    varies="a second model injected while another adapter acts in the first",
)
def one_name_acts_in_every_model() -> Adapter:
    def inject(self: Any, model: nn.Module, config: Any) -> nn.Module:
        self.now = "default"
        return Reference.inject(self, model, config)

    def activate(self: Any, model: nn.Module, name: str) -> None:
        Reference.activate(self, model, name)
        self.now = name

    def factors(self: Any, model: nn.Module) -> Any:
        for wrapper in self.wrappers(model):
            wrapper.active = self.now
        return Reference.factors(self, model)

    return wrong(inject=inject, activate=activate, factors=factors)
