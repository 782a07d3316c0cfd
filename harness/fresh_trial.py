"""A trial in a fresh process: for what is written to disk, and for what is said once a process."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from harness import fresh
from harness.case import Case
from harness.failure import fail

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.trial import Trial


def done(trial: Trial, folder: Path, act: Callable[[Trial, Path], None]) -> bool:
    """`act(trial, folder)` in a process that has met no implementation; whether it was done.

    `act` is a module's own function. There the implementation is made anew, by its name. One that was
    given as an object goes by pickle, which the contract does not ask for and which leaves behind what
    its factory did to torch: where that does not work, a note says so.
    """
    name = fresh.ADAPTER
    try:
        if not name:
            (folder / "adapter.pkl").write_bytes(pickle.dumps(trial.adapter))
    except Exception as error:  # noqa: BLE001  # pickle raises whatever the object does
        problem = f"{type(error).__name__}: {error}"
    else:
        asked = (str(folder), str(trial.case), act.__module__, act.__name__, name)
        problem = fresh.call(__name__, "child", *asked)
    if problem and name:
        fail("raised", expected="it works in a fresh process", actual=problem)
    if problem:
        trial.notes.append(
            "vacuous: an adapter given as an object does not work in a fresh process, by pickle; "
            f"to judge it there, give pkg.module:factory ({problem[:120]})"
        )
    return not problem


def child(folder: str, case: str, module: str, act: str, name: str) -> None:
    """What the fresh process runs: a module's function, on a trial of its own.

    On the implementation of that name or, where there is none, on the one in the folder.
    """
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
    getattr(import_module(module), act)(Trial(adapter, point), at)
