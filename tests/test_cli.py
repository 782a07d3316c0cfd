"""The command line is light, and wrong usage is one line and exit 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import UsageError, check
from harness.case import Case
from harness.spec import catalogue

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "pandas"}


def run(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "harness.cli", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["list"], ["compare", "--help"]])
def test_nothing_heavy_is_imported_for(args):
    """Help, version and the catalogue load neither torch nor transformers."""
    code = (
        "import sys; from harness.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )

    assert not HEAVY & set(json.loads(done.stderr.replace("'", '"')))


def test_every_command_has_help():
    """`--help` names every command of the contract."""
    said = run("--help").stdout

    for command in ("finetune", "check", "list", "bench", "plan", "matrix", "compare", "report"):
        assert f"    {command} " in said
    assert "exit codes: 0 holds" in said


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["chekc", "peft"], "invalid choice: 'chekc'"),
        (["check"], "the following arguments are required: adapter"),
        (["check", "reference", "--only", "merge/sameoutput"], "did you mean merge/same-output?"),
        (["check", "reference", "--case", "r=3"], "--case: name the one spec to judge"),
        (
            ["check", "reference", "--only", "merge/same-output", "--case", "rank=3"],
            "'rank=3' is not one of",
        ),
        (["check", "reference", "--case", ""], "--case '': it is empty"),
        (["check", "reference", "--case", "r=0"], "r must be at least 1, not 0"),
        (["check", "reference", "--case", "shape=0x4"], "shape 0x4 is not 2 sizes of at least 1"),
        (["check", "reference", "--case", "shape=4"], "shape 4 is not 2 sizes of at least 1"),
        (
            ["check", "reference", "--case", "specimen=grouped,shape=3x4x3x3"],
            "give even numbers of channels",
        ),
        (["check", "reference", "--case", "specimen=embedding,shape=1x4"], "at least 2 rows"),
        (["check", "reference", "--case", "specimen=tiny,shape=3x4"], "tiny has its own"),
        (["check", "reference", "--case", "dtype=foo"], "dtype cannot be 'foo'; give one of"),
        (["check", "reference", "--case", "alpha=inf"], "alpha must be a positive number"),
        (["check", "reference", "--case", "dropout=1"], "dropout must be at least 0 and less"),
        (["check", "reference", "--case", "device=gpu"], "device cannot be 'gpu'; give cpu"),
        (["check", "reference", "--case", "seed=-1"], "seed must be from 0 to 4294967295"),
        (
            [
                *("check", "reference", "--only", "forward/scaling"),
                *("--case", "dtype=float32", "--dtype", "bfloat16"),
            ],
            "--case: it is one whole point; leave out",
        ),
        (["check", "reference", "--seed", "-1"], "'-1' is no whole number from 0 to"),
        (["check", "reference", "--seed", str(2**32)], "is no whole number from 0 to 4294967295"),
        (["check", "reference", "--limit", "nan"], "--limit: seconds must be more than 0"),
        (["check", "reference", "--limit", "1e300"], "at most 1000000, not '1e300'"),
        (["check", "reference", "--limit", "0"], "--limit: seconds must be more than 0"),
        (["check", "reference", "--known", "absent.toml"], "absent.toml: No such file"),
        (["list", "--only", "mrege"], "did you mean merge?"),
        (["matrix", "--leg", "here", "--", "check", "peft"], "at least two legs"),
        (
            ["matrix", "--leg", "here", "--leg", "peft==0.8.2", "--", "compare"],
            "one of check, bench",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args, line):
    """What is wrong and how to mend it, in one line, with no traceback."""
    done = run(*args)

    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_case_of_the_catalogue_is_one_that_can_be_asked_for():
    """What a failure record gives, `--case` takes."""
    for item in catalogue().values():
        for case in (*item.cases, *item.more_cases):
            assert Case.parse(str(case)) == case


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_case_on_a_device_that_is_not_here_is_wrong_usage():
    """No implementation fails for a card that is not there."""
    done = run("check", "reference", "--only", "forward/scaling", "--case", "device=cuda")

    assert (done.returncode, done.stdout) == (2, "")
    assert "--case: device cuda: not here; have cpu" in done.stderr
    with pytest.raises(UsageError, match=r"^--device cuda: not here; have cpu$"):
        check("reference", only=["forward/scaling"], device="cuda")
    with pytest.raises(UsageError, match=r"^--case: device cuda: not here; have cpu$"):
        check("reference", only=["forward/scaling"], case=Case(device="cuda"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_is_told_what_it_can_show(encoding):
    """What an encoding lacks is a question mark, not a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "list"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"spec version" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("command", ["list", "--help"])
def test_output_that_cannot_be_written_is_one_line(command):
    """A full disk under `> file` is told, and is no success."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "harness.cli", command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 2
    assert "standard output cannot be written (No space left on device)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_output_that_is_closed_is_one_line():
    """`>&-`, as a job without a terminal may have it."""
    command = f"{sys.executable} -m harness.cli list >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr == "lora-harness: standard output is closed; send it elsewhere\n"


def test_check_writes_a_report_that_compares_with_itself(tmp_path):
    """What `check --json` writes, `compare` reads: nothing differs from itself."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path in (old, new):
        assert (
            run("check", "reference", "--only", "forward/scaling", "--json", str(path)).returncode
            == 0
        )
    done = run("compare", str(old), str(new))
    environment = json.loads(old.read_text())["environment"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert environment["threads"]["torch"] == 1, "as it is where the implementation is judged"
    assert environment["cuda"] == torch.version.cuda


def test_the_catalogue_as_json_is_whole(tmp_path):
    """`list --json` holds every spec with its claim, why and source."""
    path = tmp_path / "specs.json"
    assert run("list", "--json", str(path)).returncode == 0
    specs = json.loads(path.read_text())["specs"]

    assert len(specs) >= 60
    for spec in specs:
        assert spec["id"].count("/") == 1
        assert spec["level"] in spec["claim"]
        assert spec["why"]
        assert spec["source"]
