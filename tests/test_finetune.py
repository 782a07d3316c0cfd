"""The documented procedure, end to end: what `lora-harness finetune` makes and proves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from harness import recipe

CLI = [sys.executable, "-m", "harness.cli", "finetune"]
SHORT = [
    "training_config.max_steps=4",
    "training_config.logging_steps=1",
    "training_config.eval_strategy=no",
    "training_config.do_eval=false",
    "training_config.save_steps=2",
    "training_config.per_device_train_batch_size=4",
    "data.match_examples=2",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The default command: the quick recipe for PEFT and then for loralib."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [*CLI, "--device", "cpu", "--output", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    return folder, done


@pytest.mark.parametrize("adapter", ["peft", "loralib"])
def test_every_documented_property_holds(both, adapter):
    """All ten judgements of the five properties pass, on both implementations."""
    folder, done = both
    report = json.loads((folder / f"{adapter}-tiny.json").read_text("utf-8"))

    assert done.returncode == 0, done.stderr
    assert {one["spec"]: one["outcome"] for one in report["results"]} == dict.fromkeys(
        [
            "finetune/only-lora-trains",
            "finetune/optimizer-holds-lora",
            "finetune/checkpoint-is-lora",
            "finetune/two-stage-load",
            "finetune/reload-same-logits",
            "finetune/merged-same-logits",
            "finetune/merged-same-replies",
            "finetune/loss-went-down",
            "finetune/eval-loss-went-down",
            "finetune/base-unchanged",
        ],
        "passed",
    )
    assert (report["verdict"], report["finished"]) == ("CONFORMS", True)


@pytest.mark.parametrize("adapter", ["peft", "loralib"])
def test_what_was_learned_shows_in_the_replies(both, adapter):
    """Exact match on facts never trained on: at most 5 % before, at least 80 % after."""
    folder, _ = both
    report = json.loads((folder / f"{adapter}-tiny.json").read_text("utf-8"))
    before, after = report["answers"]["before"], report["answers"]["after"]

    assert before["matched"] / before["asked"] <= 0.05
    assert after["matched"] / after["asked"] >= 0.80


def test_the_terminal_is_calm(both):
    """Nothing on standard error, and no line wider than a hundred columns."""
    folder, done = both

    assert done.stderr == ""
    assert [
        line
        for line in done.stdout.replace(str(folder), "").splitlines()
        if len(line) > 100 or "Warning" in line
    ] == []


@pytest.mark.parametrize("adapter", ["peft", "loralib"])
def test_everything_lies_where_the_table_says(both, adapter):
    """Report, adapter in both forms, log and checkpoints are there; no working file is left."""
    folder, _ = both
    made = folder / f"{adapter}-tiny"
    entries = [json.loads(line) for line in (made / "log.jsonl").read_text("utf-8").splitlines()]

    assert {path.name for path in made.iterdir()} == {
        "adapter.pt",
        "adapter.safetensors",
        "checkpoints",
        "library.log",
        "log.jsonl",
        "run.json",
    }
    assert [entry["step"] for entry in entries if "loss" in entry][-1] == 40
    assert list((made / "checkpoints").glob("checkpoint-*/adapter.safetensors"))


def test_a_finished_run_is_not_overwritten_unasked(both, capsys):
    """The same output folder again: one line, exit 2, and the run as it was."""
    from harness import cli

    folder, _ = both
    report = folder / "peft-tiny.json"
    before = report.read_bytes()

    code = cli.main(["finetune", "--adapter", "peft", "--output", str(folder)])

    assert (code, capsys.readouterr().err) == (
        2,
        (
            f"lora-harness finetune: output folder {folder / 'peft-tiny'}: already holds a run; "
            "go on with --resume, or replace it with --overwrite\n"
        ),
    )
    assert report.read_bytes() == before


def test_generate_answers_with_the_trained_adapter(both):
    """The inference part: the base's answer and the adapter's, without training."""
    folder, _ = both

    done = subprocess.run(
        [*CLI, "--generate", "--adapter", "loralib", "--output", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )

    report = json.loads((folder / "loralib-tiny.json").read_text("utf-8"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split(maxsplit=1)[1] == report["answers"]["before"]["reply"]
    assert done.stdout.splitlines()[2].split(maxsplit=2)[2] == report["answers"]["after"]["reply"]


@pytest.fixture
def fit(tmp_path):
    """A short run in this process: its losses and the adapter it made."""
    from harness import chat
    from harness.losses import curve
    from harness.training import Run

    data = tmp_path / "some.jsonl"
    rows = chat.dataset("shipped", "train").select(range(32))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(adapter, *overrides, name="run", resume=False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        asked = recipe.load("quick", [*SHORT, f"data.name={json.dumps(str(data))}", *overrides])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own; a run keeps them in library.log
            one = Run(
                {
                    "recipe": asked.as_dict() | {"model": asked.model | {"device": "cpu"}},
                    "folder": str(folder),
                    "adapter": adapter,
                    "budget": None,
                    "partial": False,
                    "start": None,
                    "resume": resume,
                }
            )
            one.inject()
            proofs = one.fit()
        return curve(one.history, "loss"), {p.spec: p for p in proofs}, one

    return run


@pytest.mark.parametrize("adapter", ["peft", "loralib", "reference"])
def test_two_runs_give_the_same_losses(fit, adapter):
    """One seed, one machine: the losses are equal to the last digit."""
    first, _, _ = fit(adapter, name="first")
    second, _, _ = fit(adapter, name="second")

    assert first == second
    assert len(first) == 4


@pytest.mark.parametrize("adapter", ["peft", "loralib"])
def test_resuming_gives_the_losses_of_a_run_that_was_never_stopped(fit, adapter):
    """Two steps, then two more from the checkpoint: bit for bit the losses of four."""
    from harness.run_folder import RunFolder

    whole, _, one = fit(adapter, name="whole")
    stopped = one.folder.path.with_name("stopped")
    (stopped / "checkpoints").mkdir(parents=True)
    half = one.folder.checkpoints / "checkpoint-2"
    half.rename(stopped / "checkpoints" / half.name)
    (stopped / "log.jsonl").write_text("", encoding="utf-8")

    again, proofs, _ = fit(adapter, name="stopped", resume=True)

    assert RunFolder(path=stopped).last_checkpoint().name == "checkpoint-4"
    assert again == whole
    assert proofs["finetune/base-unchanged"].outcome == "passed"


@pytest.mark.parametrize("adapter", ["peft", "loralib"])
@pytest.mark.parametrize(
    "override",
    [
        "model.gradient_checkpointing=true",
        "training_config.gradient_checkpointing=true",
        "training_config.gradient_checkpointing_kwargs={use_reentrant=true}",
    ],
    ids=["before-injection", "after-injection", "after-reentrant"],
)
def test_gradient_checkpointing_changes_no_loss(fit, adapter, override):
    """Enabled before or after injection, reentrant or not, training is the same, step by step."""
    plain, _, _ = fit(adapter, name="plain")
    extra = ["training_config.gradient_checkpointing=true"] if "kwargs" in override else []

    checkpointed, proofs, _ = fit(adapter, override, *extra, name="checkpointed")

    assert [round(loss, 4) for _, loss in checkpointed] == [round(loss, 4) for _, loss in plain]
    assert proofs["finetune/checkpoint-is-lora"].outcome == "passed"


def test_evaluating_leaves_a_merging_implementation_unmerged(fit):
    """A merging implementation evaluated during training: its base keeps every bit, which merging would not."""
    _, proofs, one = fit(
        "loralib",
        "training_config.do_eval=true",
        "training_config.eval_strategy=steps",
        "training_config.eval_steps=1",
    )

    assert proofs["finetune/base-unchanged"].measured.startswith("0 of ")
    assert proofs["finetune/base-unchanged"].outcome == "passed"
    assert not one.model.training


def test_an_interrupted_run_keeps_its_checkpoint_and_goes_on(tmp_path):
    """Ctrl-C: one line, exit 2, the steps kept; --resume finishes the run."""
    settings = [
        "training_config.max_steps=400",
        "training_config.logging_steps=1",
        "training_config.eval_strategy=no",
        "training_config.do_eval=false",
        "data.match_examples=1",
    ]
    command = [*CLI, "--adapter", "peft", "--device", "cpu", "--output", str(tmp_path)]
    for one in settings:
        command += ["--set", one]
    log = tmp_path / "peft-tiny" / "log.jsonl"
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(1200):
        if process.poll() is not None or (log.is_file() and len(log.read_text("utf-8")) > 200):
            break
        time.sleep(0.1)

    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 2
    assert said.startswith("lora-harness finetune: interrupted; stopped at step ")
    assert said.count("\n") == 1
    assert list((tmp_path / "peft-tiny" / "checkpoints").glob("checkpoint-*/adapter.safetensors"))
    step = int(said.split("at step ")[1].split(";")[0])
    more = [*command, "--resume", "--set", f"training_config.max_steps={step + 2}"]
    done = subprocess.run(more, check=False, capture_output=True, text=True)
    assert f"  step {step + 2}/{step + 2}  loss " in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", ["peft", "loralib"])
def test_every_property_holds_on_mini_on_a_gpu(tmp_path, adapter):
    """Phi-3-mini's real dimensions in bfloat16 on a card: the same judgements pass.

    The weights are random, so that nothing is known before and little after; the properties do not
    depend on that.
    """
    settings = [
        "model.dtype=bfloat16",
        "training_config.bf16=true",
        "training_config.gradient_checkpointing=true",
        "training_config.learning_rate=1e-3",
        "training_config.max_steps=40",
        "training_config.logging_steps=1",
        "training_config.save_strategy=no",
        "data.match_examples=8",
    ]
    command = [*CLI, "--adapter", adapter, "--model", "mini-4k", "--device", "cuda"]
    command += ["--output", str(tmp_path)]
    for one in settings:
        command += ["--set", one]

    done = subprocess.run(command, check=False, capture_output=True, text=True)

    report = json.loads((tmp_path / f"{adapter}-mini-4k.json").read_text("utf-8"))
    assert {r["spec"]: r["measured"] for r in report["results"] if r["outcome"] != "passed"} == {}
    assert done.returncode == 0, done.stderr
