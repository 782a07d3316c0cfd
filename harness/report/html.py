"""Reports as one page that opens from disk: verdict, specs, comparison, curves, costs, history.

Everything is in the file: style, script, Chart.js and data. Every chart has its table; every text from
a report is escaped by the template, and data for the script stands in JSON in which no tag can begin.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness._version import __version__
from harness.errors import UsageError
from harness.report import charts
from harness.report.comparable import facts
from harness.report.compare import compare
from harness.report.history import group, load
from harness.report.rows import VERDICTS, place, told
from harness.report.schema import replace, schema
from harness.report.trend import Tracer
from harness.report.words import (
    OUTCOMES,
    compact,
    exactly,
    named,
    number_of,
    outcome,
    plain,
    plural,
    quantity,
    seconds,
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

VERDICT_STATES = {
    "CONFORMS": ("passed", "✓"),
    "CONFORMS BUT FOR KNOWN FAILURES": ("known", "!"),
    "DOES NOT CONFORM": ("failed", "✗"),
    "INCOMPLETE": ("not_run", "∅"),
}
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
    page = dataclasses.replace(page, reports=tuple(map(_filled, page.reports)))
    drawn: list[dict[str, Any]] = []

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
            memory_by_kind=charts.memory_by_kind(page.reports),
            intervals=[list(charts.intervals(one)) for one in page.comparisons],
            nights=[list(charts.outcomes(one)) for one in page.trends],
            histories=[_history(one) for one in page.trends],
            families=_families(page.reports),
            loud=[_loud(report) for report in page.reports],
            costs=[_costs(report) for report in page.reports],
            circumstances=_circumstances(page.reports),
            drawn=drawn,
            style=_asset("page.css"),
            script=_asset("page.js"),
            library=_asset("chart.umd.min.js").split("\n//# sourceMappingURL")[0],
        )
        .lstrip()
    )
    return text


def _filled(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with every optional member in its results and answers, None where it has none."""
    defs = schema()["$defs"]
    names = {name: dict.fromkeys(defs[name]["properties"]) for name in ("result", "failure")}
    answer = dict.fromkeys(defs["answer"]["anyOf"][1]["properties"])
    answers = report.get("answers") or {}
    return {
        **report,
        "results": [
            names["result"]
            | one
            | {"failures": [names["failure"] | found for found in one.get("failures") or ()]}
            for one in report["results"]
        ],
        "answers": {
            moment: answer | answers[moment]
            for moment in ("before", "after")
            if answers.get(moment)
        },
    }


# ── what the template asks for ─────────────────────────────────────────────────────────────────────


def _families(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The matrix of every report with specs: its families, each with its specs in order."""
    return [
        {
            "index": index,
            "name": named(report),
            "rows": [
                (plain(family, limit=60), list(results))
                for family, results in groupby(
                    report["results"], key=lambda one: one["spec"].partition("/")[0]
                )
            ],
        }
        for index, report in enumerate(reports)
        if report["results"]
    ]


def _loud(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What does not simply hold, the loudest first."""
    order = list(OUTCOMES)
    found = [one for one in report["results"] if has_record(one)]
    return sorted(found, key=lambda one: order.index(one["outcome"]))


def has_record(result: Mapping[str, Any]) -> bool:
    """Whether there is more to say of a result than that it passed."""
    return bool(result.get("failures")) or result["outcome"] in {
        "failed",
        "blocked",
        "known",
        "not_run",
    }


def _used(result: Mapping[str, Any]) -> float | None:
    """The largest part of an error budget that a spec used, 1 being all of it."""
    parts = [number_of(result.get("margin"))]
    for margin in result.get("margins") or ():
        used, allowed = number_of(margin.get("used")), number_of(margin.get("allowed"))
        if used is not None and allowed:
            parts.append(used / allowed)
    found = [part for part in parts if part is not None and math.isfinite(part)]
    return max(found, default=None)


def _sentence(result: Mapping[str, Any]) -> str:
    """A spec's sentence: the report's or, ids being for life, the catalogue's."""
    told_: str = result.get("sentence") or ""
    return told_ or _claims().get(result["spec"], "")


@cache
def _claims() -> dict[str, str]:
    try:
        from harness.spec import catalogue
    except ImportError:  # the report is read where the specs are not installed
        return {}
    return {name: item.claim for name, item in catalogue().items()}


def _reason(result: Mapping[str, Any]) -> str:
    parts = [result.get("reason"), *(result.get("notes") or ())]
    return "; ".join(part for part in parts if part)


def _joined(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else compact(value)


def _costs(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The tables of a report's costs: section, and rows of words."""
    found = []
    for section in ("timings", "memory", "counters"):
        rows: list[tuple[str, ...]] = []
        for row in report[section]:
            value = seconds(row) if section == "timings" else row["value"]
            show = exactly if section == "counters" else quantity
            samples = len(row.get("samples") or ())
            rows.append(
                (
                    plain(row["subject"], limit=60),
                    plain(row.get("version") or "", limit=40),
                    plain(row.get("phase") or "", limit=60),
                    place(row),
                    plain(" ".join(filter(None, (row["metric"], row.get("kind")))), limit=100),
                    show(value, row.get("unit")) + (f", median of {samples}" if samples else ""),
                )
            )
        if rows:
            found.append((section, rows))
    return found


def _circumstances(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Every circumstance, and its value in each report."""
    columns = [dict(facts(report)) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def _history(trend: Trend) -> dict[str, Any]:
    """A trend for the script: equal neighbours folded, numbers to five digits."""
    return {
        "runs": [plain(run.started, limit=40) for run in trend.runs],
        "rows": [
            {
                "name": f"{one.section}: {one.name}",
                "where": one.where,
                "unit": plain(one.unit or "", limit=24),
                "values": _folded(one.readings),
                "changes": [[change.run, change.verdict, change.why] for change in one.changes],
            }
            for one in trend.series
        ],
    }


def _folded(values: Sequence[Any]) -> list[Any]:
    """Runs of equal values as `[value, count]`, single ones bare: few rows ever change."""
    found: list[Any] = []
    for value, same in groupby(map(_short, values)):
        count = sum(1 for _ in same)
        found.append(value if count == 1 else [value, count])
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def _state(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """A report's verdict as state, sign and words."""
    verdict = plain(report.get("verdict") or "", limit=80)
    if not verdict:
        verdict = f"{report['kind']} {'finished' if report['finished'] else 'unfinished'}"
        return ("shown" if report["finished"] else "not_run"), "·", verdict
    return *VERDICT_STATES.get(verdict, ("shown", "·")), verdict


def _tally(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    found = [one["outcome"] for one in report["results"]]
    return [(name, found.count(name)) for name in OUTCOMES if name in found]


def _json(value: object) -> str:
    """JSON that may stand in a script element: no `<` in it, so no tag ends or begins there."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
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
        "OUTCOMES": OUTCOMES,
        "SIGNS": SIGNS,
        "VERDICTS": VERDICTS,
        "compact": compact,
        "exactly": exactly,
        "has_record": has_record,
        "joined": _joined,
        "json": _json,
        "named": named,
        "number_of": number_of,
        "outcome": outcome,
        "plain": plain,
        "plural": plural,
        "quantity": quantity,
        "reason": _reason,
        "sentence": _sentence,
        "state": _state,
        "tally": _tally,
        "told": told,
        "used": _used,
    }
    return environment.from_string(_asset("page.html.jinja"))


# ── the command ────────────────────────────────────────────────────────────────────────────────────


def command(args: argparse.Namespace) -> int:
    """`lora-harness report REPORT [...]`; returns the exit code.

    Raises:
        UsageError: nothing to show, or an output that cannot be written.
    """
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
        text = render(page)
        size = len(text.encode())
        if size > LARGEST:
            raise UsageError(
                f"{target}: the page would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}; "
                "give fewer reports at once"
            )
        replace(target, text)
        print(f"{target}: {', '.join(_state(report)[2] for report in page.reports)}")
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
