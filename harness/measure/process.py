"""The process that a cell of a bench is measured in.

    grid ── cell ──▶ a process of its own ──▶ rows          the process may die: that is a row, too

On the CPU the process is forked from a parent that has imported the libraries and computed nothing; on
a GPU it starts afresh, since a CUDA context does not survive a fork. The parent imports no stranger's
code: what patches torch at import must patch its own cells alone.
"""

from __future__ import annotations

import importlib
import signal
import time
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.measure.cell import BASE, FULL, NotClaimed, measure
from harness.process import ending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection

    from harness.measure.cell import Cell, Rows

OUT_OF_MEMORY = "out of memory"
"""How the reason of a cell that wanted more memory than there is begins."""

LONGEST_WAIT = 1e6
"""Seconds; the system's own clock for waiting ends not far beyond."""

RESOLVE_SECONDS = 120.0
"""How long an adapter's import and factory may take before it is left to its cells to tell of it."""


def in_process(cell: Cell, *, limit: float) -> tuple[Rows | None, str]:
    """The cell's rows and "", or None and what became of its process.

    Args:
        cell: what to run.
        limit: seconds after which a cell that does not end is ended.
    """
    answer, lost = _ask(_child, cell, device=cell.device, limit=limit)
    return (None, lost) if lost else answer


def versions(names: Iterable[str], device: str) -> dict[str, str | None]:
    """Each adapter's version as a process of its own finds it; None where that process dies or hangs.

    Raises UsageError on a name nobody knows, and where the factory is not what it should be.
    """
    found: dict[str, str | None] = {}
    for name in dict.fromkeys(names):
        if name in {BASE, FULL}:
            continue
        answer, lost = _ask(_resolved, name, device=device, limit=RESOLVE_SECONDS)
        version, why = (None, "") if lost else answer
        if why:
            raise UsageError(why)
        found[name] = version
    return found


def warm(names: Iterable[str]) -> None:
    """Import what forked cells need, and compute nothing: threads do not survive a fork.

    The built-in adapters' libraries too, but only where there are no others: beside a stranger's cells
    each cell imports its own.
    """
    import torch

    torch.set_num_threads(1)
    from harness import base, phi3, registry  # noqa: F401
    from harness.measure import meter, phases  # noqa: F401

    phases.settle_torch()
    phi3.config("tiny")
    importlib.import_module("transformers.models.phi3.modeling_phi3")
    ours = [name for name in dict.fromkeys(names) if name not in {BASE, FULL}]
    if all(name in registry.BUILT_IN for name in ours):
        for name in ours:
            registry.resolve(name)


def _ask(work: Callable[..., None], given: object, *, device: str, limit: float) -> tuple[Any, str]:
    """What the work sends from a process of its own and "", or None and what became of the process."""
    import multiprocessing

    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(given, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(min(limit, LONGEST_WAIT)):
            return None, f"hung: no answer in {limit:g} s"
        said = ours.recv()
        process.join(2)  # it has said all, and ends by itself
    except (EOFError, OSError):  # an OSError where it was ended in the middle of its answer
        process.join(10)
        code = process.exitcode
        if code is None:
            return None, "gave no answer, and does not end"
        return None, f"{'killed by' if code < 0 else 'died with'} {ending(code)}"
    else:
        return said, ""
    finally:
        process.kill()
        process.join()
        ours.close()


def _child(cell: Cell, answer: Connection) -> None:
    _deafen()
    started = time.monotonic()
    try:
        rows: Rows | None = measure(cell)
        why = ""
    except NotClaimed as error:
        rows, why = None, f"not claimed: {error}"
    except Exception as error:  # noqa: BLE001  # a stranger's code: what it raises is a row
        rows, why = None, f"{_kind(error)}: {' '.join(str(error).split())}"[:300]
    if rows is not None:
        for row in rows["timings"][:1]:
            row["cell_seconds"] = time.monotonic() - started
    answer.send((rows, why))
    answer.close()


def _deafen() -> None:
    """Leave Ctrl-C, which reaches this process as well, to the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _kind(error: Exception) -> str:
    """What an exception is called in a row; every way to be out of memory is one."""
    said = str(error).lower()
    wanting = isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
    return OUT_OF_MEMORY if wanting else type(error).__name__


def _resolved(name: str, answer: Connection) -> None:
    from harness import registry

    _deafen()
    try:
        answer.send((registry.resolve(name).version, ""))
    except UsageError as error:
        answer.send((None, str(error)))
    answer.close()
