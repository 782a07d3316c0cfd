"""The same run under other library versions.

    lora-harness matrix --leg peft==0.8.1 --leg peft==0.8.2 -- check peft

Each leg is a virtual environment laid over this one: it sees every package installed here and installs
only what the leg names, with what that needs. So a leg costs seconds and megabytes, and differs from
this environment in nothing else. Environments are kept and used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import site
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.console import table, wrapped
from harness.errors import UsageError, first_line
from harness.report.rows import SECTIONS, cost_row, rows_by_identity, told
from harness.report.terminal import SCREENFUL
from harness.telling import MARKS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

RUNS = ("check", "bench", "finetune", "plan")
"""The commands that write a report and can be run in a leg."""

COMPLETE = "complete"
"""The file that says that an environment was made to the end, and what clashes in it."""

_BETWEEN = re.compile(r",(?!\s*[<>=!~])(?![^\[\]]*\])")
_CLASH = re.compile(r" requires .*, but you have ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """One run under one set of versions.

    Attributes:
        requirements: what pip was given, such as `peft==0.8.1`; empty is this environment itself.
        exit_code: of the command; 2 where the environment could not be made.
        report: what it wrote; empty where it wrote nothing.
        said: the last line on its standard error.
        clashes: what installed packages require and this leg does not give them, in pip's words.
    """

    requirements: tuple[str, ...]
    exit_code: int
    report: dict[str, Any] = field(default_factory=dict)
    said: str = ""
    clashes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The leg as a column's head."""
        return " ".join(self.requirements) or "here"

    def as_dict(self) -> dict[str, Any]:
        """The leg as a report holds it."""
        return {
            "requirements": self.requirements,
            "exit_code": self.exit_code,
            "clashes": self.clashes,
            "report": self.report,
        }


def command(args: argparse.Namespace) -> int:
    """`lora-harness matrix`: run in each leg, show what differs, return the worst exit code."""
    run = list(args.run)
    if run[:1] == ["--"]:
        run = run[1:]
    if not run or run[0] not in RUNS:
        raise UsageError(f"after -- comes the command to run in each leg, one of {', '.join(RUNS)}")
    if any(len(word) > 2 and "--json".startswith(word.partition("=")[0]) for word in run):
        raise UsageError(
            "--json after -- would be one file for all legs; give it before --, and it holds each"
        )
    wanted = [_requirements(leg) for leg in args.leg]
    if len(wanted) < 2:
        raise UsageError("give at least two legs, such as --leg here --leg peft==0.8.2")
    folder = args.environments or kept()
    _require_folder(folder)
    from harness.report.schema import Recorder

    legs: list[Leg] = []
    with Recorder(args.json, kind="matrix", run=run, legs=[]) as report:
        for requirements in wanted:
            leg = run_leg(() if requirements == ("here",) else requirements, run, folder)
            print(
                f"{leg.name}: {leg.report.get('verdict') or leg.said or f'exit {leg.exit_code}'}",
                flush=True,
            )
            for clash in leg.clashes:
                print(f"  {clash}: add one to the leg that goes with the rest", flush=True)
            legs.append(leg)
            report.set("legs", [leg.as_dict() for leg in legs])
    _show(legs)
    return max((leg.exit_code for leg in legs), key=[0, 3, 1, 2].index)


def _show(legs: Sequence[Leg]) -> None:
    """What differs: specs, with what fails, and counted costs; and what was looked at and does not."""
    heads = [leg.name for leg in legs]
    specs, costs = differences(legs), costs_apart(legs)
    if specs:
        print(f"\n{table(specs, ['differs', *heads])}")
        for leg in legs:
            if found := failures(leg, [row[0] for row in specs]):
                print("\n".join(["", leg.name, *found]))
    if costs:
        print(f"\n{table(costs[:SCREENFUL], ['costs', 'where', *heads])}")
        if len(costs) > SCREENFUL:
            print(f"… and {len(costs) - SCREENFUL:,} more; --json has them all")
    if not all(leg.report for leg in legs):
        return
    sections = {name for leg in legs for name, held in leg.report.items() if held}
    if "results" in sections and not specs:
        print("\nno spec differs between the legs")
    if sections & {"counters", "memory"} and not costs:
        print("\nno counted cost differs between the legs")
    if not sections & {"results", "counters", "memory"}:
        print("\nno leg judged a spec or counted a cost")


def _requirements(leg: str) -> tuple[str, ...]:
    """The requirements of one `--leg`; a comma in a range of versions or among extras parts nothing."""
    try:
        words = tuple(shlex.split(_BETWEEN.sub(" ", leg)))
    except ValueError as error:
        said = str(error).lower()
    else:
        if words:
            return words
        said = "is empty"
    raise UsageError(
        f"--leg {leg!r}: {said}; give it as --leg 'peft==0.13.2,transformers==4.46.1', or --leg here"
    )


def _require_folder(folder: Path) -> None:
    """Raise UsageError where no environment can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"--environments {folder}: cannot hold environments ({error.strerror}); give a folder "
            "that can be written"
        ) from None


def kept() -> Path:
    """Where the legs' environments are kept when nobody says: in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lora-harness" / "legs"


def run_leg(requirements: Sequence[str], run: Sequence[str], folder: Path) -> Leg:
    """Run one command under one set of versions."""
    try:
        python = environment(requirements, folder)
    except UsageError as error:
        return Leg(requirements=tuple(requirements), exit_code=2, said=str(error))
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as scratch:
        path = Path(scratch) / "report.json"
        done = subprocess.run(
            [str(python), "-m", "harness.cli", *run, "--json", str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = (done.stderr.strip().splitlines() or [""])[-1]
    return Leg(
        requirements=tuple(requirements),
        exit_code=_known_code(done.returncode),
        report=report,
        said=said,
        clashes=clashes(python) if requirements else (),
    )


def environment(requirements: Sequence[str], folder: Path) -> Path:
    """The interpreter of the environment of these requirements, made if it is not there yet.

    Raises UsageError where it cannot be made, and where pip cannot install them, with pip's last words.
    """
    if not requirements:
        return Path(sys.executable)
    key = hashlib.sha256("\n".join([sys.prefix, sys.version, *sorted(requirements)]).encode())
    home = folder / key.hexdigest()[:16]
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (home / COMPLETE).is_file():
        return python
    try:
        venv.create(home, with_pip=True, clear=True)
        asked = [str(python), "-c", "import site; print(site.getsitepackages()[0])"]
        packages = Path(
            subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        )
        # `addsitedir` appends: what the leg installs comes before what is installed here.
        below = "; ".join(f"site.addsitedir({path!r})" for path in site.getsitepackages())
        (packages / "underneath.pth").write_text(f"import site; {below}\n", encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"{' '.join(requirements)}: no environment can be made in {folder} ({first_line(error)}); "
            "give another --environments"
        ) from None
    done = subprocess.run(
        [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *requirements,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        told = said[0].removeprefix("ERROR: ") if said else f"pip exited with {done.returncode}"
        raise UsageError(f"{' '.join(requirements)}: cannot be installed: {told}")
    said = [line for line in done.stderr.splitlines() if _CLASH.search(line)]
    (home / COMPLETE).write_text("\n".join(said), encoding="utf-8")
    return python


def clashes(python: Path) -> tuple[str, ...]:
    """What pip found unmet once a leg was installed: `datasets 5.2.0 requires ..., but you have ...`."""
    said = (python.parent.parent / COMPLETE).read_text(encoding="utf-8")
    return tuple(line.removesuffix(" which is incompatible.") for line in said.splitlines())


def differences(legs: Sequence[Leg]) -> list[tuple[str, ...]]:
    """The specs whose outcome is not the same in every leg, a mark a leg."""
    outcomes = [{r["spec"]: r["outcome"] for r in leg.report.get("results", [])} for leg in legs]
    ids = dict.fromkeys(id_ for outcome in outcomes for id_ in outcome)
    return [
        (id_, *(f"{MARKS[o[id_]]} {o[id_]}" if id_ in o else "–" for o in outcomes))
        for id_ in ids
        if len({o.get(id_) for o in outcomes}) > 1
    ]


def costs_apart(legs: Sequence[Leg]) -> list[tuple[str, ...]]:
    """The counted costs that are not the same in every leg that has a report, a value a leg."""
    found = []
    for section in ("counters", "memory"):
        name = SECTIONS[section]
        held = [rows_by_identity(leg.report.get(section, [])) for leg in legs]
        for key in dict.fromkeys(key for one in held for key in one):
            ours = [one.get(key) for one in held]
            first = next(one for one in ours if one)
            rows = [cost_row(name, first, one) for one in ours]
            moved = [row.verdict not in {"same", None} for row in rows]
            if any(one and leg.report for one, leg in zip(moved, legs, strict=True)):
                found.append((rows[0].name, rows[0].where, *(told(row, row.new) for row in rows)))
    return found


def failures(leg: Leg, ids: Sequence[str]) -> list[str]:
    """The first failure of each of these specs in a leg, a paragraph each."""
    return [
        wrapped(
            f"✗ {r['spec']}: expected {first['expected']}; actual {first['actual']}"
            + (f", at {first['where']}" if first.get("where") else ""),
            initial_indent="  ",
            subsequent_indent="    ",
        )
        for r in leg.report.get("results", [])
        if r["spec"] in ids and r["outcome"] == "failed"
        for first in r["failures"][:1]
    ]


def _known_code(code: int) -> int:
    """The exit code, a death by signal told as wrong."""
    return code if code in {0, 1, 2, 3} else 1
