"""Property 4 on a run: the model is merged, and compared with what it was and with W + ΔW in float64.

    unmerged logits ──┐
    W + ΔW in float64 ┼── the derived budget ── the logits agree
    merged logits ────┘
    W + ΔW, weight by weight: `harness.folded`          the replies: `harness.replies`

Source: the guide "Fine-tune Phi-3 with LoRA", step 8; arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from harness import folded, injection, proof, replies, tolerance
from harness.proof import judged, unjudged
from harness.reload import probe
from harness.truth import truth

if TYPE_CHECKING:
    from torch import Tensor

    from harness.folded import Folded
    from harness.proof import Proof
    from harness.training import Run

COMPARED_REPLIES = 16
"""How many greedy replies are compared between the merged and the unmerged model."""

CLAIM = ("merged-same-logits", "merged and unmerged: the logits")

STANDS_OUT = 10
"""How many times the budget the adapter's effect on the logits must be, for them alone to prove a merge."""


def prove(run: Run, ids: Tensor, mask: Tensor, unmerged: Tensor) -> list[Proof]:
    """Merge the run's model and judge it, logits and replies.

    The truth comes first, since merging is not asked to be undone.

    Args:
        run: trained; merged after this.
        ids: tokens of one batch, `(b, t)`.
        mask: which of them are not padding.
        unmerged: logits of the trained model on them, `(b, t, vocab)`.
    """
    adapter, model = run.adapter, run.model
    reason = ""
    if "merge" not in adapter.capabilities.features:
        reason = f"{adapter.name} does not claim merge"
    elif run.quantized:
        reason = "merging into 4-bit weights rounds to 4 bits: no budget is derived for that"
    elif run.config.modules_to_save or run.config.lora_bias or run.config.bias != "none":
        reason = "not judged with modules_to_save or trained biases; lora-harness check does"
    if reason:
        return [unjudged(*claim, reason, "not_claimed") for claim in (CLAIM, replies.CLAIM)]
    dtype, real = unmerged.dtype, mask.bool()
    found = truth(
        model,
        adapter.factors(model),
        run.marks,
        ids,
        mask,
        config=run.base.config,
        dtype=dtype,
    )
    budget = float(tolerance.model(found.noise[real], found.trained[real], dtype))
    before = run.exchanges(COMPARED_REPLIES)
    near = [replies.likeliest(model, one, budget) for one in before]
    kept = folded.before(model, adapter, run.marks, run.shells)
    dtypes = folded.coarsest(adapter, model)
    injection.release(model)
    adapter.merge(model)  # type: ignore[attr-defined]  # claimed: the feature brings it
    model.eval()
    logits = probe(model, ids, mask).cpu()
    weights = folded.after(model, adapter, kept, dtypes)
    if len(weights.unseen) == weights.modules or weights.hidden:
        run.notes.append(
            f"{adapter.name} shows no merged weight: merging is judged by the logits alone"
        )
    if sin(weights, unmerged[real], logits[real]):
        reason = "blocked: what was compared is not a merged model"
        answers = unjudged(*replies.CLAIM, reason, "not_run")
    elif not run.moved:
        answers = unjudged(*replies.CLAIM, proof.STILL, "not_run")
    else:
        answers = replies.same_replies(
            before,
            run.exchanges(COMPARED_REPLIES),
            budget,
            near,
            lambda one: replies.likeliest(model, one, budget),
        )
    return [
        same_logits(
            weights=weights,
            unmerged=unmerged[real],
            merged=logits[real],
            truth=found.trained[real],
            noise=found.noise[real],
            base=found.base[real],
            dtype=dtype,
        ),
        answers,
    ]


def same_logits(
    *,
    weights: Folded,
    unmerged: Tensor,
    merged: Tensor,
    truth: Tensor,
    noise: Tensor,
    base: Tensor,
    dtype: torch.dtype,
) -> Proof:
    """Property 4: every weight is W + ΔW, and merged and unmerged logits are those of W + ΔW in float64.

    Args:
        weights: what merging did to the weights.
        unmerged: logits of the trained model, `(n, vocab)` over the tokens that are not padding.
        merged: the same after merging.
        truth: of W + ΔW by the defining equation, in float64.
        noise: of that same model in `dtype`, less the truth.
        base: the truth without ΔW: where no weight can be read, the adapter's effect must stand out
            of the budget, or agreement would prove nothing.
        dtype: of the model.
    """
    budget = tolerance.model(noise, truth, dtype)
    apart, _ = tolerance.margin(merged, truth, budget)
    before, _ = tolerance.margin(unmerged, truth, budget)
    effect = float((truth - base).abs().max())
    measured = f"{apart.measured:.1e} and {before.measured:.1e} off"
    allowed = f"{float(budget):.1e} of {effect:.1e}"
    why = sin(weights, unmerged, merged)
    if not why and not math.isfinite(float(budget) + effect):
        reason = "the true logits are not finite, and nothing can be compared with them; lower "
        reason += "training_config.learning_rate, or use a model.dtype of a wider range"
        return unjudged(*CLAIM, reason, "not_run")
    if why or not (apart.used <= 1 and before.used <= 1):
        return judged(*CLAIM, False, measured, allowed, why)
    by_weight = 0 if weights.hidden else len(weights.right)
    if effect < STANDS_OUT * float(budget) and by_weight < weights.modules:
        return unjudged(
            *CLAIM,
            f"vacuous: the adapter's effect {effect:.1e} is under {STANDS_OUT} times the budget "
            f"{float(budget):.1e}, and a weight that shows it was read in {by_weight} of "
            f"{weights.modules} modules; judged where a run learns more, or in a finer model.dtype",
            "not_run",
        )
    return judged(*CLAIM, True, measured, allowed)


def sin(weights: Folded, unmerged: Tensor, merged: Tensor) -> str:
    """What the weights say against a merge; empty where nothing."""
    if weights.wrong:
        return f"not W + ΔW in {len(weights.wrong)} modules: {weights.wrong[:3]}"
    if weights.idle and not weights.hidden:
        return f"merge left out {len(weights.idle)} modules: {weights.idle[:3]}"
    if weights.idle and torch.equal(unmerged, merged):
        return "merge did nothing: no weight and no bit of the logits changed"
    return ""
