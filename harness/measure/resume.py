"""What of an earlier bench report a new run may keep: its cells, where nothing has changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.measure.cell import BASE, Cell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECTIONS = ("timings", "memory", "counters")

Identity = tuple[Any, ...]


def earlier(path: Path | None) -> dict[str, Any] | None:
    """The report to go on with; None where there is none yet.

    Raises UsageError without a path, and on what is no report of a bench.
    """
    from harness.report.schema import read

    if path is None:
        raise UsageError("--resume: needs the report to go on with; give it as --json PATH")
    if not Path(path).exists():
        return None
    before = read(path)
    if before["kind"] != "bench":
        raise UsageError(f"--resume {path}: is a report of {before['kind']}, not of bench")
    return before


def identity(cell: Cell) -> Identity:
    """What one cell is told from another by."""
    return cell.adapter, cell.model, _spelt(cell.conditions)


def row_identity(row: Mapping[str, Any]) -> Identity:
    """The identity of the cell that a row is of."""
    return row["subject"], row.get("model"), _spelt(row.get("conditions"))


def require_asked_for(before: Mapping[str, Any], wanted: Sequence[Cell], path: Path) -> None:
    """Raise UsageError where the report holds cells beside those wanted, which a new one would not."""
    ours = {identity(cell) for cell in wanted}
    beside = {row_identity(row): row for section in SECTIONS for row in before[section]}
    if others := [row for known, row in beside.items() if known not in ours]:
        r = (others[0].get("conditions") or {}).get("r")
        cells, them = ("1 cell", "it") if len(others) == 1 else (f"{len(others)} cells", "them")
        raise UsageError(
            f"--resume {path}: holds {cells} that this grid does not ask for and would lose, first "
            f"{others[0]['subject']}{f' r {r}' if r else ''}; ask for {them} too, or give another --json"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is no longer as in an earlier report's environment: nothing it measured can be kept."""
    old, new = _facts(before), _facts(json.loads(json.dumps(now)))
    return [name for name, fact in new.items() if old.get(name) != fact]


def kept(
    before: Mapping[str, Any], wanted: Sequence[Cell], versions: Mapping[str, str | None]
) -> dict[Identity, dict[str, list[dict[str, Any]]]]:
    """The rows by section of each wanted cell that is there whole, under the version of today.

    One that died has no time, and is run again.
    """
    rows: dict[Identity, dict[str, list[dict[str, Any]]]] = {}
    for section in SECTIONS:
        for row in before[section]:
            own = rows.setdefault(row_identity(row), {name: [] for name in SECTIONS})
            own[section].append(row)
    found = {}
    for cell in wanted:
        own = rows.get(identity(cell), {})
        if own and _whole(cell, own) and _of_version(own, versions.get(cell.adapter)):
            found[identity(cell)] = own
    return found


def _whole(cell: Cell, rows: Mapping[str, list[dict[str, Any]]]) -> bool:
    """Whether all that a table shows of the cell is there, as numbers, and its Python calls.

    The latter came with the counters of injection, save, load and merge: a cell without is run again.
    """
    values = {
        (row.get("phase"), row["metric"]): row["value"]
        for section in SECTIONS
        for row in rows[section]
        if row.get("kind") is None
    }
    phase = "evaluation-forward" if cell.adapter == BASE else "training-step"
    wanted = (
        *("seconds", "tokens_per_second", "share_of_limit", "peak_bytes", "operations"),
        "python_calls",
    )
    return all(isinstance(values.get((phase, name)), int | float) for name in wanted) and all(
        row.get("phase") for section in SECTIONS for row in rows[section]
    )


def _of_version(rows: Mapping[str, list[dict[str, Any]]], version: str | None) -> bool:
    return all(row.get("version") == version for section in SECTIONS for row in rows[section])


def _facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What a counter, a peak or a time may hang on; not what changes by the minute."""
    machine = environment.get("machine") or {}
    libraries = environment.get("libraries") or {}
    return {
        "the machine": {k: v for k, v in machine.items() if k != "load"},
        "the GPU": [
            {name: gpu.get(name) for name in ("name", "driver", "memory", "power_limit")}
            for gpu in environment.get("gpus") or []
        ],
        "Python": environment.get("python"),
        "CUDA": [environment.get("cuda"), environment.get("cudnn")],
        "the libraries": libraries,
        "the harness": environment.get("harness"),
        "the threads": environment.get("threads"),
    }


def _spelt(conditions: object) -> str:
    return json.dumps(conditions, sort_keys=True)
