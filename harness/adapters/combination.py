"""Several adapters in one whose ΔW is their weighted sum: factors side by side.

Σ w_k s_k B_k A_k  =  [w_1 s_1 B_1 … w_n s_n B_n] [A_1; …; A_n]          rank Σ r_k, scaling 1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.adapter import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.adapter import Parts
    from harness.adapters.wrapped import Adapted


def config(paths: Sequence[str], configs: Sequence[LoraConfig]) -> LoraConfig:
    """The settings of the sum; ValueError where two adapters cut one layer differently."""
    layouts: dict[str, Parts] = {}
    for path in paths:
        cuts = {each.layout(path) for each in configs}
        if len(cuts) > 1:
            raise ValueError(f"enable_lora: the adapters adapt different parts of {path}")
        if cut := cuts.pop():
            layouts[path] = cut
    r = sum(each.r for each in configs)
    return LoraConfig(
        r=r,
        lora_alpha=float(r),
        target_modules=tuple(paths),
        lora_dropout=configs[0].lora_dropout,
        lora_bias=any(each.lora_bias for each in configs),
        enable_lora=layouts or None,
    )


def fill(layer: Adapted, terms: Sequence[tuple[str, float]], new: str) -> None:
    """Write the sum of the terms, (adapter, weight), into the new adapter's branches of a layer."""
    for part, target in enumerate(layer.of(new)):
        sources = [(layer.of(name)[part], weight) for name, weight in terms if layer.of(name)]
        with torch.no_grad():
            target.lora_A.zero_()
            target.lora_B.zero_()
            at = 0
            for source, weight in sources:
                stop = at + len(source.lora_A)
                factor = weight * source.scaling / target.scaling
                target.lora_A[at:stop] = source.lora_A
                target.lora_B[:, at:stop] = factor * source.lora_B
                if target.lora_bias is not None and source.lora_bias is not None:
                    target.lora_bias.add_(source.lora_bias, alpha=factor)
                at = stop
