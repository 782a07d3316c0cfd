"""A fresh process for each question: one that has imported the libraries, and met no implementation.

    this process ── a line of JSON ──> the server ── fork ──> a child: `module.function(*arguments)`
                 <── "" or an error ──

Importing torch and transformers takes longer than any spec, so it is paid once: the server imports
them, computes nothing, and forks a child for each question. Started early, it does so beside the first
specs. The server's hash seed is not this process's.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
from functools import lru_cache
from importlib import import_module
from itertools import count

from harness.failure import NotRun
from harness.process import python

LIMIT = 50
"""Seconds a child may take: less than a spec may, so that a hang is told for what it is."""

LIBRARIES = (
    "torch",
    "transformers.modeling_utils",
    "accelerate",
    "bitsandbytes",
    "harness.registry",
    "harness.trial",
    "harness.fresh_trial",
    "harness.specs.checkpoint_fresh",
)
"""What the server imports so that no child has to: of what implementations import, and of the harness."""

ADAPTER = ""
"""The name by which a fresh process finds the implementation on trial here; none where it is an object."""

HASH_SEEDS = ("1729", "1")
"""The server's hash seed: the first, or the second where this process has the first."""


def call(module: str, function: str, *arguments: str) -> str:
    """Call a function in a fresh process; what went wrong there, in one line, or nothing.

    Raises `NotRun` on a system that cannot fork.
    """
    if not hasattr(os, "fork"):
        raise NotRun("a fresh process needs a system that can fork")
    server = _SHARED[0] if _SHARED else _server(os.getpid())
    assert server.stdin is not None
    assert server.stdout is not None
    # A copy of this process may have ended before it read its answer.
    number = f"{os.getpid()}/{next(_NUMBERS)}"
    said = None
    try:
        server.stdin.write(json.dumps([number, module, function, *arguments]) + "\n")
        server.stdin.flush()
        while said is None or said[0] != number:
            said = json.loads(server.stdout.readline())
    except (OSError, ValueError):
        _server.cache_clear()
        return "the server of fresh processes is gone"
    problem: str = said[1]
    return problem


def start() -> None:
    """Start the server now, for a question to come."""
    if hasattr(os, "fork") and not _SHARED:
        _server(os.getpid())


def share() -> None:
    """Start the server now, for this process and all its copies, which must ask one at a time."""
    _SHARED[:] = [_server(os.getpid())]


_SHARED: list[subprocess.Popen[str]] = []
_NUMBERS = count()


@lru_cache(maxsize=1)
def _server(parent: int) -> subprocess.Popen[str]:
    """One for each process, forked copies too; it ends when its input does, or this process."""
    seed = HASH_SEEDS[os.environ.get("PYTHONHASHSEED") == HASH_SEEDS[0]]
    process = subprocess.Popen(
        python("from harness import fresh; fresh.serve()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(_end, process, parent)
    return process


def _end(process: subprocess.Popen[str], parent: int) -> None:
    """End it, asked or not; a copy of the process that started it leaves it alone."""
    if parent == os.getpid():
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not written yet has no reader
                assert pipe is not None
                pipe.close()


def serve() -> None:
    """In the server: fork a child for each line of input."""
    warm_up()
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for line in requests:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _answer(line, write)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as said:
            problem = said.read()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            problem = f"no answer within {LIMIT} s"
        elif code and not problem:
            problem = f"the process ended with {code}"
        answers.write(json.dumps([json.loads(line)[0], problem]) + "\n")
        answers.flush()


def warm_up() -> None:
    """Import the libraries, but for one that asks for the cards: no copy of a process that has can."""
    import torch

    cards = torch.version.cuda or torch.version.hip
    for library in LIBRARIES:
        if library == "bitsandbytes" and cards:
            continue
        with contextlib.suppress(Exception):  # a child that needs what is broken says so
            import_module(library)


def _answer(line: str, write: int) -> None:
    """In the child: do what is asked, say what went wrong, and end."""
    signal.alarm(LIMIT)
    code = 1
    try:
        _, module, function, *arguments = json.loads(line)
        getattr(import_module(module), function)(*arguments)
        code = 0
    except BaseException as error:  # noqa: BLE001  # whatever it is, the other side is told
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with contextlib.suppress(OSError):
            os.write(write, told.encode())
    finally:
        os._exit(code)
