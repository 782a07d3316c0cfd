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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UsageError

DEFAULT = Path("reports/runs")
ROOM = 64 * 2**20
"""Bytes that must be free before a run starts: less would not hold one checkpoint and its log."""


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
        if not isinstance(asked, dict) or "recipe" not in asked:
            raise UsageError(f"run folder {self.path}: {self.request.name} is not a run's")
        return asked


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
        runs = sorted(DEFAULT.glob(f"*-{stem}/run.json")) if DEFAULT.is_dir() else []
        if not runs:
            raise UsageError(
                f"--resume: {DEFAULT} holds no run of {adapter} on {model}; run afresh"
            )
        folder = RunFolder(path=runs[-1].parent)
    elif output is None:
        folder = RunFolder(path=DEFAULT / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{stem}")
    else:
        folder = RunFolder(path=output / stem)
    _writable(folder.path)
    held = folder.path.exists() or folder.report.exists()
    if resume and not folder.request.is_file():
        raise UsageError(f"--resume: {folder.path} holds no run; run without --resume")
    if held and not resume and not overwrite:
        raise UsageError(
            f"output folder {folder.path}: already holds a run; go on with --resume, "
            "or replace it with --overwrite"
        )
    return folder


def clear(folder: RunFolder) -> None:
    """Remove a run that is to be replaced, and nothing that a run did not write."""
    if folder.path.exists() and not folder.request.is_file() and any(folder.path.iterdir()):
        raise UsageError(
            f"output folder {folder.path}: holds something that is not a run; remove it yourself, "
            "or give another --output"
        )
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.report.unlink(missing_ok=True)


def _writable(path: Path) -> None:
    """Raise UsageError where `path` could not be made and filled."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise UsageError(f"output folder {path}: {there} is a file; give another --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"output folder {path}: {there} cannot be written; give another --output")
    free = shutil.disk_usage(there).free
    if free < ROOM:
        raise UsageError(
            f"output folder {path}: no space left on its disk ({free / 2**20:.0f} MiB free, a run "
            f"needs {ROOM / 2**20:.0f}); free some, or give another --output"
        )


def _word(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-.") or "run"
