"""The kill matrix: every planted fault judged by every spec of the core tier.

              spec₁  spec₂  spec₃
    fault₁      ✗      ·      ✓        ✗ kills   · blocked by a spec that kills   ✓ lets pass
    fault₂      ✓      ✗      ✓

Red is: a fault that survives, one that the spec named for it lets pass, a spec that no fault needs, a
correct implementation that fails a MUST. `python -m harness.faults` makes it. What a fault cannot change
(`harness.faults.impact`) is the reference's own answer; `--whole` judges that too.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.faults.impact import Remembering, Traced
from harness.judge import Judge
from harness.session import Session
from harness.spec import catalogue, select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from harness.adapter import Adapter
    from harness.faults.impact import Memory
    from harness.judge import Result

KILLS = "failed"

NARROW: dict[str, str] = {
    "training/same-trajectory-as-reference": "each step may round the factor that it stores once, and "
    "a right step does",
    "merge/weight-equals-oracle": "one rounding of the sum is all that is allowed and all that a right "
    "merge takes; truncating, the least wrong one, takes two",
    "merge/no-drift-in-half-precision": "as above: one rounding is right, and a second is the sin",
    "merge/restores-base": "one rounding in and one out are allowed, and a right cycle takes both",
    "initialization/distribution": "the range is exact: what lies outside is wrong by however little",
    "forward/dropout-on-in-train": "of masks that repeat one in 200 calls is already beyond chance, and 600 "
    "draws tell a tenth from three tenths and little more",
    "forward/dropout-gradients": "a difference along one direction: where a mask drops little, "
    "forgetting it shows little, and in another case twenty times over",
    "quantized/merge-error-bounded": "NF4's widest gap is the exact worst case of a right merge, reached "
    "wherever a block has a number in its middle",
}
"""Specs whose margin is under `MARGIN` on a side, and why a budget derived exactly cannot be wider."""

MARGIN = 3.0
"""How far a budget must lie from both sides: above every correct error, below every fault's."""


@dataclass(slots=True, kw_only=True)
class Row:
    """One implementation against every spec.

    Attributes:
        name: of the fault, or of the correct implementation.
        killed_by: the spec named for the fault; empty for a correct implementation.
        outcomes: by spec id.
        used: by spec id and dtype, the largest part of a budget used; of a fault, only where it fails.
        failures: by spec id, the first failure in words.
        replays: rows of BUGS.md.
        seconds: of processor time.
    """

    name: str
    killed_by: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    used: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    replays: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def killers(self) -> set[str]:
        """The specs that fail it."""
        return {id_ for id_, outcome in self.outcomes.items() if outcome == KILLS}


@dataclass(slots=True, kw_only=True)
class Matrix:
    """All rows, and what is to be said of them."""

    faults: list[Row]
    correct: list[Row]
    seconds: float = 0.0

    @property
    def specs(self) -> list[str]:
        """The ids judged, in the catalogue's order."""
        return list(
            dict.fromkeys(id_ for row in (*self.correct, *self.faults) for id_ in row.outcomes)
        )

    def as_dict(self) -> dict[str, Any]:
        """The matrix as JSON holds it: what passed is left out of each row."""

        def kept(row: Row) -> dict[str, Any]:
            told = {id_: outcome for id_, outcome in row.outcomes.items() if outcome != "passed"}
            return asdict(row) | {"outcomes": told}

        return {
            "seconds": self.seconds,
            "specs": self.specs,
            "correct": [kept(row) for row in self.correct],
            "faults": [kept(row) for row in self.faults],
        }

    @classmethod
    def read(cls, record: dict[str, Any]) -> Matrix:
        """The matrix of what `as_dict` gave."""

        def whole(row: dict[str, Any]) -> Row:
            outcomes = dict.fromkeys(record["specs"], "passed") | row["outcomes"]
            return Row(**{**row, "outcomes": outcomes, "replays": tuple(row["replays"])})

        return cls(
            faults=[whole(row) for row in record["faults"]],
            correct=[whole(row) for row in record["correct"]],
            seconds=record["seconds"],
        )

    def without(self, spec: str) -> Matrix:
        """The matrix as if a spec were not there."""
        return Matrix(
            faults=[_without(row, spec) for row in self.faults],
            correct=[_without(row, spec) for row in self.correct],
        )

    def problems(self) -> list[str]:
        """What makes the matrix red, a line each; empty is green."""
        found = []
        judged = {id_ for row in (*self.faults, *self.correct) for id_ in row.outcomes}
        for row in self.faults:
            if not row.killers:
                found.append(f"{row.name} survives")
            elif row.killed_by not in row.killers:
                by = ", ".join(sorted(row.killers))
                found.append(
                    f"{row.name} is named for {row.killed_by}, which lets it pass; killed by {by}"
                )
        found += [
            f"{id_} has no fault that only it and its dependants kill"
            for id_ in sorted(judged)
            if not any(_is_own(row, id_) for row in self.faults)
        ]
        found += [
            f"{row.name} is correct and fails {id_}"
            for row in self.correct
            for id_ in sorted(row.killers)
            if catalogue()[id_].level == "MUST"
        ]
        return found

    def margins(self) -> list[dict[str, Any]]:
        """By spec and dtype: the largest error of a correct implementation, the smallest of a fault.

        Both in units of the allowed error: correct ones lie below 1, faults above.
        """
        right: dict[tuple[str, str], float] = defaultdict(float)
        for row in self.correct:
            for id_, by_dtype in row.used.items():
                for dtype, used in by_dtype.items():
                    right[id_, dtype] = max(right[id_, dtype], used)
        wrong: dict[tuple[str, str], float] = {}
        for row in self.faults:
            for dtype, used in row.used.get(row.killed_by, {}).items():
                key = (row.killed_by, dtype)
                wrong[key] = min(wrong.get(key, used), used)
        return [
            {
                "spec": id_,
                "dtype": dtype,
                "correct": right[id_, dtype],
                "fault": wrong.get((id_, dtype)),
            }
            for id_, dtype in sorted(right)
        ]


def _without(row: Row, spec: str) -> Row:
    outcomes = {id_: outcome for id_, outcome in row.outcomes.items() if id_ != spec}
    return Row(name=row.name, killed_by=row.killed_by, outcomes=outcomes)


def _is_own(row: Row, spec: str) -> bool:
    """Whether a fault is killed by this spec and, but for its dependants, by no other."""
    return (
        row.killed_by == spec and spec in row.killers and row.killers <= {spec, *dependants(spec)}
    )


def dependants(spec: str) -> set[str]:
    """The specs that need this one, directly or not."""
    known = catalogue()
    found: set[str] = set()
    for id_, item in known.items():  # needed ones come first
        if spec in item.needs or found & set(item.needs):
            found.add(id_)
    return found


def _enter(row: Row, result: Result) -> None:
    row.outcomes[result.spec] = result.outcome
    by_dtype: dict[str, float] = {}
    if result.outcome == KILLS:
        first = result.failures[0]
        row.failures[result.spec] = (
            f"{first.kind}: expected {first.expected}; actual {first.actual}"
        )
        for failure in result.failures:
            if failure.measured is not None and failure.allowed:
                dtype = Case.parse(failure.case).dtype
                over = failure.measured / failure.allowed
                by_dtype[dtype] = min(by_dtype.get(dtype, over), over)
    else:
        for case, used in result.margins.items():
            dtype = Case.parse(case).dtype
            by_dtype[dtype] = max(by_dtype.get(dtype, 0.0), used)
    if by_dtype:
        row.used[result.spec] = by_dtype


def run(
    correct: Sequence[str], *, only: Iterable[str] = (), jobs: int = 2, whole: bool = False
) -> Matrix:
    """The matrix of all faults, or of some, and of the correct implementations named.

    Each of `jobs` processes loads the libraries once and forks for each implementation it judges. What
    a fault cannot change is judged again only where the `whole` is asked for.
    """
    import time

    started = time.monotonic()
    flags = [*(f"--correct={name}" for name in correct), *(f"--only={name}" for name in only)]
    flags += ["--whole"] if whole else []
    parts = [
        [sys.executable, "-m", "harness.faults", "--part", f"{k}/{jobs}", *flags]
        for k in range(jobs)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(_part, parts))
    rows = [Row(**row) for part in done for row in part]
    return Matrix(
        faults=[row for row in rows if row.killed_by],
        correct=sorted(
            (row for row in rows if not row.killed_by), key=lambda r: correct.index(r.name)
        ),
        seconds=round(time.monotonic() - started, 1),
    )


def _part(command: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def judge_part(part: str, correct: Sequence[str], only: Sequence[str], *, whole: bool) -> None:
    """One process's share of the rows, a line of JSON each on standard output."""
    from harness.faults.record import faults
    from harness.registry import resolve

    k, of = map(int, part.split("/"))
    memory = _warm_up()
    if whole:
        memory.clear()
    rows: list[tuple[Row, Callable[[], Adapter]]] = [
        (Row(name=name), partial(resolve, name)) for name in correct
    ]
    rows += [
        (Row(name=fault.name, killed_by=fault.killed_by, replays=fault.replays), fault.make)
        for fault in faults().values()
        if not only or fault.name in only
    ]
    for row, make in rows[k::of]:
        before = sum(_cpu_seconds())
        adapter = make()
        _judge(row, Remembering(adapter, memory) if row.killed_by else Session(adapter))
        row.seconds = round(sum(_cpu_seconds()) - before, 2)
        print(json.dumps(asdict(row)), flush=True)


def _judge(row: Row, session: Session) -> None:
    """Enter every core spec, judged in a process of its own."""
    with session:
        judge = Judge(session)
        for item in select((), "core").values():
            _enter(row, judge.result(item))


def _warm_up() -> Memory:
    """Load and compute once here what every copy of this process would load and compute again.

    Returns what the reference answers, and what each answer takes.
    """
    import torch

    from harness import fresh

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fresh.share()
    session = Traced()
    _judge(Row(name="reference"), session)
    # What a copy does not walk through, it need not copy.
    gc.collect()
    gc.freeze()
    return session.memory


def _cpu_seconds() -> tuple[float, float]:
    """Of the children that have ended: user and system."""
    used = os.times()
    return used.children_user, used.children_system
