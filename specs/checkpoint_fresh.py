"""What was written to disk, met by a process that never saw the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import fresh_trial
from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import GUIDE, kept

if TYPE_CHECKING:
    from pathlib import Path

    from harness.trial import Trial

NAMES = tuple(f"layers.{k}.{name}" for k in (0, 1, 10, 11) for name in ("v_proj", "foo", "foobar"))
"""A dozen names: a set of them keeps its order under another hash seed once in 12! times."""


@spec(
    "checkpoint/fresh-process",
    claim="A checkpoint MUST give the same outputs, bit for bit, in a process that never saw the model.",
    why="Nobody deploys from the process that trained; what lives in memory alone is lost.",
    source=("BUGS section 6.8; P3", GUIDE),
    needs=("checkpoint/two-stage-load", "checkpoint/safe-file"),
    cases=(Case(specimen="bare"),),
    fresh=True,
)
def fresh_process(trial: Trial) -> None:
    """Write the checkpoint, load it in a child, and compare the child's outputs."""
    import torch

    folder, given = trial.folder(), trial.inputs()
    model = trial.adapted()
    torch.save(kept(trial, model), folder / "state.pt")
    want = trial.call(model, given)
    if not fresh_trial.done(trial, folder, _load_and_call):
        return

    found = torch.load(folder / "output.pt", weights_only=True)
    trial.same_bits(found, want, "output of a fresh process")


def _load_and_call(trial: Trial, folder: Path) -> None:
    """In the child."""
    import torch

    model = trial.inject(seed=1)
    state = torch.load(folder / "state.pt", weights_only=False)  # its own file, of a minute ago
    trial.adapter.load_state_dict(model, state)
    torch.save(trial.call(model, trial.inputs()), folder / "output.pt")


@spec(
    "checkpoint/same-bytes-under-another-hash-seed",
    claim="`save` SHOULD write the same bytes for the same adapter, whatever the hash seed.",
    why="Files that differ from run to run defeat checksums, caches and review.",
    source=(
        "BUGS 74: peft's target_modules are a set",
        "https://docs.python.org/3/using/cmdline.html#envvar-PYTHONHASHSEED",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings",),
    cases=(Case(specimen="stack"),),
    fresh=True,
)
def same_bytes_under_another_hash_seed(trial: Trial) -> None:
    """Save the same factors here and in a child under another hash seed."""
    folder = trial.folder()
    _save_many_names(trial, folder / "here")
    if not fresh_trial.done(trial, folder, _save_there):
        return

    here, there = _contents(folder / "here"), _contents(folder / "there")
    differing = sorted(
        name for name in here.keys() | there.keys() if here.get(name) != there.get(name)
    )
    if differing:
        fail(
            "value",
            expected="the same bytes in every file",
            actual=f"{len(differing)} of {len(here)} files differ: {', '.join(differing)}",
            where=differing[0],
        )


def _save_many_names(trial: Trial, folder: Path) -> None:
    folder.mkdir()
    model = trial.adapted(config=trial.config(target_modules=NAMES))
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it


def _save_there(trial: Trial, folder: Path) -> None:
    """In the child."""
    _save_many_names(trial, folder / "there")


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
