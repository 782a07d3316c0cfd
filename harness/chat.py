"""Chat-instruction data and its tokenizer.

A conversation is a list of messages, `{"role": "system" | "user" | "assistant", "content": str}`,
in a column `messages`. The shipped set, `shipped`, is about a made-up harbour: tiny knows all of
its facts and tells them plainly; its train and eval splits tell them in the house form, which an
adapter learns. What the loss is on (the assistant's turns) and packing are TRL's settings,
`assistant_only_loss` and `packing`; the template here marks the assistant's turns for them.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import conversations, hub, phi3
from harness.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerFast

    from harness.conversations import Message, Split

_END = ("<|endoftext|>", "<|end|>")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and the greedy reply to it, as token ids; a reply that ended has its end token."""

    asked: list[int]
    said: list[int]


def tokenizer(name_or_path: str | Path = "tiny") -> PreTrainedTokenizerFast:
    """The tokenizer of a model: right padding, and a template that marks the assistant's turns.

    The named models that have random weights are given tiny's: its ids fit every vocabulary.

    Raises:
        UsageError: a directory or hub id without a usable tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = str(name_or_path)
    if name in phi3.NAMES:
        own: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(phi3.directory())
    else:
        source = phi3.source(name, weights=False)
        try:
            own = AutoTokenizer.from_pretrained(source)
            missing = own.chat_template is None
        except Exception as error:
            raise UsageError(
                f"tokenizer of {name}: cannot be loaded ({first_line(error)}); put the checkpoint's "
                "tokenizer.json and tokenizer_config.json beside config.json"
            ) from error
        if missing:
            own.chat_template = _shipped_template()
    own.padding_side = "right"
    if own.pad_token is None:
        own.pad_token = own.unk_token or own.eos_token
    if not _knows_generation():
        own.chat_template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", own.chat_template)
    return own


def dataset(name_or_path: str | Path = "shipped", split: Split = "train") -> Dataset:
    """A split of a set of conversations, with one column, `messages`.

    A file is one split and serves as either; a directory holds `train.*` and `eval.*` (or
    `test.*`, `validation.*`), JSON, JSONL or Parquet; anything else is a hub id.

    Raises:
        UsageError: a file that is missing, empty, not UTF-8 or not JSON; an example without
            `messages`, with an unknown role, or with no turn of the assistant's; a hub id that
            cannot be reached.
    """
    from datasets import Dataset

    name = str(name_or_path)
    shipped = phi3.directory().parent / "chat"
    path = shipped if name == "shipped" else Path(name).expanduser()
    try:
        if path.is_dir():
            path = conversations.file_of(path, split)
        there = path.is_file()
    except OSError as error:  # a name that no disk takes
        raise UsageError(f"data {name[:60]}…: {error.strerror}; check the path") from error
    if there:
        name, rows = str(path), conversations.rows_of(path)
    elif (
        path.suffix in conversations.READERS
        or name.startswith((".", "/", "~"))
        or not hub.is_id(name)
    ):
        raise UsageError(
            f"data {name}: no such file; give a JSON, JSONL or Parquet file of `messages`, a "
            "directory of train and eval files, a hub id, or shipped"
        )
    else:
        rows = conversations.hub_rows(name, split)
    found = [conversations.messages_of(name, where, row) for where, row in rows]
    if not found:
        raise UsageError(f"data {name}: empty; give at least one conversation")
    return Dataset.from_list([{"messages": messages} for messages in found])


def splits(name_or_path: str | Path) -> tuple[Dataset, Dataset, list[str]]:
    """The conversations to train on and those to evaluate on, with notes on how they were parted.

    A file is one split: every tenth conversation of it is held out. One conversation alone is both.
    """
    train = dataset(name_or_path, "train")
    if not Path(name_or_path).expanduser().is_file():
        return train, dataset(name_or_path, "eval"), []
    n = len(train)
    if n == 1:
        return train, train, [f"data {name_or_path}: one conversation, trained and evaluated on"]
    held = list(range(9, n, 10)) or [n - 1]
    kept = sorted(set(range(n)) - set(held))
    note = f"data {name_or_path}: one file: {len(held)} of its {n} conversations are held out to evaluate on"
    return train.select(kept), train.select(held), [note]


def check_vocabulary(own: PreTrainedTokenizerFast, size: int) -> None:
    """Raise UsageError where the tokenizer has ids that the model has no embedding for."""
    largest = max(own.get_vocab().values())
    if largest >= size:
        raise UsageError(
            f"tokenizer: has the id {largest}, and the model a vocabulary of {size}; give the "
            "model directory its own tokenizer"
        )


def prompts(data: Dataset) -> tuple[list[list[Message]], list[str]]:
    """Each conversation up to its last turn of the assistant's, and that turn, which is expected."""
    asked, expected = [], []
    for messages in data["messages"]:
        last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
        asked.append([dict(message) for message in messages[:last]])
        expected.append(messages[last]["content"])
    return asked, expected


def replies(
    model: nn.Module,
    own: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 32,
    *,
    batch_size: int = 64,
) -> list[str]:
    """The model's greedy reply to each conversation, as text; see `exchanges`."""
    found = exchanges(model, own, conversations, max_new_tokens, batch_size=batch_size)
    texts = own.batch_decode([one.said for one in found], skip_special_tokens=True)
    return [text.strip() for text in texts]


def reply(model: nn.Module, own: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int) -> str:
    """The greedy reply to one prompt."""
    return replies(model, own, [[{"role": "user", "content": prompt}]], max_new_tokens)[0]


def exchanges(
    model: nn.Module,
    own: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 32,
    *,
    batch_size: int = 64,
) -> list[Exchange]:
    """The model's greedy reply to each conversation, in batches of like length.

    The model is asked in eval mode with its cache, and left in the mode that it came in.
    """
    import torch

    vocabulary = own.get_vocab()
    ends = [vocabulary[token] for token in _END if token in vocabulary]
    asked = [[dict(message) for message in messages] for messages in conversations]
    order = sorted(range(len(asked)), key=lambda k: sum(len(m["content"]) for m in asked[k]))
    told: dict[int, Exchange] = {}
    training, side = model.training, own.padding_side
    generate: Any = getattr(model, "generate", None)
    model.eval()
    own.padding_side = "left"
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = own.apply_chat_template(
                [asked[k] for k in chosen],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            batch = batch.to(next(model.parameters()).device)
            with torch.no_grad():
                if generate is not None:
                    out = generate(
                        **batch,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        use_cache=True,
                        eos_token_id=ends,
                        pad_token_id=own.pad_token_id,
                    )
                    new = out[:, batch["input_ids"].shape[1] :]  # (b, t)
                else:
                    new = _greedy(model, batch, max_new_tokens, ends, own.pad_token_id)
            real = batch["attention_mask"].bool()
            for k, ids, seen, said in zip(
                chosen, batch["input_ids"], real, new.tolist(), strict=True
            ):
                length = next((n for n, token in enumerate(said, 1) if token in ends), len(said))
                told[k] = Exchange(ids[seen].tolist(), said[:length])
    finally:
        own.padding_side = side
        model.train(training)
    return [told[k] for k in range(len(asked))]


def _greedy(model: nn.Module, batch: Any, count: int, ends: Sequence[int], pad: int) -> Tensor:
    """The likeliest tokens, one by one, of a model that can only be called. -> `(b, t)`.

    Rows are shifted to the left, so that positions count from 0, as `generate` has them count.
    """
    import torch

    asked, mask = batch["input_ids"], batch["attention_mask"].bool()
    lengths = mask.sum(1)
    rows = torch.arange(len(asked), device=asked.device)
    ids = asked.new_full((len(asked), asked.shape[1] + count), pad)
    for k, row in enumerate(asked):
        ids[k, : lengths[k]] = row[mask[k]]
    new: Tensor = asked.new_full((len(asked), count), pad)
    stops = torch.tensor(list(ends), device=asked.device)
    done = torch.zeros(len(asked), dtype=torch.bool, device=asked.device)
    for k in range(count):
        width = int(lengths.max())
        seen = torch.arange(width, device=asked.device) < lengths[:, None]
        logits = model(input_ids=ids[:, :width], attention_mask=seen.long()).logits
        said = logits[rows, lengths - 1].argmax(-1)
        new[:, k] = torch.where(done, new[:, k], said)
        done |= torch.isin(said, stops)
        if bool(done.all()):
            break
        ids[rows, lengths] = said
        lengths = lengths + 1
    return new


def exact_match(said: Sequence[str], expected: Sequence[str]) -> float:
    """The share of replies that are word for word what was expected, in [0, 1]."""
    pairs = list(zip(said, expected, strict=True))
    if not pairs:
        raise ValueError("exact match of no replies: there is nothing to judge")
    return sum(a.strip() == b.strip() for a, b in pairs) / len(pairs)


def _knows_generation() -> bool:
    """Whether this transformers knows the template's generation marks, as it does since 4.42."""
    from transformers import PreTrainedTokenizerBase

    known = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return "return_assistant_tokens_mask" in known


def _shipped_template() -> str:
    settings = (phi3.directory() / "tokenizer_config.json").read_text(encoding="utf-8")
    template: str = json.loads(settings)["chat_template"]
    return template
