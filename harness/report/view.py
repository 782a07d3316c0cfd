"""What a page's template asks of a report: what is loud, in which words, in which order."""

from __future__ import annotations

import math
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from harness.report.comparable import facts
from harness.report.rows import place
from harness.report.schema import schema
from harness.report.words import (
    OUTCOMES,
    compact,
    exactly,
    named,
    number_of,
    plain,
    quantity,
    seconds,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from harness.report.trend import Trend

VERDICT_STATES = {
    "CONFORMS": ("passed", "✓"),
    "CONFORMS BUT FOR KNOWN FAILURES": ("known", "!"),
    "DOES NOT CONFORM": ("failed", "✗"),
    "INCOMPLETE": ("not_run", "∅"),
}


def filled(report: Mapping[str, Any]) -> dict[str, Any]:
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


def families(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The matrix of every report with specs: its families, each with its specs, as they first came."""
    found = []
    for index, report in enumerate(reports):
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for one in report["results"]:
            family = plain(one["spec"].partition("/")[0], limit=60)
            rows.setdefault(family, []).append(one)
        if rows:
            found.append({"index": index, "name": named(report), "rows": list(rows.items())})
    return found


def records(found: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The place of each result among the loud ones, by its `id()`: two may be equal."""
    return {id(one): place_ for place_, one in enumerate(found)}


def loud(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
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


def used(result: Mapping[str, Any]) -> float | None:
    """The largest part of an error budget that a spec used, 1 being all of it."""
    parts = [number_of(result.get("margin"))]
    for margin in result.get("margins") or ():
        used, allowed = number_of(margin.get("used")), number_of(margin.get("allowed"))
        if used is not None and allowed:
            parts.append(used / allowed)
    found = [part for part in parts if part is not None and math.isfinite(part)]
    return max(found, default=None)


def sentence(result: Mapping[str, Any]) -> str:
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


def reason(result: Mapping[str, Any]) -> str:
    """Why a result is what it is, and what else was noted."""
    parts = [result.get("reason"), *(result.get("notes") or ())]
    return "; ".join(part for part in parts if part)


def joined(value: object) -> str:
    """A text, or several as one."""
    return "; ".join(map(str, value)) if isinstance(value, list) else compact(value)


def costs(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
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


def circumstances(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Every circumstance, and its value in each report."""
    columns = [dict(facts(report)) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def history(trend: Trend) -> dict[str, Any]:
    """A trend for the script: equal neighbours folded, numbers to five digits."""
    return {
        "runs": [plain(run.started, limit=40) for run in trend.runs],
        "rows": [
            {
                "name": f"{one.section}: {one.name}",
                "where": one.where,
                "unit": plain(one.unit or "", limit=24),
                "values": _folded(
                    one.readings if one.section == "spec" else map(_drawn, one.readings)
                ),
                "changes": [[change.run, change.verdict, change.why] for change in one.changes],
            }
            for one in trend.series
        ],
    }


def _drawn(value: Any) -> Any:
    """A cost that can be drawn; what is no number leaves a gap."""
    real = None if isinstance(value, str) else number_of(value)
    return value if real is not None and math.isfinite(real) else None


def _folded(values: Iterable[Any]) -> list[Any]:
    """Runs of equal values as `[value, count]`, single ones bare: few rows ever change."""
    found: list[Any] = []
    for value, same in groupby(map(_short, values)):
        count = sum(1 for _ in same)
        found.append(value if count == 1 else [value, count])
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def state(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """A report's verdict as state, sign and words."""
    verdict = plain(report.get("verdict") or "", limit=80)
    if not verdict:
        verdict = f"{report['kind']} {'finished' if report['finished'] else 'unfinished'}"
        return ("shown" if report["finished"] else "not_run"), "·", verdict
    return *VERDICT_STATES.get(verdict, ("shown", "·")), verdict


def tally(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """How many results had each outcome, the loudest first."""
    found = [one["outcome"] for one in report["results"]]
    return [(name, found.count(name)) for name in OUTCOMES if name in found]
