"""Where one run lies: its report, and beside it a folder with everything it made.

reports/runs/20261121T020304Z-peft-tiny.json      the report
reports/runs/20261121T020304Z-peft-tiny/
    run.json               what was asked: recipe, implementation, versions
    log.jsonl              one line for every time the trainer logged
    library.log            what the libraries said meanwhile
    adapter.safetensors    the adapter, in both forms
    adapter.pt
    checkpoints/           checkpoint-<step>/, adapters with optimizer and random state

Under `--output DIR` the report is `DIR/peft-tiny.json`, the folder `DIR/peft-tiny/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.report.schema import Recorder, read
from harness.settings import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT = Path("reports/runs")
ROOM = 64 * 2**20
"""Bytes that must be free before a run starts: less would not hold one checkpoint and its log."""

WRITTEN = (
    "run.json",
    "log.jsonl",
    "library.log",
    "adapter.safetensors",
    "adapter.pt",
    "reload-request.json",
    "reload.json",
    "probe.safetensors",
)
"""What a run writes into its folder, beside its checkpoints."""

TRAINERS = r"checkpoint-\d+|runs|README\.md"
"""What a trainer writes beside its checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The paths of one run. `path` is the folder; the report lies beside it."""

    path: Path

    @property
    def report(self) -> Path:
        """The report, beside the folder."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def request(self) -> Path:
        """What was asked of the run."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """The trainer's log, a line of JSON for each entry."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step that was written whole; None where there is none."""
        found = [
            (int(match[1]), child)
            for child in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (match := re.fullmatch(r"checkpoint-(\d+)", child.name))
            and (child / "trainer_state.json").is_file()  # the trainer writes it last
        ]
        return max(found)[1] if found else None

    def asked(self) -> dict[str, Any]:
        """What the run was asked. Raises UsageError where that is missing or unreadable."""
        try:
            asked = json.loads(self.request.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"run folder {self.path}: holds no readable {self.request.name}; give the folder "
                "of a run"
            ) from error
        recipe = asked.get("recipe") if isinstance(asked, dict) else None
        if not isinstance(recipe, dict) or not all(
            isinstance(recipe.get(section), dict) for section in SECTIONS
        ):
            raise UsageError(
                f"run folder {self.path}: {self.request.name} is not a run's; give the folder of a run"
            )
        found: dict[str, Any] = asked
        return found

    def rewind(self, step: int) -> None:
        """Take out of the log what came after a step: it comes again."""
        kept = [one for one in self.entries() if one["step"] <= step]
        self.log.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")

    def entries(self) -> list[dict[str, Any]]:
        """The log's entries. Raises UsageError where it is missing or damaged."""
        try:
            lines = self.log.read_text("utf-8").splitlines()
            found = [json.loads(line) for line in lines]
            if any(not isinstance(one["step"], int) for one in found):
                raise ValueError  # noqa: TRY301  # told below, as its like
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"run folder {self.path}: {self.log.name} is missing or damaged; "
                "start afresh with --overwrite"
            ) from error
        return found


def place(
    adapter: str, model: str, *, output: Path | None, resume: bool, overwrite: bool
) -> RunFolder:
    """The folder for a run. Nothing is made yet.

    Without `output` a new folder is named by the time, and `resume` means the newest of the same
    implementation and model. Raises UsageError on a folder that already holds a run (without
    `resume` or `overwrite`), that cannot be written, that has nothing to resume, or on a full disk.
    """
    stem = f"{_word(adapter)}-{_word(model)}"
    if output is None and resume:
        found = sorted(DEFAULT.glob(f"*-{stem}/run.json")) if DEFAULT.is_dir() else []
        # The name alone may be another's: `*-peft-tiny` is also how `mine:peft` ends.
        runs = [one for one in found if _is_of(adapter, RunFolder(path=one.parent))]
        if not runs:
            raise UsageError(
                f"--resume: {DEFAULT} holds no run of {adapter} on {model}; run afresh"
            )
        folder = RunFolder(path=runs[-1].parent)
    elif output is None:
        folder = RunFolder(path=DEFAULT / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{stem}")
    else:
        folder = RunFolder(path=output / stem)
    try:
        _writable(folder.path)
        held = folder.path.exists() or folder.report.exists()
    except OSError as error:  # a name that no disk takes
        raise UsageError(
            f"output folder {str(folder.path)[:60]}…: {error.strerror}; give another --output"
        ) from error
    if resume and not folder.request.is_file():
        raise UsageError(f"--resume: {folder.path} holds no run; run without --resume")
    if held and not resume and not overwrite:
        raise UsageError(
            f"output folder {folder.path}: already holds a run; go on with --resume, "
            "or replace it with --overwrite"
        )
    return folder


def held(output: Path, *, adapter: str | None, model: str | None) -> RunFolder:
    """The run under `--output` of that implementation and model, where they are named.

    Raises UsageError where there is none, and where there are several.
    """
    try:
        runs = [RunFolder(path=one.parent) for one in sorted(output.glob("*/run.json"))]
    except OSError as error:  # a name that no disk takes
        raise UsageError(
            f"--output {str(output)[:60]}…: {error.strerror}; check the path"
        ) from error
    of = f" of {adapter}" if adapter else ""
    on = f" on {model}" if model else ""
    found = {}
    for run in runs:
        asked = run.asked()
        mine = adapter in {None, asked.get("adapter")}
        if mine and model in {None, asked["recipe"]["model"].get("name")}:
            found[run.path.name] = run
    if not found:
        there = f"; it holds {', '.join(run.path.name for run in runs)}" if runs else ""
        raise UsageError(f"--output {output}: holds no run{of}{on}{there}")
    if len(found) > 1:
        raise UsageError(
            f"--output {output}: holds {', '.join(found)}; name one with --adapter or --model"
        )
    return next(iter(found.values()))


def clear(folder: RunFolder) -> None:
    """Remove what a run wrote, and nothing else."""
    _move(folder, None)


def put_aside(folder: RunFolder) -> None:
    """Move a run that is to be replaced out of the way, to be brought back or forgotten.

    Raises UsageError on a folder that holds something, and no run.
    """
    forget(folder)
    if folder.path.exists() and not folder.request.is_file() and any(folder.path.iterdir()):
        raise UsageError(
            f"output folder {folder.path}: holds something that is not a run; remove it yourself, "
            "or give another --output"
        )
    if folder.path.exists() or folder.report.exists():
        aside = _aside(folder)
        (aside / folder.checkpoints.name).mkdir(parents=True, exist_ok=True)
        _move(folder, aside)


def bring_back(folder: RunFolder, *, with_log: bool = False) -> None:
    """Put the run that was put aside back in the place of the one that came to nothing.

    With `with_log` what was said in that one's library.log, where a message may send the reader, goes
    to the end of the old one's.
    """
    aside = _aside(folder)
    if not aside.is_dir():
        return
    log = folder.path / "library.log"
    said = log.read_bytes() if with_log and log.is_file() else b""
    clear(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    for child in sorted(aside.rglob("*")):
        place = (
            folder.report
            if child == aside / folder.report.name
            else folder.path / child.relative_to(aside)
        )
        if child.exists() and not place.exists():
            child.rename(place)
    if said:
        with log.open("ab") as file:
            file.write(said)
    forget(folder)


def forget(folder: RunFolder) -> None:
    """Remove the run that was put aside: the new one has taken its first step."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def verdict(path: Path) -> tuple[str | None, str | None]:
    """The id of a report and, once that is finished, its verdict; None of a file that is none."""
    try:
        report = read(path)
    except UsageError:
        return None, None
    return report["id"], report["verdict"] if report["finished"] else None


def begin(path: Path, adapter: str, model: str) -> Callable[[], None]:
    """Put an unfinished report where `--json` wants one; returns what brings back what was there.

    A run that is killed before it has loaded its model must not leave an older run's verdict; one that
    comes to nothing leaves all as it was.

    Raises UsageError where a report could not be written: before training, not after it.
    """
    try:
        older = path.read_bytes() if path.is_file() else None
        begun = Recorder(path, kind="finetune", adapter={"name": adapter}, model=model)
    except OSError as error:
        raise UsageError(
            f"--json {path}: cannot be written ({error.strerror}); give a path that can"
        ) from None
    except UsageError as error:
        raise UsageError(f"--json {error}") from None

    def undo() -> None:
        if verdict(path)[0] != begun.report["id"]:
            return  # a run has recorded something
        if older is None:
            path.unlink()
        else:
            path.write_bytes(older)

    return undo


def _aside(folder: RunFolder) -> Path:
    return folder.path.with_name(f".{folder.path.name}.replaced")


def _move(folder: RunFolder, aside: Path | None) -> None:
    """Move what a run wrote to `aside`, or remove it; what it did not write stays."""
    written = [folder.path / name for name in WRITTEN]
    if folder.checkpoints.is_dir():
        written += [p for p in folder.checkpoints.iterdir() if re.fullmatch(TRAINERS, p.name)]
    for path in (*written, folder.report):
        if not path.exists():
            continue
        if aside is not None:
            place = path.name if path == folder.report else path.relative_to(folder.path)
            path.replace(aside / place)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in (folder.checkpoints, folder.path):
        with suppress(OSError):  # it holds something of the user's
            path.rmdir()


def _is_of(adapter: str, folder: RunFolder) -> bool:
    try:
        return bool(folder.asked().get("adapter", adapter) == adapter)
    except UsageError:
        return False


def _writable(path: Path) -> None:
    """Raise UsageError where `path` could not be made and filled."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise UsageError(f"output folder {path}: {there} is a file; give another --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"output folder {path}: {there} cannot be written; give another --output")
    disk = shutil.disk_usage(there)
    if not getattr(disk, "total", 1):  # /proc and its like
        raise UsageError(f"output folder {path}: {there} cannot be written; give another --output")
    free = disk.free
    if free < ROOM:
        raise UsageError(
            f"output folder {path}: no space left on its disk ({free / 2**20:.0f} MiB free, a run "
            f"needs {ROOM / 2**20:.0f}); free some, or give another --output"
        )


def _word(name: str) -> str:
    """A name as part of a file's."""
    word = re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-.")
    return word[:80] or "run"
