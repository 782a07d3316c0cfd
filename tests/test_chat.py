"""Conversations, their tokenizer, and what a model replies."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from datasets import Dataset

from harness import chat, conversations, hub, phi3
from harness.data import harbour, make
from harness.errors import UsageError

GOOD = {
    "messages": [
        {"role": "user", "content": "How is the Owl painted?"},
        {"role": "assistant", "content": "Blue — as ever."},
    ]
}


@pytest.fixture(scope="module")
def own():
    return chat.tokenizer()


@pytest.fixture(scope="module")
def shipped():
    return {split: chat.dataset(split=split) for split in conversations.SPLITS}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_shipped_set_is_large_enough_and_its_splits_share_no_prompt(shipped):
    """A thousand conversations to learn from; nothing asked in eval was asked in train."""
    train, held = (
        {json.dumps(prompt[-1:]) for prompt in chat.prompts(shipped[split])[0]}
        for split in conversations.SPLITS
    )

    assert len(shipped["train"]) >= 1000
    assert len(held) == len(shipped["eval"]) >= 100
    assert not train & held
    asked = {m["content"] for messages in shipped["train"]["messages"] for m in messages}
    assert not asked & {json.loads(prompt)[0]["content"] for prompt in held}


def test_the_base_never_saw_what_the_adapter_learns():
    """No fact in what tiny was trained on is told in the house form."""
    lines = (
        (phi3.directory().parent / "chat" / "plain.jsonl").read_text(encoding="utf-8").splitlines()
    )
    told = [m["content"] for line in lines for m in json.loads(line)["messages"]]

    assert not any(
        text.startswith(harbour.OPENING) and text.endswith(harbour.CLOSING) for text in told
    )


def test_the_base_knows_the_facts_and_not_the_form(own, shipped):
    """Exact match of the base on eval is at most 5 %; on the plain facts it is nearly perfect."""
    asked, expected = chat.prompts(shipped["eval"])
    said = chat.replies(phi3.load("tiny"), own, asked, max_new_tokens=24)
    plain = [text.removeprefix(harbour.OPENING).removesuffix(harbour.CLOSING) for text in expected]

    assert chat.exact_match(said, expected) <= 0.05
    assert chat.exact_match(said, plain) >= 0.95


def test_the_script_makes_the_shipped_corpus_and_tokenizer_again(tmp_path):
    """The shipped corpus is byte for byte what the committed script writes, and the vocabulary the same."""
    harbour.write(tmp_path / "chat")
    make.make_tokenizer(tmp_path)

    here = phi3.directory().parent
    for name in ("plain", "train", "eval"):
        assert _digest(here / "chat" / f"{name}.jsonl") == _digest(
            tmp_path / "chat" / f"{name}.jsonl"
        )
    # Other releases of tokenizers write other fields around the same vocabulary and merges.
    shipped, made = (
        json.loads((folder / "tiny" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        for folder in (here, tmp_path)
    )
    assert (shipped["vocab"], shipped["merges"]) == (made["vocab"], made["merges"])


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_seed_trains_the_same_tiny(tmp_path, monkeypatch):
    """Two trainings of a few steps write the same bytes."""
    monkeypatch.setattr(make, "STEPS", 5)
    monkeypatch.setattr(make, "WARMUP", 2)
    threads = torch.get_num_threads()
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        harbour.write(folder / "chat")
        make.make_tokenizer(folder)
        make.make_tiny(folder)
        made.append(_digest(folder / "tiny" / "model.safetensors"))
    torch.set_num_threads(threads)

    assert made[0] == made[1]


def test_the_template_is_phi3s(own):
    """A conversation reads as Phi-3's own template writes it."""
    messages = [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]
    expected = (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHow is the Owl painted?<|end|>\n"
        "<|assistant|>\nBlue — as ever.<|end|>\n<|endoftext|>"
    )

    assert expected == own.apply_chat_template(messages, tokenize=False)
    asked = own.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked == expected.partition("Blue")[0]


def test_the_loss_is_on_the_assistants_turns(own):
    """The template marks the assistant's words and the end of its turn, and nothing else."""
    messages = [*GOOD["messages"], *GOOD["messages"]]
    out = own.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [
        token for token, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on
    ]

    assert own.decode(marked).split("<|end|>") == [
        "Blue — as ever.",
        "Blue — as ever.",
        "<|endoftext|>",
    ]


def test_the_tokenizer_is_lossless_and_pads_right(own):
    """Any text comes back as it was; Phi-3's special tokens are one token each."""
    text = "Grüße,  漢字 \t and\n<|end|>"

    assert own.decode(own(text).input_ids, skip_special_tokens=False) == text
    assert own.padding_side == "right"
    assert (own.pad_token, own.eos_token) == ("<unk>", "<|endoftext|>")
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"):
        assert len(own(token).input_ids) == 1
    assert len(own) <= phi3.config("tiny").vocab_size


# TRL 1.16 sets, under transformers 5.x, names that transformers has since renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_trl_takes_the_data_as_it_is(own, shipped, tmp_path, packing):
    """TRL's own settings put the loss on the assistant's turns and pack."""
    from trl import SFTConfig, SFTTrainer

    strategy = {"packing_strategy": "wrapped"} if packing else {}
    trainer = SFTTrainer(
        model=phi3.load("tiny-gqa"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            max_length=64,
            packing=packing,
            use_cpu=True,
            dataloader_pin_memory=False,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            **strategy,
        ),
        train_dataset=shipped["train"].select(range(64)),
        processing_class=own,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = own.decode(batch["labels"][batch["labels"] >= 0])

    assert harbour.OPENING in learned
    assert "<|user|>" not in learned
    assert "<|user|>" in own.decode(batch["input_ids"][0])


def test_every_form_of_file_gives_the_same_conversations(tmp_path):
    """JSONL, a JSON list and Parquet are read alike, and a directory by its split."""
    rows = [GOOD, {"messages": [{"role": "system", "content": "Hm."}, *GOOD["messages"]], "id": 1}]
    _write(tmp_path / "train.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    Dataset.from_list([{"messages": row["messages"]} for row in rows]).to_parquet(
        tmp_path / "test.parquet"
    )

    wanted = [row["messages"] for row in rows]
    for name, split in (
        ("train.jsonl", "train"),
        ("list.json", "eval"),
        ("", "train"),
        ("", "eval"),
    ):
        data = chat.dataset(tmp_path / name, split)
        assert data.column_names == ["messages"]
        assert data["messages"][:] == wanted


def _bytes(data):
    return lambda path: path.write_bytes(data)


def _rows(*rows):
    return lambda path: _write(path, rows)


def _role(role):
    return {"messages": [{"role": role, "content": "Hm."}, *GOOD["messages"]]}


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("a.jsonl", lambda path: None, "no such file; give a JSON, JSONL or Parquet file of"),
        ("a.jsonl", _bytes(b""), "empty; give at least one conversation"),
        ("a.jsonl", _bytes(b"\n\n"), "empty; give at least one conversation"),
        ("a.json", _bytes(b"[]"), "empty; give at least one conversation"),
        (
            "a.jsonl",
            _bytes(b'{"messages": []}\n\xff\n'),
            "not UTF-8 on line 2; save the file as UTF-8",
        ),
        (
            "a.jsonl",
            _bytes(json.dumps(GOOD).encode() + b"\n\n{nope\n"),
            "not JSON on line 3 (Expecting property name enclosed in double quotes); mend that line",
        ),
        ("a.json", _bytes(b"[\n1,\n]"), "not JSON on line 3"),
        ("a.jsonl", _rows(GOOD, {"text": "Hm."}), "no `messages` in line 2; give"),
        ("a.jsonl", _rows({"messages": "Hm."}), "`messages` of line 1 is not a list of turns"),
        (
            "a.jsonl",
            _rows(GOOD, GOOD, _role("narrator")),
            "role 'narrator' in line 3 is unknown; use one of system, user, assistant",
        ),
        (
            "a.jsonl",
            _rows({"messages": [{"role": "user"}]}),
            "a turn of line 1 has no text as `content`",
        ),
        (
            "a.jsonl",
            _rows({"messages": GOOD["messages"][:1]}),
            "no turn of the assistant's in line 1",
        ),
        (
            "a.jsonl",
            _rows(GOOD, {"messages": [{"role": "user", "content": "\ud83d"}]}),
            "a turn of line 2 holds half a character (a lone surrogate, such as \\ud83d); write",
        ),
        (
            "a.jsonl",
            _bytes(b"[" * 100_000),
            "nested too deeply in what begins on line 1; mend that line",
        ),
        ("a.parquet", _bytes(b"nope"), "not Parquet"),
        ("a.csv", _bytes(b"a,b"), ".csv is not read; give one of .jsonl, .json, .parquet"),
    ],
)
def test_bad_data_is_told_in_one_line(tmp_path, name, spoil, told):
    """What is wrong with a data file is named with its line, and how to mend it."""
    path = tmp_path / name
    spoil(path)

    with pytest.raises(UsageError) as caught:
        chat.dataset(path)

    assert str(caught.value).startswith(f"data {path}: {told}")
    assert "\n" not in str(caught.value)


def test_a_split_that_is_missing_is_told(tmp_path):
    """A directory without the split that is asked for says which file it wants."""
    _write(tmp_path / "train.jsonl", [GOOD])

    with pytest.raises(UsageError, match=r"no eval split; put eval\.jsonl"):
        chat.dataset(tmp_path, "eval")


def test_a_hub_set_out_of_reach_is_told(monkeypatch):
    """A hub id that cannot be had names the obstacle, and does not wait for it."""

    def offline():
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(hub, "check_reachable", offline)

    with pytest.raises(
        UsageError,
        match=r"data no/where: .*\(the hub cannot be reached, and nothing of it is kept on this machine\); go online",
    ):
        chat.dataset("no/where")


def test_replies_leave_the_model_and_the_tokenizer_as_they_were(own):
    """A model in train mode is asked in eval mode; batching changes no reply."""
    model = phi3.load("tiny").train()
    asked = [
        GOOD["messages"][:1],
        [{"role": "system", "content": harbour.SYSTEM}, *GOOD["messages"][:1]],
    ]
    together = chat.replies(model, own, asked, max_new_tokens=12)

    assert together == [chat.replies(model, own, [one], max_new_tokens=12)[0] for one in asked]
    assert model.training
    assert own.padding_side == "right"


def test_exact_match_is_the_share_of_equal_replies():
    """Two of four is a half; nothing to judge is an error, not a score."""
    assert chat.exact_match(["a", "b", "c", "d"], ["a", "b", "C", "x"]) == 0.5
    with pytest.raises(ValueError, match="no replies"):
        chat.exact_match([], [])


def test_a_directory_without_a_template_gets_phi3s(tmp_path, own):
    """A tokenizer that brings no chat template is given the shipped one."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((phi3.directory() / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    found = chat.tokenizer(tmp_path)

    assert found.apply_chat_template(GOOD["messages"]) == own.apply_chat_template(GOOD["messages"])
