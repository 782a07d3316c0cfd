"""Failures: a typed record of one spec that does not hold, and how it is told.

    judge ── fail(kind, expected, actual, ...) ── Broken ── verdict ── Failure ── text, JSON, HTML

Every failure has one of a finite set of kinds, whoever finds it.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal[
    "value",  # numbers differ by more than is allowed
    "names",  # the wrong modules, parameters or keys
    "count",  # the right things in the wrong number
    "dtype",  # the wrong dtype
    "state",  # something changed that must not: mode, trainability, storage
    "silent",  # should have raised or warned
    "no-effect",  # something that must act does nothing
    "raised",  # the implementation raised
    "cost",  # more operations or bytes than the documented cost
    "known",  # the list of known failures is no longer true
    "hang",  # no answer within the limit
    "crash",  # the process died
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One spec that does not hold at one case.

    Attributes:
        kind: which way it fails, one of `KINDS`.
        case: the case's text form.
        expected: what MUST hold here, in words and numbers.
        actual: what was found.
        measured: the error, in the unit of `allowed`; None where nothing is measured.
        allowed: the most that would have passed.
        where: the worst element, module or key.
        looks_like: planted faults that behave the same.
        reproduce: the command that fails again.
    """

    kind: str
    case: str
    expected: str
    actual: str
    measured: float | None = None
    allowed: float | None = None
    where: str = ""
    looks_like: tuple[str, ...] = ()
    reproduce: str = ""

    def as_dict(self) -> dict[str, object]:
        """The record as JSON holds it."""
        return {**asdict(self), "looks_like": list(self.looks_like)}

    def facts(self) -> list[tuple[str, str]]:
        """The record as a terminal shows it: what there is to say, each under its name."""
        rows = [("expected", self.expected), ("actual", self.actual)]
        if self.measured is not None and self.allowed is not None:
            times = f", {self.measured / self.allowed:.3g} times" if self.allowed else ""
            rows.append(("measured", f"{self.measured:.4g}, allowed {self.allowed:.4g}{times}"))
        rows += [
            ("where", self.where),
            ("case", self.case),
            ("looks like", ", ".join(self.looks_like)),
            ("reproduce", self.reproduce),
        ]
        return [(name, value) for name, value in rows if value]


class Broken(Exception):  # noqa: N818  # it says that a property is broken, not that the judge is
    """A property that does not hold, on its way from a judge to the verdict."""

    def __init__(
        self,
        kind: Kind,
        *,
        expected: str,
        actual: str,
        measured: float | None = None,
        allowed: float | None = None,
        where: str = "",
        observed: Tensor | None = None,
        truth: Tensor | None = None,
    ) -> None:
        super().__init__(f"{kind}: expected {expected}; actual {actual}")
        self.kind: Kind = kind
        self.expected = expected
        self.actual = actual
        self.measured = measured
        self.allowed = allowed
        self.where = where
        self.observed = observed
        """The numbers found, for the diagnosis; not part of the record."""
        self.truth = truth
        """The numbers that should have been found."""

    def record(self, *, case: str, reproduce: str) -> Failure:
        """The record, once the case and its command are known; a terminal can show what is in it."""
        from harness.report.words import plain

        return Failure(
            kind=self.kind,
            case=case,
            expected=plain(self.expected, limit=2000),
            actual=plain(self.actual, limit=2000),
            measured=self.measured,
            allowed=self.allowed,
            where=plain(self.where),
            reproduce=reproduce,
        )


class NotRun(Exception):  # noqa: N818  # it is an outcome, not an error
    """A judge cannot run here, for a reason that is not the implementation's: what is missing."""


class Refused(Exception):  # noqa: N818  # it is an outcome, not an error
    """The implementation will not do, and says so, what it need not do: the case is vacuous."""


def fail(
    kind: Kind,
    *,
    expected: str,
    actual: str,
    where: str = "",
    measured: float | None = None,
    allowed: float | None = None,
    observed: Tensor | None = None,
    truth: Tensor | None = None,
) -> NoReturn:
    """Say that the property does not hold; the one way a judge does."""
    raise Broken(
        kind,
        expected=expected,
        actual=actual,
        where=where,
        measured=measured,
        allowed=allowed,
        observed=observed,
        truth=truth,
    )


def raised(error: BaseException, *, expected: str = "no exception") -> Broken:
    """An exception of the implementation's as a broken property, with the line it came from.

    Where no line of the implementation's was running, what it had given before was no good, or the
    harness is wrong: the line is told to be the harness's own.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/site-packages/torch/" not in Path(frame.filename).as_posix()
    ]
    theirs = [frame for frame in frames if not _ours(frame.filename)]
    frame = theirs[-1] if theirs else (frames[-1] if frames else None)
    where = f"{_short(frame.filename)}:{frame.lineno} in {frame.name}" if frame else ""
    if frame and not theirs:
        where += ", a line of the harness, on what the implementation gave it"
    return Broken("raised", expected=expected, actual=line(error), where=where)


def line(error: BaseException) -> str:
    """A stranger's exception in one line that a terminal can show: its type and what it says."""
    from harness.report.words import plain

    try:
        said = str(error)
    except Exception as second:  # noqa: BLE001  # it may be as broken as the rest
        said = f"(its message raised {type(second).__name__})"
    return plain(f"{type(error).__name__}: {said}" if said.strip() else type(error).__name__)


def of_the_harness(error: BaseException) -> bool:
    """Whether a line of the harness raised it, and none of the implementation's."""
    return _ours(traceback.extract_tb(error.__traceback__)[-1].filename)


def _ours(filename: str) -> bool:
    """Whether a line of this file is the harness's or a spec's, and not an implementation's."""
    specs = [Path(folder) for folder in import_module("harness.specs").__path__]
    here = Path(__file__).parent
    return _within(filename, here, but=here / "adapters") or any(
        _within(filename, folder) for folder in specs
    )


def _within(filename: str, folder: Path, *, but: Path | None = None) -> bool:
    path = Path(filename)
    return path.is_relative_to(folder) and not (but is not None and path.is_relative_to(but))


def _short(filename: str) -> str:
    """A path from its package on: nobody needs to know where an environment lies."""
    parts = Path(filename).parts
    for mark in ("site-packages", "dist-packages"):
        if mark in parts:
            return "/".join(parts[parts.index(mark) + 1 :])
    return "/".join(parts[-2:])
