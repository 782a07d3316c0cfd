"""The window: after how many tokens a conversation is cut, and what that leaves of the data.

The trainer cuts in silence, and leaves out what then has no word of the assistant's to learn from. Here
it is counted, told, and refused where nothing is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

BATCH = 1000
"""How many conversations are put into tokens at a time where only their lengths are wanted."""


def lengths(data: Dataset, own: PreTrainedTokenizerFast) -> list[int]:
    """How many tokens each conversation has."""
    found: list[int] = []
    for batch in data.iter(BATCH):  # the tokens of a whole large set would be tens of gigabytes
        coded = own.apply_chat_template(batch["messages"], return_dict=True)["input_ids"]
        found += map(len, coded)
    return found


def check(found: Sequence[int], size: int) -> None:
    """Raise UsageError where every conversation, by its `lengths`, is longer than the window."""
    if min(found) > size:
        raise UsageError(
            f"data: every example is longer than the window of {size} tokens, the shortest "
            f"is {min(found)}; raise training_config.max_length, or give shorter conversations"
        )


class Window(NamedTuple):
    """After how many tokens a conversation is cut, None where none is, and whether they are packed."""

    size: int | None
    packs: bool


def of(config: Any, *, evaluating: bool = False) -> Window:
    """The window of an `SFTConfig`.

    Where a recipe names no `max_length`, it is TRL's own default. Of the ways of packing, "bfd" alone
    cuts what is longer than a row; the others go on in the next.
    """
    packs = bool(config.packing)
    if evaluating and getattr(config, "eval_packing", None) is not None:
        packs = config.eval_packing
    cuts = not packs or getattr(config, "packing_strategy", None) == "bfd"
    # Its name before TRL 0.16 was max_seq_length.
    size = getattr(config, "max_length", None) or getattr(config, "max_seq_length", None)
    return Window(size if cuts else None, packs)


def told(found: Sequence[int], left: int, window: Window, verb: str) -> list[str]:
    """A note on what was cut, none where nothing was.

    Args:
        found: the conversations' `lengths`.
        left: how many rows the trainer has made of them; a packed row holds several.
        window: that of the split.
        verb: train or evaluate.

    Raises UsageError where none is left.
    """
    size = window.size
    if not left:
        raise UsageError(
            f"data: no conversation to {verb} on has a word of the assistant's within the window of "
            f"{size} tokens; raise training_config.max_length, or give shorter ones"
        )
    longer = sum(length > size for length in found) if size else 0
    if not longer:
        return []
    are = "is" if longer == 1 else "are"
    note = (
        f"data: {longer:,} of {len(found):,} conversations to {verb} on {are} longer than the window of "
        f"{size:,} tokens (training_config.max_length) and {are} cut there"
    )
    if not window.packs and (out := len(found) - left):
        has = "has" if out == 1 else "have"
        note += f"; {out:,} {has} no word of the assistant's left and {'is' if out == 1 else 'are'} left out"
    return [note]
