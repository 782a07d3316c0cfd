"""A comparison as a terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.console import table
from harness.report.rows import told
from harness.report.words import named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.report.compare import Comparison
    from harness.report.rows import Row
    from harness.report.trend import Trend

LOUD = ("worse", "removed")
"""What is always told, however long it gets."""

SCREENFUL = 25
"""Rows of everything else."""


def tell(found: Comparison, trend: Trend | None = None) -> str:
    """The comparison for a terminal: circumstances that differ, rows that are not the same, the sum."""
    parts = [f"old  {named(found.old)}", f"new  {named(found.new)}", ""]
    differing = [key for key in found.keys if not key.same]
    if differing:
        parts += [
            table(
                (
                    (key.name, key.old, key.new, ", ".join(key.rules_out) or "nothing")
                    for key in differing
                ),
                ("circumstance", "old", "new", "rules out"),
            ),
            "",
        ]
    loud = [row for row in found.rows if row.verdict in LOUD]
    quiet = [row for row in found.rows if row.verdict not in {*LOUD, "same"}]
    moved = loud + quiet[:SCREENFUL]
    shared = _shared(moved)
    if shared:
        parts += [f"everywhere  {', '.join(shared)}", ""]
    if moved:
        parts.append(
            table(
                (
                    (
                        row.verdict or "shown",
                        row.name,
                        ", ".join(part for part in row.where.split(", ") if part not in shared),
                        told(row, row.old),
                        told(row, row.new),
                        _interval(row) or row.why,
                    )
                    for row in moved
                ),
                ("verdict", "row", "where", "old", "new", "why"),
            )
        )
        if len(quiet) > SCREENFUL:
            parts.append(f"… and {len(quiet) - SCREENFUL:,} more; --html and --json have them all")
        parts.append("")
    if trend is not None:
        parts += [_tell_changes(trend), ""]
    if found.undecided:
        parts.append(f"undecided: {found.undecided}")
    return "\n".join([*parts, found.headline])


def _shared(rows: Sequence[Row]) -> list[str]:
    """The conditions that all of several rows have, so that they are told once."""
    places = [row.where.split(", ") for row in rows]
    if len(places) < 2:
        return []
    return [part for part in places[0] if part and all(part in place for place in places)]


def _tell_changes(trend: Trend) -> str:
    changes = [(one, change) for one in trend.series for change in one.changes]
    changes.sort(key=lambda pair: -pair[1].run)
    return "\n".join(
        (
            f"{len(trend.runs)} runs; where rows changed, the latest first:",
            table(
                (
                    (
                        trend.runs[change.run].name,
                        change.verdict or "shown",
                        one.name,
                        one.where,
                        change.why,
                    )
                    for one, change in changes
                ),
                ("run", "verdict", "row", "where", "why"),
            )
            or "nowhere",
        )
    )


def _interval(row: Row) -> str:
    if row.low is None or row.high is None or row.ratio is None:
        return ""
    return f"paired: {row.ratio:.3f} times, {row.low:.3f} to {row.high:.3f}"
