"""One property or cost in two reports, and what became of it.

A counter is judged exactly; memory exactly on the CPU and within the allocator's step on a GPU; wall
time where it was paired. What is not judged has no verdict at all. Specs are judged in `results`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from harness.report.words import (
    compact,
    conditions,
    exactly,
    number_of,
    outcome,
    plain,
    quantity,
    seconds,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from harness.report.comparable import Key

Verdict = Literal["worse", "removed", "incomparable", "inconclusive", "added", "better", "same"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""The seven words, the loudest first."""

ALLOCATOR_STEP = 2 * 2**20
"""Bytes. CUDA's caching allocator rounds what it reserves up to 2 MiB (kSmallBuffer, kRoundLarge)."""

NAMES = 3
"""Operations that a row names, where their numbers changed."""

SECTIONS = {"counters": "counter", "memory": "memory", "timings": "timing"}
"""A report's sections of costs, and what a row of each is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One property or cost in both reports.

    Attributes:
        section: `spec`, `counter`, `memory` or `timing`.
        name: the spec's id, or subject, phase and metric.
        where: the conditions under which it holds.
        old: its value in the old report; None where it has none.
        new: likewise in the new one.
        unit: of both.
        verdict: one of the seven words; None where the row is shown and not judged.
        why: the reason, in words.
        ratio: new over old, or of the paired times.
        low: lower end of the paired ratio's interval.
        high: upper end.
    """

    section: str
    name: str
    where: str
    old: str | int | float | None
    new: str | int | float | None
    unit: str | None
    verdict: Verdict | None
    why: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def bar(key: Key) -> str:
    """Why a row cannot be compared, in words."""
    return f"{key.name} differs: {key.old} and {key.new}"


Identity = tuple[str, ...]


def rows_by_identity(
    rows: Iterable[Mapping[str, Any]], *, versions: bool = False
) -> dict[Identity, Mapping[str, Any]]:
    """Rows by what they measure, not by what was found; repeats are numbered.

    The version is left out: that it changed is what a comparison is for. A report that tells of
    several versions needs `versions`.
    """
    seen: Counter[Identity] = Counter()
    found: dict[Identity, Mapping[str, Any]] = {}
    for row in rows:
        base = identity(row, version=versions)
        found[*base, str(seen[base])] = row
        seen[base] += 1
    return found


def identity(row: Mapping[str, Any], *, version: bool) -> Identity:
    """What a row measures: subject, phase, metric, kind, model and conditions."""
    return (
        row["subject"],
        row.get("phase") or "",
        row["metric"],
        row.get("kind") or "",
        row.get("model") or "",
        json.dumps(row.get("conditions") or {}, sort_keys=True),
        (row.get("version") or "") if version else "",
    )


def repeats(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a report measures one thing under several versions."""
    versions: dict[Identity, set[str]] = {}
    for row in rows:
        versions.setdefault(identity(row, version=False), set()).add(row.get("version") or "")
    return any(len(found) > 1 for found in versions.values())


def title(row: Mapping[str, Any]) -> str:
    """What a cost row is called: `peft training-step flops`."""
    parts = (row["subject"], row.get("phase"), row["metric"], row.get("kind"))
    return " ".join(plain(part, limit=60) for part in parts if part)


def place(row: Mapping[str, Any]) -> str:
    """Where it holds: `tiny, r=8, dtype=float32`."""
    parts = (plain(row.get("model") or "", limit=60), conditions(row))
    return ", ".join(part for part in parts if part)


def cost_row(
    section: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    *,
    barred: Key | None = None,
    finished: bool = True,
    run: Mapping[str, Any] | None = None,
) -> Row:
    """One cost in both reports, judged; one of `before` and `after` may be missing.

    Args:
        section: `counter`, `memory` or `timing`.
        before: the row in the old report.
        after: the row in the new one.
        barred: the key that makes this section incomparable.
        finished: whether the new run ended of its own accord.
        run: the old report, to recognise it as the other side of a pair.
    """
    either = after or before
    assert either is not None
    value = seconds if section == "timing" else stored_value
    old = None if before is None else value(before)
    new = None if after is None else value(after)
    verdict: Verdict | None
    ratio, low, high = _ratio(old, new), None, None
    if barred is not None and barred.name in {"kind", "model"}:
        # Of unlike runs, a row that only one side has is no news.
        verdict, why = "incomparable", bar(barred)
    elif after is None:
        verdict, why = ("removed", "no longer measured") if finished else _unfinished()
    elif before is None:
        verdict, why = "added", "newly measured"
    elif section == "timing" and (paired := _pair(before, after, run)) is not None:
        verdict, why = paired["verdict"], "paired"
        ratio, low, high = (number_of(paired.get(name)) for name in ("ratio", "low", "high"))
    elif barred is not None:
        verdict, why = "incomparable", bar(barred)
    elif section == "timing":
        third = (after.get("paired") or {}).get("against")
        verdict = None
        why = (
            f"paired with {plain(third, limit=60)}, not with the old run"
            if third
            else "wall time is judged only where it was paired"
        )
    elif either.get("exact") is False:
        verdict, why = None, "varies from run to run"
    elif (before.get("unit") or "") != (after.get("unit") or ""):
        verdict, why = "incomparable", "the unit differs"
    else:
        verdict, why = _judge_cost(section, old, new, after)
        if moved := _moved(before, after):
            why = f"{'as many' if verdict == 'same' else why}: {moved}"
    return Row(
        section=section,
        name=title(either),
        where=place(either),
        old=old,
        new=new,
        unit=either.get("unit"),
        verdict=verdict,
        why=why,
        ratio=ratio,
        low=low,
        high=high,
    )


def _unfinished() -> tuple[Verdict, str]:
    return "inconclusive", "the new run did not finish"


def stored_value(row: Mapping[str, Any]) -> str | int | float | None:
    """A row's value as the report has it."""
    value: str | int | float | None = row["value"]
    return value


def _ratio(old: object, new: object) -> float | None:
    left, right = number_of(old), number_of(new)
    if left is None or right is None or left == 0:
        return None
    quotient = right / left
    return quotient if abs(quotient) < float("inf") else None


def _pair(
    before: Mapping[str, Any], after: Mapping[str, Any], run: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The pair that answers for this row: timed against the old run, by its id, label or version.

    A pair against the row's own version has its other side in its own report, not in the old run.
    """
    paired: Mapping[str, Any] | None = after.get("paired")
    if paired is None or paired.get("against") is None:
        return None
    named = {_versioned(before)} - {_versioned(after), None}
    if run is not None:
        named |= {run["id"], run.get("label")}
    return paired if paired["against"] in named else None


def _versioned(row: Mapping[str, Any]) -> str | None:
    return f"{row['subject']} {row['version']}" if row.get("version") else None


def _judge_cost(
    section: str, old: object, new: object, row: Mapping[str, Any]
) -> tuple[Verdict, str]:
    if old == new:
        return "same", "exactly"
    left, right = number_of(old), number_of(new)
    if left is None or right is None or math.isnan(left) or math.isnan(right):
        return "inconclusive", "not a number"
    # Counts beyond 2**53 keep every bit as integers.
    left = old if isinstance(old, int) else left
    right = new if isinstance(new, int) else right
    device = compact((row.get("conditions") or {}).get("device", ""))
    if section == "memory" and device.startswith("cuda") and abs(right - left) <= ALLOCATOR_STEP:
        return "same", "within the allocator's step of 2 MiB"
    better = row.get("better") or "lower"
    if better == "equal":
        return "worse", "must not change"
    improved = right < left if better == "lower" else right > left
    change = f" ({_percent(right / left)})" if left else ""
    return ("better" if improved else "worse"), f"{'less' if right < left else 'more'}{change}"


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Which operations there are more or less of, the most first: `aten.clone.default +4`."""
    then, now = (row.get("by_name") or {} for row in (before, after))
    changes = {
        plain(name, limit=60): now.get(name, 0) - then.get(name, 0)
        for name in (dict.fromkeys([*then, *now]) if then and now else ())
        if now.get(name, 0) != then.get(name, 0)
    }
    names = sorted(changes, key=lambda name: -abs(changes[name]))
    told_ = ", ".join(f"{name} {changes[name]:+,}" for name in names[:NAMES])
    return f"{told_} and {len(names) - NAMES} more" if len(names) > NAMES else told_


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.2g} %"


def told(row: Row, value: object) -> str:
    """One of a row's values in words: exact where it is judged exactly."""
    if row.section == "spec":
        return "–" if value is None else outcome(str(value))
    return (exactly if row.section == "counter" else quantity)(value, row.unit)
