"""What a user may do wrong with `lora-harness finetune`: one line, exit 2, nothing half-written."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from harness import cli, finetune, library_log, phi3, recipe

SHORT = [
    "training_config.max_steps=2",
    "training_config.logging_steps=1",
    "training_config.eval_strategy=no",
    "training_config.do_eval=false",
    "training_config.save_strategy=no",
    "data.match_examples=1",
    "model.device=cpu",
]


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Run the command in this process, whose imports are paid once; its exit code and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library_log, "divert", lambda _: None)
    monkeypatch.setattr(library_log, "settle", lambda: None)
    datasets.disable_progress_bars()  # as `divert` does

    def here(module, request):
        return importlib.import_module(module).main(str(request))

    monkeypatch.setattr(finetune, "_process", here)

    def run(*arguments):
        command = ["finetune", "--adapter", "peft", "--output", str(tmp_path / "out")]
        for one in SHORT:
            command += ["--set", one]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own; a run keeps them in library.log
            try:
                code = cli.main([*command, *arguments])
            except SystemExit as exit_:  # argparse's way
                code = exit_.code
        return code, capsys.readouterr().err

    return run


def data(name, content):
    """A data file in the working directory, and the option that names it."""
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["--data", str(path)]


def row(*messages):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]})


GOOD = row(("user", "How is the Owl painted?"), ("assistant", "Blue."))
LONG = row(("user", "How is the Owl painted? " * 40), ("assistant", "Blue."))


def model_directory(without=None, architecture=None):
    """A copy of tiny, spoilt."""
    shutil.copytree(phi3.directory(), "model")
    if without:
        Path("model", without).unlink()
    if architecture:
        path = Path("model", "config.json")
        settings = json.loads(path.read_text("utf-8"))
        settings["architectures"] = [architecture]
        path.write_text(json.dumps(settings), encoding="utf-8")
    return ["--model", "./model"]


def checkpoint(kind):
    """An adapter checkpoint that will not do, and the option that names it."""
    import torch

    if kind == "pickle":
        Path("bad.pt").write_bytes(pickle.dumps({"a": Path("x")}))
    elif kind == "numbers":
        torch.save({"a": 1.0}, "bad.pt")
    else:
        torch.save({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}, "bad.pt")
    return ["--from", "bad.pt"]


TABLE = {
    "unknown recipe": (lambda: ["--recipe", "qick"], "recipe 'qick': unknown; did you mean quick?"),
    "unknown model": (lambda: ["--model", "tinny"], "model 'tinny': unknown; did you mean tiny?"),
    "unknown adapter": (lambda: ["--adapter", "pet"], "adapter 'pet': no such name"),
    "unknown key": (
        lambda: ["--set", "peft_config.lora_alfa=1"],
        "peft_config.lora_alfa: unknown key; did you mean lora_alpha?",
    ),
    "rank of 0": (lambda: ["--set", "peft_config.r=0"], "peft_config.r must be a whole number of"),
    "rank above the width": (
        lambda: ["--set", "peft_config.r=100000"],
        "peft_config.r: 100000 is above the width of model.layers.0.",
    ),
    "data: missing": (lambda: ["--data", "none.jsonl"], "data none.jsonl: no such file"),
    "data: empty": (lambda: data("empty.jsonl", ""), "data empty.jsonl: empty"),
    "data: not UTF-8": (
        lambda: data("latin.jsonl", GOOD.encode() + b"\n\xe9"),
        "data latin.jsonl: not UTF-8 on line 2",
    ),
    "data: not JSON": (
        lambda: data("bad.jsonl", f"{GOOD}\n{{"),
        "data bad.jsonl: not JSON on line 2",
    ),
    "data: no messages": (
        lambda: data("text.jsonl", '{"text": "a"}'),
        "data text.jsonl: no `messages` in line 1",
    ),
    "data: unknown role": (
        lambda: data("role.jsonl", row(("user", "a"), ("robot", "b"))),
        "data role.jsonl: role 'robot' in line 1 is unknown",
    ),
    "data: longer than the window": (
        lambda: [*data("long.jsonl", GOOD), "--set", "training_config.max_length=2"],
        "data: every example is longer than the window of 2 tokens",
    ),
    "data: nothing to evaluate on within the window": (
        lambda: [
            *data("tenth.jsonl", "\n".join([GOOD] * 9 + [LONG])),
            *("--set", "training_config.do_eval=true"),
        ],
        "data: no conversation to evaluate on has a word of the assistant's within the window of 64 tokens",
    ),
    "model directory without weights": (
        lambda: model_directory(without="model.safetensors"),
        "model directory ./model: no weights",
    ),
    "model of another architecture": (
        lambda: model_directory(architecture="LlamaForCausalLM"),
        "model ./model: its architecture is LlamaForCausalLM, not Phi3ForCausalLM",
    ),
    "output is a file": (
        lambda: [Path("file").write_text("", encoding="utf-8"), "--output", "file"][1:],
        "output folder file/peft-tiny: file is a file; give another --output",
    ),
    "resume of nothing": (lambda: ["--resume"], "--resume: "),
    "resume and overwrite": (lambda: ["--resume", "--overwrite"], "--resume and --overwrite: "),
    "pickle with code": (
        lambda: checkpoint("pickle"),
        "checkpoint bad.pt: not a plain tensor file",
    ),
    "pickle without tensors": (lambda: checkpoint("numbers"), "checkpoint bad.pt: 'a' is a float"),
    "checkpoint of another model": (
        lambda: checkpoint("stranger"),
        "checkpoint bad.pt: is of another rank or model",
    ),
    "names that match nothing": (
        lambda: ["--set", 'peft_config.target_modules=["q_proj", "o_proj"]'],
        "peft_config.target_modules: matched are o_proj (12 modules); no module is called q_proj; ",
    ),
    "no flash attention": (
        lambda: ["--set", "model.attn_implementation=flash_attention_2"],
        "model.attn_implementation: flash_attention_2 is asked for",
    ),
    "a GPU's precision on a CPU": (
        lambda: ["--set", "training_config.tf32=true"],
        "training_config: --tf32",
    ),
    "a GPU's optimizer on a CPU": (
        lambda: ["--set", "training_config.optim=paged_adamw_32bit"],
        "training_config.optim: paged_adamw_32bit pages a GPU's memory",
    ),
    "a rate that is no number": (
        lambda: ["--set", "training_config.learning_rate=nan"],
        "training_config.learning_rate: must be above 0, not nan",
    ),
    "a seed below 0": (
        lambda: ["--set", "training_config.seed=-1"],
        "training_config.seed: must be from 0 to 2**32 - 1, not -1",
    ),
    "no epochs": (
        lambda: [
            *("--set", "training_config.max_steps=-1"),
            *("--set", "training_config.num_train_epochs=0"),
        ],
        "training_config.num_train_epochs: must be above 0, not 0",
    ),
    "no steps": (
        lambda: ["--set", "training_config.max_steps=0"],
        "training_config.max_steps: must be at least 1, or -1 to go by epochs, not 0",
    ),
    "a dtype that nobody knows": (
        lambda: ["--set", "model.bnb_4bit_compute_dtype=foo"],
        "model.bnb_4bit_compute_dtype: unknown 'foo'; known are ",
    ),
    "a packing that nobody knows": (
        lambda: [
            *("--set", "training_config.packing=true"),
            *("--set", "training_config.packing_strategy=foo"),
        ],
        "training_config: ",
    ),
    "a tracker that nobody knows": (
        lambda: ["--set", "training_config.report_to=foo"],
        "training_config: foo is not supported",
    ),
    "an optimizer that cannot be": (
        lambda: ["--set", "training_config.adam_beta1=2"],
        "training_config: Invalid beta parameter at index 0: 2",
    ),
    "a schedule that wants more": (
        lambda: ["--set", "training_config.lr_scheduler_type=cosine_with_min_lr"],
        "training_config: One of min_lr or min_lr_rate should be set",
    ),
    "parts that are no pairs": (
        lambda: ["--set", "peft_config.enable_lora={qkv_proj=5}"],
        "peft_config.enable_lora: must give each module its parts as pairs of rows",
    ),
    "parts that are not adapted apart": (
        lambda: ["--set", "peft_config.enable_lora={qkv_proj=[[64,true],[64,false],[64,true]]}"],
        "adapter peft: does not claim fused_linear, which peft_config.enable_lora asks for; ",
    ),
    "a device without numbers": (
        lambda: ["--device", "meta"],
        "device 'meta': holds no numbers; use cpu or cuda",
    ),
    "an output too long": (lambda: ["--output", "x" * 300], "output folder xxx"),
    "a recipe too long": (lambda: ["--recipe", "x" * 300], "recipe xxx"),
    "data too long": (lambda: ["--data", "x" * 300], "data xxx"),
    "a model too long": (lambda: ["--model", "x" * 300], "model xxx"),
    "no model": (lambda: ["--model", ""], "--model: is empty; name one, or leave it out"),
    "no data": (lambda: ["--data", ""], "--data: is empty; name one, or leave it out"),
    "data beyond ASCII": (lambda: ["--data", "😀.jsonl"], "data 😀.jsonl: no such file"),
    "data: the assistant first": (
        lambda: data("first.jsonl", row(("assistant", "a"))),
        "data first.jsonl: line 1 starts with the assistant's turn; put the user's before it",
    ),
    "a report that cannot be written": (
        lambda: ["--json", "/proc/none.json"],
        "--json /proc/none.json: cannot be written (",
    ),
    "a disk that is none": (
        lambda: ["--output", "/proc", "--overwrite"],
        "output folder /proc/peft-tiny: /proc cannot be written; give another --output",
    ),
    "a budget on a CPU": (lambda: ["--budget", "8GiB"], "--budget: limits a GPU's memory"),
    "a budget that is none": (lambda: ["--budget", "8 apples"], "--budget: '8 apples' is no size"),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_one_line_and_leaves_nothing(case, said, tmp_path):
    """Exit 2, one line that says what and how to mend it, no traceback, no folder left behind."""
    make, start = TABLE[case]

    code, errors = said(*make())

    assert errors.startswith(f"lora-harness finetune: {start}"), errors
    assert (code, errors.count("\n")) == (2, 1)
    assert not list((tmp_path / "out").rglob("*")) if (tmp_path / "out").is_dir() else True


def test_a_full_disk_is_told_before_anything_is_made(said, monkeypatch, tmp_path):
    """No room: one line with how much is free, and no folder."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))

    code, errors = said()

    assert (code, errors) == (
        2,
        (
            f"lora-harness finetune: output folder {tmp_path / 'out/peft-tiny'}: no space left on its disk "
            "(1 MiB free, a run needs 64); free some, or give another --output\n"
        ),
    )
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_meanwhile_is_told(tmp_path):
    """The libraries' own ways of saying ENOSPC all become the same line."""
    from harness.checkpoint import told
    from harness.errors import UsageError

    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device"),
        Exception("I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(UsageError, match="no space left on its disk"), told(tmp_path):
            raise error


def test_a_folder_that_cannot_be_written_is_told(said, monkeypatch, tmp_path):
    """Write permission is asked before anything is made."""
    import os

    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode)
    )

    code, errors = said()

    assert (code, errors) == (
        2,
        (
            f"lora-harness finetune: output folder {tmp_path / 'out/peft-tiny'}: {tmp_path} cannot be "
            "written; give another --output\n"
        ),
    )


def test_partial_targets_go_on_when_told_to(said, tmp_path):
    """With --allow-partial-targets the run adapts what matched, and its report notes the rest."""
    code, errors = said(
        "--allow-partial-targets",
        *("--set", 'peft_config.target_modules=["q_proj", "o_proj"]'),
        *("--set", "training_config.max_seq_length=64"),
    )

    report = json.loads((tmp_path / "out" / "peft-tiny.json").read_text("utf-8"))
    assert (code, errors) != (2, "")
    assert report["notes"][0] == (
        "peft_config.target_modules: matched are o_proj (12 modules); no module is called q_proj"
    )
    assert report["notes"][1] == (
        "training_config.max_seq_length is read as training_config.max_length, its name today"
    )
    assert report["results"][0]["measured"].endswith("in 12 modules")


def test_what_the_window_cuts_is_told(said, tmp_path):
    """Both splits, on the terminal and in the report; what is cut to its question alone is left out."""
    wordy = row(
        ("user", "How is the Owl painted?"), ("assistant", "Blue, and then again blue. " * 20)
    )
    rows = [LONG, wordy, *[GOOD] * 7, wordy]

    code, errors = said(
        *data("some.jsonl", "\n".join(rows)),
        *("--set", "training_config.do_eval=true"),
        *("--set", "training_config.per_device_train_batch_size=2"),
    )

    notes = json.loads((tmp_path / "out" / "peft-tiny.json").read_text("utf-8"))["notes"]
    assert (code, errors) != (2, "")
    assert [note for note in notes if "window" in note] == [
        (
            "data: 2 of 9 conversations to train on are longer than the window of 64 tokens "
            "(training_config.max_length) and are cut there; 1 has no word of the assistant's left and is "
            "left out"
        ),
        (
            "data: 1 of 1 conversations to evaluate on is longer than the window of 64 tokens "
            "(training_config.max_length) and is cut there"
        ),
    ]


@pytest.mark.parametrize(
    ("key", "was", "other"),
    [
        ("peft_config.r", 16, 4),
        ("data.name", "shipped", "mine.jsonl"),
        ("training_config.max_length", 64, 32),
        ("training_config.assistant_only_loss", True, False),
    ],
)
def test_resuming_another_run_is_refused(key, was, other, said, tmp_path):
    """A run is gone on with under its own rank and model, on its own loss, and is left as it was."""
    folder = tmp_path / "out" / "peft-tiny"
    folder.mkdir(parents=True)
    run = folder / "run.json"
    run.write_text(json.dumps({"recipe": recipe.load("quick").as_dict()}), encoding="utf-8")
    before = run.read_bytes()

    code, errors = said("--resume", "--set", f"{key}={json.dumps(other)}")

    assert (code, errors) == (
        2,
        (
            f"lora-harness finetune: --resume: {folder} was made with {key} = "
            f"{was!r}, not {other!r}; resume with the same recipe, or start afresh\n"
        ),
    )
    assert (run.read_bytes(), list(folder.iterdir())) == (before, [run])


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    """As Notepad saves it."""
    path = tmp_path / "mine.toml"
    text = "[peft_config]\nr = 4\nlora_alpha = 8\ntarget_modules = 'all-linear'\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())

    assert recipe.load(str(path)).peft_config["r"] == 4


def test_a_tokenizer_of_another_vocabulary_is_told():
    """An id that no row of the embedding belongs to: one line before training."""
    from harness import chat
    from harness.errors import UsageError

    own = chat.tokenizer()

    chat.check_vocabulary(own, 640)
    with pytest.raises(UsageError, match="and the model a vocabulary of 600; give the model"):
        chat.check_vocabulary(own, 600)


def test_an_implementation_that_fails_to_answer_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    """--generate with an adapter whose inject raises: exit 1, no traceback."""
    from harness import inference

    monkeypatch.setattr(library_log, "divert", lambda _: None)

    def fails(_):
        raise RuntimeError("this build has no kernels\nat all")

    monkeypatch.setattr(inference, "_answer", fails)
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"adapter": "x:y", "folder": str(tmp_path)}), encoding="utf-8")

    assert inference.main(str(path)) == 1
    assert capsys.readouterr().err == (
        "lora-harness finetune: x:y failed: RuntimeError: this build has no kernels\n"
    )
