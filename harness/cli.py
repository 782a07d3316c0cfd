"""The command line. Loads nothing heavy: each command's module is imported when it is called."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from harness import arguments
from harness._version import __version__
from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _typeshed import SupportsWrite

EXIT_CODES = """\
exit codes: 0 holds · 1 does not hold (a failed MUST, a worse row) ·
2 wrong usage or unreadable input · 3 incomplete, incomparable or inconclusive
where a decision was asked for"""

INTERRUPTED, UNREAD = 130, 141
"""What a shell expects of a command that Ctrl-C ended, or a closed pipe: 128 + SIGINT, 128 + SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Usage errors are one line and exit 2."""
    name = "lora-harness"
    if sys.stdout is None:
        # The next file that is opened would be standard output, and be written into.
        print(f"{name}: standard output is closed; send it elsewhere", file=sys.stderr)
        return 2
    _write_what_can_be_written()
    try:
        try:
            args = parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # --help leaves here, and may have nowhere to go
        name = f"lora-harness {args.command}"
        command = _COMMANDS[args.command]
        module = import_module(command.module)
        run: Callable[[argparse.Namespace], int] = getattr(module, command.function)
        code = run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; whether the run was green nobody was told.
        _silence_stdout()
        return UNREAD
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        _silence_stdout()
        told = error.strerror or "no reason given"
        print(
            f"{name}: standard output cannot be written ({told}); send it elsewhere",
            file=sys.stderr,
        )
        return 2
    return code


UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})
"""What a system says where a stream it was writing can hold no more, or is gone."""


def _write_what_can_be_written() -> None:
    """Let a terminal without Unicode show `?` for what it lacks, rather than end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _silence_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter would try once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Command(NamedTuple):
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    function: str = "command"


_COMMANDS = {
    "finetune": _Command(
        "the documented procedure end to end, and proof of what it made",
        arguments.finetune,
        "harness.finetune",
    ),
    "check": _Command(
        "a verdict on one implementation", arguments.check, "harness.telling", "check_command"
    ),
    "list": _Command("the catalogue of specs", arguments.list_, "harness.telling", "list_command"),
    "bench": _Command(
        "throughput and memory over rank, dtype, implementation, model",
        arguments.bench,
        "harness.measure.bench",
    ),
    "plan": _Command("what fits a memory budget, with no GPU", arguments.plan, "harness.plan"),
    "matrix": _Command(
        "the same run under other library versions", arguments.matrix, "harness.matrix"
    ),
    "compare": _Command(
        "two or more reports, row by row", arguments.compare, "harness.report.compare"
    ),
    "report": _Command("a report as HTML or Markdown", arguments.report, "harness.report.html"),
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as everywhere here."""

    def error(self, message: str) -> None:  # type: ignore[override]  # it exits, as the original
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Write it or raise: help that could not be written was not given."""
        (file or sys.stderr).write(message)


def parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    top = _Parser(
        prog="lora-harness",
        description="Is this LoRA implementation right, and did it get slower or hungrier?",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"lora-harness {__version__}")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for name, command in _COMMANDS.items():
        told = f"{command.help[0].upper()}{command.help[1:]}."
        one = commands.add_parser(
            name,
            help=command.help,
            description=told,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(one)
    return top


if __name__ == "__main__":
    sys.exit(main())
