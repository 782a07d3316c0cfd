"""Run specs on an implementation and come to a verdict.

                 a MUST fails, or the known list is untrue ─────────── DOES NOT CONFORM
    every spec ─ else, a required one could not be judged, or none was ─ INCOMPLETE
                 else, some failures are known ─────────────────────── CONFORMS BUT FOR KNOWN FAILURES
                 else ──────────────────────────────────────────────── CONFORMS

A spec whose need failed is blocked, at the kinds of layers that the failure reaches: one cause, one
line. This process loads neither torch nor the implementation; `harness.session` keeps those in a
process of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from harness import known as known_failures
from harness import lanes
from harness.adapter import Capabilities
from harness.case import SEEDS, Points
from harness.errors import UsageError
from harness.judge import LIMIT, Judge, Result
from harness.session import Session
from harness.spec import SPEC_VERSION, Tier, catalogue, select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.adapter import Adapter
    from harness.case import Case
    from harness.spec import Spec

Word = Literal["CONFORMS", "CONFORMS BUT FOR KNOWN FAILURES", "DOES NOT CONFORM", "INCOMPLETE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a run of specs says of one implementation.

    Attributes:
        adapter: name and version.
        verdict: one of the four words.
        required: how many specs had to be judged: every MUST that is claimed.
        ran: how many of them were.
        results: one for each spec.
        unclaimed: what works although it is not claimed.
        unjudged: what is claimed and no spec of the run asks for: of that the verdict says nothing.
        environment: the typed fingerprint of machine and libraries.
        tier: which specs were asked.
    """

    adapter: dict[str, str]
    verdict: Word
    required: int
    ran: int
    results: list[Result]
    unclaimed: list[str] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    tier: str = "core"

    @property
    def exit_code(self) -> int:
        """0 conforms, with or without known failures · 1 does not · 3 incomplete."""
        return {"DOES NOT CONFORM": 1, "INCOMPLETE": 3}.get(self.verdict, 0)

    @property
    def failed(self) -> list[Result]:
        """The specs that failed, MUST before SHOULD."""
        failed = [result for result in self.results if result.outcome == "failed"]
        return sorted(failed, key=lambda result: result.level)

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON holds it, a report of kind `check`."""
        return {
            "schema_version": 1,
            "adapter": self.adapter,
            "environment": self.environment,
            "tier": self.tier,
            "spec_version": SPEC_VERSION,
            "verdict": self.verdict,
            "required": self.required,
            "ran": self.ran,
            "results": [result.as_dict() for result in self.results],
            "unclaimed": self.unclaimed,
            "unjudged": self.unjudged,
        }


def check(
    adapter: str | Adapter,
    *,
    only: Sequence[str] = (),
    tier: Tier = "core",
    case: Case | None = None,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    known: Path | str | None = None,
    explore: bool = False,
    limit: float = LIMIT,
    on_trial: Callable[[dict[str, str], dict[str, Any]], None] | None = None,
    progress: Callable[[Result], None] | None = None,
) -> Verdict:
    """A verdict on one implementation, in a process of its own, or two at once for a whole tier.

    Args:
        adapter: a built-in name, an entry-point name, `pkg.module:factory`, or the object itself.
        only: ids or families; every spec of the tier where empty.
        tier: smoke, core or full.
        case: judge at this one point only.
        model: in the place of the Phi-3 specimens.
        device: in the place of the CPU.
        dtype: judge in this dtype only.
        seed: other weights, factors and inputs; the verdict must not depend on it.
        known: a file of known failures, instead of those that come with the harness.
        explore: search at random for counterexamples and note them; never changes the verdict.
        limit: seconds a spec may take.
        on_trial: called before the first spec, with the implementation's name and version and with the
            fingerprint of machine and libraries.
        progress: called with each result as it arrives.

    Raises:
        UsageError: the adapter cannot be had, a name matches no spec, or what is asked does not go together.
    """
    from harness import environment

    specs = select(only, tier)
    _check_asked(specs, case, whole=not (model or device or dtype or seed))
    _check_ranges(dtype, seed, limit)
    # Not where a second process weighs more than it saves: a few specs, a large model, one card.
    in_two = not (only or case or model or tier == "smoke" or (device or "cpu") != "cpu")
    with Session(adapter) as session, Session(adapter) as second:
        session.start()
        if in_two:
            second.start()
        judge = Judge(
            session, Points(case, model, device, dtype, tier, seed), limit=limit, explore=explore
        )
        adapter_named = {"name": judge.name, "version": judge.version}
        surroundings = environment.collect() | judge.environment
        if on_trial:
            on_trial(adapter_named, surroundings)
        entries = (
            known_failures.built_in(judge.name, judge.version)
            if known is None
            else known_failures.load(known)
        )
        judge.known = entries
        if any(item.fresh for item in specs.values()):
            session.ask({"do": "prepare"}, limit=limit)
        found = (
            lanes.judge_in_two((judge, judge.beside(second)), specs)
            if in_two
            else (judge.result(item) for item in specs.values())
        )
        for result in found:
            if progress:
                progress(result)
        results = [judge.results[id_] for id_ in specs]
        for result in sorted(results, key=lambda r: r.level):
            judge.diagnose(result)
        # Of a part of the specs nobody expects that all claims are in it.
        partial = bool(only or case)
        unclaimed = [] if partial else judge.unclaimed()
        silent = [] if partial else unjudged(judge.claims["features"], results)
    return Verdict(
        adapter=adapter_named,
        **summary(results),
        results=results,
        unclaimed=unclaimed,
        unjudged=silent,
        environment=surroundings,
        tier=tier,
    )


def _check_asked(specs: Mapping[str, Spec], case: Case | None, *, whole: bool) -> None:
    """Raise UsageError where a case is not given by itself: it is one whole point of one spec."""
    if case is not None and len(specs) != 1:
        raise UsageError("--case: name the one spec to judge with --only ID")
    if case is not None and not whole:
        raise UsageError(
            "--case: it is one whole point; leave out --model, --device, --dtype and --seed"
        )


def _check_ranges(dtype: str | None, seed: int, limit: float) -> None:
    """Raise UsageError on a value that means nothing, which the command line has refused already."""
    dtypes = Capabilities.KNOWN["dtypes"]
    if dtype is not None and dtype not in dtypes:
        raise UsageError(f"--dtype {dtype}: no such dtype; give one of {', '.join(dtypes)}")
    if not 0 <= seed < SEEDS:
        raise UsageError(f"--seed {seed}: must be from 0 to {SEEDS - 1}")
    if not limit > 0:
        raise UsageError(f"--limit: seconds must be more than 0, not {limit}")


WITHIN = {"quantized_base": "quantized_base in 8 bits"}
"""What a feature claims beside what its specs ask for: they have bases in 4 bits alone."""


def unjudged(features: Iterable[str], results: Iterable[Result]) -> list[str]:
    """The features that are claimed and that none of these specs asks for, and unjudged parts of others."""
    asked: set[str] = set()
    for result in results:
        if result.outcome != "not_claimed":
            item = catalogue()[result.spec]
            asked.update(item.features, *(case.way.split(", ") for case in item.cases))
    told = {name: WITHIN.get(name) if name in asked else name for name in features}
    return [name for name in told.values() if name]


def summary(results: Iterable[Result]) -> dict[str, Any]:
    """The word, how many specs were required, and how many of them ran."""
    claimed = [r for r in results if r.outcome != "not_claimed"]
    required = [r for r in claimed if r.level == "MUST"]
    ran = [r for r in required if r.outcome in {"passed", "failed", "known"}]
    broken = [
        r
        for r in claimed
        if r.outcome == "failed"
        and (r.level == "MUST" or any(failure.kind == "known" for failure in r.failures))
    ]
    judged = [r for r in claimed if r.outcome in {"passed", "failed", "known"}]
    word: Word = "CONFORMS"
    if broken:
        word = "DOES NOT CONFORM"
    elif len(ran) < len(required) or not judged:
        word = "INCOMPLETE"
    elif any(r.outcome == "known" for r in claimed):
        word = "CONFORMS BUT FOR KNOWN FAILURES"
    return {"verdict": word, "required": len(required), "ran": len(ran)}
