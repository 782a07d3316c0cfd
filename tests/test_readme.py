"""README is true: its files are the files, its commands run, its example fails as shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(mark):
    """The indented block that follows each `<!-- mark: ... -->`."""
    found = re.findall(rf"<!-- {mark}: (.*?) -->\n\n((?:    .*\n|\n)+)", README)
    return [(name, textwrap.dedent(block).strip()) for name, block in found]


def test_the_adapter_shown_is_the_one_that_is_judged():
    """The shim in README is the file, in at most 25 lines, imports aside."""
    ((name, shown),) = blocks("file")
    text = (ROOT / name).read_text(encoding="utf-8").strip()
    lines = [line for line in text.splitlines() if line.strip()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]

    assert shown == text
    assert len(lines) - len(imports) <= 25


def commands():
    """Every command line of README that starts with lora-harness."""
    lines = re.findall(r"^    (lora-harness .*)$", README.replace("\\\n", ""), flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_shown_is_one_the_command_line_knows(command):
    """No command of README has an option or a choice that is not there."""
    from harness.cli import parser

    parser().parse_args(command[1:])


def test_readme_names_every_command():
    """What there is, README shows."""
    shown = {command[1] for command in commands()}

    assert {"finetune", "check", "bench", "plan", "compare", "report"} <= shown


def test_the_failure_shown_is_what_is_printed():
    """The failure record in README is what the command prints."""
    ((command, shown),) = blocks("output")
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},  # README is as wide as text is ever wrapped
    )

    assert done.returncode == 1
    assert masked(shown) in masked(done.stdout)


def masked(text):
    """Text with its numbers left out: another processor rounds otherwise."""
    return re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", text)
