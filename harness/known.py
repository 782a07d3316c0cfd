"""Known failures: strict, cited, expiring.

    [[known]]
    spec = "targeting/unmatched-name-is-loud"
    case = { way = "partial" }          # optional: which cases; all where it is left out
    kind = "silent"                     # of `harness.failure.KINDS`
    versions = ">=0.5"                  # optional: which versions of the implementation
    reason = "names that match nothing are ignored"
    url = "https://github.com/huggingface/peft/issues/3658"
    expires = 2027-06-01

An entry excuses exactly the failures it names. One that no longer happens, has expired or matches
nothing is itself a failure, so that the list cannot rot.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.failure import KINDS
from harness.spec import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from packaging.specifiers import SpecifierSet

    from harness.case import Case
    from harness.failure import Failure
    from harness.spec import Spec

_REQUIRED = {"spec": str, "kind": str, "reason": str, "url": str, "expires": dt.date}
_CASE_FIELDS = {"specimen", "shape", "dtype", "r", "alpha", "dropout", "way", "device", "seed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One failure that is known, why, where it is discussed, and until when it is excused."""

    spec: str
    kind: str
    reason: str
    url: str
    expires: dt.date
    file: str
    case: dict[str, Any] = field(default_factory=dict)
    versions: str = ""

    def excuses(self, spec: str, case: Case, failure: Failure) -> bool:
        """Whether this failure is the one that is known."""
        return self.spec == spec and self.kind == failure.kind and case.matches(self.case)

    def untrue(self, spec: Spec, judged: Iterable[Case], *, used: bool) -> str:
        """Why the entry is no longer true of its spec; empty where it is, or none of its cases was judged."""
        if self.expires < dt.datetime.now(tz=dt.UTC).date():
            return f"expired on {self.expires}: look whether it still has to be there"
        if not any(case.matches(self.case) for case in (*spec.cases, *spec.more_cases)):
            return "matches no case: mend its selector or remove it"
        idle = not used and any(case.matches(self.case) for case in judged)
        return "no longer fails: remove it" if idle else ""


def load(path: Path | str) -> list[Known]:
    """The entries of one file; raises `UsageError` on one that is not whole."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"known failures {path}: {error.strerror or error}; give a TOML file of [[known]] entries"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"known failures {path.name}: not TOML: {error}; every entry starts with [[known]]"
        ) from None
    if set(data) - {"known"} or not isinstance(data.get("known", []), list):
        raise UsageError(f"known failures {path.name}: every entry starts with [[known]]")
    entries = []
    for number, entry in enumerate(data.get("known", []), 1):
        where = f"known failures {path.name}, entry {number}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where}: it must be a table, which starts with [[known]]")
        for name, kind in _REQUIRED.items():
            if type(entry.get(name)) is not kind:  # a moment would be a date
                raise UsageError(f"{where}: {name} must be given, as a {kind.__name__}")
        if not isinstance(entry.get("case", {}), dict):
            raise UsageError(f'{where}: case must be a table, such as {{ way = "merged" }}')
        unknown = set(entry) - set(_REQUIRED) - {"case", "versions"}
        unknown |= set(entry.get("case", {})) - _CASE_FIELDS
        if unknown:
            raise UsageError(f"{where}: unknown key {', '.join(sorted(unknown))}")
        if entry["kind"] not in KINDS:
            raise UsageError(f"{where}: kind must be one of {', '.join(KINDS)}")
        if entry["spec"] not in catalogue():
            raise UsageError(
                f"{where}: no spec is called {entry['spec']!r}; lora-harness list has the ids"
            )
        _specifiers(entry.get("versions", ""), where)
        entries.append(Known(**entry, file=path.name))
    return entries


def built_in(adapter: str, version: str) -> list[Known]:
    """What is known of an implementation at a version, from `specs/known/<adapter>.toml`."""
    from importlib.resources import files

    # Looked for among what there is: a name may be longer than a path's part, or lead elsewhere.
    lists = {one.name: one for one in (files("harness.specs") / "known").iterdir()}
    if (mine := lists.get(f"{adapter}.toml")) is None:
        return []
    return [entry for entry in load(Path(str(mine))) if _applies(entry, version)]


def _applies(entry: Known, version: str) -> bool:
    from packaging.version import InvalidVersion

    if not entry.versions:
        return True
    try:
        return _specifiers(entry.versions, entry.file).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _specifiers(text: object, where: str) -> SpecifierSet:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)  # type: ignore[arg-type]  # what is no text is refused below
    except (InvalidSpecifier, TypeError, AttributeError):
        raise UsageError(
            f"{where}: versions must be a specifier such as '>=0.5,<0.22', not {text!r}"
        ) from None
