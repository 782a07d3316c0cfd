"""`lora-harness bench`: throughput, memory and counters over a grid, or one pair in alternation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.console import table
from harness.errors import UsageError
from harness.measure import cell as cells
from harness.measure import claims, paired
from harness.measure.memory import format_bytes, parse_bytes, require_memory

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from harness.measure.cell import Cell, Rows


def command(args: argparse.Namespace) -> int:
    """`lora-harness bench`; 0 where every cell ran or was not claimed, 1 where one failed."""
    return _pair(args) if args.aa or args.against else _grid(args)


# ---- the grid ------------------------------------------------------------------------------------


def _grid(args: argparse.Namespace) -> int:
    from harness.report.schema import Recorder

    wanted = cells.grid(
        adapter=args.adapter,
        rank=args.rank,
        dtype=args.dtype,
        model=args.model,
        batch=args.batch,
        sequence=args.sequence,
        checkpointing=[c == "on" for c in args.checkpointing],
        device=args.device,
        threads=args.threads,
        repeats=args.repeats,
        budget=parse_bytes(args.budget) if args.budget else None,
    )
    _require_device(args.device)
    _require_room(wanted)
    before = _resumed(args.json) if args.resume else None
    done = _done(before) if before else set()
    left = [cell for cell in wanted if _identity(cell) not in done]
    cells.warm(left)
    failed = 0
    head = {"model": wanted[0].model if len(args.model) == 1 else None, "budget": wanted[0].budget}
    with Recorder(args.json, kind="bench", **head) as report:
        if before:
            _carry_over(before, report, wanted)
            print(f"{len(wanted) - len(left)} of {len(wanted)} cells are there already")
        for cell in _with_progress(left):
            rows, why = cells.in_process(cell, limit=args.limit)
            if rows is None:
                failed += not why.startswith("not claimed")
                report.add("timings", _lost(cell, why))
                report.add("notes", f"{cell}: {why}")
            else:
                for section, found in rows.items():
                    report.add(section, found)
            _say(f"{cell}: {why or _told(rows)}")
        _show(report.report)
    return 1 if failed else 0


def _require_device(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}: there is no GPU here; use --device cpu")


def _require_room(wanted: Sequence[Cell]) -> None:
    """Raise UsageError where a model's weights alone are more than this machine has free."""
    from harness import phi3
    from harness.plan import weights

    for name in dict.fromkeys(cell.model for cell in wanted):
        if name in phi3.NAMES and not name.startswith("tiny"):
            of_it = [cell for cell in wanted if cell.model == name and cell.device == "cpu"]
            for dtype in dict.fromkeys(cell.dtype for cell in of_it):
                # A 4-bit base is made from the whole one.
                size = weights(name, "bfloat16" if dtype == "nf4" else dtype, "none")
                require_memory(size, subject=f"--model {name} in {dtype}")


def _resumed(path: Path | None) -> dict[str, Any] | None:
    from harness.report.schema import read

    if path is None:
        raise UsageError("--resume: needs the report to go on with; give it as --json PATH")
    if not Path(path).exists():
        return None
    before = read(path)
    if before["kind"] != "bench":
        raise UsageError(f"--resume {path}: is a report of {before['kind']}, not of bench")
    return before


def _identity(cell: Cell) -> tuple[Any, ...]:
    return cell.adapter, cell.model, tuple(sorted(cell.conditions.items()))


def _row_identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["subject"], row["model"], tuple(sorted(row["conditions"].items()))


def _done(before: dict[str, Any]) -> set[tuple[Any, ...]]:
    """The cells that have a time; one that died has none, and is run again."""
    return {_row_identity(row) for row in before["timings"] if row["value"] is not None}


def _carry_over(before: dict[str, Any], report: Any, wanted: Sequence[Cell]) -> None:
    asked, done = {_identity(cell) for cell in wanted}, _done(before)
    for section in ("timings", "memory", "counters"):
        kept = [row for row in before[section] if _row_identity(row) in asked & done]
        if kept:
            report.add(section, kept)


def _with_progress(left: Sequence[Cell]) -> Any:
    import sys

    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would not survive the fork of a cell
    return tqdm(left, unit="cell", leave=False, disable=not sys.stderr.isatty())


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)


def _lost(cell: Cell, why: str) -> dict[str, Any]:
    return {
        "subject": cell.adapter,
        "model": cell.model,
        "phase": "training-step",
        "conditions": cell.conditions,
        "metric": "seconds",
        "value": None,
        "unit": "s",
        "why": why,
    }


def _value(rows: Rows | dict[str, Any], section: str, phase: str, metric: str) -> Any:
    return next(
        (
            row["value"]
            for row in rows[section]
            if row["phase"] == phase and row["metric"] == metric and "kind" not in row
        ),
        None,
    )


def _told(rows: Rows | None) -> str:
    assert rows is not None
    phase = "training-step"
    if _value(rows, "timings", phase, "seconds") is None:
        phase = "evaluation-forward"
    seconds = _value(rows, "timings", phase, "seconds")
    peak = _value(rows, "memory", phase, "peak_bytes")
    return f"{phase} {1e3 * seconds:.1f} ms, peak {format_bytes(peak)}"


def _show(report: dict[str, Any]) -> None:
    """The cells as a table, then the paper's claims."""
    by_cell: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for section in ("timings", "memory", "counters"):
        for row in report[section]:
            found = by_cell.setdefault(
                _row_identity(row), {"timings": [], "memory": [], "counters": []}
            )
            found[section].append(row)
    lines = []
    for rows in by_cell.values():
        first = rows["timings"][0]
        c = first["conditions"]
        phase = "evaluation-forward" if first["subject"] == cells.BASE else "training-step"
        seconds = _value(rows, "timings", phase, "seconds")
        lines.append(
            [
                first["subject"],
                c["r"] or "–",
                c["dtype"],
                first["model"],
                f"{c['batch']}×{c['sequence']}",
                "on" if c["checkpointing"] else "off",
                phase,
                *(
                    [first.get("why", ""), "–", "–", "–", "–"]
                    if seconds is None
                    else [
                        f"{1e3 * seconds:.1f}",
                        f"{_value(rows, 'timings', phase, 'tokens_per_second'):.0f}",
                        f"{_value(rows, 'timings', phase, 'share_of_limit'):.0f} %",
                        format_bytes(_value(rows, "memory", phase, "peak_bytes")),
                        _value(rows, "counters", phase, "operations"),
                    ]
                ),
            ]
        )
    headers = ["", "r", "dtype", "model", "batch", "checkpointing", "phase", "ms", "tokens/s"]
    print("\n" + table(lines, [*headers, "of limit", "peak", "operations"]))
    told = claims.table(report)
    if told:
        print("\nThe LoRA paper's claims, as published and as measured here:\n")
        print(table(told, ["claim", "as published", "measured", "conditions"]))


# ---- a pair --------------------------------------------------------------------------------------

DECISION = {"better": 0, "same": 0, "worse": 1, "inconclusive": 3}


def _pair(args: argparse.Namespace) -> int:
    from harness import registry
    from harness.report.schema import Recorder

    axes = ("adapter", "rank", "dtype", "model", "batch", "sequence")
    for axis in axes:
        if len(getattr(args, axis)) != 1 and axis != "adapter":
            setattr(args, axis, getattr(args, axis)[:1])
    if args.aa and args.against:
        raise UsageError("--aa: runs one side against itself; leave out --against")
    if args.dtype[0] == "nf4":
        raise UsageError("--against: a pair is timed on a dense base; give another --dtype")
    first = paired.Side(
        adapter=args.adapter[0],
        model=args.model[0],
        r=args.rank[0],
        dtype=args.dtype[0],
        batch=args.batch[0],
        sequence=args.sequence[0],
        device=args.device,
        threads=args.threads,
        **({"python": args.python} if args.python else {}),
    )
    second = replace(
        first,
        adapter=args.against or first.adapter,
        python=args.against_python or first.python,
    )
    versions = [registry.resolve(side.adapter).version for side in (first, second)]
    with Recorder(args.json, kind="bench", model=first.model) as report:
        answer = paired.compare(first, second, seconds=args.seconds, margin=args.margin)
        report.add("timings", paired.rows(answer, first, second, versions))
        if answer.note:
            report.add("notes", answer.note)
    name = "itself" if args.aa else f"{first.adapter}"
    print(f"{second.adapter} against {name}, {first.phase} of {first.model}: {answer}")
    return DECISION[answer.verdict]
