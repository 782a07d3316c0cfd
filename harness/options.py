"""The pytest plugin's options, and what they ask: whose run it is, which tier, the GPU or not."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import UsageError
from harness.spec import TIERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.spec import Tier

OPTIONS: dict[str, dict[str, Any]] = {
    "--adapter": {
        "action": "append",
        "metavar": "NAME",
        "help": "judge this implementation: peft, transformers, loralib, an entry point, or pkg.module:factory; repeatable",
    },
    "--spec": {
        "action": "append",
        "metavar": "ID|FAMILY",
        "help": "with --adapter: judge this spec or family only; repeatable",
    },
    "--tier": {
        "metavar": "|".join(TIERS),
        "help": "with --adapter: how much to judge (default: core)",
    },
    "--model": {"help": "the model of end-to-end tests, and of whole-model specs"},
    "--device": {"help": "cpu or cuda"},
    "--gpu-budget": {"metavar": "SIZE", "help": "the most GPU memory to use, such as 8GiB"},
    "--allow-no-gpu": {
        "action": "store_true",
        "help": "let `-m gpu` pass where there is no GPU",
    },
    "--report": {"metavar": "PATH", "help": "write the run as a report"},
}


def add_options(parser: pytest.Parser) -> None:
    """Add the options that are free."""
    group = parser.getgroup("lora-harness", "LoRA harness")
    groups = {*parser._groups, parser._anonymous}  # noqa: SLF001  # no public way to ask
    taken = {name for one in groups for option in one.options for name in option.names()}
    for option, attributes in OPTIONS.items():
        if option not in taken:
            with contextlib.suppress(ValueError, argparse.ArgumentError):
                group.addoption(option, dest=dest(option), **attributes)


def dest(option: str) -> str:
    """Where a value of ours is kept, apart from a project's own of that name."""
    return f"lora_harness_{option.removeprefix('--').replace('-', '_')}"


def given(config: pytest.Config, option: str) -> Any:
    """What an option of ours was given; None also where the name is the project's own."""
    return getattr(config.option, dest(option), None)


def ours(config: pytest.Config) -> bool:
    """Whether this run is the harness's: an option of ours is given, or this is its own tree."""
    return own_tree(config) or any(given(config, option) for option in OPTIONS)


def own_tree(config: pytest.Config) -> bool:
    """Whether it is the harness that is tested here."""
    root = config.rootpath
    return (root / "harness" / "plugin.py").is_file() and (root / "specs").is_dir()


@contextlib.contextmanager
def usage_errors(*, option: str = "--only", ends: bool = True) -> Iterator[None]:
    """End the session with one line and exit 2, as everywhere here; pytest's own would be exit 4.

    A worker of xdist, which would be started again and again, `ends` nothing: the test fails.
    """
    __tracebackhide__ = True
    try:
        yield
    except UsageError as error:
        line = str(error).replace("--only", option, 1)
        if ends:
            pytest.exit(line, returncode=2)
        raise pytest.fail.Exception(line, pytrace=False) from None


def tier_of(config: pytest.Config) -> Tier:
    """How much `--adapter` asks for."""
    tier: Tier = given(config, "--tier") or "core"
    return tier


def gpu_tier(config: pytest.Config) -> bool:
    """Whether `-m` asks for the GPU tier: something is selected for being marked `gpu` alone."""
    from _pytest.mark.expression import Expression  # no public way to read an expression

    words = config.option.markexpr or ""
    names = sorted(set(re.findall(r"\w+", words)) - {"and", "or", "not", "gpu"})[:8]
    try:
        expression = Expression.compile(words)
        return any(
            expression.evaluate(lambda name, /, others=others, **_: name == "gpu" or name in others)
            and not expression.evaluate(lambda name, /, others=others, **_: name in others)
            for size in range(len(names) + 1)
            for others in itertools.combinations(names, size)
        )
    except (SyntaxError, ValueError):
        return False  # pytest itself says what is wrong with it


def has_gpu() -> bool:
    """Whether there is one here."""
    import torch

    return torch.cuda.is_available()
