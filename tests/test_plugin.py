"""The plugin's doors: `--adapter`, `parametrize_with_specs`, and a GPU tier that is never green by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness import options, spec_case, tally
from harness.failure import Failure
from harness.judge import Result
from harness.report.schema import read
from harness.spec import catalogue


@pytest.fixture
def pytest_in(tmp_path, request):
    """Run pytest in an empty folder outside the tree, the strangers importable."""
    (tmp_path / "strangers.py").write_text((request.path.parent / "strangers.py").read_text())

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )

    run.folder = tmp_path
    return run


def test_adapter_option_judges_with_no_test_file(pytest_in):
    """`pytest --adapter` needs nothing in the implementer's tree but the shim."""
    done = pytest_in("--adapter", "strangers:correct", "--spec", "forward/scaling", "-v")

    assert done.returncode == 0, done.stdout
    assert "on trial: strangers:correct" in done.stdout
    assert "strangers:correct::forward/scaling PASSED" in done.stdout


def test_a_failed_spec_is_a_failed_test_with_its_record(pytest_in):
    """The failure record is what pytest shows, with no frames of ours."""
    done = pytest_in("--adapter", "strangers:wrong_shapes", "--spec", "targeting/exact-coverage")

    assert done.returncode == 1
    assert "reproduce  lora-harness check strangers:wrong_shapes" in done.stdout
    assert "harness/" not in done.stdout.split("short test summary")[0].split("FAILURES")[-1]


def test_own_suite_takes_three_lines(pytest_in):
    """The decorator turns one test into a test a spec."""
    (pytest_in.folder / "test_mine.py").write_text(
        "from harness import parametrize_with_specs\n\n"
        '@parametrize_with_specs("strangers:correct", only=["forward/scaling", "forward/output-dtype"])\n'
        "def test_conforms(spec_case): spec_case.run()\n"
    )
    done = pytest_in("-v", "--junit-xml", "out.xml")

    assert done.returncode == 0, done.stdout
    assert "test_conforms[forward/scaling] PASSED" in done.stdout
    assert (
        '<property name="spec" value="forward/scaling"'
        in (pytest_in.folder / "out.xml").read_text()
    )


def test_an_adapter_that_is_not_there_is_a_usage_error(pytest_in):
    """One line, exit 2."""
    done = pytest_in("--adapter", "nowhere:adapter", "--spec", "forward/scaling")

    assert done.returncode == 2
    assert "nowhere" in done.stdout + done.stderr


def test_a_run_that_judged_nothing_is_not_green(pytest_in):
    """Everything skipped is INCOMPLETE."""
    done = pytest_in("--adapter", "strangers:claims_little", "--spec", "forward/embedding")

    assert done.returncode == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_gpu_tier_without_a_gpu_is_incomplete(faked):
    """`pytest -m gpu` never exits 0 where there is no GPU, unless that is allowed."""
    faked.write(
        "import pytest\n\n@pytest.mark.gpu\ndef test_on_the_card(): assert False\n", only=()
    )

    done = faked("-m", "(gpu)", "--tier", "core")

    assert done.returncode == 3, done.stdout
    assert "INCOMPLETE: no CUDA device" in done.stdout
    assert faked("-m", "gpu", "--allow-no-gpu").returncode == 0


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("gpu", True),
        ("(gpu)", True),
        ("gpu and slow", True),
        ("slow or gpu", True),
        ("not gpu", False),
        ("not (gpu)", False),
        ("not gpu and not slow", False),
        ("not slow", False),
        ("gpus", False),
        ("", False),
        ("gpu and", False),
    ],
)
def test_the_gpu_tier_is_read_off_the_expression_as_pytest_reads_it(words, asked):
    """Asked for is what is selected for being marked `gpu`."""
    config = SimpleNamespace(option=SimpleNamespace(markexpr=words))

    assert options.gpu_tier(config) is asked


FAKE = """
import json
import harness.spec_case
from harness import tally
from harness.failure import Failure
from harness.judge import Result

OUTCOMES = {outcomes!r}

class Fake(tally.Tally):
    def judge(self, adapter, tier):
        self.named[self.called(adapter)] = {{"name": "fake", "version": "1"}}

    def result(self, adapter, tier, item):
        self.judge(adapter, tier)
        outcome = getattr(adapter, "outcome", OUTCOMES.get(item.id, "passed"))
        told = [Failure(kind="value", case="", expected="one", actual="two")]
        found = Result(
            spec=item.id, level=item.level, outcome=outcome, failures=told * (outcome == "failed")
        )
        name = self.called(adapter)
        return found, json.dumps([name, self.named[name], found.as_dict()])

harness.spec_case.Tally = Fake
"""
MUST, OTHER = "forward/scaling", "forward/output-dtype"
SHOULD = next(item.id for item in catalogue().values() if item.level == "SHOULD")


@pytest.fixture
def faked(pytest_in):
    """Run pytest where nothing is judged: every spec has the outcome it is given."""

    def become(**outcomes):
        ids = {"must": MUST, "other": OTHER, "should": SHOULD}
        given = {ids[name]: outcome for name, outcome in outcomes.items()}
        (pytest_in.folder / "conftest.py").write_text(FAKE.format(outcomes=given))

    def write(text="", only=(MUST, OTHER, SHOULD)):
        if only:
            text += (
                "\nfrom harness import parametrize_with_specs\n\n"
                f"@parametrize_with_specs('acme:lora', only={list(only)!r})\n"
                "def test_conforms(spec_case): spec_case.run()\n"
            )
        (pytest_in.folder / "test_mine.py").write_text(text)

    become()
    pytest_in.become, pytest_in.write = become, write
    return pytest_in


DOOR = ["--adapter", "acme:lora", *(f"--spec={id_}" for id_ in (MUST, OTHER, SHOULD))]


@pytest.mark.parametrize("door", [DOOR, []], ids=["--adapter", "own suite"])
@pytest.mark.parametrize(
    ("outcomes", "code", "told"),
    [
        ({"should": "failed"}, 0, "SHOULD not met"),
        ({"other": "blocked"}, 3, "INCOMPLETE: 1 of 2 required specs ran"),
        ({"must": "failed", "other": "not_run"}, 1, "DOES NOT CONFORM"),
        (dict.fromkeys(("must", "other", "should"), "not_claimed"), 3, "INCOMPLETE: 0 of 0"),
    ],
)
def test_the_exit_code_is_the_verdicts(faked, door, outcomes, code, told):
    """Through either door pytest ends as `check` does."""
    faked.become(**outcomes)
    faked.write()

    done = faked(*door)

    assert done.returncode == code, done.stdout
    assert told in done.stdout


def test_a_test_of_ones_own_that_fails_is_exit_1(faked):
    """What is incomplete does not hide it."""
    faked.become(must="blocked")
    faked.write("def test_mine(): assert False\n")

    assert faked().returncode == 1


def test_the_adapter_option_leaves_ones_own_tests_alone(faked):
    """With no path named they are not even imported; -k chooses among the specs."""
    faked.write("import not_a_module\n", only=())

    done = faked(*DOOR, "-k", "scaling")
    listed = faked(*DOOR, "--collect-only")

    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 deselected" in done.stdout
    assert listed.returncode == 0, listed.stdout
    assert "3 tests collected" in listed.stdout


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--spec", "mrege"], "--spec mrege: no spec and no family is called that; did you mean"),
        (["--tier", "whole"], "--tier whole: no such tier; give smoke, core, full"),
        (["--report", "."], "cannot be written (Is a directory)"),
    ],
)
def test_wrong_usage_is_exit_2(faked, args, line):
    """One line says what is wrong, as on the command line."""
    done = faked("--adapter", "acme:lora", *args)

    assert done.returncode == 2
    assert line in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stdout + done.stderr


def test_a_name_that_matches_nothing_in_the_own_suite_is_told_without_our_frames(faked):
    """The line stands where pytest tells what it could not collect."""
    faked.write(only=["mrege"])

    done = faked()

    assert done.returncode == 2
    assert "parametrize_with_specs: only=mrege: no spec and no family" in done.stdout
    assert "harness/" not in done.stdout


def test_the_header_says_what_is_on_trial_where_something_is(faked):
    """Name and version, at a width a terminal has; nothing in somebody else's project."""
    faked.write()
    own = faked()
    faked.write("def test_mine(): pass\n", only=())
    foreign = faked()

    assert "on trial: acme:lora (fake 1); model tiny" in own.stdout
    assert "on trial" not in foreign.stdout


def test_a_suite_of_somebody_elses_is_left_alone(pytest_in):
    """Its options are its own, its GPU tests run, and `-m gpu` is its business."""
    (pytest_in.folder / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--device', default='theirs')\n"
    )
    (pytest_in.folder / "test_theirs.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\n"
        "def test_it(pytestconfig): assert pytestconfig.getoption('--device') == 'theirs'\n"
    )

    done = pytest_in("-m", "gpu")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_several_test_processes_tell_one_verdict(faked):
    """With xdist the results are collected where the session is told."""
    pytest.importorskip("xdist")

    done = faked(*DOOR, "-n", "2", "--report", "run.json")

    assert done.returncode == 0, done.stdout
    assert "CONFORMS: 2 of 2 required specs ran" in done.stdout
    assert len(read(faked.folder / "run.json")["results"]) == 3


def test_several_test_processes_tell_why_there_is_no_adapter(pytest_in):
    """A worker that ends is started again: the tests say the line, and the session ends."""
    pytest.importorskip("xdist")
    (pytest_in.folder / "test_mine.py").write_text(
        "from harness import parametrize_with_specs\n\n"
        f"@parametrize_with_specs('nowhere:adapter', only=['{MUST}', '{OTHER}'])\n"
        "def test_conforms(spec_case): spec_case.run()\n"
    )

    done = pytest_in("-n", "1")

    assert done.returncode == 1
    assert "adapter 'nowhere:adapter': no module 'nowhere' here" in done.stdout
    assert "2 failed" in done.stdout
    assert "another exception" not in done.stdout
    assert "node down" not in done.stdout


def test_objects_of_one_name_have_a_verdict_each(faked):
    """One class with two settings: the one that holds does not hide the one that does not."""
    (faked.folder / "test_mine.py").write_text(
        "from types import SimpleNamespace\nfrom harness import parametrize_with_specs\n\n"
        f"def of(outcome): return parametrize_with_specs(\n"
        f"    SimpleNamespace(name='acme', outcome=outcome), only=['{MUST}'])\n\n"
        "@of('failed')\ndef test_a(spec_case): spec_case.run()\n\n"
        "@of('passed')\ndef test_b(spec_case): spec_case.run()\n"
    )

    done = faked("--report", "run.json")
    report = read(faked.folder / "run.json")

    assert "acme (fake 1)\n  DOES NOT CONFORM: 1 of 1" in done.stdout
    assert "acme #2 (fake 1)\n  CONFORMS: 1 of 1" in done.stdout
    assert report["verdict"] == "DOES NOT CONFORM"
    assert [row["adapter"] for row in report["results"]] == ["acme", "acme #2"]


def test_of_two_tiers_of_one_spec_the_worse_counts():
    """A case of the full tier that fails is not undone by the core tier's."""
    kept = tally.Tally()
    for outcome in ("failed", "passed"):
        result = Result(spec=MUST, level="MUST", outcome=outcome)
        kept.take(json.dumps(["acme", {"name": "acme", "version": "1"}, result.as_dict()]))

    assert kept.worst.verdict == "DOES NOT CONFORM"


def test_a_result_outlives_the_journey_between_processes():
    """A row of a test's report gives the verdict that the result itself would have given."""
    failure = Failure(kind="value", case="r=3", expected="one", actual="two")
    result = Result(spec=MUST, level="MUST", outcome="failed", cases=2, failures=[failure])
    named = {"name": "fake", "version": "1"}
    kept = tally.Tally()

    row = kept.take(json.dumps(["acme:lora", named, result.as_dict()]))

    assert kept.worst.verdict == "DOES NOT CONFORM"
    assert kept.verdicts()["acme:lora"].failed[0].failures == [failure]
    assert row == {**json.loads(json.dumps(result.as_dict())), "adapter": "acme:lora"}
    assert not spec_case.State(SimpleNamespace(workerinput={}, option=SimpleNamespace())).tells, (
        "a worker of xdist leaves the telling to the session"
    )


def test_the_tier_of_the_decorator_is_judged(monkeypatch):
    """`tier="full"` means the further cases too."""
    asked = []

    class Points:
        def __init__(self, *args):
            asked.append(args[-1])

    made = SimpleNamespace(name="fake", version="1")
    monkeypatch.setattr(tally, "Points", Points)
    monkeypatch.setattr(tally, "Judge", lambda *_: made)
    (cases,) = spec_case.parametrize_with_specs("acme:lora", only=[MUST], tier="full").args[1:]

    tally.Tally().judge(cases[0].adapter, cases[0].tier)

    assert asked == ["full"]


@pytest.mark.parametrize(("first", "finished"), [("failed", False), ("passed", True)])
def test_a_report_of_a_run_that_stopped_early_is_unfinished(faked, first, finished):
    """`-x` leaves the rest unjudged; what ran to its end is finished, though its last test failed."""
    last = "passed" if first == "failed" else "failed"
    faked.become(other=first, must=last)

    done = faked("--adapter", "acme:lora", "--spec", OTHER, "--spec", MUST, "-x", "--report", "a")
    report = read(faked.folder / "a")

    assert done.returncode == 1
    assert report["tests"] == {"collected": 2, "failed": 1}
    assert report["finished"] is finished


def test_a_report_is_written_when_asked(pytest_in):
    """`--report` writes the run as one file that the harness reads."""
    done = pytest_in(
        "--adapter", "strangers:correct", "--spec", "forward/scaling", "--report", "run.json"
    )
    report = read(pytest_in.folder / "run.json")

    assert done.returncode == 0
    assert report["finished"]
    assert report["adapter"] == {"name": "reference", "version": report["adapter"]["version"]}
    assert [row["outcome"] for row in report["results"]] == ["passed"]
