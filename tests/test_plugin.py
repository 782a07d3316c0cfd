"""The plugin's doors: `--adapter`, `parametrize_with_specs`, and a GPU tier that is never green by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


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
def test_the_gpu_tier_without_a_gpu_is_incomplete(pytest_in):
    """`pytest -m gpu` never exits 0 where there is no GPU, unless that is allowed."""
    (pytest_in.folder / "test_gpu.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_on_the_card(): assert False\n"
    )

    done = pytest_in("-m", "gpu")

    assert done.returncode == 3
    assert "INCOMPLETE" in done.stdout
    assert pytest_in("-m", "gpu", "--allow-no-gpu").returncode == 0


def test_a_report_is_written_when_asked(pytest_in):
    """`--report` writes the run as one file that the harness reads."""
    from harness.report.schema import read

    done = pytest_in(
        "--adapter", "strangers:correct", "--spec", "forward/scaling", "--report", "run.json"
    )
    report = read(pytest_in.folder / "run.json")

    assert done.returncode == 0
    assert report["finished"]
    assert [row["outcome"] for row in report["results"]] == ["passed"]
