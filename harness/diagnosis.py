"""Say which planted fault a failing implementation behaves like.

Each fault that the failed spec must catch is judged at the same case, from the same factors and inputs.
It is named when what it does is what the implementation does: the same numbers, far nearer than the
truth is, or the same words. Several that are equal are named together; none when none fits.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from harness.failure import Broken
from harness.worker import judge

if TYPE_CHECKING:
    from torch import Tensor

    from harness.adapter import Adapter
    from harness.case import Case
    from harness.spec import Spec

NEAR = 0.02
"""A fault fits when its numbers are at most this part of the way that the truth is away."""

LIMIT = 1.5
"""Seconds; what has not been tried by then is not named."""


def nearest(adapter: Adapter, item: Spec, case: Case) -> tuple[str, ...]:
    """The names of the faults that behave as the adapter does, nearest first; empty if none does."""
    from harness.faults.record import faults

    deadline = time.monotonic() + LIMIT
    broken, _, _ = judge(adapter, item, case)
    if not isinstance(broken, Broken):
        return ()
    distances: dict[str, float] = {}
    for fault in faults().values():
        if fault.killed_by != item.id or time.monotonic() > deadline:
            continue
        other, _, _ = judge(fault.make(), item, case)
        if isinstance(other, Broken):
            away = distance(broken, other)
            if away <= NEAR:
                distances[fault.name] = away
    if not distances:
        return ()
    best = min(distances.values())
    # Distances this close are rounding apart: which is the nearer is chance.
    named = [name for name, away in distances.items() if away <= 10 * best + 1e-6]
    return tuple(sorted(named, key=distances.__getitem__))


def distance(mine: Broken, other: Broken) -> float:
    """How far a fault's behaviour is from the one seen: 0 is the same, 1 as far as the truth.

    By the numbers where both have some, otherwise by the words, numbers and names in them left out.
    """
    if mine.kind != other.kind:
        return float("inf")
    if mine.observed is not None and other.observed is not None and mine.truth is not None:
        if mine.observed.shape != other.observed.shape:
            return float("inf")
        return _relative(mine.observed, other.observed, mine.truth)
    if mine.actual == other.actual and mine.where == other.where:
        return 0.0
    same = _words(mine.expected) == _words(other.expected) and _words(mine.actual) == _words(
        other.actual
    )
    return NEAR if same else float("inf")


def _relative(mine: Tensor, other: Tensor, truth: Tensor) -> float:
    a, f, t = (x.detach().cpu().double().nan_to_num() for x in (mine, other, truth))
    away = float((a - t).norm())
    return float((a - f).norm()) / away if away else float("inf")


def _words(text: str) -> str:
    """A sentence without its numbers and its dotted or underscored names."""
    return re.sub(r"[\w-]*[\d._][\w.-]*", "#", text)
