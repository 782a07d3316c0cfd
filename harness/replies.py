"""Property 4, by replies: what the unmerged and the merged model answer, greedily, token for token.

Where two tokens are all but equally likely, rounding alone chooses between them, and the replies part
there. That is no sin of a merge: logits within the budget b of the truth's put the likeliest token of
the one model within 4b of the other's, b for each of the four logits that are compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from harness.proof import judged, unjudged
from harness.reload import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from harness.chat import Exchange
    from harness.proof import Proof

CLAIM = ("merged-same-replies", "merged and unmerged: the replies")


def likeliest(model: nn.Module, one: Exchange, budget: float) -> Tensor:
    """Which tokens the model might as well have said, at each place of a reply. -> `(t, vocab)`.

    Args:
        model: asked for all places at once, given the reply.
        one: a prompt and its reply.
        budget: of a logit, see `harness.tolerance.model`.
    """
    ids = torch.tensor([[*one.asked, *one.said]])
    logits = probe(model, ids, torch.ones_like(ids))[0, len(one.asked) - 1 : -1].double()
    return (logits >= logits.amax(-1, keepdim=True) - 4 * budget).cpu()


def same_replies(
    before: Sequence[Exchange],
    after: Sequence[Exchange],
    budget: float,
    unmerged: Sequence[Tensor],
    merged: Callable[[Exchange], Tensor],
) -> Proof:
    """The replies are the same, but from a tie on.

    Args:
        before: of the unmerged model.
        after: of the merged one, to the same prompts.
        budget: of a logit; where it is not finite, nothing can be told.
        unmerged: `likeliest` of the unmerged model for each reply in `before`.
        merged: the same of the merged model; called where replies differ.
    """
    if not math.isfinite(budget):
        return unjudged(*CLAIM, "the true logits are not finite", "not_run")
    same = tied = 0
    for a, b, near in zip(before, after, unmerged, strict=True):
        pairs = zip(a.said, b.said, strict=False)
        place = next((k for k, (one, other) in enumerate(pairs) if one != other), None)
        if place is None:
            same += len(a.said) == len(b.said)
        elif near[place, b.said[place]] and merged(a)[place, a.said[place]]:
            tied += 1
    told = f", {tied} tied" if tied else ""
    return judged(
        *CLAIM,
        same + tied == len(before) > 0,
        f"{same} of {len(before)} the same{told}",
        f"{len(before)}",
    )
