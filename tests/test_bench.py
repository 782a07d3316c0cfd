"""The bench: its grid, cells that die, resuming, and the paper's claims."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from harness import base, phi3, registry
from harness.cli import main, parser
from harness.errors import UsageError
from harness.measure import claims, clock, paired, process, resume
from harness.measure.bench import _excused
from harness.measure.bench import command as bench_command
from harness.measure.cell import Cell, _model_settings, grid
from harness.measure.counters import counting
from harness.measure.memory import require_room
from harness.measure.phases import PHASES
from harness.report import schema
from harness.report.compare import compare
from harness.report.schema import Recorder, read

AXES = {
    "adapter": ["peft", "loralib"],
    "rank": [4, 8],
    "dtype": ["float32", "nf4"],
    "model": ["tiny"],
    "batch": [1],
    "sequence": [64],
    "checkpointing": [False],
}

CELLS = [Cell(adapter="base", r=0), Cell(adapter="full", r=0), Cell(adapter="peft")]

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
def test_a_value_given_twice_is_run_once(axis):
    """The cell is the same."""
    assert grid(**{**AXES, axis: 2 * AXES[axis]}) == grid(**AXES)


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
        (["--threads", "0"], "--threads: 0; give a whole number from 1 on"),
        (["--repeats", "0"], "--repeats: 0; give a whole number from 1 on"),
        (["--device", "mps"], "--device mps: a bench knows cpu and cuda; give one of them"),
        (["--aa", "--adapter", ""], "--adapter: is empty; give --aa one value"),
        (["--aa", "--rank", ""], "--rank: is empty; give --aa one value"),
        (["--aa", "--rank", "2,4"], "--rank 2,4: --aa times one point; give one value"),
        (
            ["--aa", "--rank", "2", "--rank", "4"],
            "--rank 2,4: --aa times one point; give one value",
        ),
        (
            ["--against", "peft", "--repeats", "3"],
            "--repeats: is of the grid, not of a pair; leave it out of --against",
        ),
        *(
            (
                [option, value],
                f"{option}: is of a pair, not of the grid; add --against ADAPTER, or --aa",
            )
            for option, value in (
                ("--python", "python"),
                ("--against-python", "python"),
                ("--seconds", "5"),
                ("--margin", "0.1"),
            )
        ),
        (
            ["--aa", "--checkpointing", "on"],
            "--checkpointing: is of the grid, not of a pair; leave it out of --aa",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capsys, arguments, line):
    """Nothing is measured before."""
    code = main(["bench", *arguments])

    assert code == 2
    assert capsys.readouterr().err == f"lora-harness bench: {line}\n"


def test_the_margin_s_help_tells_what_lies_between(capsys):
    """From half of it on a change may be called worse: who sets a margin must know."""
    with pytest.raises(SystemExit):
        main(["bench", "--help"])

    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--margin MARGIN more than this is not the same, less than half of it no change; between, "
        "either may be told (default: 0.02)"
    ) in said


@pytest.mark.parametrize("seconds", [math.inf, math.nan, -1.0, 0.0])
@pytest.mark.parametrize("option", ["limit", "seconds"])
def test_a_time_that_is_none_is_wrong_usage(option, seconds):
    """Neither endless nor negative, whoever calls."""
    args = parser().parse_args(["bench"])
    setattr(args, option, seconds)
    with pytest.raises(UsageError, match=rf"^--{option}: .* give a time above zero"):
        bench_command(args)


@pytest.mark.parametrize("more", [[], ["--aa"]])
def test_a_model_nobody_knows_is_wrong_usage(capsys, more):
    """Grid or pair: told before anything is measured."""
    assert main(["bench", "--model", "nonesuch", *more]) == 2
    assert capsys.readouterr().err.startswith("lora-harness bench: model 'nonesuch': unknown")


@pytest.mark.parametrize("more", [[], ["--aa"]])
def test_a_gpu_that_is_not_there_is_wrong_usage(capsys, monkeypatch, more):
    """The pair as the grid."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    assert main(["bench", "--device", "cuda", *more]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_four_bits_without_their_library_are_wrong_usage(capsys, monkeypatch):
    """It names the extra that brings it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    assert main(["bench", "--dtype", "nf4"]) == 2
    assert "pip install '.[quantized]'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (40, "signal 40")])
def test_a_cell_killed_in_the_middle_of_its_answer_is_a_row(monkeypatch, number, name):
    """The pipe then raises OSError, not EOFError; a real-time signal has no name."""

    def half_an_answer(_cell, answer):
        os.write(answer.fileno(), b"\0\0\0\x64 and no more")
        os.kill(os.getpid(), number)

    monkeypatch.setattr(process, "_child", half_an_answer)

    assert process.in_process(Cell(adapter="base"), limit=60) == (None, f"killed by {name}")


def test_a_driver_that_hangs_costs_one_number(monkeypatch):
    """What the cell has measured by then is kept; the driver's count is left out."""

    def hangs(command, **_):
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", hangs)

    assert clock._driver_bytes() is None


def test_what_the_driver_says_is_read(monkeypatch):
    """In MiB, by process."""
    lines = f"1, 30\n{os.getpid()}, 512\n"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, lines)
    )

    assert clock._driver_bytes() == 512 * 2**20


def test_ctrl_c_is_the_parent_s_to_answer(monkeypatch, capfd):
    """The terminal sends it to the cell, too, which would die of it with a traceback."""

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(process, "measure", interrupted)
    monkeypatch.setattr(
        registry, "resolve", lambda _: interrupted() or SimpleNamespace(version="1")
    )

    assert process.in_process(Cell(adapter="base"), limit=60) == (None, "")
    assert process.versions(["peft"], "cpu") == {"peft": "1"}
    assert capfd.readouterr().err == ""


def test_a_cell_that_is_interrupted_is_not_waited_for(monkeypatch):
    """It is deaf to Ctrl-C, and goes on."""

    def child(_cell, answer):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(0.2)  # by then the parent waits
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(process, "_child", child)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        process.in_process(Cell(adapter="base"), limit=60)

    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("adapter", "why", "excused"),
    [
        ("full", "out of memory: CUDA out of memory", True),
        ("base", "out of memory: CUDA out of memory", True),
        ("full", "killed by SIGKILL", True),
        ("peft", "killed by SIGKILL", False),
        ("full", "killed by SIGSEGV", False),
        ("peft", "out of memory: CUDA out of memory", False),
        ("full", "RuntimeError: no", False),
        ("peft", "not claimed: peft does not claim float16", True),
    ],
)
def test_a_card_too_small_for_the_rows_without_lora_is_no_failure(adapter, why, excused):
    """That is what LoRA is for; its own cells must fit."""
    assert _excused(Cell(adapter=adapter), why) is excused


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("the memory format is not supported"), "RuntimeError"),
    ],
)
def test_out_of_memory_is_told_from_other_words_of_memory(error, kind):
    """What excuses a cell is a lack of memory alone."""
    assert process._kind(error) == kind


def a_row(cell, metric, value, **more):
    phase = "evaluation-forward" if cell.adapter == "base" else "training-step"
    return {
        "subject": cell.adapter,
        "version": "1" if cell.adapter == "peft" else None,
        "model": cell.model,
        "phase": phase,
        "conditions": cell.conditions,
        "metric": metric,
        "value": value,
    } | more


def a_report(*cells):
    """A whole report of these cells, as far as resuming reads it."""
    shown = ("seconds", "tokens_per_second", "share_of_limit")
    return {
        "timings": [a_row(cell, name, 1.0) for cell in cells for name in shown],
        "memory": [a_row(cell, "peak_bytes", 1) for cell in cells],
        "counters": [
            a_row(cell, name, 1) for cell in cells for name in ("operations", "python_calls")
        ],
    }


def test_a_cell_is_kept_under_its_own_version_only():
    """Measured under another release, it is measured again; the base has none."""
    cells = [Cell(adapter="base", r=0), Cell(adapter="peft")]
    before = a_report(*cells)

    assert list(resume.kept(before, cells, {"peft": "1"})) == [resume.identity(c) for c in cells]
    assert list(resume.kept(before, cells, {"peft": "2"})) == [resume.identity(cells[0])]


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"phase": None},
        {"conditions": {"r": [8]}},
        {"conditions": None},
        {"value": "NaN"},
        {"value": None},
    ],
)
def test_rows_that_are_not_whole_are_measured_again(change):
    """A valid report may hold less than a bench writes, or something else."""
    cell = Cell(adapter="peft")
    before = a_report(cell)
    before["timings"][0] |= change
    del before["memory"][0]["version"]

    assert resume.kept(before, [cell], {"peft": "1"}) == {}


def test_a_cell_from_before_injection_was_counted_is_measured_again():
    """Kept beside new ones, it would lack their rows, and a comparison would call them removed."""
    cell = Cell(adapter="peft")
    before = a_report(cell)
    before["counters"] = [row for row in before["counters"] if row["metric"] != "python_calls"]

    assert resume.kept(before, [cell], {"peft": "1"}) == {}


def test_another_machine_or_library_keeps_nothing():
    """What is the machine's load is no change; a library, a thread or a processor is."""
    now = {
        "machine": {"cpu": "a", "load": 1},
        "libraries": {"torch": {"version": "2"}},
        "threads": {"torch": 1},
    }

    assert resume.changes({**now, "machine": {"cpu": "a", "load": 5}}, now) == []
    assert resume.changes({**now, "machine": {"cpu": "b"}}, now) == ["the machine"]
    assert resume.changes({**now, "libraries": {}}, now) == ["the libraries"]
    assert resume.changes({**now, "threads": {"torch": 2}}, now) == ["the threads"]
    assert resume.changes({}, now) == ["the machine", "the libraries", "the threads"]
    # Counters hang on what counts.
    assert resume.changes({**now, "harness": {"commit": "a"}}, now) == ["the harness"]


@pytest.mark.parametrize(
    ("row", "lost"),
    [({}, "reference r 2"), ({"conditions": {"slowdown": 0.0}}, "reference")],
)
def test_resuming_never_drops_what_the_grid_does_not_ask_for(
    tmp_path, monkeypatch, capsys, row, lost
):
    """Another rank's cells, or a pair's answer: measured for minutes, and gone with the file."""
    path = tmp_path / "bench.json"
    before = a_report(*CELLS)
    before["timings"].append(a_row(Cell(adapter="reference", r=2), "seconds", 1.0) | row)
    with Recorder(path, kind="bench", **before):
        pass
    held = path.read_bytes()
    monkeypatch.setattr(process, "in_process", None)
    code = main(["bench", "--adapter", "peft", "--resume", "--json", str(path)])

    assert code == 2
    assert capsys.readouterr().err == (
        f"lora-harness bench: --resume {path}: holds 1 cell that this grid does not ask for and "
        f"would lose, first {lost}; ask for it too, or give another --json\n"
    )
    assert path.read_bytes() == held


def test_resuming_replaces_the_report_by_a_full_one(tmp_path, monkeypatch):
    """A kill at any moment loses no cell that was there."""
    path = tmp_path / "bench.json"
    with Recorder(path, kind="bench", **a_report(*CELLS)):
        pass
    monkeypatch.setattr(resume, "changes", lambda *_: [])
    monkeypatch.setattr(process, "versions", lambda *_: {"peft": "1"})
    monkeypatch.setattr(process, "warm", lambda _: None)
    seen = []
    write = schema.replace
    monkeypatch.setattr(
        schema, "replace", lambda *a, **k: (write(*a, **k), seen.append(len(read(path)["timings"])))
    )

    assert main(["bench", "--adapter", "peft", "--resume", "--json", str(path)]) == 0
    assert set(seen) == {9}


def test_a_budget_on_the_cpu_says_that_it_binds_nothing(tmp_path, monkeypatch, capsys):
    """In the terminal and in the report."""
    monkeypatch.setattr(process, "versions", lambda *_: {"peft": "1"})
    monkeypatch.setattr(process, "warm", lambda _: None)
    monkeypatch.setattr(process, "in_process", lambda *_, **__: (None, "not claimed: no"))
    path = tmp_path / "bench.json"
    code = main(["bench", "--adapter", "peft", "--budget", "1MiB", "--json", str(path)])

    assert code == 3  # nothing was measured
    assert "--budget: is enforced on a GPU only" in capsys.readouterr().out
    assert read(path)["notes"][0].startswith("--budget: is enforced on a GPU only")


def test_full_fine_tuning_trains_base_weights():
    """In its peak they are no adapters; the gradients and moments are what they are."""
    model = torch.nn.Linear(8, 8)
    with counting(model, trained="base weights") as count:
        model(torch.ones(1, 8))
    peak = count.result().peak

    assert peak["base weights"] == 4 * 72
    assert peak["adapters"] == 0


@pytest.fixture
def free(monkeypatch):
    """Sets the GiB that this machine has free."""
    psutil = pytest.importorskip("psutil")
    now = psutil.virtual_memory()

    def have(gib):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: now._replace(available=int(gib * 2**30))
        )

    return have


def test_a_model_too_large_for_this_machine_is_refused(capsys, free):
    """medium-4k in float32 wants 52 GiB; told before anything is allocated."""
    free(1)
    code = main(["bench", "--model", "medium-4k", "--adapter", "peft"])

    assert code == 2
    assert capsys.readouterr().err == (
        "lora-harness bench: --model medium-4k in float32: needs 52.01 GiB of real tensors and this "
        "machine has 1.00 GiB free; lora-harness plan measures it without any\n"
    )


@pytest.mark.parametrize("asked", [["--aa"], ["--adapter", "peft", "--against", "loralib"]])
def test_a_pair_wants_room_for_both_sides(capsys, free, monkeypatch, asked):
    """Each is a process with a base of its own, which live side by side."""
    monkeypatch.setattr(paired, "compare", None)
    free(20)
    code = main(["bench", "--model", "mini-4k", *asked])

    assert code == 2
    assert "mini-4k in float32: needs 28.47 GiB" in capsys.readouterr().err


def test_full_fine_tuning_without_room_is_not_started(capsys, free, monkeypatch):
    """Weights, gradients and two moments of each: where LoRA fits, that is told and is no failure."""
    started = []

    def in_process(cell, **_):
        started.append(cell.adapter)
        rows = {"timings": ("seconds", "tokens_per_second", "share_of_limit")}
        rows |= {"memory": ("peak_bytes",), "counters": ("operations",)}
        return {name: [a_row(cell, m, 1.0) for m in metrics] for name, metrics in rows.items()}, ""

    monkeypatch.setattr(process, "in_process", in_process)
    monkeypatch.setattr(process, "versions", lambda *_: {"peft": "1"})
    monkeypatch.setattr(process, "warm", lambda _: None)
    free(20)
    code = main(["bench", "--model", "mini-4k", "--adapter", "peft"])

    assert code == 0
    assert started == ["base", "peft"]
    assert "out of memory: --model mini-4k in float32: needs 56.94 GiB" in capsys.readouterr().out


def test_a_4_bit_base_of_a_card_is_made_in_the_machines_memory(monkeypatch, free):
    """Whole, it is four times what the card and the budget are asked for."""
    cell = Cell(adapter="peft", model="mini-4k", dtype="nf4", device="cuda")
    made = []

    def load(_name, *, device, **_):
        made.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(phi3, "load", load)
    monkeypatch.setattr(base, "find_spec", lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        base.load(_model_settings(cell))
    free(1)

    assert made == ["cpu"]
    with pytest.raises(UsageError, match=r"^--model mini-4k in nf4: needs 7\.12 GiB"):
        require_room("mini-4k", "nf4", "cuda")
    require_room("mini-4k", "float32", "cuda")


def bench(folder, *arguments, **environment):
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
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


GROWN = """
import os
import torch
from harness.adapters.peft import Peft

SIZE, MORE = (1000, 3) if os.environ.get("GROWN") else (1, 0)

class Grown(Peft):
    def inject(self, model, config):
        self.kept = torch.ones(SIZE)
        return super().inject(model, config)

    def merge(self, model):
        super().merge(model)
        for _ in range(MORE):
            torch.ones(1)
"""


def test_every_phase_is_counted_and_what_grew_is_told(tmp_path):
    """Of two runs under two hash seeds, an injection and a merge that grew are worse, and no other row."""
    (tmp_path / "grown.py").write_text(GROWN)
    paths = [tmp_path / f"{name}.json" for name in ("old", "new")]

    def run(seed):
        arguments = ("--adapter", "grown:Grown", "--json", str(paths[seed]))
        return bench(tmp_path, *arguments, PYTHONHASHSEED=str(seed), GROWN="1" * seed)

    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(run, range(2)))
    for done in runs:
        assert done.returncode == 0, done.stderr
        assert "injection" not in done.stdout
    found = compare(*map(read, paths))
    rows = {row.name: row for row in found.rows if row.verdict not in {None, "same"}}
    counted = {
        (row["phase"], row["metric"])
        for row in read(paths[0])["counters"]
        if row["subject"] == "grown:Grown"
    }

    metrics = ("operations", "flops", "allocated_bytes", "saved_bytes", "python_calls")
    assert counted >= set(itertools.product(PHASES, metrics))
    assert set(rows) == {
        "grown:Grown injection allocated_bytes",
        "grown:Grown injection peak_bytes",
        "grown:Grown injection peak_bytes other",
        "grown:Grown merge allocated_bytes",
        "grown:Grown merge operations",
    }
    assert {row.verdict for row in rows.values()} == {"worse"}
    assert rows["grown:Grown merge operations"].why.endswith(": aten.ones.default +3")
    assert main(["compare", *map(str, paths)]) == 1


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


PATCHER = """
import torch
from harness.adapters.reference import Reference as Patches

linear = torch.nn.functional.linear
torch.nn.functional.linear = lambda *a: linear(*a) + 0
"""


def test_an_adapter_that_patches_torch_patches_its_own_cells_alone(tmp_path):
    """It is imported in their processes; the base's operations are the same with and without it."""
    (tmp_path / "patcher.py").write_text(PATCHER)
    counts = []
    for adapter in ("patcher:Patches", "reference"):
        path = tmp_path / "bench.json"
        done = bench(tmp_path, "--adapter", adapter, "--json", str(path))
        assert done.returncode == 0, done.stderr
        counts.append(
            {
                row["subject"]: row["value"]
                for row in read(path)["counters"]
                if row["metric"] == "operations" and row["phase"] == "evaluation-forward"
            }
        )

    assert counts[0]["base"] == counts[1]["base"]
    assert counts[0]["patcher:Patches"] > counts[1]["reference"]


def test_a_claim_is_never_told_without_its_conditions():
    """Rank, dtype, size, checkpointing, device and optimizer: once, where all cells share them."""
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
    report = {
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

    told = claims.measured(report)
    assert [one.claim for one in told] == list(claims.PUBLISHED)
    assert [one.found for one in told] == [
        "3.00× less: 3.00 MiB → 1.00 MiB",
        "+25.0 % tokens/s, -20.0 % time",
        "500.0× smaller: 500.00 KiB → 1.00 KiB",
        "the same operations (100); 101.0 ms, base 100.0 ms",
    ]
    head = claims.tell(report).partition("\n")[0]
    for section in report.values():
        section += [r | {"subject": "loralib"} for r in section if r["subject"] == "peft"]
    two = claims.tell(report)
    assert head.endswith("(peft, tiny, r 8, float32, 1×64, no checkpointing, cpu, AdamW)")
    assert two.startswith("The LoRA paper's claims, and what was measured here (tiny, r 8,")
    assert "\n  peft     3.00× less" in two
    assert "\n  loralib  3.00× less" in two
