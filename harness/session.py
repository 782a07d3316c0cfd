"""The parent's end of a worker: asks, waits no longer than a limit, and starts another when one dies."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from harness import registry
from harness.errors import UsageError
from harness.process import ending, last_words, python
from harness.report.words import plain

if TYPE_CHECKING:
    from harness.adapter import Adapter

START_LIMIT = 180.0
"""Seconds an implementation may take to import."""

STARVED = 5
"""How many times its limit a process may take that computes and is not given the time."""

AT_WORK = 0.02
"""The part of a core below which a process is said to wait for something that does not come."""


AT_ONCE = 1.0
"""Seconds within which an answer most often comes."""


class _Process(Protocol):
    """What a session needs of a process, spawned or forked."""

    pid: int
    requests: IO[str]
    answers: IO[str]

    def kill(self) -> None: ...
    def ended(self) -> bool: ...
    def status(self) -> str: ...


class Spawned:
    """A fresh interpreter for an implementation given by name."""

    def __init__(self, adapter: str) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            python(f"from harness import worker; sys.exit(worker.main({adapter!r}))"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,
        )
        self.pid = self.process.pid
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests: IO[str] = self.process.stdin
        self.answers: IO[str] = self.process.stdout

    def kill(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(OSError):
            self.requests.close()
        _kill_group(self.pid)
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def ended(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def status(self) -> str:
        """How it ended, and the last thing it said."""
        code = self.process.wait()
        return f"the process ended with {ending(code)}{last_words(self.errors)}"


class Forked:
    """A copy of this process, for an implementation given as an object, which no name reaches."""

    def __init__(self, adapter: Adapter) -> None:
        if not hasattr(os, "fork"):
            raise UsageError(
                "check: an adapter object needs a system that can fork; give pkg.module:factory"
            )
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(down_write)
            os.close(up_read)
            _serve_and_exit(adapter, down_read, up_write)
        os.close(down_read)
        os.close(up_write)
        self.requests: IO[str] = os.fdopen(down_write, "w", encoding="utf-8")
        self.answers: IO[str] = os.fdopen(up_read, "r", encoding="utf-8")
        self.code: int | None = None

    def kill(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(OSError):
            self.requests.close()
        _kill_group(self.pid)
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def ended(self) -> bool:
        """Whether it is gone."""
        self._wait(os.WNOHANG)
        return self.code is not None

    def status(self) -> str:
        """How it ended."""
        self._wait()
        assert self.code is not None
        return f"the process ended with {ending(self.code)}"

    def _wait(self, options: int = 0) -> None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None


def _serve_and_exit(adapter: Adapter, down: int, up: int) -> None:
    from harness.worker import serve

    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with (
            os.fdopen(down, encoding="utf-8") as requests,
            os.fdopen(up, "w", encoding="utf-8") as answers,
        ):
            serve(adapter, requests, answers)
        code = 0
    finally:
        os._exit(code)


def _kill_group(leader: int) -> None:
    """End what an implementation has started, too: a child holds the pipe that its answers come by."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def _cpu_seconds(pid: int) -> float:
    """Processor time that a process and its children have used; 0 once it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        times = [process.cpu_times(), *(c.cpu_times() for c in process.children(recursive=True))]
    except psutil.Error:
        return 0.0
    return float(sum(t.user + t.system for t in times))


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer: the process hung or died."""

    kind: str
    """`hang` or `crash`."""
    how: str


class Ended(Exception):  # noqa: N818  # it is no error: who asks has outlived the run
    """A question to a session that is over."""


class Session:
    """Questions to one implementation in a process of its own, with a limit on each.

    After a hang or a crash the next question starts a fresh process.
    """

    def __init__(self, adapter: str | Adapter) -> None:
        self._adapter = adapter
        self._process: _Process | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._met = False
        self._ended = False
        self.named = isinstance(adapter, str)
        if not isinstance(adapter, str):
            registry.check(adapter, str(getattr(adapter, "name", type(adapter).__name__)))
        self.spelling = adapter if isinstance(adapter, str) else f"<{plain(adapter.name)}>"
        """How a command names the implementation."""

    def __enter__(self) -> Self:
        """Nothing is started before the first question."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, for good."""
        self._ended = True
        self.close()

    def ask(self, request: dict[str, Any], *, limit: float) -> dict[str, Any] | Lost:
        """The answer, or how it was lost; raises `UsageError` where there is no adapter to ask."""
        self.start()
        if request["do"] == "describe":
            self._met = True
            limit += START_LIMIT
        elif not self._met and isinstance(lost := self._imported(), Lost):
            return lost
        process = self._process
        if process is None:
            raise Ended
        try:
            process.requests.write(json.dumps(request) + "\n")
            process.requests.flush()
        except (BrokenPipeError, OSError):
            pass  # it is dead; the reader says how
        try:
            line = self._wait(process, limit)
        except queue.Empty:
            self.close()
            return Lost("hang", f"no answer within {limit:g} s")
        if line is None:
            how = process.status()
            self.close()
            return Lost("crash", how)
        answer: dict[str, Any] = json.loads(line)
        if "usage" in answer:
            self.close()
            raise UsageError(plain(answer["usage"], limit=1000))
        return answer

    def _imported(self) -> dict[str, Any] | Lost:
        """The answer of a process that was started anew, once it has imported the implementation."""
        return self.ask({"do": "describe"}, limit=0)

    def _wait(self, process: _Process, limit: float) -> str | None:
        """The next line, None where there is none to come; `queue.Empty` when it has had its time.

        On a machine with more work than cores a process that is at work may need more time than the
        limit to be given that much: it is let go on while it computes, up to `STARVED` times as long.
        """
        # Most answers are here at once: what the process computes is asked only of those that are not.
        first = min(limit, AT_ONCE)
        with contextlib.suppress(queue.Empty):
            return self._lines.get(timeout=first)
        started = _cpu_seconds(process.pid)
        for round_ in range(STARVED):
            before = _cpu_seconds(process.pid)
            wait = limit - first if round_ == 0 else limit
            try:
                return self._line(process, wait)
            except queue.Empty:
                now = _cpu_seconds(process.pid)
                idle = now - before < AT_WORK * wait
                if idle or now - started >= limit or round_ == STARVED - 1:
                    raise
        raise queue.Empty

    def _line(self, process: _Process, wait: float) -> str | None:
        """The next line within some seconds; None where the process has ended.

        The pipe does not always tell: a child that the implementation left behind keeps it open.
        """
        for left in (*[AT_ONCE] * int(wait // AT_ONCE), wait % AT_ONCE):
            ended = process.ended()  # before the look: what it said last is there then, or never
            try:
                return self._lines.get(timeout=AT_ONCE if ended else left)
            except queue.Empty:
                if ended:
                    return None
        raise queue.Empty

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process, self._met = self._process, None, False
        if process is not None:
            process.kill()

    def start(self) -> None:
        """Let the process begin to import, if there is none; raises `Ended` after the run."""
        if self._process is not None:
            return
        if self._ended:
            raise Ended
        process: _Process = (
            Spawned(self._adapter) if isinstance(self._adapter, str) else Forked(self._adapter)
        )
        self._process = process
        lines: queue.Queue[str | None] = queue.Queue()
        self._lines = lines

        def read() -> None:
            with contextlib.suppress(ValueError, OSError), process.answers:
                for line in process.answers:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
