"""Reports as one page that opens from disk: verdict, specs, comparison, curves, costs, history.

Everything is in the file: style, script, Chart.js and data. Every chart has its table; every text from
a report is escaped by the template, and data for the script stands in JSON in which no tag can begin.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness._version import __version__
from harness.errors import UsageError
from harness.report import charts, intervals, view
from harness.report.compare import compare
from harness.report.history import group, load, spare
from harness.report.rows import told
from harness.report.schema import replace
from harness.report.tables import Tables
from harness.report.trend import Tracer
from harness.report.words import (
    CLAIMS,
    OUTCOMES,
    compact,
    exactly,
    named,
    number_of,
    outcome,
    plain,
    plural,
    quantity,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from harness.report.charts import Chart
    from harness.report.compare import Comparison
    from harness.report.schema import Report
    from harness.report.trend import Trend

LARGEST = 2_000_000
"""Bytes a page may have: a mail or a pull request still takes it."""

SIGNS = {
    "worse": "▲",
    "removed": "∅",
    "incomparable": "≠",
    "inconclusive": "?",
    "added": "+",
    "better": "▼",
    "same": "=",
    "shown": "·",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What one page shows.

    Attributes:
        reports: the runs, each with its verdict, specs, curves and costs.
        comparisons: of runs.
        trends: of series of runs.
        skipped: files that could not be read, and why.
    """

    reports: tuple[Mapping[str, Any], ...]
    comparisons: tuple[Comparison, ...] = ()
    trends: tuple[Trend, ...] = ()
    skipped: tuple[str, ...] = ()


def render(page: Page) -> str:
    """The page as HTML."""
    page = dataclasses.replace(page, reports=tuple(map(view.filled, page.reports)))
    drawn: list[dict[str, Any]] = []
    loud = [view.loud(report) for report in page.reports]

    def add(chart: Chart) -> int:
        drawn.append(chart.drawn())
        return len(drawn) - 1

    text: str = (
        _template()
        .render(
            page=page,
            version=__version__,
            title=", ".join(named(report) for report in page.reports)[:200],
            add=add,
            training=list(charts.training(page.reports)),
            against_rank=charts.against_rank(page.reports),
            paired=list(intervals.paired(page.reports)),
            memory_by_kind=charts.memory_by_kind(page.reports),
            intervals=[list(intervals.compared(one)) for one in page.comparisons],
            nights=[list(charts.outcomes(one)) for one in page.trends],
            histories=[view.history(one) for one in page.trends],
            families=view.families(page.reports),
            loud=loud,
            records=list(map(view.records, loud)),
            tables=Tables(),
            costs=[view.costs(report) for report in page.reports],
            circumstances=view.circumstances(page.reports),
            drawn=drawn,
            style=_asset("page.css"),
            script=_asset("page.js"),
            library=_asset("chart.umd.min.js").split("\n//# sourceMappingURL")[0],
        )
        .lstrip()
    )
    return text


def draw(page: Page, target: Path) -> None:
    """Write the page; raises `UsageError` where it would be too large, or cannot be written."""
    text = render(page)
    size = len(text.encode())
    if size > LARGEST:
        raise UsageError(
            f"{target}: the page would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}; "
            "give fewer reports at once"
        )
    replace(target, text)


def _json(value: object) -> str:
    """JSON that may stand in a script element: no `<` in it, so no tag ends or begins there."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704  # it is escaped, for the place where it stands


def _asset(name: str) -> str:
    return files("harness.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "CLAIMS": CLAIMS,
        "OUTCOMES": OUTCOMES,
        "SIGNS": SIGNS,
        "compact": compact,
        "exactly": exactly,
        "has_record": view.has_record,
        "identity": id,
        "joined": view.joined,
        "json": _json,
        "named": named,
        "number_of": number_of,
        "outcome": outcome,
        "plain": plain,
        "plural": plural,
        "quantity": quantity,
        "reason": view.reason,
        "sentence": view.sentence,
        "state": view.state,
        "tally": view.tally,
        "told": told,
        "used": view.used,
    }
    return environment.from_string(_asset("page.html.jinja"))


# ── the command ────────────────────────────────────────────────────────────────────────────────────


def command(args: argparse.Namespace) -> int:
    """`lora-harness report REPORT [...]`; returns the exit code.

    Raises:
        UsageError: nothing to show, or an output that cannot be written.
    """
    spare(args.reports, html=args.html, markdown=args.markdown)
    page = gathered(args.reports)
    for line in page.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if args.json:
        _rewrite(page, args.json)
    if args.github:
        from harness.report.markdown import github

        for report in page.reports:
            for line in github(report):
                print(line)
    if args.markdown:
        from harness.report import markdown

        text = "\n".join(markdown.report(report) for report in page.reports)
        if args.markdown == "-":
            print(text, end="")
        else:
            replace(Path(args.markdown), text)
    if args.html or not (args.markdown or args.github or args.json):
        target = Path(args.html or "report.html")
        draw(page, target)
        print(f"{target}: {', '.join(view.state(report)[2] for report in page.reports)}")
    return 0


def gathered(paths: Sequence[str]) -> Page:
    """The page of these reports: those given by name, and of a folder's series the newest run.

    A series of two runs or more is shown with its history, and its newest run beside the one before.
    """
    skipped: list[str] = []
    stored = any(Path(path).is_dir() for path in paths)
    tracers: dict[tuple[str, ...], Tracer] = {}
    shown: dict[tuple[str, ...], Report] = {}
    for report in load(paths, skipped):
        key = group(report) if stored else (report["id"],)
        tracers.setdefault(key, Tracer()).add(report)
        shown[key] = report
    if not shown:
        raise UsageError(
            f"{', '.join(paths)}: no report that can be read; give one that --json wrote"
        )
    trends = tuple(tracer.trend() for tracer in tracers.values() if len(tracer) > 1)
    return Page(
        reports=tuple(shown.values()),
        comparisons=tuple(compare(trend.before, trend.last) for trend in trends),
        trends=trends,
        skipped=tuple(skipped),
    )


def _rewrite(page: Page, path: Path) -> None:
    """The one report, brought up to the schema of today."""
    if len(page.reports) != 1:
        raise UsageError(
            f"--json: {plural(len(page.reports), 'report')} and one file; give one report"
        )
    replace(path, json.dumps(page.reports[0], indent=1) + "\n", durable=True)
