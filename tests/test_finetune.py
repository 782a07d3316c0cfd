"""The documented procedure, end to end: what `lora-harness finetune` makes and proves."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

import harness
from harness import process as processes
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


@pytest.fixture(scope="module", autouse=True)
def started(request, tmp_path_factory):
    """The default command, under way: it works beside the tests that come first, on the other core."""
    if not any("both" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("runs")
    process = subprocess.Popen(
        [*CLI, "--device", "cpu", "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield folder, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the run's own process, too
    process.communicate()


@pytest.fixture(scope="module")
def both(started):
    """The default command, done: the quick recipe for PEFT and then for loralib."""
    folder, process = started
    out, err = process.communicate()
    return folder, subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """A short run in this process: its losses and the adapter it made."""
    from harness import chat
    from harness.losses import curve
    from harness.training import Run

    home = tmp_path_factory.mktemp("short")
    data = home / "some.jsonl"
    rows = chat.dataset("shipped", "train").select(range(32))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(adapter, *overrides, folder=None, resume=False):
        folder = folder or Path(tempfile.mkdtemp(dir=home))
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


@pytest.fixture(scope="module")
def plain(fit):
    """One short run of each implementation, made when first asked for."""
    return functools.cache(fit)


@pytest.mark.parametrize("adapter", ["peft", "loralib", "reference"])
def test_two_runs_give_the_same_losses(fit, plain, adapter):
    """One seed, one machine: the losses are equal to the last digit."""
    first, _, _ = plain(adapter)
    second, _, _ = fit(adapter)

    assert first == second
    assert len(first) == 4


@pytest.mark.parametrize("adapter", ["peft", "loralib"])
def test_resuming_gives_the_losses_of_a_run_that_was_never_stopped(fit, plain, adapter, tmp_path):
    """Two steps, then two more from the checkpoint: bit for bit the losses of four."""
    from harness.run_folder import RunFolder

    whole, _, one = plain(adapter)
    stopped = RunFolder(path=tmp_path)
    shutil.copytree(one.folder.checkpoints / "checkpoint-2", stopped.checkpoints / "checkpoint-2")
    stopped.log.write_text("", encoding="utf-8")

    again, proofs, _ = fit(adapter, folder=tmp_path, resume=True)

    assert stopped.last_checkpoint().name == "checkpoint-4"
    assert again == whole
    assert proofs["finetune/base-unchanged"].outcome == "passed"


def test_resuming_a_finished_run_trains_no_more(fit, plain, tmp_path):
    """Four steps of four: the last checkpoint is loaded, and judged as it stands."""
    from harness.run_folder import RunFolder

    whole, _, one = plain("peft")
    shutil.copytree(one.folder.path, tmp_path, dirs_exist_ok=True)
    log = RunFolder(path=tmp_path).log.read_bytes()

    again, proofs, resumed = fit("peft", folder=tmp_path, resume=True)

    assert (again, resumed.steps) == (whole, 4)
    assert proofs["finetune/optimizer-holds-lora"].outcome == "passed"
    assert [json.loads(one) for one in log.splitlines()][: len(whole)] == RunFolder(
        path=tmp_path
    ).entries()[: len(whole)]


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
def test_gradient_checkpointing_changes_no_loss(fit, plain, adapter, override):
    """Enabled before or after injection, reentrant or not, training is the same, step by step."""
    unchecked, _, _ = plain(adapter)
    extra = ["training_config.gradient_checkpointing=true"] if "kwargs" in override else []

    checkpointed, proofs, _ = fit(adapter, override, *extra)

    assert [round(v, 4) for _, v in checkpointed] == [round(v, 4) for _, v in unchecked]
    assert proofs["finetune/checkpoint-is-lora"].outcome == "passed"


def test_a_single_step_of_warmup_blames_nobody(fit):
    """Its rate is 0: B stays zero, and no loss moves."""
    from harness import merging

    _, proofs, one = fit("reference", "training_config.max_steps=1", "training_config.do_eval=true")

    outcomes = {p.spec.partition("/")[2]: p.outcome for p in proofs.values()}
    names = ("checkpoint-is-lora", "loss-went-down", "eval-loss-went-down")
    assert (one.moved, {outcomes[name] for name in names}) == (False, {"not_run"})
    assert set(outcomes.values()) == {"passed", "not_run"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        assert {p.outcome for p in merging.prove(one, *one.probe())} == {"not_run"}


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


def test_mixed_precision_ends_with_training(fit):
    """What is proved is the model as anyone loads it: the trainer's autocast and fused loss are gone."""
    _, _, one = fit("peft", "model.dtype=bfloat16", "training_config.bf16=true")

    assert [name for name, m in one.model.named_modules() if "forward" in vars(m)] == []


def test_a_rate_too_low_to_lower_the_loss_is_said_and_not_failed():
    """Losses that vary more than the steps can move them are not judged; others are."""
    from harness.losses import loss_went_down, reach

    log = [
        {"step": k, "loss": 3 + 0.1 * (k % 2), "learning_rate": 1e-6, "grad_norm": 1.0}
        for k in range(1, 41)
    ]
    curve = [(entry["step"], entry["loss"]) for entry in log]

    assert reach(log, 10_000) == pytest.approx(40 * 1e-6 * 100)
    assert loss_went_down(curve, reach(log, 10_000)).outcome == "not_run"
    assert loss_went_down([(k, 3 + k / 40) for k, _ in curve], 1.0).outcome == "failed"
    assert loss_went_down([(k, 3 - k / 40) for k, _ in curve], 1.0).outcome == "passed"


@pytest.fixture
def report(monkeypatch, tmp_path):
    """The report of a run whose first process is this one, imports being paid; the second is fresh."""
    from harness import library_log, run
    from harness.run_folder import RunFolder

    monkeypatch.setattr(library_log, "divert", lambda _: None)
    monkeypatch.setattr(library_log, "settle", lambda: None)

    def made(name, *overrides):
        asked = recipe.load(name, ["model.name=tiny", "model.device=cpu", *overrides])
        folder = RunFolder(path=tmp_path / "peft-tiny")
        folder.path.mkdir()
        request = {
            "adapter": "peft",
            "recipe": asked.as_dict(),
            "folder": str(folder.path),
            "resume": False,
            "budget": None,
            "partial": False,
            "start": None,
        }
        folder.request.write_text(json.dumps(request), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own; a run keeps them in library.log
            code = run.main(str(folder.request))
        return code, json.loads(folder.report.read_text("utf-8"))

    return made


def test_the_qlora_notebook_runs_on_a_cpu(report):
    """A base in NF4, with the names that Phi-3 has: it learns, keeps every bit, and loads again exactly."""
    pytest.importorskip("bitsandbytes")

    code, found = report(
        "qlora-notebook",
        'peft_config.target_modules=["qkv_proj","o_proj","gate_up_proj","down_proj"]',
        "training_config.max_steps=10",
        "training_config.learning_rate=5e-3",
        "training_config.logging_steps=1",
        "training_config.eval_strategy=no",
        "training_config.save_strategy=no",
        "data.match_examples=1",
        "data.max_new_tokens=4",
    )

    assert {one["spec"]: one["outcome"] for one in found["results"]} == {
        "finetune/only-lora-trains": "passed",
        "finetune/optimizer-holds-lora": "passed",
        "finetune/checkpoint-is-lora": "passed",
        "finetune/two-stage-load": "not_claimed",
        "finetune/reload-same-logits": "passed",
        "finetune/merged-same-logits": "not_claimed",
        "finetune/merged-same-replies": "not_claimed",
        "finetune/loss-went-down": "passed",
        "finetune/eval-loss-went-down": "passed",
        "finetune/base-unchanged": "passed",
    }
    assert (code, found["verdict"]) == (0, "CONFORMS")


def test_evaluating_a_4_bit_base_leaves_its_gradients_whole():
    """After an evaluation the loss still reaches what lies below a 4-bit layer, on any CPU."""
    pytest.importorskip("bitsandbytes")
    import torch

    from harness import base

    asked = recipe.load("qlora-notebook", ["model.name=tiny", "model.device=cpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = base.load(asked.model)
        layer = model.model.layers[0].self_attn.o_proj
        x = torch.randn(2, layer.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            layer(x)
        model.train()
        x.requires_grad_(True)
        layer(x).float().sum().backward()

    assert x.grad is not None
    assert x.grad.any()


def test_a_4_bit_base_is_loaded_without_a_progress_bar(capfd):
    """In a bench it would stand between the cells."""
    pytest.importorskip("bitsandbytes")
    from harness import base

    asked = recipe.load("qlora-notebook", ["model.name=tiny", "model.device=cpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.load(asked.model)

    assert "Loading" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_a_4_bit_base_without_a_weight_is_told(tmp_path):
    """It would be drawn at random, and trained on."""
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file, save_file

    from harness import base, phi3
    from harness.errors import UsageError

    model = tmp_path / "model"
    shutil.copytree(phi3.directory(), model)
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    name = json.dumps(str(model))
    asked = recipe.load("qlora-notebook", [f"model.name={name}", "model.device=cpu"])

    with pytest.raises(UsageError, match=r"do not fit a Phi3ForCausalLM of .* first at lm_head"):
        base.load(asked.model)


@pytest.mark.slow
def test_the_model_cards_recipe_runs_on_a_cpu(report):
    """Mixed precision and packing: the proofs are of the plain model; too low a rate is said, not failed."""
    code, found = report(
        "model-card",
        "data.name=shipped",
        "model.attn_implementation=sdpa",
        "training_config.max_length=64",
        "training_config.max_steps=4",
        "training_config.logging_steps=1",
        "training_config.save_strategy=no",
        "data.match_examples=1",
        "data.max_new_tokens=4",
    )
    results = {one["spec"].partition("/")[2]: one for one in found["results"]}

    assert results["loss-went-down"]["outcome"] == "not_run"
    assert results["loss-went-down"]["reason"].startswith(
        "the learning rate is too low for so few steps to show it: they can lower the loss by about "
    )
    assert [
        results[name]["outcome"]
        for name in ("two-stage-load", "reload-same-logits", "base-unchanged")
    ] == ["passed"] * 3
    assert (code, found["verdict"]) == (3, "INCOMPLETE")


def test_an_interrupted_run_keeps_its_checkpoint_and_goes_on(tmp_path):
    """Ctrl-C: one line, exit 2, the steps kept; --resume finishes the run."""
    settings = [
        "training_config.max_steps=400",
        "training_config.logging_steps=1",
        "training_config.eval_strategy=no",
        "training_config.do_eval=false",
        "data.match_examples=1",
        "data.max_new_tokens=4",
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


def test_a_folder_called_harness_that_lies_here_is_not_ours(tmp_path, monkeypatch):
    """A user who keeps their runs in `harness/` gets them from us all the same."""
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text("")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "tells_which.py").write_text(
        "from pathlib import Path\nfrom harness import __file__ as found\n\n"
        "def main(path): Path(path).write_text(found)\n"
        "if __name__ == '__main__': main(__import__('sys').argv[1])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    one, other = tmp_path / "one", tmp_path / "other"

    assert processes.run("tells_which", one) == 0
    assert processes.beside("tells_which", other).wait() == 0
    assert one.read_text() == other.read_text() == harness.__file__
