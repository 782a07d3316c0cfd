"""How a report's values are told to a person, and its texts made harmless.

A report is data from elsewhere: a name in it may hold an escape sequence, a newline or a tag. Every
text passes through here, or through the template's own escaping, before it is shown.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.report.schema import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OUTCOMES = {
    "failed": "✗",
    "not_run": "∅",
    "blocked": "⊘",
    "known": "!",
    "passed": "✓",
    "not_claimed": "–",
}
"""A spec's outcomes, the loudest first, each with its sign: colour is never alone."""

CLAIMS = {"unclaimed": "Works, but is not claimed", "unjudged": "Claimed, not judged"}
"""What a verdict says of its claims beside the specs: members of a report, each with its words."""

_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def plain(text: object, *, limit: int = 500) -> str:
    """One line that can be printed: control characters become spaces, the rest is cut at `limit`."""
    line = " ".join(_UNSEEN.sub(" ", str(text)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def outcome(name: str) -> str:
    """An outcome in words: `not_claimed` is `not claimed`."""
    return name.replace("_", " ")


def quantity(value: object, unit: str | None = None) -> str:
    """A value and its unit, short enough to read: `8.60 GiB`, `14.98 GFLOP`, `12.3 ms`, `1,234`."""
    if isinstance(value, str) and number_of(value) is None:
        return plain(value, limit=60)
    real = number_of(value)
    if real is None:
        return "–"
    unit = plain(unit or "", limit=24)
    if not math.isfinite(real):
        return f"{_digits(real)} {unit}".rstrip()
    size = abs(real)
    if unit in {"B", "byte", "bytes"}:
        return _binary(real)
    if unit in {"s", "second", "seconds"} and size:
        for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
            if size >= scale:
                return f"{_digits(real / scale)} {name}"
    if size >= 1e7:
        for scale, prefix in _SI:
            if size >= scale:
                return f"{_digits(real / scale)} {prefix}{'' if unit == '1' else unit}".rstrip()
    return f"{_digits(real)} {'' if unit == '1' else unit}".rstrip()


def exactly(value: object, unit: str | None = None) -> str:
    """A value with every digit that it has: what is compared exactly is shown exactly."""
    if isinstance(value, str):
        return plain(value, limit=60)
    if value is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{number_of(value):.6g}"
    return f"{text} {plain(unit or '', limit=24)}".rstrip()


def number_of(value: object) -> float | None:
    """A report's number as a float; None for what is none."""
    if isinstance(value, str) and value not in {"NaN", "Infinity", "-Infinity"}:
        return None
    return number(value)


def seconds(row: Mapping[str, Any]) -> float | None:
    """What a timing row says: its value or, without one, the median of its samples."""
    value = number_of(row.get("value"))
    samples = [found for one in row.get("samples") or () if (found := number_of(one)) is not None]
    return statistics.median(samples) if value is None and samples else value


def conditions(row: Mapping[str, Any]) -> str:
    """A row's conditions in words: `r=8, dtype=float32`."""
    parts = (row.get("conditions") or {}).items()
    return ", ".join(
        f"{plain(key, limit=60)}={plain(compact(value), limit=60)}"
        for key, value in parts
        if value is not None
    )


def compact(value: object) -> str:
    """Any JSON value as one short text; strings without their quotes."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def named(report: Mapping[str, Any]) -> str:
    """What a run is called: its label or adapter, version, model and moment."""
    if report.get("label"):
        return plain(report["label"], limit=80)
    adapter = report.get("adapter") or {}
    parts = [adapter.get("name") or report["kind"], adapter.get("version"), report.get("model")]
    return f"{' '.join(plain(part, limit=40) for part in parts if part)}, {moment(report)}"


def told_apart(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each of several runs is called: its name, with its id where two share one."""
    names = [named(report) for report in reports]
    shared = Counter(names)
    return [
        name if shared[name] == 1 else f"{name} ({plain(report['id'], limit=80)})"
        for name, report in zip(names, reports, strict=True)
    ]


def moment(report: Mapping[str, Any]) -> str:
    """When a run started, to the minute: `2026-11-21 03:00`."""
    return plain(report["started"][:16]).replace("T", " ")


def plural(count: int, noun: str) -> str:
    """`1 spec`, `2 specs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _binary(size: float) -> str:
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "∞", "-inf": "-∞"}[str(value)]
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 100 <= abs(value) < 1e15 else f"{value:.3g}"
