"""The nightly workflow: its issues, its shape, and its commands on a clean checkout."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_samples as samples
import yaml

from harness.cli import main

ROOT = Path(__file__).resolve().parent.parent
SLOW = "Test what is slow"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(name):
    """The commands of a workflow's one job, in their order."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"].values()
    return [step for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_hold_no_expression(path):
    """A command takes what it needs from the environment: it runs as it stands, and injects nothing."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    commands = [step["run"] for job in jobs for step in job.get("steps", ()) if "run" in step]

    assert not [command for command in commands if "${{" in command]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.skipif(shutil.which("npx") is None, reason="needs npx")
@pytest.mark.slow
def test_actionlint_finds_nothing():
    """The workflows pass actionlint, by the command that CI runs."""
    (command,) = re.findall(
        r"run: (npx .*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    )

    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)


GH = """#!/usr/bin/env python3
import json, pathlib, sys
store = pathlib.Path(sys.argv[0]).with_name("issues.json")
issues = json.loads(store.read_text()) if store.exists() else []
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
if words[:2] == ["issue", "create"]:
    issues.append({"number": len(issues) + 1, "title": option("--title"), "open": True, "label": option("--label")})
elif words[:2] == ["issue", "close"]:
    issues[int(words[2]) - 1]["open"] = False
elif words[:2] == ["issue", "list"]:
    print(json.dumps([i for i in issues if i["open"] and i["label"] == option("--label")]))
elif words[:2] != ["label", "create"]:
    sys.exit(f"unknown: {words}")
store.write_text(json.dumps(issues))
"""


def test_an_issue_is_opened_once_and_closed_when_its_row_is_gone(tmp_path, monkeypatch, capsys):
    """Three nights: a spec breaks, stays broken, is mended; one issue opens, stays, closes."""
    gh = tmp_path / "bin" / "gh"
    gh.parent.mkdir()
    gh.write_text(GH)
    gh.chmod(0o755)
    monkeypatch.setenv("PATH", str(gh.parent), prepend=os.pathsep)
    bring = runpy.run_path(str(ROOT / ".github" / "issues.py"))["main"]
    good = samples.check("good")
    seen = []
    for night, outcomes in enumerate(
        ({"merge/no-drift": "failed"}, {"merge/no-drift": "failed"}, {})
    ):
        paths = samples.write(tmp_path, good, samples.check(f"night-{night}", outcomes))
        compared = tmp_path / "compared"
        main(["compare", *map(str, paths), "--json", str(compared / "check-peft.json")])
        bring("cpu-pinned", compared)
        issues = json.loads((gh.parent / "issues.json").read_text())
        seen.append([(issue["title"], issue["open"]) for issue in issues])
    capsys.readouterr()

    title = "cpu-pinned: check-peft: worse: merge/no-drift"
    assert seen == [[(title, True)], [(title, True)], [(title, False)]]


@pytest.mark.parametrize("night", ["nothing compared", "cut off", "no longer there", "blocked"])
def test_an_issue_stays_open_where_its_row_was_not_compared(tmp_path, monkeypatch, capsys, night):
    """A night that says nothing of the row closes nothing."""
    gh = tmp_path / "bin" / "gh"
    gh.parent.mkdir()
    gh.write_text(GH)
    gh.chmod(0o755)
    monkeypatch.setenv("PATH", str(gh.parent), prepend=os.pathsep)
    bring = runpy.run_path(str(ROOT / ".github" / "issues.py"))["main"]
    bad = {"merge/no-drift": "failed"}
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    paths = samples.write(tmp_path, samples.check("good"), samples.check("bad", bad))
    main(["compare", *map(str, paths), "--json", str(first / "check-peft.json")])
    bring("cpu-pinned", first)
    if night != "nothing compared":
        new = samples.check("new", {"merge/no-drift": "blocked"} if night == "blocked" else {})
        new["finished"] = night != "cut off"
        if night == "no longer there":
            new["results"] = [one for one in new["results"] if one["spec"] not in bad]
        paths = samples.write(tmp_path, samples.check("good"), new)
        main(["compare", *map(str, paths), "--json", str(second / "check-peft.json")])

    bring("cpu-pinned", second)
    capsys.readouterr()
    issues = json.loads((gh.parent / "issues.json").read_text())
    assert issues[0]["title"].endswith("worse: merge/no-drift")
    assert issues[0]["open"] is True


@pytest.mark.parametrize(
    ("changes", "code"),
    [((False, False), 0), ((True, False), 1), ((False, True), 1), ((None, False), 0)],
)
def test_a_night_is_red_where_one_comparison_is(tmp_path, changes, code):
    """Any comparison with a worse row turns the step red, whatever comes after; an undecided one none."""
    (command,) = (
        step["run"] for step in steps("leg.yml") if step["name"].startswith("Compare with")
    )
    for index, change in enumerate(changes):
        old, new = samples.check(f"old-{index}"), samples.check(f"new-{index}")
        if change is None:
            new["model"] = "another"
        elif change:
            new["results"][3]["outcome"] = "failed"
        for folder, report in (("last/tonight", old), ("tonight", new)):
            path = tmp_path / "reports/runs" / folder / f"check-{index}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report))
    bin_ = tmp_path / ".venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "lora-harness").write_text(f'#!/bin/sh\nexec {sys.executable} -m harness.cli "$@"\n')
    (bin_ / "lora-harness").chmod(0o755)

    summary = tmp_path / "summary.md"
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", command],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"GITHUB_STEP_SUMMARY": str(summary)},
    )
    assert done.returncode == code
    assert summary.read_text().count("## ") == 2


def test_every_slow_test_but_this_files_own_runs_at_night():
    """The CPU leg selects every test that is marked slow and needs no GPU, less the leg's own."""
    (command,) = (step["run"] for step in steps("leg.yml") if step["name"] == SLOW)
    words = shlex.split(command.replace("\\\n", " "))
    expression = words[words.index("-m") + 1]
    left_out = words[words.index("--deselect") + 1]
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    listed = lambda *more: {  # noqa: E731
        line
        for line in subprocess.run(
            [*collect, *more], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if "::" in line
    }

    assert left_out == "tests/test_nightly.py::test_the_cpu_legs_commands_run_on_a_clean_checkout"
    paths = ["tests/test_nightly.py", "tests/test_report_history.py"]
    chosen = listed("-m", expression, *paths)
    assert left_out in chosen
    assert listed("-m", expression, "--deselect", left_out, *paths) == chosen - {left_out}
    assert chosen - {left_out} == {
        "tests/test_nightly.py::test_actionlint_finds_nothing",
        "tests/test_report_history.py::test_a_year_of_nights_fits_in_a_gibibyte_and_a_page",
    }


def test_every_variable_of_a_leg_is_used():
    """What the leg puts into the environment is read by a command, or by `gh`, which takes its token."""
    (job,) = yaml.safe_load((ROOT / ".github/workflows/leg.yml").read_text())["jobs"].values()
    commands = "\n".join(step["run"] for step in steps("leg.yml"))

    assert {name for name in job["env"] if f"${name}" not in commands} == {"GH_TOKEN"}


@pytest.mark.slow
def test_the_cpu_legs_commands_run_on_a_clean_checkout(tmp_path):
    """Every command of the leg, in order, in a clone with nothing but a machine and an index."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    given = {"TIER": "cpu", "LEG": "pinned"}
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GITHUB_", "GH_", "PYTEST_", "VIRTUAL_ENV"))
    }
    for step in steps("leg.yml"):
        # Whoever runs this test runs the other slow ones already: here they are only found.
        found = {"PYTEST_ADDOPTS": "--collect-only"} if step["name"] == SLOW else {}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]],
            check=False,
            cwd=checkout,
            env=plain | given | found,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (step["name"], done.stdout[-3000:], done.stderr[-3000:])

    pages = sorted(path.name for path in (checkout / "reports/runs/pages").iterdir())
    assert pages == [
        "bench.html",
        "check-loralib.html",
        "check-peft.html",
        "check-reference.html",
        "check-transformers.html",
        "finetune-loralib.html",
        "finetune-peft.html",
        "pytest.html",
    ]
