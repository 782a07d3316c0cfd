"""Reports and comparisons for a pull request or a job summary: a screenful, the worst first.

Whatever comes from a report stands in a code span: no tag, link, mention or table mark in it acts.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.report.rows import place, told
from harness.report.words import (
    CLAIMS,
    OUTCOMES,
    exactly,
    named,
    outcome,
    plain,
    plural,
    quantity,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from harness.report.compare import Comparison
    from harness.report.trend import Trend

SCREENFUL = 25
"""Rows of a table; what is over is counted."""

MARKS = {
    "worse": "🔴 worse",
    "removed": "🔴 removed",
    "incomparable": "⚪ incomparable",
    "inconclusive": "🟡 inconclusive",
    "added": "🔵 added",
    "better": "🟢 better",
    "same": "⚪ same",
    None: "⚪ shown",
}
_VERDICTS = {
    "CONFORMS": "🟢",
    "CONFORMS BUT FOR KNOWN FAILURES": "🟡",
    "DOES NOT CONFORM": "🔴",
    "INCOMPLETE": "🟡",
}


def comparison(found: Comparison, trend: Trend | None = None) -> str:
    """Two reports' comparison, and with more of them where each row changed."""
    lines = [
        f"## {_sign(found)} {found.headline}",
        "",
        f"{code(named(found.old))} → {code(named(found.new))}",
        "",
    ]
    if found.undecided:
        lines += [f"**Undecided:** {found.undecided}.", ""]
    differing = [key for key in found.keys if not key.same]
    if differing:
        lines += table(
            ("circumstance", "old", "new", "so not compared"),
            (
                (code(key.name), code(key.old), code(key.new), ", ".join(key.rules_out) or "–")
                for key in differing
            ),
        )
    moved = [row for row in found.rows if row.verdict not in {"same", None}]
    lines += table(
        ("verdict", "row", "where", "old", "new", "why"),
        (
            (
                MARKS[row.verdict],
                code(row.name),
                code(row.where),
                code(told(row, row.old)),
                code(told(row, row.new)),
                code(row.why),
            )
            for row in moved
        ),
    )
    if trend is not None:
        lines += changes(trend)
    return "\n".join(lines).rstrip() + "\n"


def changes(trend: Trend) -> list[str]:
    """The run at which each row changed, the latest first."""
    found = [
        (change, one) for one in trend.series for change in one.changes if change.verdict != "added"
    ]
    found.sort(key=lambda pair: -pair[0].run)
    return [
        f"### {plural(len(trend.runs), 'run')}, {plural(len(found), 'change')}",
        "",
        *table(
            ("run", "verdict", "row", "where", "why"),
            (
                (
                    code(trend.runs[change.run].name),
                    MARKS[change.verdict],
                    code(one.name),
                    code(one.where),
                    code(change.why),
                )
                for change, one in found
            ),
        ),
    ]


def report(found: Mapping[str, Any]) -> str:
    """One report: verdict, failures, and what it cost."""
    verdict = found.get("verdict") or ("finished" if found["finished"] else "unfinished")
    lines = [f"## {_VERDICTS.get(verdict, '⚪')} {code(named(found))}: {code(verdict)}", ""]
    if not found["finished"]:
        lines += ["**Unfinished:** the run was cut short; what follows is what it had done.", ""]
    counts = Counter(one["outcome"] for one in found["results"])
    if counts:
        sum_ = ", ".join(f"{counts[name]} {outcome(name)}" for name in OUTCOMES if counts[name])
        required = found.get("required")
        ran = f" {found.get('ran')} of {required} required specs ran." if required else ""
        lines += [f"{sum_}.{ran}", ""]
    for member, words in CLAIMS.items():
        if found[member]:
            lines += [f"{words}: {', '.join(code(name) for name in found[member])}.", ""]
    lines += table(
        ("spec", "outcome", "case", "expected", "actual", "measured / allowed"),
        _failures(found["results"]),
    )
    lines += table(
        ("cost", "where", "value"),
        (
            (code(f"{row['subject']} {row['metric']}"), code(_where(row)), code(_value(row)))
            for row in [*found["timings"], *found["memory"], *found["counters"]]
        ),
        limit=10,
    )
    return "\n".join(lines).rstrip() + "\n"


def github(found: Mapping[str, Any]) -> Iterator[str]:
    """GitHub's workflow commands: an error for a failed MUST; a warning for a SHOULD, or a cut-off run."""
    for one in found["results"]:
        if one["outcome"] != "failed":
            continue
        first = (one.get("failures") or [{}])[0]
        parts = [one.get("sentence")]
        parts += [
            f"{name} {plain(first[name])}"
            for name in ("expected", "actual")
            if first.get(name) is not None
        ]
        parts.append(first.get("reproduce"))
        message = "; ".join(plain(part) for part in parts if part)
        heading = f"{named(found)}: {plain(one['spec'])}"
        weight = "warning" if one.get("level") == "SHOULD" else "error"
        yield f"::{weight} title={_property(heading)}::{_data(message)}"
    if found.get("verdict") == "INCOMPLETE":
        idle = [plain(one["spec"]) for one in found["results"] if one["outcome"] == "not_run"]
        message = f"INCOMPLETE: {found.get('ran')} of {found.get('required')} required specs ran"
        message += f"; not run: {', '.join(idle)}" if idle else ""
        yield f"::error title={_property(named(found))}::{_data(message)}"
    if not found["finished"]:
        yield f"::warning title={_property(named(found))}::the run was cut short"


def code(text: object) -> str:
    """A code span that nothing in the text can leave, nor the table cell it stands in."""
    inner = plain(text, limit=160).replace("`", "ˋ").replace("|", "¦")
    return f"`{inner}`" if inner else ""


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, limit: int = SCREENFUL
) -> list[str]:
    """A pipe table of at most `limit` rows with a blank line after it; nothing for no rows."""
    body = list(rows)
    if not body:
        return []
    lines = [f"| {' | '.join(headers)} |", f"|{' --- |' * len(headers)}"]
    lines += [f"| {' | '.join(row)} |" for row in body[:limit]]
    if len(body) > limit:
        lines += ["", f"… and {len(body) - limit:,} more."]
    return [*lines, ""]


def _sign(found: Comparison) -> str:
    return {0: "🟢", 1: "🔴"}.get(found.exit_code(("worse", "removed")), "🟡")


def _failures(results: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    # One cause, one line: what is only blocked is in the sum.
    loud = sorted(
        (one for one in results if one["outcome"] in {"failed", "not_run", "known"}),
        key=lambda one: (list(OUTCOMES).index(one["outcome"]), one.get("level") == "SHOULD"),
    )
    for one in loud:
        first = (one.get("failures") or [{}])[0]
        measured, allowed = first.get("measured"), first.get("allowed")
        ratio = "" if measured is None else f"{quantity(measured)} / {quantity(allowed)}"
        yield (
            code(one["spec"]),
            f"{OUTCOMES[one['outcome']]} {outcome(one['outcome'])}",
            code(_text(first.get("case"))),
            code(_text(first.get("expected"))),
            code(_text(first.get("actual"))),
            code(ratio),
        )


def _text(value: object) -> str:
    return "" if value is None else plain(value, limit=120)


def _where(row: Mapping[str, Any]) -> str:
    phase = plain(row.get("phase") or "", limit=60)
    return ", ".join(part for part in (phase, place(row)) if part)


def _value(row: Mapping[str, Any]) -> str:
    show = exactly if row.get("unit") in {None, "1"} else quantity
    return show(row["value"], row.get("unit"))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
