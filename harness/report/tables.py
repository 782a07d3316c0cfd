"""The long tables of a page, as its script builds them: every text is kept once.

A bench of 182 cells has 7,860 rows and a few hundred texts of where they hold; written out as HTML
they would be 5 MB, as places in a list of texts they are a few hundred KB.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.report.rows import told

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness.report.rows import Row

COMPARISON = (
    ("verdict", "badge"),
    ("row", "row"),
    ("", "under"),
    ("old", "n"),
    ("new", "n"),
    ("ratio", "n"),
    ("", "under"),
    ("why", "wide"),
)
"""Columns with how they are shown; `under` stands below the column before it."""

COSTS = (
    ("subject", ""),
    ("version", ""),
    ("phase", ""),
    ("where", ""),
    ("metric", ""),
    ("value", "n"),
)


class Tables:
    """Takes the tables of a page, and gives each its number.

    Attributes:
        words: every text, and its place.
        drawn: for each table its columns, and the places of its cells, row after row.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.drawn: list[dict[str, Any]] = []

    def comparison(self, rows: Iterable[Row]) -> int:
        """The rows of a comparison."""
        return self._add(COMPARISON, map(_compared, rows))

    def costs(self, rows: Iterable[Sequence[str]]) -> int:
        """Rows of words, as `view.costs` makes them."""
        return self._add(COSTS, rows)

    def _add(self, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> int:
        cells = [self.words.setdefault(cell, len(self.words)) for row in rows for cell in row]
        self.drawn.append({"columns": columns, "cells": cells})
        return len(self.drawn) - 1


def _compared(row: Row) -> tuple[str, ...]:
    within = row.low is not None and row.high is not None
    return (
        row.verdict or "shown",
        row.name,
        row.where,
        told(row, row.old),
        told(row, row.new),
        _times(row.ratio),
        f"{_times(row.low)} to {_times(row.high)}" if within else "",
        row.why,
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None or math.isnan(ratio) else f"{ratio:.4g}"
