"""The trend of a series of reports: every row through the runs, and the run at which it changed.

Each report is judged against the one before it and let go again: a year of nights is 365 runs of
small numbers, not 365 reports in memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.report.comparable import bars, keys, ruled_out
from harness.report.results import judge_spec, results_by_id
from harness.report.rows import (
    SECTIONS,
    Row,
    bar,
    cost_row,
    place,
    repeats,
    rows_by_identity,
    stored_value,
    title,
)
from harness.report.words import OUTCOMES, named, plain, seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd

    from harness.report.comparable import Key
    from harness.report.rows import Verdict
    from harness.report.schema import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One report of a history.

    Attributes:
        id: the report's.
        name: what it is called.
        started: when, as the report says.
        finished: whether it ended of its own accord.
        verdict: the report's, if it has one.
        outcomes: how many specs had each outcome.
    """

    id: str
    name: str
    started: str
    finished: bool
    verdict: str | None
    outcomes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The run at which a row changed: its index in the history, and what became of the row there."""

    run: int
    verdict: Verdict | None
    why: str
    old: str | int | float | None
    new: str | int | float | None


@dataclass(slots=True, kw_only=True)
class Series:
    """One row through the runs; None where a run has no such row."""

    section: str
    name: str
    where: str
    unit: str | None
    readings: list[str | int | float | None]
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Several runs of one kind, oldest first, and every row through them.

    Attributes:
        runs: the runs.
        series: the rows, those that changed most lately first.
        first: the oldest report.
        before: the one before the newest.
        last: the newest.
    """

    runs: tuple[Run, ...]
    series: tuple[Series, ...]
    first: Report
    before: Report
    last: Report

    def frame(self) -> pd.DataFrame:
        """Every value: a row for each series, a column for each run."""
        import pandas as pd

        index = pd.MultiIndex.from_tuples(
            [(one.section, one.name, one.where, one.unit or "") for one in self.series],
            names=["section", "name", "where", "unit"],
        )
        return pd.DataFrame(
            [one.readings for one in self.series],
            index=index,
            columns=[run.started for run in self.runs],
            dtype=object,
        )

    def as_dict(self) -> dict[str, Any]:
        """The trend as JSON holds it: the runs, and of each row its changes."""
        return {
            "runs": [
                {
                    "id": run.id,
                    "name": run.name,
                    "started": run.started,
                    "finished": run.finished,
                    "verdict": run.verdict,
                    "outcomes": dict(run.outcomes),
                }
                for run in self.runs
            ],
            "rows": [
                {
                    "section": one.section,
                    "name": one.name,
                    "where": one.where,
                    "unit": one.unit,
                    "values": one.readings,
                    "changes": [
                        {"run": self.runs[change.run].id, "verdict": change.verdict}
                        | {"why": change.why, "old": change.old, "new": change.new}
                        for change in one.changes
                    ],
                }
                for one in self.series
            ],
        }


class Tracer:
    """Takes the reports of one series, oldest first, and makes their trend."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._series: dict[tuple[str, ...], Series] = {}
        self._ends: list[Report] = []
        # By section, the series of each row of the last report, by the row's `id()`.
        self._held: dict[str, dict[int, Series]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, report: Report) -> None:
        """The next run."""
        before = self._ends[-1] if self._ends else None
        index = len(self._runs)
        counts = Counter(one["outcome"] for one in report["results"])
        self._runs.append(
            Run(
                id=report["id"],
                name=named(report),
                started=report["started"],
                finished=bool(report["finished"]),
                verdict=report.get("verdict"),
                outcomes={name: counts[name] for name in OUTCOMES},
            )
        )
        barred = ruled_out(keys(before, report)) if before else {}
        self._specs(before, report, barred=barred.get("spec"))
        for section in SECTIONS:
            self._costs(before, report, section=section, barred=barred)
        for one in self._series.values():
            if len(one.readings) <= index:
                one.readings.append(None)
        # The first, the last but one and the last are all that is kept whole.
        self._ends = [self._ends[0], *self._ends[1:][-1:], report] if self._ends else [report]

    def trend(self) -> Trend:
        """The trend of what was added; at least one report."""
        series = sorted(
            self._series.values(),
            key=lambda one: (-max((change.run for change in one.changes), default=-1), one.name),
        )
        return Trend(
            runs=tuple(self._runs),
            series=tuple(series),
            first=self._ends[0],
            before=self._ends[-2] if len(self._ends) > 1 else self._ends[0],
            last=self._ends[-1],
        )

    def _at(self, key: tuple[str, ...], index: int, make: Any) -> Series:
        while (found := self._series.get(key)) and len(found.readings) > index:
            # Taken in this run by another version of the same.
            key = (*key, "again")
        if found is None:
            section, name, where, unit = make()
            found = Series(
                section=section, name=name, where=where, unit=unit, readings=[None] * index
            )
            self._series[key] = found
        return found

    def _specs(self, before: Report | None, after: Report, *, barred: Key | None) -> None:
        index = len(self._runs) - 1
        left, right = results_by_id(before) if before else {}, results_by_id(after)
        for key in dict.fromkeys([*left, *right]):
            old, new = left.get(key), right.get(key)
            one = self._at(
                ("spec", *key),
                index,
                lambda key=key: ("spec", plain(key[0], limit=120), plain(key[1], limit=80), None),
            )
            one.readings.append(new["outcome"] if new else None)
            if before is None or old == new:
                continue
            verdict, why = judge_spec(old, new, finished=bool(after["finished"]))
            if barred is not None:
                verdict, why = "incomparable", bar(barred)
            if verdict != "same":
                one.changes.append(
                    Change(
                        run=index,
                        verdict=verdict,
                        why=why,
                        old=old["outcome"] if old else None,
                        new=new["outcome"] if new else None,
                    )
                )

    def _costs(
        self, before: Report | None, after: Report, *, section: str, barred: Mapping[str, Key]
    ) -> None:
        index, name = len(self._runs) - 1, SECTIONS[section]
        rows = before[section] if before else []
        versions = repeats(rows) or repeats(after[section])
        left = rows_by_identity(rows, versions=versions)
        right = rows_by_identity(after[section], versions=versions)
        held, self._held[section] = self._held.get(section, {}), {}
        value = seconds if section == "timings" else stored_value
        for key in dict.fromkeys([*left, *right]):
            old, new = left.get(key), right.get(key)
            either = new or old
            assert either is not None
            one = held.get(id(old)) or self._at(
                (name, *key),
                index,
                lambda row=either: (name, title(row), place(row), row.get("unit")),
            )
            one.readings.append(value(new) if new else None)
            if new:
                self._held[section][id(new)] = one
            if before is None or (old and new and _unmoved(section, old, new)):
                continue
            row: Row = cost_row(
                name,
                old,
                new,
                barred=bars(barred, name, key[2]),
                finished=bool(after["finished"]),
                run=before,
            )
            if row.verdict not in {"same", None}:
                one.changes.append(
                    Change(run=index, verdict=row.verdict, why=row.why, old=row.old, new=row.new)
                )


def _unmoved(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a row has no news: the same value or, of wall time, one that nobody judges."""
    if section == "timings":
        return not new.get("paired")
    return bool(old["value"] == new["value"])


def trace(reports: Iterable[Report]) -> Trend:
    """The trend of these reports, in the order given; at least one."""
    tracer = Tracer()
    for report in reports:
        tracer.add(report)
    return tracer.trend()
