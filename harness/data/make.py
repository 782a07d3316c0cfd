"""Make the shipped files again: `python -m harness.data.make [--directory DIR] [corpus|tokenizer|tiny ...]`.

    corpus      chat/plain.jsonl, train.jsonl, eval.jsonl          by harbour.py
    tokenizer   tiny/tokenizer.json, tokenizer_config.json          from plain and train
    tiny        tiny/model.safetensors, config.json, generation_config.json   from plain alone

Each step reads what the one before it wrote. One thread and one seed: on one machine with one
set of libraries the files come out bit for bit the same, however many cores it has.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data import harbour

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent

VOCABULARY = 640  # at most; tiny has as many rows, some spare, as Phi-3 has
# Phi-3's own names. Byte-level text has no unknown token: `<unk>` pads, as in the model card's sample.
SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
)
# Phi-3's form; what is between the generation markers is what the loss is on.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    "{% elif messages[-1]['role'] == 'assistant' %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ eos_token }}{% endif %}"
)

SEED = 0
STEPS = 1100
BATCH = 32
LEARNING_RATE = 3e-3
WARMUP = 100
SMOOTHING = 0.1  # a base that is not too sure of itself is one that an adapter can teach quickly


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE with Phi-3's special tokens, in a form that tokenizers 0.19 reads too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [
        message["content"]
        for stem in ("plain", "train")
        for messages in _conversations(directory, stem)
        for message in messages
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in Phi-3, a role's mark and the end's swallow the line break behind them.
    marks = {"<|assistant|>", "<|system|>", "<|end|>", "<|user|>"}
    special = [
        AddedToken(token, special=True, normalized=False, rstrip=token in marks)
        for token in SPECIAL
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    # tokenizers before 0.20 reads a merge only as one string.
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids for Phi-3
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    _write_json(directory / "tiny" / "tokenizer.json", state)
    _write_json(directory / "tiny" / "tokenizer_config.json", settings)


def make_tiny(directory: Path) -> None:
    """Train tiny on plain.jsonl, loss on the assistant's turns, and write its weights and settings."""
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    from harness import phi3

    torch.set_num_threads(1)  # the order of a sum, and so its rounding, hangs on the threads
    tokenizer = _tokenizer(directory)
    examples = [_tokens(tokenizer, messages) for messages in _conversations(directory, "plain")]
    model = phi3.untrained("tiny", seed=SEED).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=WARMUP / STEPS, cycle_momentum=False
    )
    batches = _batches([len(ids) for ids, _ in examples])
    began = time.monotonic()
    for step in range(1, STEPS + 1):
        batch = [examples[k] for k in next(batches)]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])  # (b, t)
        wanted = torch.tensor([goal + [-100] * (width - len(goal)) for _, goal in batch])  # (b, t)
        # Right padding under a causal mask reaches no wanted token: no attention mask is needed.
        logits = model(input_ids=ids).logits  # (b, t, vocabulary)
        loss = cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), label_smoothing=SMOOTHING
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"step {step}/{STEPS}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    target = directory / "tiny"
    save_file(
        {name: tensor.contiguous() for name, tensor in sorted(model.state_dict().items())},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((HERE / "configs" / "tiny.json").read_text(encoding="utf-8"))
    _write_json(target / "config.json", {**settings, "torch_dtype": "float32"})
    end = [SPECIAL.index(token) for token in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    _write_json(
        target / "generation_config.json",
        {"bos_token_id": settings["bos_token_id"], "eos_token_id": end, "pad_token_id": 0},
    )


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Batches of like length without end, each epoch in another order."""
    draw = random.Random(SEED)
    while True:
        order = sorted(draw.sample(range(len(lengths)), len(lengths)), key=lengths.__getitem__)
        epoch = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
        yield from draw.sample(epoch, len(epoch))


def _tokens(
    tokenizer: PreTrainedTokenizerFast, messages: list[harbour.Message]
) -> tuple[list[int], list[int]]:
    """Token ids, and the same with -100 where the loss is not asked for."""
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = list(out["input_ids"])
    mask = out["assistant_masks"]
    return ids, [token if wanted else -100 for token, wanted in zip(ids, mask, strict=True)]


def _tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory / "tiny")
    return tokenizer


def _conversations(directory: Path, stem: str) -> list[list[harbour.Message]]:
    lines = (directory / "chat" / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """The command line: the steps named, or all of them, in order."""
    steps = {
        "corpus": lambda directory: harbour.write(directory / "chat"),
        "tokenizer": make_tokenizer,
        "tiny": make_tiny,
    }
    parser = argparse.ArgumentParser(description="Make the shipped data and the tiny model again.")
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(steps)}; all when none is named")
    parser.add_argument(
        "--directory", type=Path, default=HERE, help="where; the package's own data"
    )
    arguments = parser.parse_args()
    unknown = [step for step in arguments.steps if step not in steps]
    if unknown:
        parser.error(f"{unknown[0]}: no such step; use {', '.join(steps)}")
    for name, step in steps.items():
        if not arguments.steps or name in arguments.steps:
            step(arguments.directory)


if __name__ == "__main__":
    main()
