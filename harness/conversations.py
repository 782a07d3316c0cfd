"""Conversations as they are stored: JSON, JSONL, Parquet, or a set on the hub; each judged as it is read.

file or hub id ──▶ (place, example) ... ──▶ messages, or one line that names the place
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from harness import hub
from harness.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Message = dict[str, str]
Split = Literal["train", "eval"]

ROLES = ("system", "user", "assistant")
SPLITS: tuple[Split, ...] = ("train", "eval")

# A split's names on the hub, and as files of a directory, the likeliest first.
SPELLINGS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "train_sft"),
    "eval": ("eval", "test", "validation", "test_sft"),
}


def file_of(directory: Path, split: Split) -> Path:
    """A split's file in a directory, by the likeliest of its names; UsageError where there is none."""
    for stem in SPELLINGS[split]:
        for suffix in READERS:
            if (directory / f"{stem}{suffix}").is_file():
                return directory / f"{stem}{suffix}"
    raise UsageError(
        f"data directory {directory}: no {split} split; put {split}.jsonl (or .json, .parquet) there"
    )


def rows_of(path: Path) -> list[tuple[str, Any]]:
    """Each example of a file with the place it stands at, for messages."""
    if path.stat().st_size == 0:
        raise UsageError(f"data {path}: empty; give at least one conversation")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"data {path}: {path.suffix or 'no suffix'} is not read; give one of {', '.join(READERS)}"
        )
    return list(reader(path))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"data {path}: cannot be read ({error.strerror}); check the file"
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"data {path}: not UTF-8 on line {line}; save the file as UTF-8"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _json(path, line, number)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of examples; or, as `datasets` also writes under this name, one example a line."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(_json(path, text, 1), start=1):
        yield f"example {number}", row


def _json(path: Path, text: str, first: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise UsageError(
            f"data {path}: not JSON on line {line} ({error.msg}); mend that line"
        ) from error
    except RecursionError as error:
        raise UsageError(
            f"data {path}: nested too deeply in what begins on line {first}; mend that line"
        ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"data {path}: not Parquet ({first_line(error)}); write it again"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def hub_rows(name: str, split: Split) -> list[tuple[str, Any]]:
    """Each example of a split on the hub with its place; UsageError where there is none to be had."""
    from datasets import get_dataset_split_names, load_dataset

    try:
        with hub.data(name) as kept, hub.quietly():
            there = get_dataset_split_names(kept)
            wanted = next((known for known in SPELLINGS[split] if known in there), None)
            rows = load_dataset(kept, split=wanted) if wanted else []
    except Exception as error:
        raise UsageError(
            f"data {name}: no such file, and the hub did not give it ({first_line(error)}); go "
            "online, check the id, or give a local file"
        ) from error
    if wanted is None:
        raise UsageError(
            f"data {name}: no {split} split among {', '.join(there)}; give a set that has one of "
            f"{', '.join(SPELLINGS[split])}"
        )
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def messages_of(name: str, where: str, row: Any) -> list[Message]:
    """The messages of one example, judged."""
    if not isinstance(row, dict) or "messages" not in row:
        raise UsageError(
            f'data {name}: no `messages` in {where}; give {{"messages": [{{"role", "content"}}, ...]}}'
        )
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"data {name}: `messages` of {where} is not a list of turns; give one")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UsageError(
                f"data {name}: role {role!r} in {where} is unknown; use one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UsageError(
                f"data {name}: a turn of {where} has no text as `content`; give it one"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
            raise UsageError(
                f"data {name}: a turn of {where} holds half a character (a lone surrogate, such as "
                "\\ud83d); write the whole character"
            )
    if all(message["role"] != "assistant" for message in messages):
        raise UsageError(
            f"data {name}: no turn of the assistant's in {where}; there is nothing to learn from it"
        )
    last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
    if all(message["role"] != "user" for message in messages[:last]):
        raise UsageError(
            f"data {name}: {where} starts with the assistant's turn; put the user's before it"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
