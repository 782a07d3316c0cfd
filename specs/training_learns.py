"""What it is all for: an adapter that learns, on the conversations that come with the harness."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from torch import nn

    from harness.trial import Trial

STEPS, BATCH, RATE = 40, 16, 5e-3
"""The quick recipe's."""

KNOWN_BEFORE, LEARNED = 0.05, 0.8
"""Parts of the replies that are exactly right: of the base at most, of the adapted model at least."""

ASKED, LONGEST = 40, 16
"""How many prompts of the eval split, and how many tokens of a reply."""


@spec(
    "training/learns",
    claim="An adapter trained on the shipped conversations MUST learn their form: of the replies to new "
    "prompts at most 5 % are exactly right before, and at least 80 % after.",
    why="A loss can go down while nothing is learned that a user would see.",
    source=(
        "Fine-tune Phi-3 with LoRA, the guide: fine-tune on a custom chat-instruction dataset",
    ),
    needs=("training/loss-goes-down", "training/update-equivalence"),
    tier="full",
    cases=(Case(specimen="tiny", r=16, alpha=32.0),),
)
def learns(trial: Trial) -> None:
    """Train as the quick recipe does, without a trainer, and ask before and after."""
    import torch

    from harness import chat

    tokenizer = chat.tokenizer()
    asked, expected = chat.prompts(chat.dataset("shipped", "eval").select(range(ASKED)))
    model = trial.inject()
    before = _right(model, tokenizer, asked, expected)
    if before > KNOWN_BEFORE:
        fail(
            "value",
            expected=f"at most {KNOWN_BEFORE:.0%} of {ASKED} replies right before training",
            actual=f"{before:.0%}",
            measured=before,
            allowed=KNOWN_BEFORE,
        )

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    rows = [_row(tokenizer, messages) for messages in chat.dataset("shipped", "train")["messages"]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trial.case.seed))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        batch = _batch([rows[int(k)] for k in order[step * BATCH : (step + 1) * BATCH]])
        loss = model(**{name: t.to(trial.case.device) for name, t in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trial.unmerged(model)
    after = _right(model, tokenizer, asked, expected)
    if after < LEARNED:
        fail(
            "value",
            expected=f"at least {LEARNED:.0%} of {ASKED} replies right after {STEPS} steps",
            actual=f"{after:.0%}, after {before:.0%} before",
            measured=1 - after,
            allowed=1 - LEARNED,
        )


def _row(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens and labels of one conversation: only the last turn, the assistant's, is learned."""
    asked = _tokens(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _tokens(tokenizer, messages)
    return whole, [-100] * len(asked) + whole[len(asked) :]


def _tokens(tokenizer: Any, messages: list[dict[str, str]], **settings: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _batch(rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Rows padded to the right: `(b, t)` each."""
    import torch

    longest = max(len(tokens) for tokens, _ in rows)
    short = [longest - len(tokens) for tokens, _ in rows]
    return {
        "input_ids": torch.tensor([t + [0] * n for (t, _), n in zip(rows, short, strict=True)]),
        "labels": torch.tensor([y + [-100] * n for (_, y), n in zip(rows, short, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(t) + [0] * n for (t, _), n in zip(rows, short, strict=True)]
        ),
    }


def _right(model: nn.Module, tokenizer: Any, asked: list[Any], expected: list[str]) -> float:
    """The part of greedy replies that is exactly right. `generate` is not promised: calls are."""
    import torch

    from harness import chat

    device = next(model.parameters()).device
    said = []
    with torch.no_grad():
        for messages in asked:
            ids = torch.tensor(
                [_tokens(tokenizer, messages, add_generation_prompt=True)], device=device
            )
            start = ids.shape[1]
            for _ in range(LONGEST):
                best = model(input_ids=ids).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, best], dim=1)
                if int(best) in _ends(tokenizer):
                    break
            said.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    return chat.exact_match(said, expected)


def _ends(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id}
