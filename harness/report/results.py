"""One spec in two reports, and what became of it: by its outcome, its level and which cases fail."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.report.words import compact, outcome, plain, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.report.rows import Verdict

JUDGED = frozenset({"passed", "known", "failed"})
"""The outcomes that say whether the property holds; the others say that nobody knows."""

_ENDS = frozenset({"hang", "crash"})
"""Kinds of failure after which no further case was judged."""

_FIELD = re.compile(r",(?=[a-z]+=)")


def results_by_id(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """A report's results by spec and, where one report tells of several, adapter."""
    return {(one["spec"], one.get("adapter") or ""): one for one in report["results"]}


def judge_spec(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, *, finished: bool
) -> tuple[Verdict, str]:
    """A spec's verdict and the reason, from its result in both reports.

    A spec that is no longer judged is `removed`, whatever the way: gone, not run, no longer claimed,
    or on fewer cases. One whose prerequisite fails is inconclusive: the prerequisite is the news. So is
    one that is newly claimed and was not judged.
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
    if now not in JUDGED:
        reason = plain(after.get("reason") or "", limit=160)
        told = f"{change}: {reason}" if reason else change
        if then == "not_claimed" != now:
            return "inconclusive", told
        if then not in JUDGED:
            return "same", change if now != then else outcome(now)
        return ("inconclusive", told) if now == "blocked" else ("removed", told)
    if then not in JUDGED:
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
    """Of a spec that does not hold in either report; a run that hung or crashed saw no further case."""
    then, now = _kinds_by_case(before), _kinds_by_case(after)
    ended, ends = _end(then), _end(now)
    more = (before.get("cases") or 0) < (after.get("cases") or 0)
    further, mended = (now.keys() - then.keys()), (then.keys() - now.keys())
    if ends and not ended:
        return "worse", f"{otherwise}, now with a {ends}"
    if further:
        told = f"{otherwise}, on {plural(len(further), 'further case')}"
        if ended and more:
            return "inconclusive", f"{told}; the old run ended in a {ended} before"
        return "worse", told
    if fewer := _fewer(before, after):
        return "removed", fewer
    if ended and not ends:
        return "better", f"{otherwise}, no longer with a {ended}"
    if moved := [case for case in now if now[case] != then.get(case)]:
        kinds = f"{then[moved[0]]} → {now[moved[0]]}"
        return (
            "inconclusive",
            f"{otherwise}, in another way on {plural(len(moved), 'case')}: {kinds}",
        )
    if mended:
        return "better", f"{otherwise}, on {plural(len(mended), 'case')} less"
    return _judged_cases(before, after, otherwise)


def _kinds_by_case(result: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """The kind of each failure by its case, equal ones numbered.

    Seed and device are the run's, and told as its circumstances: they make no other case.
    """
    seen: Counter[str] = Counter()
    found = {}
    for one in result.get("failures") or ():
        fields = _FIELD.split(compact(one.get("case")))
        case = ",".join(part for part in fields if not part.startswith(("seed=", "device=")))
        found[case, seen[case]] = plain(one.get("kind") or "–", limit=20)
        seen[case] += 1
    return found


def _end(kinds: Mapping[Any, str]) -> str:
    """The hang or crash that ended a spec's judging; empty where none did."""
    return next((kind for kind in kinds.values() if kind in _ENDS), "")


def _judged_cases(
    before: Mapping[str, Any], after: Mapping[str, Any], otherwise: str
) -> tuple[Verdict, str]:
    gone = _fewer(before, after) or _no_longer_at(before, after)
    return ("removed", gone) if gone else ("same", otherwise)


def _fewer(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How many of the cases are still judged, in words; empty where none is lost."""
    then, now = before.get("cases"), after.get("cases")
    if then is None or now is None or now >= then:
        return ""
    return f"judged on {now:,} of {plural(then, 'case')}"


def _no_longer_at(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The dtypes and kinds of layers no longer judged, in words; empty where all are, or none can tell.

    A report names a case by its margin or its failure. Where it names fewer than were judged, what
    became of the others is not known: one that has to be loud has no margin.
    """
    then, now = _cases(before), _cases(after)
    if len(then) != before.get("cases") or len(now) != after.get("cases"):
        return ""
    kept = {part for case in now for part in case}
    lost = {part for case in then for part in case if part.startswith(("dtype=", "specimen="))}
    gone = sorted(lost - kept)
    return f"no longer judged at {', '.join(gone)}" if gone else ""


def _cases(result: Mapping[str, Any]) -> set[tuple[str, ...]]:
    told = [*(result.get("margins") or ()), *(result.get("failures") or ())]
    return {tuple(_FIELD.split(plain(compact(one.get("case"))))) for one in told}
