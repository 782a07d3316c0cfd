"""One spec in two reports, and what became of it: by its outcome, its level and which cases fail."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from harness.report.words import outcome, plain, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.report.rows import Verdict

_JUDGED = {"passed", "known", "failed"}


def results_by_id(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """A report's results by spec and, where one report tells of several, adapter."""
    return {(one["spec"], one.get("adapter") or ""): one for one in report["results"]}


def judge_spec(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, *, finished: bool
) -> tuple[Verdict, str]:
    """A spec's verdict and the reason, from its result in both reports.

    A spec that is no longer judged is `removed`, whatever the way: gone, not run, no longer claimed,
    or on fewer cases. One whose prerequisite fails is inconclusive: the prerequisite is the news.
    """
    if after is None:
        if not finished:
            return "inconclusive", "the new run did not finish"
        return "removed", "no longer there"
    now = after["outcome"]
    if before is None:
        return ("worse", "new, and fails") if now == "failed" else ("added", outcome(now))
    then = before["outcome"]
    change = f"{outcome(then)} → {outcome(now)}"
    if now == "failed" and then != "failed":
        return "worse", change
    if now not in _JUDGED:
        if then not in _JUDGED:
            return "same", change if now != then else outcome(now)
        reason = plain(after.get("reason") or "", limit=160)
        told = f"{change}: {reason}" if reason else change
        return ("inconclusive", told) if now == "blocked" else ("removed", told)
    if then not in _JUDGED:
        return "added", change
    verdict, why = _judged(before, after, change)
    was, is_ = before.get("level"), after.get("level")
    if not was or not is_ or was == is_:
        return verdict, why
    why = f"{why}, {was} → {is_}"
    if verdict in {"same", "better"}:
        # A property that need no longer hold is gone as a requirement, whatever its outcome.
        verdict = "removed" if was == "MUST" else "worse" if now == "failed" else verdict
    return verdict, why


def _judged(
    before: Mapping[str, Any], after: Mapping[str, Any], change: str
) -> tuple[Verdict, str]:
    """Of a spec that was judged in both reports."""
    then, now = before["outcome"], after["outcome"]
    if now == then == "passed":
        return _judged_cases(before, after, outcome(now))
    if now == "passed":
        return "better", change
    if then == "passed":
        # passed → known is a defect, newly listed.
        return "worse", change
    # failed → known mends nothing.
    otherwise = {"failed": "still fails", "known": "still known"}[now] if now == then else change
    return _failing_cases(before, after, otherwise)


def _failing_cases(
    before: Mapping[str, Any], after: Mapping[str, Any], otherwise: str
) -> tuple[Verdict, str]:
    then, now = (
        {json.dumps([one.get("case"), one.get("kind")]) for one in result.get("failures") or ()}
        for result in (before, after)
    )
    if now - then:
        return "worse", f"{otherwise}, on {plural(len(now - then), 'further case')}"
    if then - now:
        return "better", f"{otherwise}, on {plural(len(then - now), 'case')} less"
    return _judged_cases(before, after, otherwise)


def _judged_cases(
    before: Mapping[str, Any], after: Mapping[str, Any], otherwise: str
) -> tuple[Verdict, str]:
    then, now = before.get("cases"), after.get("cases")
    if then is not None and now is not None and now < then:
        return "removed", f"judged on {now:,} of {plural(then, 'case')}"
    return "same", otherwise
