"""Costs that are the same on every run: operations, FLOPs, bytes, Python calls.

with counting() as count:              # or counting(model=..., logits_width=...)
    model(**batch)
count.result().flops
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.measure.ledger import Ledger, uncollected

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from torch import nn

    from harness.adapter import Adapter
    from harness.measure.ledger import Kind

_LEDGER = Path(Ledger.label.__code__.co_filename)
# torch looks up a rule in Python for every operation that a dispatch mode sees (2.6 on).
_MEASURING = {str(_LEDGER), str(Path(torch.__file__).parent / "_library" / "simple_registry.py")}
_HERE = f"{_LEDGER.parent}{os.sep}"
_GENERATOR = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What one phase cost, in numbers that do not vary.

    Attributes:
        operations: how often each operator was dispatched, by its full name, sorted.
        flops: floating-point operations by operator, sorted.
        allocated_bytes: bytes of every storage that came into being.
        saved_bytes: bytes the graph kept for the backward pass, weights left out.
        peak: live bytes by kind at the highest moment.
        peak_at: the stage and the operation of that moment.
        python_calls: Python functions entered; None where they were not counted. Resumed generators
            are left out: how often `any()` asks one depends on the order of a set.
    """

    operations: Mapping[str, int]
    flops: Mapping[str, int]
    allocated_bytes: int
    saved_bytes: int
    peak: Mapping[str, int]
    peak_at: str
    python_calls: int | None = None

    @property
    def total_operations(self) -> int:
        """Operators dispatched."""
        return sum(self.operations.values())

    @property
    def total_flops(self) -> int:
        """Floating-point operations, attention's products among them."""
        return sum(self.flops.values())

    @property
    def peak_bytes(self) -> int:
        """Live bytes at the highest moment."""
        return sum(self.peak.values())

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        """Report rows of the counters; `where` is subject, version, model, phase, conditions."""
        metrics: list[tuple[str, int | None, str, Mapping[str, int] | None]] = [
            ("operations", self.total_operations, "operations", self.operations),
            ("flops", self.total_flops, "FLOP", self.flops),
            ("allocated_bytes", self.allocated_bytes, "B", None),
            ("saved_bytes", self.saved_bytes, "B", None),
            ("python_calls", self.python_calls, "calls", None),
        ]
        return [
            {**where, "metric": metric, "value": value, "unit": unit}
            | ({"by_name": dict(names)} if names is not None else {})
            for metric, value, unit, names in metrics
            if value is not None
        ]

    def memory_rows(self, **where: Any) -> list[dict[str, Any]]:
        """Report rows of the peak: all of it, then by kind."""
        whole = {**where, "metric": "peak_bytes", "value": self.peak_bytes, "unit": "B"}
        kinds = [
            {**where, "metric": "peak_bytes", "kind": kind, "value": size, "unit": "B"}
            for kind, size in self.peak.items()
        ]
        return [whole | {"at": self.peak_at}, *kinds]


@dataclass(slots=True)
class Count:
    """A count under way; `result()` once it is over."""

    ledger: Ledger
    calls: int | None = None

    def result(self, *, packed: bool = False) -> Counters:
        """The record; with `packed`, the peak as if packed weights lay in 4 bits."""
        peak, stage, operation = self.ledger.peak(packed=packed)
        return Counters(
            operations=dict(sorted(self.ledger.operations.items())),
            flops=dict(sorted(self.ledger.flops.items())),
            allocated_bytes=self.ledger.allocated_bytes,
            saved_bytes=self.ledger.saved_bytes,
            peak={str(kind): size for kind, size in peak.items()},
            peak_at=" in ".join(filter(None, (operation, stage))),
            python_calls=self.calls,
        )


@contextmanager
def counting(
    model: nn.Module | None = None,
    *,
    adapter: Adapter | None = None,
    logits_width: int | None = None,
    trained: Kind = "adapters",
) -> Iterator[Count]:
    """Count what is dispatched inside.

    With `model`, its parameters and buffers are known for what they are: base weights or, where
    `adapter` names them as factors or they are trainable, adapters. In full fine-tuning what is
    `trained` is base weights too.
    """
    ledger = Ledger(logits_width=logits_width)
    if model is not None:
        open_books(ledger, model, adapter, trained)
    with ledger.writing():
        yield Count(ledger)


def open_books(
    ledger: Ledger, model: nn.Module, adapter: Adapter | None = None, trained: Kind = "adapters"
) -> None:
    """Enter a model's storages into a ledger: adapters first, since a view may share."""
    factors = adapter.factors(model) if adapter is not None else {}
    # A factor may be computed on the fly; what lives is then the leaf it comes from, which trains.
    ledger.opening(
        (t for parts in factors.values() for f in parts for t in (f.A, f.B) if t.is_leaf),
        "adapters",
    )
    ledger.opening((p for p in model.parameters() if p.requires_grad), trained)
    ledger.opening(model.parameters(), "base weights")
    ledger.opening(model.buffers(), "base weights")
    ledger.opening((p.grad for p in model.parameters() if p.grad is not None), "gradients")


class Calls:
    """Python functions entered; generators are left out, and so are built-ins.

    So is the measuring itself: a function of this folder is not counted, nor what a ledger calls. The
    count is the same with a ledger and without.
    """

    def __init__(self) -> None:
        self.count = 0
        self._skipped: FrameType | None = None

    def event(self, frame: FrameType, event: str, arg: object) -> None:  # noqa: ARG002
        """What `sys.setprofile` calls."""
        if self._skipped is not None:
            if event == "return" and frame is self._skipped:
                self._skipped = None
        elif event == "call":
            code = frame.f_code
            if code.co_filename in _MEASURING:
                self._skipped = frame
            elif not code.co_flags & _GENERATOR and not code.co_filename.startswith(_HERE):
                self.count += 1


@contextmanager
def counting_calls() -> Iterator[Calls]:
    """Count the Python functions entered inside, on this thread."""
    calls = Calls()
    with uncollected():
        sys.setprofile(calls.event)
        try:
            yield calls
        finally:
            sys.setprofile(None)
