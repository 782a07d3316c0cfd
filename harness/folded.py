"""Property 4, by weights: what `merge` left in the place of W is W + ΔW, in every adapted module.

Logits alone let a merge pass that does nothing, since nothing then differs, and in half precision
one that forgets a layer, since rounding hides it. A weight shows both: it is read before and after,
through the adapter's `base_weight`, or from the tensor in which the base's weight lies.

`base_weight` is the frozen weight by contract, and an implementation may keep W beside the sum. So
only where some weight changed must every other; where none did, the logits must differ in a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import checkpoint, oracle, tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from harness.adapter import Adapter, LoraConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The adapted modules before merging: their weights, where they can be read, and their factors."""

    read: Mapping[str, Tensor]
    places: Mapping[str, str]
    factors: oracle.Snapshot
    shells: Mapping[str, nn.Module]


@dataclass(slots=True, kw_only=True)
class Folded:
    """What merging did to the weights.

    Attributes:
        modules: how many are adapted.
        right: changed, and W + ΔW within the budget.
        wrong: changed, and not that.
        idle: unchanged, though ΔW is far larger than the budget.
        unseen: not to be read, or ΔW is within the budget.
    """

    modules: int
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def hidden(self) -> bool:
        """Whether nothing that was read changed: there is no telling W kept from W not merged."""
        return not self.right and not self.wrong


def shells(base: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules to be adapted, without their numbers: kinds and shapes."""
    found: dict[str, nn.Module] = {}
    for name, module in config.targets(base).items():
        if isinstance(module, nn.Embedding):
            found[name] = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        elif isinstance(module, nn.Linear):
            found[name] = nn.Linear(module.in_features, module.out_features, device="meta")
    return found


def before(
    model: nn.Module, adapter: Adapter, marks: Mapping[str, str], shapes: Mapping[str, nn.Module]
) -> Weights:
    """Keep what the merge is judged by. A weight that is not the base's own, bit for bit, is not read."""
    live = model.state_dict()
    places = checkpoint.base_keys(marks, checkpoint.digests(live))
    factors = oracle.snapshot(adapter.factors(model))
    read = {}
    for name in factors:
        weight = _weight(model, adapter, name, places, live)
        mark = marks.get(f"{name}.weight")
        if weight is not None and checkpoint.digests({name: weight})[name] == mark:
            read[name] = weight.detach().to("cpu", copy=True)
    return Weights(read=read, places=places, factors=factors, shells=shapes)


def after(model: nn.Module, adapter: Adapter, kept: Weights, dtypes: Mapping[str, Any]) -> Folded:
    """Judge every adapted module of the merged model.

    Args:
        model: merged.
        adapter: of the implementation.
        kept: from `before`.
        dtypes: of each module's factors, the coarsest.
    """
    live = model.state_dict()
    found = Folded(modules=len(kept.factors))
    for name, parts in kept.factors.items():
        W = kept.read.get(name)
        now = None if W is None else _weight(model, adapter, name, kept.places, live)
        if W is None or now is None or now.shape != W.shape or name not in kept.shells:
            found.unseen.append(name)
            continue
        shell = kept.shells[name]
        delta = oracle.delta(shell, parts)
        budget = tolerance.weights(
            W.double() + delta,
            oracle.delta(shell, parts, absolute=True),
            r=max(one.A.shape[0] for one in parts),
            dtype=W.dtype,
            factor_dtype=dtypes[name],
        )
        if torch.equal(now.detach().cpu(), W):
            plain = bool((delta.abs() > budget).any())
            (found.idle if plain else found.unseen).append(name)
        else:
            margin, _ = tolerance.margin(now, W.double() + delta, budget)
            (found.right if margin.used <= 1 else found.wrong).append(name)
    return found


def coarsest(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """The coarsest dtype of each module's factors."""
    return {
        name: max((t.dtype for f in parts for t in (f.A, f.B)), key=tolerance.unit_roundoff)
        for name, parts in adapter.factors(model).items()
    }


def _weight(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    places: Mapping[str, str],
    live: Mapping[str, Tensor],
) -> Tensor | None:
    if callable(read := getattr(adapter, "base_weight", None)):
        weight = read(model, name)
        return weight if isinstance(weight, torch.Tensor) else None
    return live.get(places.get(f"{name}.weight", ""))
