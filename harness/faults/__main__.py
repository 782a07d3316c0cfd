"""`python -m harness.faults`: the kill matrix, as JSON and readable Markdown; exit 1 where it is red."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.faults.matrix import MARGIN, NARROW, Matrix, judge_part, run
from harness.spec import SPEC_VERSION


def main() -> int:
    """Make the matrix, write it, say what is red."""
    parser = argparse.ArgumentParser(prog="python -m harness.faults", description=__doc__)
    parser.add_argument(
        "--correct",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="a correct implementation, repeatable (default: reference)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="FAULT", help="this fault only, repeatable"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write kill-matrix.json and kill-matrix.md there"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="judge also what a fault cannot change (twice the time)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        judge_part(args.part, args.correct, args.only, whole=args.whole)
        return 0
    matrix = run(args.correct or ["reference"], only=args.only, jobs=args.jobs, whole=args.whole)
    problems = matrix.problems() if not args.only else []
    if args.output:
        write(matrix, problems, args.output)
    for row in matrix.faults if args.only else []:
        print(
            f"{row.name}: {', '.join(f'{id_} ({row.failures[id_]})' for id_ in sorted(row.killers)) or 'survives'}"
        )
    for problem in problems:
        print(f"red: {problem}")
    killed = sum(bool(row.killers) for row in matrix.faults)
    print(
        f"{killed} of {len(matrix.faults)} faults killed, {len(matrix.correct)} correct implementations, {len(problems)} problems, {matrix.seconds} s"
    )
    return 1 if problems else 0


def write(matrix: Matrix, problems: list[str], folder: Path) -> None:
    """`kill-matrix.json`, a row to a line, and `kill-matrix.md`."""
    head = {"spec_version": SPEC_VERSION, "problems": problems, "margins": matrix.margins()}
    lines = [
        f" {json.dumps(key)}: {_lines(value)}" for key, value in (head | matrix.as_dict()).items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kill-matrix.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    (folder / "kill-matrix.md").write_text(markdown(matrix, problems), encoding="utf-8")


def _lines(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"


def markdown(matrix: Matrix, problems: list[str]) -> str:
    """The matrix for a reader: a line a fault, a line a spec, the margins."""
    lines: list[str] = [
        "# Kill matrix",
        "",
        (
            f"{len(matrix.faults)} planted faults judged by every spec of the core tier; spec version "
            f"{SPEC_VERSION}; {len(matrix.correct)} correct implementations: "
            f"{', '.join(row.name for row in matrix.correct)}."
        ),
        "Made by `python -m harness.faults --output reports`. A spec that runs nothing of what a fault",
        "replaces has the reference's own outcome; with `--whole` it is judged all the same.",
        "",
        *(
            [*(f"- red: {p}" for p in problems), ""]
            if problems
            else [
                "Green: every fault is killed by the spec named for it, every spec has a fault of its own.",
                "",
            ]
        ),
        "## Faults",
        "",
        "| fault | replays | named for | also killed by |",
        "|---|---|---|---|",
    ]
    for row in matrix.faults:
        also = ", ".join(sorted(row.killers - {row.killed_by}))
        rows = ", ".join(f"#{n}" for n in row.replays)
        lines.append(f"| `{row.name}` | {rows} | {row.killed_by} | {also} |")
    lines += [
        "",
        "## Margins",
        "",
        "In units of the allowed error: correct implementations lie below 1, faults above.",
        f"A margin under {MARGIN:g} on either side is marked.",
        "",
        "| spec | dtype | largest correct | smallest fault | |",
        "|---|---|---|---|---|",
    ]
    for m in matrix.margins():
        fault = "" if m["fault"] is None else f"{m['fault']:.3g}"
        narrow = m["correct"] * MARGIN > 1 or (m["fault"] is not None and m["fault"] < MARGIN)
        why = NARROW.get(m["spec"], "narrow") if narrow else ""
        lines.append(f"| {m['spec']} | {m['dtype']} | {m['correct']:.2g} | {fault} | {why} |")
    wishes = [(row.name, id_) for row in matrix.correct for id_ in sorted(row.killers)]
    if wishes:
        lines += ["", "## Wishes", "", "What correct implementations do and need not (SHOULD):", ""]
        lines += [f"- {name}: {id_}" for name, id_ in wishes]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
