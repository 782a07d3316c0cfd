"""`lora-harness bench`: throughput, memory and counters over a grid, or one pair in alternation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.console import table
from harness.errors import UsageError
from harness.measure import cell as cells
from harness.measure import claims, paired, process, resume
from harness.measure.memory import format_bytes, parse_bytes, require_room

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from harness.measure.cell import Cell, Rows

ON_A_GPU_ONLY = "--budget: is enforced on a GPU only; on the CPU a cell takes what it takes"


def command(args: argparse.Namespace) -> int:
    """`lora-harness bench`; 0 where every cell ran or was not claimed, 1 where one failed."""
    _require_numbers(args)
    _require_device(args.device)
    _require_library(args.dtype)
    return _pair(args) if args.aa or args.against else _grid(args)


# ---- what is asked -------------------------------------------------------------------------------


def _require_numbers(args: argparse.Namespace) -> None:
    for option in ("threads", "repeats"):
        number = getattr(args, option)
        if number < 1:
            raise UsageError(f"--{option}: {number}; give a whole number from 1 on")
    for option in ("limit", "seconds"):
        seconds = getattr(args, option)
        if not 0 < seconds < math.inf:
            raise UsageError(f"--{option}: {seconds:g} s; give a time above zero, such as 60")


def _require_device(device: str) -> None:
    kind, colon, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (colon and not index.isdecimal())):
        raise UsageError(f"--device {device}: a bench knows cpu and cuda; give one of them")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}: there is no GPU here; use --device cpu")
        if index and int(index) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: there are {torch.cuda.device_count()} GPUs here, from cuda:0 on"
            )


def _require_library(dtypes: Sequence[str]) -> None:
    from importlib.util import find_spec

    if "nf4" in dtypes and find_spec("bitsandbytes") is None:
        raise UsageError(
            "--dtype nf4: bitsandbytes is not installed; pip install '.[quantized]', or give another"
        )


def _require_models(names: Sequence[str]) -> None:
    from harness import phi3

    for name in names:
        if name not in phi3.NAMES:
            phi3.source(name)


def _lacking(cell: Cell) -> str:
    """Why full fine-tuning is not even begun; empty where it may be, and for any other cell."""
    if cell.adapter == cells.FULL:
        try:  # the weights, their gradients, two moments of each
            require_room(cell.model, cell.dtype, cell.device, times=4)
        except UsageError as error:
            return f"{process.OUT_OF_MEMORY}: {error}"
    return ""


# ---- the grid ------------------------------------------------------------------------------------


OF_A_PAIR: dict[str, Any] = {
    "python": None,
    "against_python": None,
    "seconds": 45.0,
    "margin": 0.02,
}
"""What the command line gives where nobody asks: a grid would drop the rest in silence."""


def _grid(args: argparse.Namespace) -> int:
    from harness.environment import collect
    from harness.report.schema import Recorder

    for option, default in OF_A_PAIR.items():
        if getattr(args, option) != default:
            told = option.replace("_", "-")
            raise UsageError(
                f"--{told}: is of a pair, not of the grid; add --against ADAPTER, or --aa"
            )
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
    before = resume.earlier(args.json) if args.resume else None
    if before:
        resume.require_asked_for(before, wanted, args.json)
    _require_models(args.model)
    for where in dict.fromkeys((cell.model, cell.dtype, cell.device) for cell in wanted):
        require_room(*where)
    versions = process.versions(args.adapter, args.device)
    process.warm(args.adapter)
    environment = collect()
    changed = resume.changes(before["environment"], environment) if before else []
    old = resume.kept(before, wanted, versions) if before and not changed else {}
    left = [cell for cell in wanted if resume.identity(cell) not in old]
    head: dict[str, Any] = {
        section: [row for rows in old.values() for row in rows[section]]
        for section in resume.SECTIONS
    }
    head |= {
        "model": args.model[0] if len({*args.model}) == 1 else None,
        "budget": wanted[0].budget,
    }
    failed = 0
    with Recorder(args.json, kind="bench", environment=environment, **head) as report:
        if changed:
            print(f"every cell is run again: {', '.join(changed)} changed since the report")
        elif before:
            print(f"{len(wanted) - len(left)} of {len(wanted)} cells are there already")
        if wanted[0].budget is not None and args.device == "cpu":
            report.add("notes", ON_A_GPU_ONLY)
            print(ON_A_GPU_ONLY)
        for cell in _with_progress(left):
            lacking = _lacking(cell)
            rows, why = (None, lacking) if lacking else process.in_process(cell, limit=args.limit)
            if rows is None:
                failed += not _excused(cell, why)
                report.add("timings", _lost(cell, why))
                report.add("notes", f"{cell}: {why}")
            else:
                for section, found in rows.items():
                    report.add(section, found)
            _say(f"{cell}: {why or _told(rows)}")
        _show(report.report)
    if failed:
        return 1
    return 0 if any(row["value"] is not None for row in report.report["timings"]) else 3


def _excused(cell: Cell, why: str) -> bool:
    """Whether a cell without figures is no failure.

    It is not claimed; or it is a row without LoRA that the card or the machine is too small for,
    which is what LoRA is for.
    """
    without = cell.adapter in {cells.BASE, cells.FULL}
    # SIGKILL is how Linux ends a process that it has no memory for.
    too_small = (process.OUT_OF_MEMORY, "killed by SIGKILL")
    return why.startswith("not claimed") or (without and why.startswith(too_small))


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
                resume.row_identity(row), {"timings": [], "memory": [], "counters": []}
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
    if told := claims.tell(report):
        print(f"\n{told}")


# ---- a pair --------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "adapter": ["reference", "peft", "loralib"],
    "checkpointing": ["off"],
    "repeats": 10,
    "resume": False,
    "budget": None,
    "limit": 600.0,
}
"""What the command line gives where nobody asks: a pair runs the first adapter and needs no other."""

DECISION = {"better": 0, "same": 0, "worse": 1, "inconclusive": 3}


def _pair(args: argparse.Namespace) -> int:
    from harness.report.schema import Recorder

    if args.aa and args.against:
        raise UsageError("--aa: runs one side against itself; leave out --against")
    _require_one_point(args)
    _require_models(args.model)
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
    require_room(first.model, first.dtype, first.device, times=2)  # one for each side
    with Recorder(args.json, kind="bench", model=first.model) as report:
        answer = paired.compare(first, second, seconds=args.seconds, margin=args.margin)
        report.add("timings", paired.rows(answer, first, second))
        if answer.note:
            report.add("notes", answer.note)
    name = "itself" if args.aa and first == second else answer.facts[0].told(first)
    print(
        f"{answer.facts[1].told(second)} against {name}, {first.phase} of {first.model}: {answer}"
    )
    return DECISION[answer.verdict]


def _require_one_point(args: argparse.Namespace) -> None:
    """Raise UsageError on what a pair would have to drop in silence."""
    asked = "--aa" if args.aa else "--against"
    for axis in ("adapter", "rank", "dtype", "model", "batch", "sequence"):
        values = getattr(args, axis)
        if not values:
            raise UsageError(f"--{axis}: is empty; give {asked} one value")
        if len(values) > 1 and values != DEFAULTS.get(axis):
            given = ",".join(map(str, values))
            raise UsageError(f"--{axis} {given}: {asked} times one point; give one value")
    for option in ("checkpointing", "repeats", "resume", "budget", "limit"):
        if getattr(args, option) != DEFAULTS[option]:
            raise UsageError(f"--{option}: is of the grid, not of a pair; leave it out of {asked}")
    if args.dtype[0] == "nf4":
        raise UsageError(f"{asked}: a pair is timed on a dense base; give another --dtype")
