"""Two reports side by side, row by row.

    comparable? key by key ──> rows: better · same · worse · inconclusive · incomparable · added · removed
                                │
          specs ............... by outcome, and by which cases fail
          counters ............ exactly
          memory .............. exactly on the CPU, within the allocator's step on a GPU
          wall time ........... where it was paired; elsewhere shown, never judged

A spec that vanished is told as loudly as one that failed.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.report.comparable import Key, bars, keys, ruled_out
from harness.report.history import group, load, spare
from harness.report.results import JUDGED, judge_spec, results_by_id
from harness.report.rows import (
    SECTIONS,
    VERDICTS,
    Row,
    bar,
    cost_row,
    repeats,
    rows_by_identity,
)
from harness.report.schema import replace
from harness.report.terminal import tell
from harness.report.trend import Tracer
from harness.report.words import plain, plural

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pandas as pd

    from harness.report.trend import Trend


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of every row from the old report to the new one.

    Attributes:
        old: the old report.
        new: the new one.
        keys: the circumstances of both.
        rows: the loudest first.
    """

    old: Mapping[str, Any]
    new: Mapping[str, Any]
    keys: tuple[Key, ...]
    rows: tuple[Row, ...]

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many rows each of the seven words has, and how many are only shown."""
        found: Counter[str] = Counter(row.verdict or "shown" for row in self.rows)
        return {word: found[word] for word in (*VERDICTS, "shown")}

    @property
    def headline(self) -> str:
        """The comparison in one line: `2 worse, 1 removed, 40 same, 3 shown and not judged`."""
        told = {"shown": "shown and not judged"}
        parts = [
            f"{count:,} {told.get(word, word)}" for word, count in self.counts.items() if count
        ]
        return ", ".join(parts) or "no rows"

    @property
    def undecided(self) -> str:
        """Why nothing may be concluded from what is not worse, in words; empty where it may."""
        if not self.new["finished"]:
            return "the new run did not finish"
        open_ = Counter(row.section for row in self.rows if row.verdict == "inconclusive")
        specs, costs = open_["spec"], open_["counter"] + open_["memory"]
        told = [plural(n, noun) for n, noun in ((specs, "spec"), (costs, "cost")) if n]
        if told:
            return f"{' and '.join(told)} inconclusive"
        # What was judged in neither run is the same; a failed spec would tell of those it blocks.
        return "the new run is INCOMPLETE" if self.new.get("verdict") == "INCOMPLETE" else ""

    def exit_code(self, fail_on: Iterable[str]) -> int:
        """1 where a row has a word of `fail_on`; 3 where it is one that leaves the question open.

        A comparison that judged nothing is 3 as well, and so is one of a run that was cut short or
        that left a spec or a counted cost undecided. Where `fail_on` asks for no decision, it is 0.
        """
        counts, wanted = self.counts, set(fail_on)
        if not wanted:
            return 0
        undecided = {"inconclusive", "incomparable"}
        if any(counts[word] for word in wanted - undecided):
            return 1
        if any(counts[word] for word in wanted & undecided) or self.undecided:
            return 3
        return 0 if any(map(_says, self.rows)) else 3

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        columns = list(Row.__dataclass_fields__)
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON holds it."""
        return {
            "old": _head(self.old),
            "new": _head(self.new),
            "counts": self.counts,
            "keys": [key.as_dict() for key in self.keys],
            "rows": [asdict(row) for row in self.rows],
        }


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Hold the new report against the old one; both as `schema.read` returns them."""
    found = keys(old, new)
    barred = ruled_out(found)
    rows = list(_spec_rows(old, new, barred.get("spec")))
    for section, name in SECTIONS.items():
        rows += _cost_rows(old, new, section, name, barred)
    rows.sort(key=lambda row: len(VERDICTS) if row.verdict is None else VERDICTS.index(row.verdict))
    return Comparison(old=old, new=new, keys=found, rows=tuple(rows))


def _says(row: Row) -> bool:
    """Whether a row was judged in either run; one that was in neither is the same, and says nothing."""
    if row.verdict in {None, "inconclusive", "incomparable"}:
        return False
    values = {row.old, row.new}
    return not values.isdisjoint(JUDGED) if row.section == "spec" else values != {None}


def _head(report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("id", "label", "kind", "started", "finished", "adapter", "model", "verdict")
    return {name: report.get(name) for name in names}


def _spec_rows(old: Mapping[str, Any], new: Mapping[str, Any], barred: Key | None) -> Iterator[Row]:
    left, right = results_by_id(old), results_by_id(new)
    for spec, adapter in dict.fromkeys([*left, *right]):
        before, after = left.get((spec, adapter)), right.get((spec, adapter))
        verdict, why = judge_spec(before, after, finished=bool(new["finished"]))
        if barred is not None:
            verdict, why = "incomparable", bar(barred)
        yield Row(
            section="spec",
            name=plain(spec, limit=120),
            where=plain(adapter, limit=80),
            old=before["outcome"] if before else None,
            new=after["outcome"] if after else None,
            unit=None,
            verdict=verdict,
            why=why,
        )


def _cost_rows(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    section: str,
    name: str,
    barred: Mapping[str, Key],
) -> Iterator[Row]:
    versions = repeats(old[section]) or repeats(new[section])
    left = rows_by_identity(old[section], versions=versions)
    right = rows_by_identity(new[section], versions=versions)
    for key in dict.fromkeys([*left, *right]):
        yield cost_row(
            name,
            left.get(key),
            right.get(key),
            barred=bars(barred, name, key[2]),
            finished=bool(new["finished"]),
            run=old,
        )


# ── the command ────────────────────────────────────────────────────────────────────────────────────


def command(args: argparse.Namespace) -> int:
    """`lora-harness compare OLD NEW [...]`; returns the exit code.

    Raises:
        UsageError: fewer than two runs, one run twice, a word of `--fail-on` that is none, or an
            output that cannot be written.
    """
    from harness.report.markdown import comparison

    fail_on = parse_words(args.fail_on)
    spare(args.reports, json=args.json, html=args.html, markdown=args.markdown)
    skipped: list[str] = []
    trend = _trend(args.reports, skipped)
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    found = compare(trend.first, trend.last)
    several = trend if len(trend.runs) > 2 else None
    # Told first: whatever cannot be written after, the verdict was heard.
    if args.markdown == "-":
        print(comparison(found, several), end="")
    else:
        print(tell(found, several))
    if args.json:
        from harness.report.schema import Recorder

        members = {name: trend.last[name] for name in ("adapter", "model", "environment")}
        with Recorder(args.json, kind="compare", **members) as report:
            report.set("comparison", found.as_dict())
            report.set("trend", several and several.as_dict())
            report.set("notes", skipped)
    if args.html:
        from harness.report.html import Page, draw

        page = Page(
            reports=(trend.last,),
            comparisons=(found,),
            trends=(several,) if several else (),
            skipped=tuple(skipped),
        )
        draw(page, Path(args.html))
    if args.markdown and args.markdown != "-":
        replace(Path(args.markdown), comparison(found, several))
    return found.exit_code(fail_on)


def parse_words(text: str) -> tuple[str, ...]:
    """The words of `--fail-on`: some of the seven, or `none`."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if words == ("none",):
        return ()
    unknown = [word for word in words if word not in VERDICTS]
    if unknown or not words:
        raise UsageError(
            f"--fail-on: {', '.join(map(repr, unknown)) or 'nothing'} is no verdict of a row; "
            f"give some of {', '.join(VERDICTS)}, or none"
        )
    return words


def _trend(paths: Sequence[str], skipped: list[str]) -> Trend:
    """The runs that the arguments name, in their order.

    Reports given by name are compared whatever they are. A folder may keep several series: of those,
    the one that the last report belongs to.
    """
    stored = any(Path(path).is_dir() for path in paths)
    tracers: dict[tuple[str, ...], Tracer] = {}
    key: tuple[str, ...] = ()
    for report in load(paths, skipped):
        key = group(report) if stored else ()
        tracers.setdefault(key, Tracer()).add(report)
    count = len(tracers[key]) if tracers else 0
    if count < 2:
        raise UsageError(
            f"{', '.join(map(str, paths))}: {plural(count, 'report')} to compare, and two are needed; "
            "give OLD and NEW, or a folder that holds both"
        )
    return tracers[key].trend()
