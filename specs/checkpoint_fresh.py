"""What was written to disk, met by a process that never saw the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import GUIDE, kept

if TYPE_CHECKING:
    from collections.abc import Callable
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
    if not _in_a_fresh_process(trial, folder, _load_and_call):
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
    if not _in_a_fresh_process(trial, folder, _save_there):
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


def _in_a_fresh_process(trial: Trial, folder: Path, act: Callable[[Trial, Path], None]) -> bool:
    """`act(trial, folder)` in a process that has met no implementation; whether it was done.

    There the implementation is made anew, by its name. One that was given as an object goes by
    pickle, which the contract does not ask for and which leaves behind what its factory did to
    torch: where that does not work, a note says so.
    """
    import pickle

    from harness import fresh

    name = fresh.ADAPTER
    try:
        if not name:
            (folder / "adapter.pkl").write_bytes(pickle.dumps(trial.adapter))
    except Exception as error:  # noqa: BLE001  # pickle raises whatever the object does
        problem = f"{type(error).__name__}: {error}"
    else:
        problem = fresh.call(__name__, "child", str(folder), str(trial.case), act.__name__, name)
    if problem and name:
        fail("raised", expected="it works in a fresh process", actual=problem)
    if problem:
        trial.notes.append(
            "vacuous: an adapter given as an object does not work in a fresh process, by pickle; "
            f"to judge it there, give pkg.module:factory ({problem[:120]})"
        )
    return not problem


def child(folder: str, case: str, act: str, name: str) -> None:
    """What the fresh process runs: one of this file's functions, on a trial of its own.

    On the implementation of that name or, where there is none, on the one in the folder.
    """
    import pickle
    from pathlib import Path

    import torch

    from harness.registry import resolve
    from harness.trial import Trial
    from harness.worker import ready

    torch.set_num_threads(1)
    point = Case.parse(case)
    ready(point.device)
    at = Path(folder)
    # Its own pickle, written a moment ago.
    adapter = resolve(name) if name else pickle.loads((at / "adapter.pkl").read_bytes())  # noqa: S301
    known = {function.__name__: function for function in (_load_and_call, _save_there)}
    known[act](Trial(adapter, point), at)
