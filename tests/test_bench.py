"""The bench: its grid, cells that die, resuming, and the paper's claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from harness.cli import main
from harness.errors import UsageError
from harness.measure import claims
from harness.measure.cell import Cell, grid
from harness.report.schema import read

AXES = {
    "adapter": ["peft", "loralib"],
    "rank": [4, 8],
    "dtype": ["float32", "nf4"],
    "model": ["tiny"],
    "batch": [1],
    "sequence": [64],
    "checkpointing": [False],
}

KILLER = """
import os, signal
from harness.adapters.reference import Reference

class Killed(Reference):
    name = "killed"
    def inject(self, model, config):
        os.kill(os.getpid(), signal.SIGKILL)

class Raises(Reference):
    name = "raises"
    def inject(self, model, config):
        raise RuntimeError("not today")
"""


def test_the_grid_has_each_combination_and_its_baselines():
    """Two adapters by two ranks by two dtypes; base and full before them, no full in 4 bits."""
    cells = grid(**AXES)

    assert len(cells) == 2 * 2 * 2 + 2 + 1
    assert [c.adapter for c in cells if c.dtype == "nf4" and c.r == 0] == ["base"]
    assert [str(c) for c in cells[:3]] == [
        "base float32 tiny 1×64",
        "full float32 tiny 1×64",
        "peft r 4 float32 tiny 1×64",
    ]


@pytest.mark.parametrize("axis", list(AXES))
def test_a_grid_with_no_cell_is_wrong_usage(axis):
    """Whichever axis is empty."""
    with pytest.raises(UsageError, match=r"^the grid has no cell"):
        grid(**{**AXES, axis: []})


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rank", ""], "the grid has no cell; give each of its axes at least one value"),
        (
            ["--budget", "much"],
            "--budget: 'much' is no size; write one such as 8GiB, 500MB or 1024",
        ),
        (["--resume"], "--resume: needs the report to go on with; give it as --json PATH"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capsys, arguments, line):
    """Nothing is measured before."""
    code = main(["bench", *arguments])

    assert code == 2
    assert capsys.readouterr().err == f"lora-harness bench: {line}\n"


def test_a_model_too_large_for_this_machine_is_refused(capsys, monkeypatch):
    """medium-4k in float32 wants 52 GiB; told before anything is allocated."""
    psutil = pytest.importorskip("psutil")
    free = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    code = main(["bench", "--model", "medium-4k", "--adapter", "peft"])

    assert code == 2
    assert capsys.readouterr().err == (
        "lora-harness bench: --model medium-4k in float32: needs 52.01 GiB of real tensors and this "
        "machine has 1.00 GiB free; lora-harness plan measures it without any\n"
    )


def bench(folder, *arguments):
    """The command in a process of its own, where killed.py can be imported."""
    (folder / "killed.py").write_text(KILLER)
    return subprocess.run(
        [
            *(sys.executable, "-m", "harness.cli", "bench"),
            *("--repeats", "2", "--sequence", "8", "--rank", "2"),
            *arguments,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_cell_is_a_row_and_resuming_runs_it_again(tmp_path):
    """Kill -9 of one cell and an exception in another: told, and the rest goes on."""
    path = tmp_path / "bench.json"
    adapters = "reference,killed:Killed,killed:Raises,peft"
    first = bench(tmp_path, "--adapter", adapters, "--json", str(path))
    report = read(path)
    lost = {row["subject"]: row["why"] for row in report["timings"] if row["value"] is None}

    assert first.returncode == 1, first.stderr
    assert report["finished"]
    assert lost == {
        "killed:Killed": "killed by SIGKILL",
        "killed:Raises": "RuntimeError: not today",
    }
    done = {row["subject"] for row in report["timings"] if row["value"] is not None}
    assert done == {"base", "full", "reference", "peft"}
    assert "The LoRA paper's claims" in first.stdout
    assert "the same operations" in first.stdout

    again = bench(tmp_path, "--adapter", adapters, "--json", str(path), "--resume")

    assert "4 of 6 cells are there already" in again.stdout
    assert [r for r in read(path)["timings"] if r["value"] is not None] == [
        r for r in report["timings"] if r["value"] is not None
    ]


def test_a_claim_is_never_told_without_its_conditions():
    """Every line of the table says rank, dtype, size, checkpointing, device and optimizer."""
    ours, full, base = (
        Cell(adapter=name, r=r) for name, r in (("peft", 8), ("full", 0), ("base", 0))
    )

    def row(cell, phase, metric, value):
        return {
            "subject": cell.adapter,
            "model": "tiny",
            "phase": phase,
            "conditions": json.loads(json.dumps(cell.conditions)),
            "metric": metric,
            "value": value,
        }

    step = "training-step"
    told = claims.table(
        {
            "timings": [
                row(ours, step, "seconds", 0.8),
                row(full, step, "seconds", 1.0),
                row(ours, "merged-forward", "seconds", 0.101),
                row(base, "evaluation-forward", "seconds", 0.1),
            ],
            "memory": [
                row(ours, step, "peak_bytes", 2**20),
                row(full, step, "peak_bytes", 3 * 2**20),
            ],
            "counters": [
                row(ours, step, "checkpoint_bytes", 1024),
                row(full, step, "checkpoint_bytes", 1024 * 500),
                row(ours, "merged-forward", "operations", 100),
                row(base, "evaluation-forward", "operations", 100),
            ],
        }
    )

    assert [line[0] for line in told] == list(claims.PUBLISHED)
    assert [line[2] for line in told] == [
        "3.00× less: 3.00 MiB → 1.00 MiB",
        "+25.0 % tokens/s, -20.0 % time",
        "500.0× smaller: 500.00 KiB → 1.00 KiB",
        "the same operations (100); 101.0 ms, base 100.0 ms",
    ]
    assert {line[3] for line in told} == {
        "peft tiny r 8, float32, 1×64, no checkpointing, cpu, AdamW"
    }
