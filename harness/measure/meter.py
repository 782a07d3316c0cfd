"""What is measured of a cell's phases: each is counted, and some are timed."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from harness.measure import clock, phases
from harness.measure.cell import FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from harness.measure.cell import Cell, Rows
    from harness.measure.counters import Counters
    from harness.measure.phases import Phase, Work

TIMED = {"evaluation-forward", "training-step", "merged-forward"}
"""What is done again and again; the other phases happen once, or are part of a step."""


class Meter:
    """A meter of `phases.live` for one cell.

    Attributes:
        rows: what it has found, by section of a report.
    """

    def __init__(self, cell: Cell, where: Mapping[str, Any]) -> None:
        self.rows: Rows = {"timings": [], "memory": [], "counters": []}
        self._cell = cell
        self._where = dict(where)
        self._limit = 0.0

    def __call__(self, phase: Phase, model: nn.Module, work: Work) -> Any:
        """Count a phase and, where it can be repeated, time it."""
        counters, out = self._counted(phase, model, work)
        if phase == "save":
            self._add(
                "counters", "training-step", "checkpoint_bytes", phases.checkpoint_bytes(out), "B"
            )
        if phase not in TIMED:
            return out
        del out
        clock.reset_peak(self._cell.device)
        self._timed(phase, lambda: work(None), counters.total_flops)
        if phase == "training-step":
            self._stepped(model)
        return None

    def count(self, phase: Phase, model: nn.Module, work: Work) -> Any:
        """Count a phase, and no more."""
        return self._counted(phase, model, work)[1]

    def _counted(self, phase: Phase, model: nn.Module, work: Work) -> tuple[Counters, Any]:
        full = self._cell.adapter == FULL
        counters, out = phases.count(
            phase, model, work, trained="base weights" if full else "adapters"
        )
        self.rows["counters"] += counters.rows(**self._where, phase=phase)
        self.rows["memory"] += counters.memory_rows(**self._where, phase=phase)
        return counters, out

    def _timed(self, phase: Phase, work: Callable[[], object], flops: int) -> None:
        cell = self._cell
        if not self._limit:
            self._limit = clock.product_flops_per_second(
                cell.device, torch.bfloat16 if cell.dtype == "nf4" else getattr(torch, cell.dtype)
            )
        samples = clock.seconds_of(work, device=cell.device, repeats=cell.repeats)
        second = median(samples)
        self._add("timings", phase, "seconds", second, "s", samples=samples)
        tokens = cell.batch * cell.sequence / second
        self._add("timings", phase, "tokens_per_second", tokens, "tokens/s", better="higher")
        share = 100 * flops / second / self._limit
        self._add("timings", phase, "share_of_limit", share, "%", better="higher")

    def _stepped(self, model: nn.Module) -> None:
        """What is known once a step has run: what the allocator saw, and how much trains."""
        step: Phase = "training-step"
        for name, size in clock.peak_memory(self._cell.device).items():
            self._add("memory", step, name, size, "B", exact=False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._add("counters", step, "trained_parameters", trained, "parameters")
        if self._cell.adapter == FULL:
            self._add(
                "counters",
                step,
                "checkpoint_bytes",
                phases.checkpoint_bytes(model.state_dict()),
                "B",
            )

    def _add(
        self, section: str, phase: Phase, metric: str, value: float, unit: str, **more: Any
    ) -> None:
        row = {**self._where, "phase": phase, "metric": metric, "value": value, "unit": unit}
        self.rows[section].append(row | more)
