"""What each command takes, as `lora-harness COMMAND --help` tells it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from harness.axes import axis, names, numbers, words
from harness.case import SEEDS


def finetune(p: argparse.ArgumentParser) -> None:
    """The recipe, and where its run goes."""
    p.add_argument(
        "--recipe",
        help="a TOML file, or quick, model-card, fine-training-script, lora-notebook or qlora-notebook "
        "(default: quick)",
    )
    p.add_argument(
        "--adapter",
        action="append",
        metavar="NAME",
        help="implementation, repeatable (default: peft, then loralib)",
    )
    p.add_argument(
        "--model",
        help="tiny, tiny-gqa, mini-4k, mini-128k, medium-4k, a directory or a hub id (default: the "
        "recipe's)",
    )
    p.add_argument(
        "--data",
        help="conversations: shipped, a JSON, JSONL or Parquet file, a directory of train and eval files, "
        "or a hub id (default: the recipe's)",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a value of the recipe, repeatable",
    )
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where report, adapter, log and checkpoints go (default: reports/runs)",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of the run in --output, or else of the newest",
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
        help="no training: answer a prompt with the model and, given --output or --from, with its adapter; "
        "without PROMPT, the first of the evaluation data",
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


def check(p: argparse.ArgumentParser) -> None:
    """What is judged, and how much of it."""
    p.add_argument(
        "adapter",
        help="peft, transformers, loralib, reference, an entry-point name, or pkg.module:factory",
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
    p.add_argument(
        "--model",
        help="the Phi-3 that whole-model specs are judged on, in the place of tiny: a name such as "
        "mini-4k, a directory or a hub id",
    )
    p.add_argument("--device", help="cpu or cuda (default: cpu)")
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
        help="TOML file of known failures, instead of those that come with the harness",
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


def list_(p: argparse.ArgumentParser) -> None:
    """Which specs."""
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


def bench(p: argparse.ArgumentParser) -> None:
    """The grid, or the pair."""
    grid = p.add_argument_group("the grid, each a list separated by commas, or repeated")
    axis(grid, "--adapter", words, ["reference", "peft", "loralib"], "implementations")
    axis(grid, "--rank", numbers, [8], "r of the factors")
    dtypes = names("float32", "bfloat16", "float16", "nf4")
    axis(grid, "--dtype", dtypes, ["float32"], "of the base")
    axis(grid, "--model", words, ["tiny"], "names, directories or hub ids")
    axis(grid, "--batch", numbers, [1], "rows of a step")
    axis(grid, "--sequence", numbers, [64], "tokens of a row")
    axis(grid, "--checkpointing", names("off", "on"), ["off"], "of gradients")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    p.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="samples of each time (default: 10)"
    )
    p.add_argument(
        "--budget", metavar="SIZE", help="memory a cell may take of the card, such as 8GiB"
    )
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
    pair.add_argument("--python", metavar="PATH", help="interpreter of the first side")
    pair.add_argument("--against-python", metavar="PATH", help="interpreter of the second side")
    pair.add_argument("--seconds", type=float, default=45.0, help="how long at most (default: 45)")
    pair.add_argument(
        "--margin",
        type=float,
        default=0.02,
        help="more than this is not the same, less than half of it no change; between, either may "
        "be told (default: 0.02)",
    )
    _json(p)


def plan(p: argparse.ArgumentParser) -> None:
    """The budget and the grid."""
    p.add_argument("--budget", required=True, metavar="SIZE", help="memory to fit, such as 8GiB")
    p.add_argument(
        "--model",
        default="mini-4k",
        help="tiny, tiny-gqa, mini-4k, mini-128k or medium-4k (default: mini-4k)",
    )
    p.add_argument("--adapter", default="peft", help="any implementation (default: peft)")
    p.add_argument(
        "--target", type=int, metavar="TOKENS", help="tokens an optimizer step is to see"
    )
    axis(p, "--rank", numbers, [16], "r of the factors")
    axis(p, "--dtype", names("float32", "bfloat16", "float16"), ["bfloat16"], "of the base")
    axis(p, "--batch", numbers, [1, 4], "rows of a step")
    axis(p, "--sequence", numbers, [512, 2048], "tokens of a row")
    axis(p, "--checkpointing", names("off", "on"), ["off", "on"], "of gradients")
    axis(p, "--quantization", names("none", "nf4"), ["none", "nf4"], "of the base")
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


def matrix(p: argparse.ArgumentParser) -> None:
    """The legs, and the run."""
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


def compare(p: argparse.ArgumentParser) -> None:
    """The reports, and what is red."""
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


def report(p: argparse.ArgumentParser) -> None:
    """The reports, and the form."""
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
