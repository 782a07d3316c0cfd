"""The modules that stand where the base's stood: an adapted layer, and a module trained whole."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.quantized import dense, with_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Self

    from harness.adapters.equation import Branch


class Adapted(nn.Module):
    """A layer and its branches, by adapter; the active adapter's are added to the base's output.

    Merging puts a module with the weight W + ΔW in `base`'s place and keeps the other beside it, so
    that unmerging gives back the very module, bit for bit, and a weight tied to another module's is
    never written.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active = "default"
        self.enabled = True
        self.kept: list[nn.Module] = []  # the unmerged base, while merged; in a list: not a child
        self.training = base.training

    @property
    def branches(self) -> list[Branch]:
        """The active adapter's, one for each part; none where it does not adapt this layer."""
        return self.of(self.active)

    def of(self, adapter: str) -> list[Branch]:
        """The branches of one adapter."""
        found: Any = self.adapters[adapter] if adapter in self.adapters else []  # noqa: SIM401  # no `get`
        return list(found)

    def forward(self, x: Tensor) -> Tensor:
        """Y = base(x) + Σ branch(x)."""
        if not self.enabled:
            return self.original(x)  # type: ignore[no-any-return]
        y = self.base(x)
        if not self.kept:
            for branch in self.branches:
                y = self.add(y, branch(self.base, x), branch.rows)
        return y  # type: ignore[no-any-return]

    def add(self, y: Tensor, update: Tensor, rows: slice | None) -> Tensor:
        """Add a branch's output, to the columns of y that its rows of W make; y's dtype stays."""
        if rows is not None:
            update = nn.functional.pad(update, (rows.start, y.shape[-1] - rows.stop))
        return y + update.to(y.dtype)

    @property
    def original(self) -> Any:
        """The base as it was given."""
        return self.kept[0] if self.kept else self.base

    def merged(self) -> nn.Module:
        """The base with W + ΔW; raises ValueError where that is not finite. Changes nothing."""
        weight, bias = dense(self.base)
        for branch in self.branches:
            weight = self.merge_weight(weight, branch.delta(self.base), branch.rows)
            bias = self.merge_bias(weight, bias, branch.bias_delta(), branch.rows)
        if not weight.isfinite().all() or (bias is not None and not bias.isfinite().all()):
            raise ValueError("the merged weight is not finite")
        return with_weight(self.base, weight, bias)

    def merge_weight(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        """W + ΔW in those rows, added in the wider dtype, rounded once."""
        # Under autocast ΔW may be narrower than W.
        total = weight.to(torch.promote_types(weight.dtype, delta.dtype), copy=True)
        total[rows or slice(None)] += delta
        return total.to(weight.dtype)

    def merge_bias(
        self, weight: Tensor, bias: Tensor | None, delta: Tensor | None, rows: slice | None
    ) -> Tensor | None:
        """The bias with the branch's own; one is made where the base has none."""
        if delta is None:
            return bias
        return self.merge_weight(
            weight.new_zeros(len(weight)) if bias is None else bias, delta, rows
        )

    def merge(self, merged: nn.Module) -> None:
        """Put what `merged` gave in the base's place."""
        self.kept, self.base = [self.base], merged

    def unmerge(self) -> None:
        """Put the base back."""
        if self.kept:
            (self.base,), self.kept = self.kept, []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast what is kept, too."""
        for module in self.kept:
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the base's weights by the names they have in the base, too: the two-stage load."""
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state:
                state[f"{prefix}base.{name}"] = state.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state, prefix, *args)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that look at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)


class Whole(nn.Module):
    """A module of `modules_to_save`: the base's, and each adapter's own trained copy."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active = "default"
        self.enabled = True
        self.training = base.training

    def copy_for(self, adapter: str) -> None:
        """Give an adapter its own copy, starting from the base."""
        self.adapters[adapter] = copy.deepcopy(self.base)

    @property
    def original(self) -> nn.Module:
        """The base as it was given."""
        return self.base

    @property
    def acting(self) -> nn.Module:
        """The active adapter's copy, or the base."""
        mine = self.enabled and self.active in self.adapters
        return self.adapters[self.active] if mine else self.base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the acting module does."""
        return self.acting(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The acting module's weight, for models that look at it."""
        return self.acting.weight  # type: ignore[return-value]


def walk(
    model: nn.Module, stop: type[nn.Module] | tuple[()] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, which hands each module up through a generator for every level above it.

    What is inside a `stop` is left out.
    """
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        if isinstance(module, stop):
            continue
        prefix = f"{path}." if path else ""
        stack += [
            (prefix + name, child)
            for name, child in reversed(module._modules.items())  # noqa: SLF001
            if child is not None
        ]


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value in its key's place, under every name that has."""
    if not new:
        return
    for _, parent in list(walk(model)):
        for name, child in parent._modules.items():  # noqa: SLF001  # every name, not each child once
            if child is not None and child in new:
                parent._modules[name] = new[child]  # noqa: SLF001


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Inside, the model as it was before injection."""
    wrapped = [module for _, module in walk(model) if isinstance(module, Adapted | Whole)]
    if not wrapped:
        yield
        return
    swap(model, {module: module.original for module in wrapped})
    try:
        yield
    finally:
        swap(model, {module.original: module for module in wrapped})
