"""The command line is light, and wrong usage is one line and exit 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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


def test_check_writes_a_report_that_compares_with_itself(tmp_path):
    """What `check --json` writes, `compare` reads: nothing differs from itself."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path in (old, new):
        assert (
            run("check", "reference", "--only", "forward/scaling", "--json", str(path)).returncode
            == 0
        )
    done = run("compare", str(old), str(new))

    assert done.returncode == 0, done.stdout + done.stderr


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
