"""The command line. Loads nothing heavy: each command's module is imported when it is called."""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from harness._version import __version__
from harness.case import SEEDS
from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _typeshed import SupportsWrite

EXIT_CODES = """\
exit codes: 0 holds · 1 does not hold (a failed MUST, a worse row) · 2 wrong usage or unreadable input ·
3 incomplete, incomparable or inconclusive where a decision was asked for"""

INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended: 128 + SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Usage errors are one line and exit 2."""
    _write_what_can_be_written()
    name = "lora-harness"
    try:
        try:
            args = parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # --help leaves here, and may have nowhere to go
        name = f"lora-harness {args.command}"
        module, function = _COMMANDS[args.command]
        run: Callable[[argparse.Namespace], int] = getattr(import_module(module), function)
        code = run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; nothing is left to tell it.
        _silence_stdout()
        return 0
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


_COMMANDS = {
    "finetune": ("harness.finetune", "command"),
    "check": ("harness.telling", "check_command"),
    "list": ("harness.telling", "list_command"),
    "bench": ("harness.measure.bench", "command"),
    "plan": ("harness.plan", "command"),
    "matrix": ("harness.matrix", "command"),
    "compare": ("harness.report.compare", "command"),
    "report": ("harness.report.html", "command"),
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
    for name, (help_, arguments) in {
        "finetune": (
            "the documented procedure end to end, and proof of what it made",
            _finetune_arguments,
        ),
        "check": ("a verdict on one implementation", _check_arguments),
        "list": ("the catalogue of specs", _list_arguments),
        "bench": (
            "throughput and memory over rank, dtype, implementation, model",
            _bench_arguments,
        ),
        "plan": ("what fits a memory budget, with no GPU", _plan_arguments),
        "matrix": ("the same run under other library versions", _matrix_arguments),
        "compare": ("two or more reports, row by row", _compare_arguments),
        "report": ("a report as HTML or Markdown", _report_arguments),
    }.items():
        sub = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        arguments(sub)
    return top


def _finetune_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--recipe", default="quick", help="a recipe's name or a TOML file (default: quick)"
    )
    p.add_argument(
        "--adapter",
        action="append",
        metavar="NAME",
        help="implementation, repeatable (default: peft, then loralib)",
    )
    p.add_argument("--model", help="tiny, mini-4k, ..., a directory or a hub id")
    p.add_argument("--data", help="a JSON, JSONL or Parquet file of conversations, or a hub id")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a value of the recipe, repeatable",
    )
    p.add_argument(
        "--output", type=Path, metavar="DIR", help="where adapter, log and checkpoints go"
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    p.add_argument(
        "--allow-partial-targets",
        action="store_true",
        help="go on where some target names match nothing",
    )
    p.add_argument(
        "--generate",
        metavar="PROMPT",
        nargs="?",
        const="",
        help="no training: answer a prompt with the model and, given --output, its adapter",
    )
    p.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="PATH",
        help="an adapter checkpoint to start from: a run's folder, .safetensors or .pt",
    )
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--budget", metavar="SIZE", help="the most GPU memory to use, such as 8GiB")
    _json(p)


def _check_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "adapter", help="peft, loralib, reference, an entry-point name, or pkg.module:factory"
    )
    p.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ID|FAMILY",
        help="judge this spec or family only, repeatable",
    )
    p.add_argument(
        "--tier",
        choices=("smoke", "core", "full"),
        default="core",
        help="how much to judge (default: core)",
    )
    p.add_argument(
        "--case",
        metavar="NAME=VALUE,...",
        help="judge at this one case, as a failure record gives it",
    )
    p.add_argument("--model", help="in the place of the Phi-3 specimens")
    p.add_argument("--device", help="cpu or cuda")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="judge in this dtype only",
    )
    p.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="other weights, factors and inputs; the verdict must not depend on it",
    )
    p.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="known failures, instead of those that come with the harness",
    )
    p.add_argument(
        "--explore",
        action="store_true",
        help="also search at random for counterexamples; never changes the verdict",
    )
    p.add_argument(
        "--limit",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="the most one spec may take (default: 60)",
    )
    _json(p)


def _list_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ID|FAMILY",
        help="this spec or family, repeatable",
    )
    p.add_argument(
        "--tier",
        choices=("smoke", "core", "full"),
        default="full",
        help="up to this tier (default: full)",
    )
    _json(p)


def _bench_arguments(p: argparse.ArgumentParser) -> None:
    grid = p.add_argument_group("the grid, each a list separated by commas")
    grid.add_argument(
        "--adapter",
        type=lambda text: [part.strip() for part in text.split(",") if part.strip()],
        default=["reference", "peft", "loralib"],
        help="(default: reference,peft,loralib)",
    )
    grid.add_argument("--rank", type=_numbers, default=[8], metavar="R,...", help="(default: 8)")
    grid.add_argument(
        "--dtype",
        type=_names("float32", "bfloat16", "float16", "nf4"),
        default=["float32"],
        help="of the base (default: float32)",
    )
    grid.add_argument(
        "--model",
        type=lambda text: [part.strip() for part in text.split(",") if part.strip()],
        default=["tiny"],
        help="(default: tiny)",
    )
    grid.add_argument("--batch", type=_numbers, default=[1], metavar="N,...", help="(default: 1)")
    grid.add_argument(
        "--sequence", type=_numbers, default=[64], metavar="N,...", help="(default: 64)"
    )
    grid.add_argument("--checkpointing", type=_names("off", "on"), default=["off"])
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    p.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    p.add_argument("--repeats", type=int, default=10, help="samples of each time (default: 10)")
    p.add_argument("--budget", metavar="SIZE", help="memory a cell may take of the card")
    p.add_argument(
        "--limit",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="the most one cell may take (default: 600)",
    )
    p.add_argument("--resume", action="store_true", help="go on with the report of --json")
    pair = p.add_argument_group("a pair, timed in alternation until the question is answered")
    pair.add_argument("--against", metavar="ADAPTER", help="time this one against --adapter")
    pair.add_argument("--aa", action="store_true", help="one side against itself: the noise now")
    pair.add_argument("--python", help="interpreter of the first side")
    pair.add_argument("--against-python", help="interpreter of the second side")
    pair.add_argument("--seconds", type=float, default=45.0, help="at most (default: 45)")
    pair.add_argument("--margin", type=float, default=0.02, help="counts as same (default: 0.02)")
    _json(p)


def _plan_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--budget", required=True, metavar="SIZE", help="memory to fit, such as 8GiB")
    p.add_argument("--model", default="mini-4k", help="(default: mini-4k)")
    p.add_argument("--adapter", default="peft", help="any implementation (default: peft)")
    p.add_argument(
        "--target", type=int, metavar="TOKENS", help="tokens an optimizer step is to see"
    )
    p.add_argument("--rank", type=_numbers, default=[16], metavar="R,...", help="(default: 16)")
    p.add_argument("--dtype", type=_names("float32", "bfloat16", "float16"), default=["bfloat16"])
    p.add_argument("--batch", type=_numbers, default=[1, 4], metavar="N,...", help="(default: 1,4)")
    p.add_argument(
        "--sequence",
        type=_numbers,
        default=[512, 2048],
        metavar="N,...",
        help="(default: 512,2048)",
    )
    p.add_argument("--checkpointing", type=_names("off", "on"), default=["off", "on"])
    p.add_argument("--quantization", type=_names("none", "nf4"), default=["none", "nf4"])
    _json(p)


def _seed(text: str) -> int:
    """A seed that every generator takes."""
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed < SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {SEEDS - 1}")
    return seed


def _seconds(text: str) -> float:
    """A time to wait, no longer than a system can."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(
            f"seconds must be more than 0 and at most {LONGEST:.0f}, not {text!r}"
        )
    return seconds


LONGEST = 1e6
"""Seconds, eleven days."""


def _numbers(text: str) -> list[int]:
    """Whole numbers above zero, separated by commas."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",") if part]
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 4,8,16")
    return numbers


def _names(*known: str) -> Callable[[str], list[str]]:
    """Some of the names known, separated by commas."""

    def parse(text: str) -> list[str]:
        names = [part.strip() for part in text.split(",") if part.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _matrix_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--leg",
        action="append",
        default=[],
        metavar="REQUIREMENTS",
        help="versions of one leg, such as peft==0.8.2 or 'peft==0.13.2,transformers==4.46.1'; `here` is this environment; repeatable",
    )
    p.add_argument(
        "--environments", type=Path, metavar="DIR", help="where the legs' environments are kept"
    )
    p.add_argument(
        "run",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND ...",
        help="what to run in each leg, such as -- check peft",
    )
    _json(p)


def _compare_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "reports",
        nargs="+",
        metavar="REPORT",
        help="the old one, then the newer; a folder stands for its reports in order of time",
    )
    p.add_argument(
        "--fail-on",
        default="worse,removed",
        metavar="VERDICTS",
        help="exit 1 where a row is one of these; inconclusive and incomparable exit 3; "
        "none for never (default: worse,removed)",
    )
    p.add_argument("--markdown", metavar="PATH", help="write it as Markdown; - for the terminal")
    p.add_argument("--html", metavar="PATH", help="write it as one page")
    _json(p)


def _report_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "reports",
        nargs="+",
        metavar="REPORT",
        help="report files, or a folder, which is shown with its history",
    )
    p.add_argument("--html", metavar="PATH", help="where the page goes (default: report.html)")
    p.add_argument("--markdown", metavar="PATH", help="write Markdown; - for the terminal")
    p.add_argument("--github", action="store_true", help="print annotations for GitHub Actions")
    _json(p)


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", type=Path, metavar="PATH", help="write what was found as JSON")


if __name__ == "__main__":
    sys.exit(main())
