"""Paired times as a page draws them: the interval of each ratio, against no change."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.report.charts import MOST, Chart, Series, finite
from harness.report.rows import place, title
from harness.report.words import plain, told_apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from harness.report.compare import Comparison


def compared(found: Comparison) -> Iterator[Chart]:
    """The paired times of a comparison as intervals of the ratio, the loudest first."""
    yield from _intervals(
        "Paired times, new over old",
        (
            (str(row.verdict), row.name, row.where, row.low, row.ratio, row.high)
            for row in found.rows
        ),
    )


def paired(reports: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """The paired times of the reports themselves, each against the other side of its pair."""
    yield from _intervals(
        "Paired times",
        (
            (
                pair["verdict"],
                f"{title(row)} against {plain(pair.get('against') or '–', limit=60)}"
                + (f", {run}" if len(reports) > 1 else ""),
                place(row),
                *(finite(pair.get(name)) for name in ("low", "ratio", "high")),
            )
            for report, run in zip(reports, told_apart(reports), strict=True)
            for row in report["timings"]
            if (pair := row.get("paired"))
        ),
    )


def _intervals(heading: str, rows: Iterable[tuple[Any, ...]]) -> Iterator[Chart]:
    known = [row for row in rows if all(one is not None for one in row[3:])]
    shown = [row for row in known if all(map(math.isfinite, row[3:]))][:MOST]
    if shown:
        seen: Counter[str] = Counter()

        def once(label: str) -> str:
            # The script places a row by its label.
            seen[label] += 1
            return label if seen[label] == 1 else f"{label} ({seen[label]})"

        yield Chart(
            kind="interval",
            title=heading,
            note="The diamond is the ratio, the bar its interval.",
            x=tuple(
                once(f"{verdict}: {name}{f', {where}' if where else ''}")
                for verdict, name, where, *_ in shown
            ),
            x_label="",
            y_label="ratio; under 1 is faster",
            series=tuple(
                Series(name=name, y=tuple(row[3 + index] for row in shown))
                for index, name in enumerate(("low", "ratio", "high"))
            ),
            limits=(("no change", 1.0),),
            headers=("row", "where", "verdict", "low", "ratio", "high"),
            rows=tuple(
                (name, where, verdict, *(f"{one:.4g}" for one in ends))
                for verdict, name, where, *ends in shown
            ),
        )
