"""One of our modules in a process of its own, and the signals between the two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from harness.report.words import plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType
    from typing import IO, Any

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What asks a run to end, beside Ctrl-C: the child takes them as that, and keeps what was done."""

# The child must not inherit the ignored SIGINT: Python installs its own handler only over the default.
_HEED = (
    "import signal; h = signal.default_int_handler; signal.signal(signal.SIGINT, h); "
    "[signal.signal(s, h) for s in (signal.SIGTERM, signal.SIGHUP) "
    "if signal.getsignal(s) is not signal.SIG_IGN]; "
)


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs some code of ours in an interpreter that sees what this process sees.

    A folder called harness that happens to lie here is none of ours: neither `-c` nor an empty entry
    of this process's path lets it in.
    """
    path = f"import sys; sys.path[:] = {[p for p in sys.path if p]!r}; "
    return [sys.executable, "-P", "-c", path + code, *arguments]


def _command(module: str, request: Path, first: str = "") -> list[str]:
    return python(f"{first}from {module} import main; sys.exit(main(sys.argv[1]))", str(request))


def run(module: str, request: Path) -> int:
    """Run one of our modules on a request; returns its exit code, negative for a signal.

    Ctrl-C is the child's to answer, which has the work; SIGTERM and SIGHUP are handed on to it.
    """
    child: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        for process in child:
            process.send_signal(number)

    before: dict[signal.Signals, Callable[..., Any] | int | None] = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)
    }
    for one in ENDING:
        if signal.getsignal(one) is not signal.SIG_IGN:  # nohup's wish
            before[one] = signal.signal(one, hand_on)
    try:
        child.append(
            subprocess.Popen(
                _command(module, request, _HEED),
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        )
        return child[0].wait()
    finally:
        if child and child[0].poll() is None:
            child[0].terminate()
            child[0].wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def beside(module: str, request: Path) -> subprocess.Popen[bytes]:
    """Start one of our modules on a request, deaf to Ctrl-C: whoever started it ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an ignored signal is inherited
    try:
        return subprocess.Popen(_command(module, request))
    finally:
        signal.signal(signal.SIGINT, before)


def last_words(errors: IO[str]) -> str:
    """The last line of what a process wrote to a file, as the end of a sentence; "" where there is none."""
    errors.seek(0)
    said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f"; its last words: {plain(said[-1], limit=200)}" if said else ""


def ending(code: int) -> str:
    """An exit code in words: the signal's name, where it was one. Of real-time signals few have one."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
