"""Property 5: the losses of a run, and whether they went down.

The training loss is judged against its own noise: every step sees another batch. Where even steps
that all pull one way could not lower it by more than that noise, the run cannot tell, and says so.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.proof import judged, unjudged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.proof import Proof


def curve(history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of one quantity of the trainer's log."""
    return [(int(e["step"]), float(e[key])) for e in history if key in e]


def reach(history: Sequence[dict[str, Any]], parameters: int) -> float:
    """About how far Adam can lower the loss in a run: Σ rate · √n · ‖gradient‖₂ over the steps.

    Adam moves each of the n parameters by about the learning rate at most (Kingma and Ba, section
    2.1), which to first order lowers the loss by rate · ‖gradient‖₁ ≤ rate · √n · ‖gradient‖₂.
    """
    total, before = 0.0, 0
    for entry in history:
        if "learning_rate" in entry and "grad_norm" in entry:
            steps = int(entry["step"]) - before
            total += steps * entry["learning_rate"] * math.sqrt(parameters) * entry["grad_norm"]
            before = int(entry["step"])
    return total


def loss_went_down(losses: Sequence[tuple[int, float]], within: float = math.inf) -> Proof:
    """The last tenth's mean below the first's by two standard errors of the difference.

    Fails where it rose by as much; what lies between proves neither, and is not judged.

    Args:
        losses: (step, loss), as logged.
        within: how far the run's steps can lower the loss, see `reach`; not judged where that is
            less than two standard errors.
    """
    claim = "the training loss went down"
    n = max(2, len(losses) // 10)
    if len(losses) < 2 * n:
        reason = (
            f"{len(losses)} losses were logged, too few to compare a first and a last tenth: lower "
            "training_config.logging_steps"
        )
        return unjudged("loss-went-down", claim, reason, "not_run")
    if broken := [(step, loss) for step, loss in losses if not math.isfinite(loss)]:
        step, loss = broken[0]
        why = f"it is {loss} at step {step}; lower training_config.learning_rate"
        return judged("loss-went-down", claim, False, f"{len(broken)} not finite", "0", why)
    first, last = ([loss for _, loss in part] for part in (losses[:n], losses[-n:]))
    # Of two losses at each end no variance is known; the steps from loss to loss show the noise, and
    # hardly the trend (von Neumann, Annals of Mathematical Statistics 12, 1941).
    noise = fmean((after - before) ** 2 for (_, before), (_, after) in pairwise(losses)) / 2
    margin = 2 * math.sqrt(2 * noise / n)
    if within < margin:
        reason = (
            f"the learning rate is too low for so few steps to show it: they can lower the loss by about "
            f"{within:.2g}, and it varies by {margin:.2g} from batch to batch; raise "
            "training_config.learning_rate, or train longer"
        )
        return unjudged("loss-went-down", claim, reason, "not_run")
    fell = fmean(first) - fmean(last)
    if abs(fell) <= margin:
        reason = (
            f"it went from {fmean(first):.3f} to {fmean(last):.3f}, by less than the {margin:.2g} it "
            "varies by from batch to batch: train longer, or log oftener"
        )
        return unjudged("loss-went-down", claim, reason, "not_run")
    return judged(
        "loss-went-down",
        claim,
        fell > 0,
        f"{fmean(first):.3f} → {fmean(last):.3f}",
        f"< {fmean(first) - margin:.3f}",
    )


def eval_loss_went_down(
    before: float | None, after: float | None, unsuited: str = "", *, learned: bool = False
) -> Proof:
    """The same on conversations that were not trained on; the same ones both times.

    Args:
        before: the loss before training.
        after: the loss at its end.
        unsuited: why the conversations at hand cannot tell.
        learned: whether the training loss was not seen to go up: what was not trained on may well be
            told worse then. A loss that has not moved at all shows an adapter that evaluation leaves out.
    """
    claim = "the evaluation loss went down"
    if unsuited:
        return unjudged("eval-loss-went-down", claim, unsuited, "not_run")
    if before is None or after is None:
        return unjudged("eval-loss-went-down", claim, "do_eval is false", "not_claimed")
    if not math.isfinite(before):
        reason = f"it was {before} before training: the base and these conversations cannot tell"
        return unjudged("eval-loss-went-down", claim, reason, "not_run")
    if learned and after > before:
        reason = (
            f"it went up, from {before:.3f} to {after:.3f}, and the training loss did not: what was "
            "learned does not carry over (overfitting); train on more conversations"
        )
        return unjudged("eval-loss-went-down", claim, reason, "not_run")
    return judged(
        "eval-loss-went-down",
        claim,
        after < before,
        f"{before:.3f} → {after:.3f}",
        f"< {before:.3f}",
    )
