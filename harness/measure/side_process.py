"""A side's process as the other end of its pipes sees it: asked, waited for, ended.

compare ── SideProcess ── a line of JSON each way ──▶ `side`, in an interpreter of its own
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from harness.errors import UsageError
from harness.measure.process import LONGEST_WAIT
from harness.process import ending, last_words

if TYPE_CHECKING:
    from harness.measure.paired import Side


class Lost(Exception):  # noqa: N818  # it says what became of a side
    """A side that will not answer any more: why."""


class Late(Lost):
    """No answer when the time was up, `silence` seconds after the question."""

    def __init__(self, said: str, silence: float) -> None:
        super().__init__(said)
        self.silence = silence


class _Nonsense(Lost):
    """A side that speaks another language."""


class _Silent(Lost):
    """A side that ended without a word."""


class SideProcess:
    """A side's process, from the outside."""

    def __init__(self, side: Side, name: str) -> None:
        self._name = f"the {name} side ({side.adapter})"
        self._side = side
        here = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        threads = str(side.threads)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [side.python, "-m", "harness.measure.side"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # Ctrl-C does not reach another session: `__exit__` ends what is in it.
                start_new_session=True,
                # One hash seed for both: the order of a set is no difference between them.
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTHONHASHSEED": "0",
                    "OMP_NUM_THREADS": threads,
                    "MKL_NUM_THREADS": threads,
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        except OSError as error:
            self._errors.close()
            raise UsageError(
                f"--python {side.python}: cannot be run ({error.strerror}); give an interpreter "
                "that has torch, transformers and the implementation"
            ) from None
        self._pending = b""
        self._asked = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        # All of its session: what a wrapper around the interpreter has started holds the pipes, too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # what was never read is written once more
                stream.close()
        self._process.wait()
        self._errors.close()

    def begin(self) -> None:
        """Ask for the work to be built; of one that is dead already, `ready` says how."""
        with contextlib.suppress(Lost):
            self._say({k: v for k, v in asdict(self._side).items() if k != "python"})

    def ready(self, deadline: float) -> dict[str, Any]:
        """Wait until it is built; what the side says of itself.

        Raises UsageError where the answer is no side's, and where the side cannot be what was asked.
        """
        try:
            said = self.answer(deadline)
        except _Nonsense:
            raise self._no_side() from None
        except _Silent:
            if self._process.poll() == 0:  # it ended well and has said nothing
                raise self._no_side() from None
            raise
        if "usage" in said:
            raise UsageError(f"{self._name}: {said['usage']}")
        return said

    def _no_side(self) -> UsageError:
        return UsageError(
            f"--python {self._side.python}: does not answer as a Python would; give an interpreter "
            "that has torch, transformers and the implementation"
        )

    def run(self, steps: int, deadline: float, core: int | None = None) -> float:
        """Median seconds of a step, in a block of `steps`, on a core or on any."""
        self._say({"steps": steps, "core": core})
        seconds: list[float] = self.answer(deadline)["seconds"]
        return median(seconds)

    def answer(self, deadline: float) -> dict[str, Any]:
        """The next line; raises `Lost` where there will be none."""
        stream = self._process.stdout
        assert stream is not None
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([stream], [], [], min(max(0.0, left), LONGEST_WAIT))
            if not ready:
                raise Late(
                    f"{self._name} hangs or is too slow: no answer when the time was up",
                    silence=time.monotonic() - self._asked,
                )
            chunk = os.read(stream.fileno(), 1 << 16)
            if not chunk:
                raise _Silent(f"{self._name} ended{self._how()}")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            said: Any = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise _Nonsense(f"{self._name} said what is no answer")
        if "error" in said:
            raise Lost(f"{self._name} raised {said['error']}")
        return said

    def _say(self, words: dict[str, Any]) -> None:
        stream = self._process.stdin
        assert stream is not None
        self._asked = time.monotonic()
        try:
            stream.write(json.dumps(words).encode() + b"\n")
            stream.flush()
        except BrokenPipeError:
            raise Lost(f"{self._name} ended{self._how()}") from None

    def _how(self) -> str:
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return ""
        return f" with {ending(code)}{last_words(self._errors)}"
