"""A folder of reports as a history: which files it has, and which of them belong together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.report.schema import read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from harness.report.schema import Report


def gather(paths: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """The report files that the arguments name, and which of them came from folders.

    A folder stands for the `*.json` files in it, in order of time.

    Raises:
        UsageError: a folder holds none.
    """
    found: list[Path] = []
    stored: list[Path] = []
    for argument in paths:
        path = Path(argument)
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("*.json"), key=lambda file: (_moment(file), file.name))
        if not inside:
            raise UsageError(f"{path}: no *.json in this folder; give one where reports are kept")
        found += inside
        stored += inside
    return found, stored


def spare(paths: Iterable[str], **outputs: Path | str | None) -> None:
    """Raise UsageError where what is to be written would take the place of a report that is read."""
    files = gather(paths)[0]
    for option, output in outputs.items():
        if output and any(_same(output, path) for path in files):
            raise UsageError(
                f"--{option} {output}: is a report that is read here, and would be lost; give another path"
            )


def _same(one: Path | str, other: Path) -> bool:
    """Whether both are there and are one file."""
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):  # not there, a link to itself, or no path at all
        return False


def load(paths: Iterable[str], skipped: list[str]) -> Iterator[Report]:
    """Every report that the arguments name, one at a time.

    A folder's broken file, or second copy of a run, is named in `skipped` and passed over; given by
    name, it raises `UsageError`. A comparison's own report is no run: a folder may hold some.
    """
    files, stored = gather(paths)
    quiet = set(stored)
    seen: dict[str, Path] = {}
    for path in files:
        try:
            report = read(path)
        except UsageError as error:
            if path not in quiet:
                raise
            skipped.append(str(error))
            continue
        if report["kind"] == "compare" and path in quiet:
            continue
        problem = _problem(report, seen)
        if problem and path not in quiet:
            raise UsageError(f"{path}: {problem}")
        if problem:
            skipped.append(f"{path}: {problem}")
            continue
        seen[report["id"]] = path
        yield report


def _problem(report: Report, seen: Mapping[str, Path]) -> str:
    if report["kind"] == "compare":
        return "is a comparison; give the reports that it compared"
    if report["id"] in seen:
        return f"the same run as {seen[report['id']]}; give two different runs"
    return ""


def _moment(path: Path) -> str:
    """When the report says that it started, off its first lines: order must not cost a whole read."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return ""
    found = re.search(rb'"started"\s*:\s*"([^"]{1,40})"', head)
    return found[1].decode("ascii", "replace") if found else ""


def group(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes a report one of a series: kind, adapter and model, and what of its specs was asked."""
    return (
        report["kind"],
        (report.get("adapter") or {}).get("name") or "",
        *(report.get(name) or "" for name in ("model", "tier", "device", "dtype")),
    )
