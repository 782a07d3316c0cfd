"""Sins of an implementation that a fine-tuning run must not let pass, and what it must not blame."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import LoraConfig, checkpoint, finetune, recipe, registry, run, run_folder
from harness.cli import main
from harness.errors import UsageError
from harness.report.schema import Recorder, read
from harness.run_folder import RunFolder

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=("o_proj",))


def injected(adapter, dtype="float32", config=CONFIG):
    """Tiny with LoRA whose B is not zero; its fingerprints and its bare modules."""
    import torch

    from harness import folded, injection, phi3

    base = phi3.load("tiny", dtype=dtype)
    marks, shells = checkpoint.digests(base.state_dict()), folded.shells(base, config)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapter.inject(base, config)
    with torch.no_grad():
        for parts in adapter.factors(model).values():
            for one in parts:
                one.B.normal_(std=0.02)
    return injection.evaluating(model, adapter), marks, shells


def sin_of(adapter, merge, dtype="float32"):
    """What is said against a merge, by weights and bits."""
    import torch

    from harness import folded, injection, merging, reload

    model, marks, shells = injected(adapter, dtype)
    ids = torch.arange(8)[None]
    unmerged = reload.probe(model, ids, torch.ones_like(ids))
    kept = folded.before(model, adapter, marks, shells)
    dtypes = folded.coarsest(adapter, model)
    injection.release(model)
    merge(adapter, model)
    found = folded.after(model, adapter, kept, dtypes)
    merged = reload.probe(model.eval(), ids, torch.ones_like(ids))
    return merging.sin(found, unmerged, merged), found


def forgets_a_layer(adapter, model):
    """PEFT's merge, of all modules but one."""
    from peft.tuners import lora

    layers = [one for one in model.modules() if isinstance(one, lora.LoraLayer)]
    for one in layers[1:]:
        one.merge()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of what it renamed
@pytest.mark.parametrize(
    "name", ["peft", "loralib", "reference", "hooked", "parametrised", "transposed"]
)
def test_a_correct_merge_is_seen_in_every_weight(name, monkeypatch):
    """Each module's weight is read, changed and W + ΔW, in half precision too."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "implementations")
    adapter = registry.resolve(name if name in registry.BUILT_IN else f"{name}:adapter")

    said, found = sin_of(adapter, lambda adapter, model: adapter.merge(model), "bfloat16")

    assert (said, len(found.right)) == ("", 12)


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (lambda *_: None, "merge did nothing: no weight and no bit of the logits changed"),
        (forgets_a_layer, "merge left out 1 modules: ['model.layers.0.self_attn.o_proj']"),
    ],
    ids=["nothing", "a layer forgotten"],
)
def test_a_merge_that_leaves_something_out_is_seen(merge, said):
    """In bfloat16, where the logits' budget hides a layer."""
    assert sin_of(registry.resolve("peft"), merge, "bfloat16")[0] == said


def test_a_merge_that_keeps_the_weight_is_judged_by_its_logits():
    """`base_weight` may go on giving W: where nothing that is read changes, a changed bit is enough."""
    adapter = registry.resolve("peft")
    model, _, _ = injected(adapter)
    frozen = {name: adapter.base_weight(model, name).clone() for name in adapter.factors(model)}
    adapter.base_weight = lambda _, name: frozen[name]

    said, found = sin_of(adapter, lambda adapter, model: adapter.merge(model))

    assert (said, found.hidden, len(found.idle)) == ("", True, 12)


def test_an_effect_within_ten_budgets_proves_no_merge():
    """With no weight to read, so small an effect is vacuous; with every weight read, it is judged."""
    import torch

    from harness.folded import Folded
    from harness.merging import same_logits

    truth = torch.linspace(1, 2, 8, dtype=torch.float64)
    given = {
        "unmerged": truth,
        "merged": truth,
        "truth": truth,
        "noise": torch.full_like(truth, 1e-3),
        "base": truth - 0.02,
        "dtype": torch.bfloat16,
    }

    unread = same_logits(weights=Folded(modules=1, unseen=["fc"]), **given)
    read = same_logits(weights=Folded(modules=1, right=["fc"]), **given)

    assert (unread.outcome, unread.reason.partition(":")[0]) == ("not_run", "vacuous")
    assert read.outcome == "passed"


@pytest.mark.parametrize("spoilt", ["noise", "truth", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_budget_that_is_not_finite_proves_no_merge(spoilt, value):
    """Logits that are off by 100 are not let pass by noise that is NaN."""
    import torch

    from harness.folded import Folded
    from harness.merging import same_logits

    truth = torch.linspace(1, 2, 8, dtype=torch.float64)
    given = {"truth": truth, "noise": torch.full_like(truth, 1e-3), "base": truth - 9}
    given[spoilt] = torch.where(truth > 1.5, value, given[spoilt])
    off = truth + 100 if spoilt == "noise" else given["truth"]

    found = same_logits(
        weights=Folded(modules=1, right=["fc"]),
        unmerged=off,
        merged=off,
        dtype=torch.bfloat16,
        **given,
    )

    assert found.outcome == "not_run"
    assert found.reason.startswith("the true logits are not finite, ")


@pytest.mark.parametrize(
    ("unmerged", "merged", "outcome", "measured"),
    [
        (True, True, "passed", "1 of 2 the same, 1 tied"),
        (False, True, "failed", "1 of 2 the same"),
        (True, False, "failed", "1 of 2 the same"),
    ],
)
def test_replies_may_part_at_a_tie(unmerged, merged, outcome, measured):
    """Where either model might as well have said the other's token, rounding alone chose."""
    import torch

    from harness.chat import Exchange
    from harness.replies import same_replies

    before = [Exchange([1], [4, 5, 7]), Exchange([2], [4, 7])]
    after = [before[0], Exchange([2], [4, 6, 7])]
    near = torch.zeros(2, 8, dtype=torch.bool)
    near[1, 6] = unmerged
    near_too = torch.zeros(2, 8, dtype=torch.bool)
    near_too[1, 7] = merged

    found = same_replies(before, after, 0.1, [near, near], lambda _: near_too)

    assert (found.outcome, found.measured) == (outcome, measured)


def test_the_likeliest_tokens_are_those_that_are_said():
    """With no budget each place of a greedy reply has its own token, and no other."""
    from harness import chat, phi3
    from harness.replies import likeliest

    model, own = phi3.load("tiny"), chat.tokenizer()
    asked, _ = chat.prompts(chat.dataset("shipped", "eval").select(range(3)))

    for one in chat.exchanges(model, own, asked, 8):
        assert likeliest(model, one, 0.0).nonzero().tolist() == [*map(list, enumerate(one.said))]
        assert likeliest(model, one, float("inf")).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of what it renamed
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_seen_and_told(value, tmp_path):
    """Transformers would log it as 0, the lowest loss there is."""
    from harness.losses import loss_went_down
    from harness.trainer import settings

    config, _ = settings(recipe.load("quick"), tmp_path, device="cpu")
    found = loss_went_down([(step, 3 - step / 40) for step in range(40)] + [(40, value)])

    assert config.logging_nan_inf_filter is False
    assert (found.outcome, found.measured) == ("failed", "1 not finite")
    assert found.reason.startswith(f"it is {value} at step 40; ")


def test_a_checkpoint_of_steps_without_a_rate_proves_nothing_of_b(tmp_path):
    """B is zero as it must be, and nobody is blamed; a tensor that is left out is named all the same."""
    import torch

    from harness import proof

    adapter = registry.resolve("reference")
    model, marks, _ = injected(adapter)
    name = next(iter(adapter.factors(model)))

    def judged(moved):
        return proof.checkpoint_is_whole(model, marks, tmp_path, moved=moved)

    with torch.no_grad():
        for parts in adapter.factors(model).values():
            for one in parts:
                one.B.zero_()
    state = adapter.state_dict(model)
    checkpoint.write(state, tmp_path)
    still, trained = judged(False), judged(True)
    with torch.no_grad():
        for parts in adapter.factors(model).values():
            for one in parts:
                one.B.normal_()
    state = dict(adapter.state_dict(model))
    del state[next(key for key in state if name in key and "lora_B" in key)]
    checkpoint.write(state, tmp_path)
    short = judged(False)

    assert (still.outcome, still.reason) == ("not_run", proof.STILL)
    assert (trained.outcome, short.outcome) == ("failed", "failed")
    assert short.reason.startswith(f"lacks ['{name}.")
    assert short.reason.endswith("lora_B'], has beside what trains []")


def test_another_scaling_than_the_config_gives_is_seen():
    """alpha·r in the place of alpha/r: the truth, which takes the factors' own, cannot show it."""
    from harness import proof

    adapter = registry.resolve("peft")
    model, _, _ = injected(adapter)
    expected = dict.fromkeys(adapter.factors(model), 4 * 128)
    assert proof.only_lora_trains(model, adapter, CONFIG, expected, {}).outcome == "passed"
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] = 32.0

    found = proof.only_lora_trains(model, adapter, CONFIG, expected, {})

    assert found.outcome == "failed"
    assert found.reason.startswith("another scaling than alpha and r give in 12: ")


def test_other_parts_than_those_asked_for_are_seen():
    """Parts q and k in the place of q and v: as many numbers, in other rows."""
    from harness import proof

    asked, made = (
        LoraConfig(
            r=4, lora_alpha=8, target_modules=("qkv_proj",), enable_lora={"qkv_proj": layout}
        )
        for layout in (
            ((64, True), (64, False), (64, True)),
            ((64, True), (64, True), (64, False)),
        )
    )
    adapter = registry.resolve("reference")
    model, _, _ = injected(adapter, config=made)
    expected = dict.fromkeys(adapter.factors(model), 4 * 128 * 2)
    assert proof.only_lora_trains(model, adapter, made, expected, {}).outcome == "passed"

    found = proof.only_lora_trains(model, adapter, asked, expected, {})

    assert found.outcome == "failed"
    assert found.reason.startswith("adapts other rows than enable_lora names in [")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"enable_lora": {"qkvproj": ((192, True),)}},
            "peft_config.enable_lora: no module that target_modules names is called qkvproj; those are o_proj",
        ),
        (
            {"target_modules": ("self_attn",)},
            "peft_config.target_modules: model.layers.0.self_attn is a Phi3Attention, to which LoRA is not put; this model's linear layers are o_proj, qkv_proj, gate_up_proj, down_proj, lm_head",
        ),
        (
            {
                "target_modules": "all-linear",
                "enable_lora": {"qkv_proj": ((64, True), (64, False))},
            },
            "peft_config.enable_lora: the parts of model.layers.0.self_attn.qkv_proj are 128 rows together, the layer has 192",
        ),
        (
            {"modules_to_save": ("lm_hed",)},
            "peft_config.modules_to_save: no module with parameters is called lm_hed; this model's are model, embed_tokens, layers, self_attn, o_proj, qkv_proj, mlp, gate_up_proj, down_proj, input_layernorm, post_attention_layernorm, norm, lm_head",
        ),
    ],
)
def test_a_name_that_matches_nothing_is_told(given, said):
    """A slip in a name would leave undone what the recipe asks for, without a word."""
    import dataclasses

    from harness import injection, phi3

    with pytest.raises(UsageError) as error:
        injection.fitted(phi3.load("tiny"), dataclasses.replace(CONFIG, **given), partial=False)

    assert str(error.value) == said


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_steps_of_warmup_beat_a_ratio(tmp_path):
    """As in transformers, where both are given; and it is said."""
    from harness.trainer import settings

    asked = recipe.load("quick", ["training_config.warmup_steps=30"])
    assert asked.training_config["warmup_ratio"] == 0.1

    found, notes = settings(asked, tmp_path, device="cpu")

    assert found.get_warmup_steps(1000) == 30
    assert notes == ["training_config.warmup_ratio 0.1 gives way to warmup_steps=30"]


def test_a_note_of_the_trainers_is_told(capsys):
    """It comes too late to be told with the others."""
    from harness.training import Run

    one = Run.__new__(Run)
    one.notes = ["before"]

    one._note("training_config.output_dir 'x' is recorded")

    assert one.notes == ["before", "training_config.output_dir 'x' is recorded"]
    assert capsys.readouterr().out == "  note: training_config.output_dir 'x' is recorded\n"


def test_a_module_to_save_may_be_named_with_a_dot():
    """`model.norm` is the norm before the head, and its weight may train."""
    from harness import proof

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=("o_proj",), modules_to_save=("model.norm",)
    )
    adapter = registry.resolve("peft")
    model, _, _ = injected(adapter, config=config)
    expected = dict.fromkeys(adapter.factors(model), 4 * 128)

    whole = {"model.norm.weight": 64}
    assert proof.only_lora_trains(model, adapter, config, expected, whole).outcome == "passed"


@pytest.mark.parametrize("name", ["peft", "reference"])
def test_a_module_to_save_that_does_not_train_is_seen(name):
    """Its count is nowhere in r·(in + out)."""
    from harness import phi3, proof
    from harness.injection import trainable

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=("o_proj",), modules_to_save=("model.norm", "lm_head")
    )
    adapter = registry.resolve(name)
    base = phi3.load("tiny")
    expected, whole = proof.expected_counts(base, config), proof.whole_counts(base, config)
    model, _, _ = injected(adapter, config=config)
    assert proof.only_lora_trains(model, adapter, config, expected, whole).outcome == "passed"
    for key, parameter in trainable(model).items():
        parameter.requires_grad_("lm_head" not in key)

    found = proof.only_lora_trains(model, adapter, config, expected, whole)

    assert found.outcome == "failed"
    assert found.reason == "does not train 1 of modules_to_save: ['lm_head.weight']"


@pytest.mark.parametrize(
    ("last", "outcome"), [(3.2, "passed"), (3.6, "not_run"), (3.7, "not_run"), (4.1, "failed")]
)
def test_a_change_within_the_noise_blames_nobody(last, outcome):
    """Plainly down, down and up by less than the noise, and plainly up."""
    from harness.losses import loss_went_down

    losses = [3.6, 3.7] * 10 + [last - 0.01, last + 0.01]

    assert loss_went_down(list(enumerate(losses))).outcome == outcome


def test_a_falling_loss_is_hardly_ever_failed_for_its_noise():
    """It falls by as much as it varies; of 500 draws in 20 losses 1 in 100 may look like a rise."""
    import random

    from harness.losses import loss_went_down

    draw = random.Random(0)
    runs = [[(k, 3 - k / 20 + draw.gauss(0, 1)) for k in range(20)] for _ in range(500)]
    failed = sum(loss_went_down(run).outcome == "failed" for run in runs)

    assert failed <= 5


@pytest.mark.parametrize(
    ("after", "learned", "outcome"),
    [
        (2.9, True, "passed"),
        (3.1, True, "not_run"),
        (3.1, False, "failed"),
        (3.0, True, "failed"),
        (float("nan"), True, "failed"),
    ],
)
def test_overfitting_blames_nobody(after, learned, outcome):
    """Up while the training loss is not is not judged; up with it, and not moved at all, fail."""
    from harness.losses import eval_loss_went_down

    assert eval_loss_went_down(3.0, after, learned=learned).outcome == outcome
    assert eval_loss_went_down(float("nan"), after, learned=learned).outcome == "not_run"


def test_a_wrapper_that_can_only_be_called_is_asked_token_by_token():
    """Without `generate`, the greedy replies are the same, of prompts of unlike length."""
    from torch import nn

    from harness import chat, phi3

    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, **given):
            return self.inner(**given)

    model, own = phi3.load("tiny"), chat.tokenizer()
    asked, _ = chat.prompts(chat.dataset("shipped", "eval").select(range(6)))

    assert chat.replies(Plain(model), own, asked, 8) == chat.replies(model, own, asked, 8)


# -- the process ---------------------------------------------------------------------------------


def request(folder, **given):
    """What a run is asked, written where it looks for it."""
    asked = recipe.load("quick", ["model.device=cpu"])
    folder.path.mkdir(parents=True, exist_ok=True)
    whole = {"adapter": "peft", "recipe": asked.as_dict(), "folder": str(folder.path)}
    whole |= {"resume": False, "budget": None, "partial": False, "start": None} | given
    folder.request.write_text(json.dumps(whole), encoding="utf-8")
    return folder.request


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_ends_early_has_judged_nothing(code, monkeypatch, capsys, tmp_path):
    """`os._exit(0)` in an implementation: exit 1, and it is said."""
    monkeypatch.setattr(finetune, "_process", lambda *_: code)
    folder = RunFolder(path=tmp_path / "x-tiny")

    assert finetune.run(recipe.load("quick"), "x:y", folder=folder) == 1
    assert capsys.readouterr().err == (
        f"lora-harness finetune: x:y: its process ended with exit code {code} before it was judged; "
        "an implementation that ends the process does not conform\n"
    )


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (
            SystemExit(0),
            1,
            "lora-harness finetune: peft failed: SystemExit: 0; the traceback is in ",
        ),
        (
            KeyboardInterrupt(),
            2,
            "lora-harness finetune: interrupted; training was done, the proofs were not; ",
        ),
    ],
    ids=["sys.exit", "Ctrl-C in the proofs"],
)
def test_what_was_trained_outlives_what_ends_the_run(  # noqa: PLR0917  # half of them pytest's
    raised, code, said, monkeypatch, capsys, tmp_path
):
    """An implementation that exits has failed; an interruption keeps the adapter."""
    from harness import library_log

    monkeypatch.setattr(library_log, "divert", lambda _: None)
    folder = RunFolder(path=tmp_path / "peft-tiny")
    path = request(folder)

    def after_training(*_):
        (folder.path / "adapter.safetensors").write_bytes(b"x")
        raise raised

    monkeypatch.setattr(run, "_run", after_training)

    assert run.main(str(path)) == code
    assert capsys.readouterr().err.startswith(said)
    assert (folder.path / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    ("injecting", "kind", "code", "said"),
    [
        (True, RuntimeError, 1, "peft failed: RuntimeError: no; the traceback is in "),
        (False, RuntimeError, 2, "model, data or recipe: RuntimeError: no; mend it, or "),
        (
            True,
            type("OutOfMemoryError", (RuntimeError,), {}),
            2,
            "the GPU's memory is used up (no); --set ",
        ),
    ],
    ids=["after injection", "before injection", "no memory"],
)
def test_only_what_the_implementation_does_is_its_failure(  # noqa: PLR0917  # half of them pytest's
    injecting, kind, code, said, monkeypatch, capsys, tmp_path
):
    """Before LoRA is put in, it is the input's; and a full card is nobody's sin."""
    from harness import library_log

    monkeypatch.setattr(library_log, "divert", lambda _: None)
    folder = RunFolder(path=tmp_path / "peft-tiny")
    path = request(folder)

    def breaks(_request, _folder, held):
        held.append(SimpleNamespace(injecting=injecting, steps=0))
        raise kind("no")

    monkeypatch.setattr(run, "_run", breaks)

    assert run.main(str(path)) == code
    assert capsys.readouterr().err.startswith(f"lora-harness finetune: {said}")


def test_sigterm_is_handed_to_the_child_which_ends_in_order(tmp_path):
    """The child takes it as Ctrl-C; the parent waits and returns its code."""
    (tmp_path / "patient.py").write_text(
        textwrap.dedent(
            """
            import pathlib, time
            def main(path):
                try:
                    pathlib.Path(path).write_text("ready")
                    time.sleep(60)
                except KeyboardInterrupt:
                    pathlib.Path(path).write_text("kept")
                    return 2
            """
        ),
        encoding="utf-8",
    )
    mark = tmp_path / "mark"
    code = (
        "import sys, pathlib; from harness import process; "
        f"sys.exit(process.run('patient', pathlib.Path({str(mark)!r})))"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    for _ in range(600):
        if mark.exists() and mark.read_text() == "ready":
            break
        time.sleep(0.05)

    parent.send_signal(signal.SIGTERM)

    assert parent.wait(timeout=30) == 2
    assert mark.read_text() == "kept"


def test_the_copy_of_the_report_grows_with_it(tmp_path):
    """`--json`: unfinished from the first row on, whatever lay there before."""
    copy = tmp_path / "copy.json"
    copy.write_text('{"finished": true}', encoding="utf-8")
    recorder = run._recorder({"json": str(copy)})

    with recorder(tmp_path / "own.json", kind="finetune", environment={}) as record:
        assert json.loads(copy.read_text("utf-8"))["finished"] is False
        record.add("notes", "so far")
        assert json.loads(copy.read_text("utf-8"))["notes"] == ["so far"]

    assert copy.read_bytes() == (tmp_path / "own.json").read_bytes()


@pytest.mark.parametrize("kept", [True, False])
def test_an_older_report_is_not_this_run_s_before_it_has_one(kept, monkeypatch, tmp_path):
    """While the model loads, and after kill -9, `--json` is unfinished; on exit 2 it is as it was."""
    path = tmp_path / "run.json"
    if kept:
        with Recorder(path, kind="finetune", verdict="CONFORMS"):
            pass
    before = path.read_bytes() if kept else None
    seen = []

    def process(_, request):
        asked = json.loads(request.read_text("utf-8"))
        seen.append(read(Path(asked["json"])))
        return 2

    monkeypatch.setattr(finetune, "_process", process)
    code = main(["finetune", "--adapter", "peft", "--json", str(path), "--output", str(tmp_path)])

    assert code == 2
    assert [(one["finished"], one["verdict"], one["model"]) for one in seen] == [
        (False, None, "tiny")
    ]
    assert (path.read_bytes() if path.exists() else None) == before


# -- the folder ----------------------------------------------------------------------------------


def old_run(tmp_path):
    """A run, and beside it in the folder something of the user's."""
    folder = RunFolder(path=tmp_path / "peft-tiny")
    request(folder)
    (folder.checkpoints / "checkpoint-2").mkdir(parents=True)
    (folder.checkpoints / "checkpoint-2" / "adapter.pt").write_bytes(b"old")
    (folder.path / "notes.txt").write_text("mine", encoding="utf-8")
    folder.report.write_text("{}", encoding="utf-8")
    return folder, {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_to_be_replaced_comes_back_where_the_new_one_comes_to_nothing(monkeypatch, tmp_path):
    """Exit 2 before the first step: every file as it was."""
    folder, before = old_run(tmp_path)
    monkeypatch.setattr(finetune, "_process", lambda *_: 2)

    assert finetune.run(recipe.load("quick"), "peft", folder=folder) == 2

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("code", [1, -9])
def test_a_run_that_breaks_down_before_its_first_step_replaces_nothing(
    code, monkeypatch, capsys, tmp_path
):
    """Its adapter, report and log come back, the log with what a message sends the reader to."""
    folder, before = old_run(tmp_path)
    with Recorder(folder.report, kind="finetune", verdict="CONFORMS"):
        pass
    log = folder.path / "library.log"
    log.write_text("old\n", encoding="utf-8")
    before |= {folder.report: folder.report.read_bytes(), log: b"old\nnew\n"}

    def breaks(*_):
        log.write_text("new\n", encoding="utf-8")
        Recorder(folder.report, kind="finetune")
        return code

    monkeypatch.setattr(finetune, "_process", breaks)

    given = ["--adapter", "peft", "--overwrite", "--output", str(tmp_path)]
    assert main(["finetune", *given]) == (1 if code == 1 else 2)

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert "CONFORMS" not in capsys.readouterr().out  # the old table is not told for the new run


def test_a_replaced_run_goes_and_what_is_the_users_stays(tmp_path):
    """From the first step on the old run is gone; what no run wrote never moves."""
    folder, _ = old_run(tmp_path)

    run_folder.put_aside(folder)
    run_folder.forget(folder)

    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [folder.path / "notes.txt"]


def test_the_newest_run_is_one_of_the_same_implementation(monkeypatch, tmp_path):
    """The folder of `mine:peft` ends as peft's does."""
    monkeypatch.chdir(tmp_path)
    for name, adapter in (("1-peft-tiny", "peft"), ("2-mine-peft-tiny", "mine:peft")):
        request(RunFolder(path=run_folder.DEFAULT / name), adapter=adapter)

    found = run_folder.place("peft", "tiny", output=None, resume=True, overwrite=False)

    assert found.path.name == "1-peft-tiny"


@pytest.mark.parametrize("content", ['{"recipe": {}}', "5", "[]", "{"])
def test_a_request_that_is_not_a_runs_is_told(content, tmp_path):
    """Anything else in run.json: one line."""
    folder = RunFolder(path=tmp_path)
    folder.request.write_text(content, encoding="utf-8")

    with pytest.raises(UsageError, match="give the folder of a run"):
        folder.asked()


def test_a_log_is_taken_back_to_the_checkpoint(tmp_path):
    """What comes again is not told twice; a missing log is told in one line."""
    folder = RunFolder(path=tmp_path)
    folder.log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n', encoding="utf-8")

    folder.rewind(2)

    assert folder.entries() == [{"step": 1}, {"step": 2}]
    folder.log.unlink()
    with pytest.raises(UsageError, match=r"log\.jsonl is missing or damaged; start afresh"):
        folder.rewind(2)


def test_a_checkpoint_cut_short_is_told(tmp_path):
    """optimizer.pt without its end: one line before anything is loaded."""
    import torch

    (tmp_path / "trainer_state.json").write_text("{}", encoding="utf-8")
    path = tmp_path / "optimizer.pt"
    torch.save({"a": torch.zeros(100)}, path)
    checkpoint.check_whole(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])

    with pytest.raises(UsageError, match=r"optimizer\.pt is damaged"):
        checkpoint.check_whole(tmp_path)


def test_a_parametrised_weight_is_found_in_its_place():
    """Where torch's own parametrisation moved it."""
    injected = {
        "inner.fc.parametrizations.weight.original": "bits",
        "inner.fc.lora.weight": "other",
    }

    assert checkpoint.base_keys({"fc.weight": "bits"}, injected) == {
        "fc.weight": "inner.fc.parametrizations.weight.original"
    }


@pytest.mark.parametrize(("count", "kept", "held"), [(25, 23, 2), (4, 3, 1), (1, 1, 1)])
def test_a_single_file_is_parted(count, kept, held, tmp_path):
    """Every tenth conversation is held out and said so; one alone is both, which is said too."""
    from harness import chat

    rows = chat.dataset("shipped", "train").select(range(count))
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    train, evaluated, notes = chat.splits(path)

    assert (len(train), len(evaluated), len(notes)) == (kept, held, 1)
    assert count == 1 or not {str(row) for row in train} & {str(row) for row in evaluated}


def test_titles_and_replies_are_as_wide_as_the_terminal(monkeypatch, tmp_path):
    """At 60 columns nothing is wider, but for what is copied whole."""
    monkeypatch.setenv("COLUMNS", "60")
    answer = {"prompt": "Why? " * 40, "reply": "Because. " * 40, "matched": 1, "asked": 2}
    report = {
        "adapter": {"name": "an-implementation", "version": "1.2.3.post4"},
        "model": "tiny",
        "verdict": "CONFORMS BUT FOR KNOWN FAILURES",
        "ran": 9,
        "required": 10,
        "results": [],
        "answers": {"before": answer, "after": answer},
    }

    lines = finetune.told(report, RunFolder(path=tmp_path / "x")).splitlines()

    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 60
    assert sum(line.startswith("prompt") for line in lines) == 1


def test_the_table_breaks_between_words_on_a_narrow_terminal(monkeypatch):
    """At 80 columns no line is wider, and no word is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    rows = [("merged and unmerged: the replies", "not judged", "3.1e-05 and 2.9e-05 off", "1 of 2")]
    words = " ".join(rows[0]).split()

    found = finetune._table(rows * 2, ("property", "holds", "measured", "allowed"))

    assert max(map(len, found.splitlines())) <= 80
    assert set(words) <= set(found.split())
