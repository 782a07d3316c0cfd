"""The one file of a run: how it is written, grown and read back.

    with Recorder(path, kind="check", adapter=..., model="tiny") as report:
        report.add("results", result)       the file on disk is whole after every add
        report.set("verdict", "CONFORMS")
                                            leaving closes it: finished is true

The shape is `schema.json`, beside this module: the file that is published is the file that checks.

History of `schema_version`:

    1   2026-11   environment, results, counters, timings, memory, training, recipe, artefacts, notes
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from harness.errors import UsageError
from harness.report.shape import Misshapen, compile_schema
from harness.report.strict_json import dumps, first_line, loads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from harness.report.shape import Check

    Report = dict[str, Any]

SCHEMA_VERSION = 1
KINDS = ("check", "finetune", "bench", "plan", "matrix", "pytest", "compare")
LISTS = ("results", "counters", "timings", "memory", "notes")
"""Sections that grow row by row."""
LARGEST = 64 * 2**20
"""Bytes. A night of 500 rows is 0.2 MB; what is larger than this is not a report."""

_UPGRADES: dict[int, Callable[[Report], Report]] = {}
"""From each older schema version, the function to the next."""


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of the current version."""
    text = files("harness.report").joinpath("schema.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


@cache
def _check() -> Check:
    return compile_schema(schema())


@cache
def _member_check(section: str) -> Check:
    whole = schema()
    part = whole["properties"][section]
    wanted = part["items"] if section in LISTS else part
    return compile_schema({**wanted, "$defs": whole["$defs"]})


def now() -> str:
    """This moment, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Recorder:
    """A report that grows on disk.

    The file is there, whole and marked unfinished, from construction on, and replaced atomically by
    every `add` and `set`: a reader, or whoever comes after `kill -9`, finds all that was added.

    Args:
        path: where to; folders in between are made. None keeps the report in memory alone.
        kind: the command, one of `KINDS`.
        head: further members: `adapter`, `model`, `seed`, `spec_version`, `recipe`, ... Without an
            `environment`, this machine's is collected.

    Raises:
        UsageError: the path cannot be written.
        ValueError: a member does not fit the schema; a mistake of the caller's.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, kind: str, **head: Any) -> None:
        if "environment" not in head:
            from harness.environment import collect

            head["environment"] = collect()
        started = now()
        stamp = re.sub(r"\D", "", started)
        self.path = None if path is None else Path(path)
        self._before: str | None = None
        if self.path is not None and self.path.is_file():
            with suppress(OSError, UnicodeDecodeError):
                self._before = self.path.read_text(encoding="utf-8")
        self._members: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "id": f"{kind}-{stamp}-{secrets.token_hex(4)}",
            "started": started,
            "ended": None,
            "finished": False,
            "adapter": None,
            "model": None,
            "verdict": None,
            "required": None,
            "ran": None,
            "seed": None,
            "spec_version": None,
        }
        self._texts: dict[str, str] = {}
        self._rows: dict[str, list[str]] = {}
        self._lists: dict[str, list[Any]] = {name: [] for name in LISTS}
        for name, value in (self._members | head).items():
            self._put(name, value)
        self._write()

    @property
    def report(self) -> Report:
        """What is recorded so far, as `read` would return it."""
        return {**self._members, **self._lists}

    def add(self, section: str, rows: Mapping[str, Any] | str | Sequence[Any]) -> None:
        """One row or several to the end of a section of `LISTS`."""
        if section not in LISTS:
            raise ValueError(f"section {section!r} does not grow; one of {', '.join(LISTS)} does")
        single = isinstance(rows, str) or hasattr(rows, "keys") or hasattr(rows, "as_dict")
        for row in [rows] if single else rows:
            plain = json.loads(dumps(row))
            self._verify(section, plain)
            self._lists[section].append(plain)
            self._rows.setdefault(section, []).append(dumps(plain))
        self._write()

    def set(self, key: str, value: Any) -> None:
        """One member of the report; a section of `LISTS` is replaced whole."""
        self._put(key, value)
        self._write()

    def close(self, *, finished: bool = True) -> None:
        """Mark the end. Not finished means that the run was cut short."""
        self._put("ended", now())
        self._put("finished", finished)
        self._write(durable=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, UsageError) and not any(self._lists.values()):
            self._put_back()
            return
        if kind is not None:
            self.add("notes", f"ended by {kind.__name__}: {error}".rstrip(": "))
        self.close(finished=kind is None)

    def _put_back(self) -> None:
        """What lay at the path before: a run that was asked for wrongly has nothing to say."""
        if self.path is None or not self.path.is_file():
            return
        if self._before is None:
            self.path.unlink()
        else:
            replace(self.path, self._before)

    def _put(self, name: str, value: Any) -> None:
        if name in LISTS:
            self._lists[name], self._rows[name] = [], []
            for row in value:
                plain = json.loads(dumps(row))
                self._verify(name, plain)
                self._lists[name].append(plain)
                self._rows[name].append(dumps(plain))
            return
        plain = json.loads(dumps(value))
        if name in schema()["properties"]:
            self._verify(name, plain)
        self._members[name] = plain
        self._texts[name] = dumps(plain)

    def _verify(self, section: str, value: object) -> None:
        try:
            _member_check(section)(value, section)
        except Misshapen as error:
            raise ValueError(f"a report cannot hold this: {error}") from None

    def _write(self, *, durable: bool = False) -> None:
        if self.path is None:
            return
        members = [f'"{name}": {text}' for name, text in self._texts.items()]
        # A row a line, so that two committed reports differ line by line.
        for name in LISTS:
            rows = self._rows.get(name)
            body = "\n  " + ",\n  ".join(rows) + "\n " if rows else ""
            members.append(f'"{name}": [{body}]')
        text = "{" + ",\n ".join(members) + "}\n"
        replace(self.path, text, durable=durable, draft=not durable)


def replace(path: Path, text: str, *, durable: bool = False, draft: bool = False) -> None:
    """Put the text at the path at once: a reader finds the old file or the new one, whole.

    Args:
        path: the file; missing folders are made.
        text: what it holds afterwards.
        durable: wait until it would outlast the machine's power.
        draft: more will follow; a pipe or a device, which keeps all it gets, waits for the last.

    Raises:
        UsageError: it cannot be written.
    """
    part: Path | None = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # A pipe or a device is written to, never replaced by a file, and goes by the name given:
            # what /dev/stdout resolves to has no name of its own.
            if not draft:
                sys.stdout.flush()
                path.write_text(text, encoding="utf-8")
            return
        path = path.resolve()
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except (OSError, ValueError, RuntimeError) as error:
        # Some paths are no file's name, and before Python 3.13 a loop of links is a RuntimeError.
        if part is not None:
            with suppress(OSError):
                part.unlink()
        told = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"{path}: cannot be written ({told}); give a path that can") from None


def read(path: str | os.PathLike[str]) -> Report:
    """The report in a file, checked against the schema, older versions brought up to this one.

    Absent sections come back empty, so that every name of the schema can be indexed.

    Raises:
        UsageError: no such file, too large, not JSON, not a report, of a newer schema, or
            misshapen; one line that says which and how to mend it.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if file.is_dir():
            raise UsageError(f"{file}: is a folder; give one report of it")
        if size > LARGEST:
            raise UsageError(
                f"{file}: {size / 2**20:.0f} MiB, more than the {LARGEST // 2**20} MiB a report may "
                "have; give the JSON file that --json wrote"
            )
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise UsageError(f"{file}: cannot be read ({told}); check the path") from None
    return parse(data, name=str(file))


def parse(data: bytes, *, name: str) -> Report:
    """The report in these bytes, as `read` reads it; `name` is what messages call it."""
    if not data.strip():
        raise UsageError(f"{name}: empty; run again with --json to write a report")
    try:
        report = loads(data)
    except (ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise UsageError(
            f"{name}: not JSON as a report has it ({told}); write it again with --json"
        ) from None
    if not isinstance(report, dict) or "schema_version" not in report:
        raise UsageError(
            f"{name}: JSON, but not a report: no schema_version; give a file that --json wrote"
        )
    version = report["schema_version"]
    if version.__class__ is not int or version < 1:
        raise UsageError(f"{name}: schema_version is no number from 1 on; give a file of --json")
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{name}: written under schema {version}, and this lora-harness reads up to "
            f"{SCHEMA_VERSION}; upgrade lora-harness"
        )
    while version < SCHEMA_VERSION:
        report = _UPGRADES[version](report)
        version = report["schema_version"]
    try:
        _check()(report, "report")
    except Misshapen as error:
        raise UsageError(f"{name}: {error}; write it again with --json") from None
    return _completed(report)


def _completed(report: Report) -> Report:
    for section in LISTS:
        report.setdefault(section, [])
    for member in ("environment", "artefacts"):
        report.setdefault(member, {})
    for member in schema()["properties"]:
        report.setdefault(member, None)
    return report


def number(value: object) -> float | None:
    """A report's number as a float, its NaN and infinities too; None where there is none."""
    if value is None:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
