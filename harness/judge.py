"""Judge specs on one implementation, through a session, each once and needed ones first."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from harness.adapter import Capabilities
from harness.case import Case, Points
from harness.errors import UsageError
from harness.failure import Failure
from harness.reach import kind_of, reach
from harness.report.words import plain
from harness.session import Lost
from harness.spec import Spec, catalogue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from harness.known import Known
    from harness.session import Session

Outcome = Literal["passed", "failed", "blocked", "known", "not_claimed", "not_run"]

LIMIT = 60.0
"""Seconds a spec may take before the implementation is said to hang."""

DIAGNOSIS_LIMIT = 2.0
"""Seconds a diagnosis may take; after that none is given."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What became of one spec.

    Attributes:
        spec: its id.
        level: MUST or SHOULD.
        outcome: passed, failed, blocked, known, not_claimed or not_run.
        cases: at how many points it was judged.
        failures: one for each case at which it does not hold, in the order of the cases.
        margins: by case, the largest part of an error budget used, 0 to 1.
        notes: what is worth telling: by what it is blocked, why it was not run, what was vacuous.
        seconds: wall time, for information.
    """

    spec: str
    level: str
    outcome: Outcome
    cases: int = 0
    failures: list[Failure] = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON holds it, with what the spec says, so that a report reads by itself."""
        item = catalogue()[self.spec]
        return {
            **dataclasses.asdict(self),
            "sentence": item.claim,
            "why": item.why,
            "source": list(item.source),
            "failures": [failure.as_dict() for failure in self.failures],
            "margins": [{"case": case, "used": used} for case, used in self.margins.items()],
        }


class Judge:
    """Judges specs on one implementation, each once, needed ones first."""

    def __init__(
        self,
        session: Session,
        points: Points | None = None,
        *,
        limit: float = LIMIT,
        explore: bool = False,
    ) -> None:
        self._session = session
        self._points = points or Points(None, None, None, None, "core")
        self._limit = limit
        self._explore = explore
        self._diagnosis_left = DIAGNOSIS_LIMIT
        described = session.ask({"do": "describe"}, limit=limit)
        if isinstance(described, Lost):
            raise UsageError(
                f"the adapter cannot be loaded: {described.how}; import it by itself to see why"
            )
        only, here = self._points.only, described["devices"]
        device = only.device if only else self._points.device or "cpu"
        if device not in here:
            option = "--case: device" if only else "--device"
            raise UsageError(f"{option} {device}: not here; have {', '.join(here)}")
        self.name, self.version = plain(described["name"]), plain(described["version"])
        self.environment: dict[str, Any] = described["environment"]
        self.methods: list[str] = described["methods"]
        self.claims: dict[str, list[str]] = described["capabilities"]
        self.known: list[Known] = []
        self.results: dict[str, Result] = {}
        self._doubts: dict[str, dict[str, set[str]]] = {}
        self.elsewhere: Callable[[Spec], Result | None] = lambda _: None
        """What the other judge of a run finds of a spec that is not this one's, waited for."""

    def beside(self, session: Session) -> Judge:
        """Another judge of the same run, which asks another process; what one finds both know."""
        other = copy.copy(self)
        other._session = session  # noqa: SLF001  # its own kind
        return other

    def result(self, item: Spec) -> Result:
        """What becomes of a spec; judged the first time, with what it needs."""
        if item.id not in self.results:
            self.results[item.id] = self.elsewhere(item) or self._judge(item)
        return self.results[item.id]

    def _judge(self, item: Spec) -> Result:
        cases = [case for case in self._points.of(item) if self._claimed(case)]
        result = Result(spec=item.id, level=item.level, outcome="passed")
        claims = {*self.claims["features"], *self.claims["layers"]}
        lacking = [feature for feature in item.features if feature not in claims]
        if lacking or not cases:
            result.outcome = "not_claimed"
            if lacking:
                result.notes = [f"{', '.join(lacking)} is not claimed"]
            elif self._points.dtype:
                result.notes = [f"has no case in {self._points.dtype}"]
            return result
        # Asked for one case, that is what is judged: what it needs was judged at cases of its own.
        needs = () if self._points.only is not None else item.needs
        doubts = self._doubts[item.id] = self._in_doubt(needs)
        sound = [case for case in cases if kind_of(case) not in doubts]
        causes = {cause for case in cases for cause in doubts.get(kind_of(case), ())}
        if sound:
            started = time.monotonic()
            self._ask_all(item, sound, result)
            result.seconds = round(time.monotonic() - started, 3)
            self._settle(item, cases, result, whole=not causes)
        if causes:
            result.notes.append(f"needs {', '.join(id_ for id_ in catalogue() if id_ in causes)}")
            if result.outcome in {"passed", "known"}:
                result.outcome = "blocked"
        return result

    def _in_doubt(self, needs: Iterable[str]) -> dict[str, set[str]]:
        """The kinds of layers at which a need, or what it needs, does not hold, and which specs say so."""
        found: dict[str, set[str]] = {}
        for need in needs:
            for kind in reach(self.result(catalogue()[need])):
                found.setdefault(kind, set()).add(need)
            for kind, causes in self._doubts.get(need, {}).items():
                found.setdefault(kind, set()).update(causes)
        return found

    def _claimed(self, case: Case) -> bool:
        kinds = {*self.claims["layers"], *self.claims["features"]}
        return kind_of(case) in kinds and case.dtype in self.claims["dtypes"]

    def _ask_all(self, item: Spec, cases: list[Case], result: Result) -> None:
        deadline = time.monotonic() + self._limit
        for case in cases:
            # A case that a busy machine let run on must not be the next one's hang.
            left = max(deadline - time.monotonic(), self._limit / 4)
            answer = self._session.ask(
                {"do": "judge", "spec": item.id, "case": str(case)}, limit=left
            )
            result.cases += 1
            if isinstance(answer, Lost):
                result.failures.append(self._lost(item, case, answer))
                return
            self._take(item, answer, result)
            if "not_run" in answer:
                result.outcome = "not_run"
                return
        if item.search is not None and self._points.only is None and not result.failures:
            self._search(item, result, deadline)

    def _search(self, item: Spec, result: Result, deadline: float) -> None:
        for explore in (False, True) if self._explore else (False,):
            answer = self._session.ask(
                {
                    "do": "search",
                    "spec": item.id,
                    "explore": explore,
                    "dtype": self._points.dtype,
                    "device": self._points.device,
                },
                limit=max(deadline - time.monotonic(), self._limit / 4)
                + (self._limit if explore else 0),
            )
            if isinstance(answer, Lost):
                if not explore:
                    result.failures.append(self._lost(item, Case(way="search"), answer))
                return
            if explore and answer["failure"]:
                result.notes.append(f"explored, a case to keep: --case {answer['case']}")
                continue
            result.cases += 1
            self._take(item, answer, result)

    def _take(self, item: Spec, answer: dict[str, Any], result: Result) -> None:
        notes = [plain(note) for note in answer["notes"]]
        result.notes += [note for note in notes if note not in result.notes]
        if answer.get("not_run"):
            result.notes.append(plain(answer["not_run"]))
        if answer["margin"] is not None:
            result.margins[answer["case"]] = answer["margin"]
        if answer["failure"]:
            told = {**answer["failure"], "looks_like": ()}
            told["reproduce"] = self._reproduce(item, told["case"])
            result.failures.append(Failure(**told))

    def _reproduce(self, item: Spec, case: str) -> str:
        if not self._session.named:  # no command line reaches an object
            name = self._session.spelling
            return f"harness.check({name}, only=['{item.id}'], case=Case.parse('{case}'))"
        return f"lora-harness check {self._session.spelling} --only {item.id} --case '{case}'"

    def _lost(self, item: Spec, case: Case, lost: Lost) -> Failure:
        return Failure(
            kind=lost.kind,
            case=str(case),
            expected=f"an answer within {self._limit:g} s",
            actual=lost.how,
            reproduce=self._reproduce(item, str(case)),
        )

    def _settle(self, item: Spec, cases: list[Case], result: Result, *, whole: bool) -> None:
        """The outcome, with what is known taken into account; not of the `whole`, no entry is untrue."""
        entries = [entry for entry in self.known if entry.spec == item.id]
        open_ones, used = [], set()
        for failure in result.failures:
            case = Case.parse(failure.case)
            excuse = next((e for e in entries if e.excuses(item.id, case, failure)), None)
            if excuse is None:
                open_ones.append(failure)
            else:
                used.add(id(excuse))
        if result.failures:
            result.outcome = "failed" if open_ones else "known"
            result.notes += [f"known: {e.reason} ({e.url})" for e in entries if id(e) in used]
        lost = any(failure.kind in {"hang", "crash"} for failure in result.failures)
        complete = whole and self._points.own and result.outcome != "not_run"
        for entry in entries:
            used_up = lost or id(entry) in used
            untrue = entry.untrue(item, cases, used=used_up) if complete else ""
            if untrue:
                result.outcome = "failed"
                result.failures.append(
                    Failure(
                        kind="known",
                        case="",
                        expected=f"{entry.file} to be true of {self.name} {self.version}",
                        actual=f"its entry for {entry.spec} ({entry.reason}) {untrue}",
                    )
                )

    def diagnose(self, result: Result) -> None:
        """Name the planted faults that behave as the first failure of a spec does.

        All diagnoses of a run share `DIAGNOSIS_LIMIT`; they never change what was found.
        """
        if result.outcome != "failed" or self._diagnosis_left <= 0:
            return
        failure = result.failures[0]
        if failure.kind in {"hang", "crash", "known"} or failure.looks_like:
            return
        started = time.monotonic()
        answer = self._session.ask(
            {"do": "diagnose", "spec": result.spec, "case": failure.case},
            limit=self._diagnosis_left,
        )
        self._diagnosis_left -= time.monotonic() - started
        if isinstance(answer, Lost):
            self._diagnosis_left = 0.0
            return
        result.failures[0] = dataclasses.replace(failure, looks_like=tuple(answer["looks_like"]))

    def unclaimed(self) -> list[str]:
        """What works although it is not claimed: told, never judged."""
        told = []
        for name, (spec_id, cases, methods) in _PROBES.items():
            group = _group(name)
            if name in self.claims[group] or any(m not in self.methods for m in methods):
                continue
            if spec_id not in catalogue() or self._in_doubt([spec_id]):
                continue
            if all(self._holds(spec_id, case) for case in cases):
                told.append(name)
        return told

    def _holds(self, spec_id: str, case: Case) -> bool:
        answer = self._session.ask(
            {"do": "judge", "spec": spec_id, "case": str(case)}, limit=self._limit
        )
        return not isinstance(answer, Lost) and not answer["failure"] and "not_run" not in answer


def _group(name: str) -> str:
    return next(group for group, names in Capabilities.KNOWN.items() if name in names)


_ORACLE = "forward/equals-oracle"
_PROBES: dict[str, tuple[str, tuple[Case, ...], tuple[str, ...]]] = {
    "bfloat16": (_ORACLE, (Case(dtype="bfloat16"),), ()),
    "float16": (_ORACLE, (Case(dtype="float16"),), ()),
    "float64": (_ORACLE, (Case(dtype="float64"),), ()),
    "embedding": (_ORACLE, (Case(specimen="embedding"),), ()),
    "conv2d": (
        _ORACLE,
        (Case(specimen="conv2d"), Case(specimen="dilated", shape=(3, 4, 3, 2))),
        (),
    ),
    "merge": ("merge/same-output", (Case(),), ("merge",)),
    "unmerge": ("merge/restores-base", (Case(),), ("merge", "unmerge")),
    "disable": ("several/disabled-equals-base", (Case(),), ("disable",)),
}
"""For each claim that can be probed: a spec, cases that all must hold, and the methods they take."""
