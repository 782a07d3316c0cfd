"""Two sides timed against each other in the same minutes, until the question is answered.

    a round:  first ▏second ▏second ▏first      or, every other time round the cores, the mirror image
              └ log(second / first) of each round ┘ ──▶ median, interval ──▶ better same worse

Each side is a process of its own with an interpreter of its own; while one works the other waits.
Blocks are short, so that a neighbour's burst hits both sides of a round or is one outlier among
hundreds. In a round each side once follows the other, which has emptied the caches, and once itself,
so that this cancels, as does what drifts in a straight line. All of a round runs on one core: left
to the scheduler, each side keeps a core of its own for seconds, and a neighbour on one of the two
cores is then taken for a difference between the sides.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from harness.errors import UsageError
from harness.measure.interval import LOOKS, Interval, Verdict, decide, median_interval
from harness.measure.side_process import Late, Lost, SideProcess

Phase = Literal["training-step", "evaluation-forward", "merged-forward"]
BLOCK_SECONDS = 0.02
"""How long one side works before the other does: two or three steps of a tiny model."""

ROUNDS_ON_A_CORE = 4
"""After how many rounds both sides move to the next core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side runs, and in which interpreter.

    Attributes:
        adapter: name, entry point or `pkg.module:factory`.
        python: the interpreter; another one may hold other library versions.
        slowdown: planted: 0.05 keeps every step busy for five per cent longer.
    """

    adapter: str
    python: str = sys.executable
    model: str = "tiny"
    phase: Phase = "training-step"
    r: int = 8
    dtype: str = "float32"
    batch: int = 1
    sequence: int = 16
    device: str = "cpu"
    threads: int = 1
    slowdown: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a side says of itself, which may run under other library versions than we do."""

    name: str | None = None
    version: str | None = None

    def told(self, side: Side) -> str:
        """The side with its version, where it is known."""
        return f"{side.adapter} {self.version}" if self.version else side.adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The answer: the second side's time over the first's.

    Attributes:
        verdict: of the second side against the first.
        ratio: median of the rounds' ratios; 1.05 is five per cent slower.
        low: lower bound of the interval, which takes all looks into account.
        high: upper bound.
        rounds: rounds run.
        seconds: from the start of the processes to the answer.
        samples: seconds of a step in each round, first side then second.
        note: why it is inconclusive, where it is more than noise.
        facts: what the sides said of themselves, first then second.
    """

    verdict: Verdict
    ratio: float
    low: float
    high: float
    rounds: int
    seconds: float
    samples: tuple[tuple[float, float], ...] = field(repr=False)
    note: str = ""
    facts: tuple[Facts, Facts] = (Facts(), Facts())

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON holds it; a bound that is not known is null."""
        known = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }
        return known | {"samples": [list(pair) for pair in self.samples]}

    def __str__(self) -> str:
        """One line for a person."""
        if self.note:
            return f"{self.verdict}: {self.note}"
        change = (self.ratio - 1) * 100
        return (
            f"{self.verdict}: {change:+.2f} % time "
            f"[{(self.low - 1) * 100:+.2f}, {(self.high - 1) * 100:+.2f}], "
            f"{self.rounds} rounds, {self.seconds:.0f} s"
        )


def compare(
    first: Side, second: Side, *, seconds: float = 45.0, margin: float = 0.02, error: float = 0.05
) -> Pairing:
    """Time the second side against the first for at most `seconds`, start-up included.

    A side that dies, hangs or raises makes the answer inconclusive and says so.

    Raises:
        UsageError: an interpreter that is not there or is none, a side that is asked for what nobody
            knows, or bounds that leave no room for an answer.
    """
    if not 0 < seconds < math.inf or not 0 < margin < 1:
        raise UsageError(
            f"paired timing: {seconds:g} s and a margin of {margin:g} answer nothing; "
            "give a time above zero and a margin such as 0.02"
        )
    began = time.monotonic()
    deadline = began + seconds
    ratios: list[float] = []
    samples: list[tuple[float, float]] = []
    facts = [Facts(), Facts()]
    cores = _cores(first, second)

    def finish(verdict: Verdict, found: Interval, note: str = "") -> Pairing:
        return Pairing(
            verdict=verdict,
            ratio=math.exp(found.middle),
            low=math.exp(found.low),
            high=math.exp(found.high),
            rounds=len(ratios),
            seconds=time.monotonic() - began,
            samples=tuple(samples),
            note=note,
            facts=(facts[0], facts[1]),
        )

    with SideProcess(first, "first") as one, SideProcess(second, "second") as two:
        try:
            one.begin()
            two.begin()
            told = [process.ready(deadline) for process in (one, two)]
            facts[:] = [Facts(name=t.get("name"), version=t.get("version")) for t in told]
            steps = _steps(one, two, deadline)
            longest = 0.0
            while time.monotonic() + longest < deadline:
                start = time.monotonic()
                lap, core = divmod(len(ratios) // ROUNDS_ON_A_CORE, len(cores))
                outer, inner = (one, two) if lap % 2 == 0 else (two, one)
                took: dict[SideProcess, list[float]] = {one: [], two: []}
                for process in (outer, inner, inner, outer):
                    took[process].append(process.run(steps, deadline, cores[core]))
                samples.append((math.sqrt(math.prod(took[one])), math.sqrt(math.prod(took[two]))))
                ratios.append(math.log(samples[-1][1] / samples[-1][0]))
                longest = max(longest, time.monotonic() - start)
                if len(ratios) in LOOKS:
                    verdict, found = decide(ratios, margin=margin, error=error)
                    if verdict != "inconclusive":
                        return finish(verdict, found)
        except Lost as lost:
            # One block that is late at the end is no hang: what the rounds before it say holds.
            if not isinstance(lost, Late) or lost.silence > seconds / 2:
                nothing = median_interval(ratios, error / (len(LOOKS) + 1))
                return finish("inconclusive", nothing, str(lost))
        verdict, found = decide(ratios, margin=margin, error=error)
        note = "" if ratios else f"{seconds:g} s were over before the first round"
        return finish(verdict, found, note)


def _cores(*sides: Side) -> list[int | None]:
    """The cores to run rounds on, in turn; only None where a side is not one thread of the CPU's."""
    alone = all(side.device == "cpu" and side.threads == 1 for side in sides)
    if not alone or not hasattr(os, "sched_getaffinity"):
        return [None]
    return [*sorted(os.sched_getaffinity(0))]


def _steps(one: SideProcess, two: SideProcess, deadline: float) -> int:
    """How many steps make a block: warms both sides up, and measures them."""
    for process in (one, two):
        process.run(5, deadline)
    step = median(process.run(5, deadline) for process in (one, two))
    return max(1, round(BLOCK_SECONDS / step))


def rows(pairing: Pairing, first: Side, second: Side) -> list[dict[str, Any]]:
    """Report rows of both sides, under the versions they ran; the second holds the answer."""
    conditions = {
        key: value
        for key, value in asdict(second).items()
        if key not in {"adapter", "python", "model", "phase"}
    }
    sides = []
    for k, (side, facts) in enumerate(zip((first, second), pairing.facts, strict=True)):
        samples = [pair[k] for pair in pairing.samples]
        sides.append(
            {
                "subject": side.adapter,
                "name": facts.name,
                "version": facts.version,
                "model": side.model,
                "phase": side.phase,
                "conditions": conditions,
                "metric": "seconds",
                "value": median(samples) if samples else None,
                "unit": "s",
                "samples": samples,
            }
        )
    answer = pairing.as_dict()
    sides[1]["paired"] = {
        "against": pairing.facts[0].told(first),
        **{key: answer[key] for key in ("verdict", "ratio", "low", "high", "rounds", "note")},
    }
    return sides
