"""The trained model in float64, from the defining equation alone.

W + scaling · B A is added up in float64 for every adapted module and put into a model of transformers'
own, with no LoRA code in the way. Cast to the run's dtype, that model shows what rounding alone does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness import checkpoint
from harness.reload import probe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from harness.adapter import Factors

LARGE = 10**9
"""Parameters from which a half-precision model's truth is float32: 2¹³ times finer than float16 and
2¹⁶ times finer than bfloat16, and half of float64's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Logits `(b, t, vocab)`: of the base, with ΔW, and how far the run's dtype strays from the latter."""

    base: Tensor
    trained: Tensor
    noise: Tensor


def truth(
    model: nn.Module,
    factors: Mapping[str, Sequence[Factors]],
    marks: Mapping[str, str],
    ids: Tensor,
    mask: Tensor,
    *,
    config: object,
    dtype: torch.dtype,
) -> Truth:
    """The truth about an unmerged model, on one batch.

    Args:
        model: injected and trained, unmerged.
        factors: of the adapted modules, by their names in the base.
        marks: the base's fingerprints, by which its tensors are found in `model`.
        ids: token ids, `(b, t)`.
        mask: 1 where `ids` is not padding.
        config: the base's Phi3Config.
        dtype: of the run.
    """
    from transformers import Phi3ForCausalLM

    live = model.state_dict()
    places = checkpoint.base_keys(marks, checkpoint.digests(live))
    size = sum(live[place].numel() for place in places.values())
    half = torch.finfo(dtype).bits == 16
    wide = torch.float32 if half and size >= LARGE else torch.float64
    with torch.device("meta"):
        shell = Phi3ForCausalLM._from_config(config, attn_implementation="sdpa")  # noqa: SLF001  # no public way
    # On the CPU, whatever the run's device: the card's memory belongs to the run.
    pure = shell.to(wide).to_empty(device="cpu")
    pure.load_state_dict({name: live[place].to(wide) for name, place in places.items()})
    pure.model.rotary_emb = type(pure.model.rotary_emb)(config=pure.config)
    pure.eval()
    base = probe(pure, ids, mask)
    weights = dict(pure.named_modules())
    with torch.no_grad():
        for name, parts in factors.items():
            weight = weights[name].weight
            for one in parts:
                delta = one.scaling * (one.B.to("cpu", wide) @ one.A.to("cpu", wide))
                if isinstance(weights[name], nn.Embedding):
                    delta = delta.T
                weight[slice(None) if one.rows is None else one.rows] += delta
    trained = probe(pure, ids, mask)
    noise = probe(pure.to(dtype), ids, mask).to(wide) - trained
    return Truth(base=base, trained=trained, noise=noise)
