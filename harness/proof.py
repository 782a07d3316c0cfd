"""The five documented properties, judged on what a fine-tuning run really made.

    1  only LoRA parameters train, r·(in + out) for each module; the optimizer holds exactly those
    2  the checkpoint holds the LoRA tensors, all of them, none empty, and nothing else
    3  pretrained checkpoint, then adapter checkpoint, into a new model in a fresh process:
       the logits bit for bit (`harness.reload`)
    4  merged and unmerged agree, in logits within the derived budget (`harness.merging`), in greedy
       replies exactly but for ties (`harness.replies`)
    5  the loss went down (`harness.losses`), and the base is bit for bit as it was

Source: the guide "Fine-tune Phi-3 with LoRA", steps 3, 4, 5 and 8; arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from harness import checkpoint, tolerance
from harness.adapter import matches
from harness.injection import sizes, trainable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from harness.adapter import Adapter, Factors, LoraConfig

SOURCE = 'the guide "Fine-tune Phi-3 with LoRA"'

Outcome = Literal["passed", "failed", "not_claimed", "not_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One property on one run: what was measured, what is allowed, and whether it holds."""

    spec: str
    claim: str
    outcome: Outcome
    measured: str
    allowed: str
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A row of the report's results."""
        failure = {"kind": "property", "expected": self.allowed, "actual": self.measured}
        return {
            "spec": self.spec,
            "level": "MUST",
            "outcome": self.outcome,
            "sentence": self.claim,
            "source": SOURCE,
            "reason": self.reason or None,
            "cases": 1,
            "measured": self.measured,
            "allowed": self.allowed,
            "failures": [failure] if self.outcome == "failed" else [],
        }


def judged(  # noqa: PLR0917  # the columns of the table, in order
    spec: str, claim: str, holds: bool, measured: str, allowed: str, why: str = ""
) -> Proof:
    """A property that was put to the test."""
    return Proof(
        spec=f"finetune/{spec}",
        claim=claim,
        outcome="passed" if holds else "failed",
        measured=measured,
        allowed=allowed,
        reason="" if holds else why,
    )


def unjudged(
    spec: str, claim: str, reason: str, outcome: Literal["not_claimed", "not_run"]
) -> Proof:
    """A property that was not put to the test, and why."""
    return Proof(
        spec=f"finetune/{spec}",
        claim=claim,
        outcome=outcome,
        measured="–",
        allowed="–",
        reason=reason,
    )


def expected_counts(base: nn.Module, config: LoraConfig) -> dict[str, int]:
    """r·(in + out) for every target of the bare base; for a fused one, for each wanted part.

    An embedding has num_embeddings in and embedding_dim out; a trained bias on B adds `out`.
    """
    counts = {}
    for name, module in config.targets(base).items():
        if isinstance(module, nn.Embedding):
            i, o = module.num_embeddings, module.embedding_dim
        elif isinstance(module, nn.Linear):
            i, o = sizes(module)
        else:
            continue
        parts = config.parts(name, o)
        outs = [o] if parts is None else [part.stop - part.start for part in parts]
        counts[name] = sum(config.r * (i + out) + config.lora_bias * out for out in outs)
    return counts


def whole_counts(base: nn.Module, config: LoraConfig) -> dict[str, int]:
    """The size of every parameter of `modules_to_save`, by its name in the bare base."""
    return {
        name: p.numel()
        for name, p in base.named_parameters(remove_duplicate=False)
        if any(_within(name, word) for word in config.modules_to_save)
    }


def only_lora_trains(
    model: nn.Module,
    adapter: Adapter,
    config: LoraConfig,
    expected: Mapping[str, int],
    whole: Mapping[str, int],
) -> Proof:
    """Property 1, by count and by storage: what trains is the factors, whatever their names.

    And each module of `modules_to_save`, whole: `whole` is `whole_counts` of the bare base.
    """
    factors = adapter.factors(model)
    counts = {name: sum(map(_numbers, found)) for name, found in factors.items()}
    wrong = sorted(
        name for name in expected.keys() | counts.keys() if expected.get(name) != counts.get(name)
    )
    storages = {
        tensor.untyped_storage().data_ptr()
        for found in factors.values()
        for one in found
        for tensor in (one.A, one.B, one.bias)
        if tensor is not None
    }
    also = (*config.modules_to_save, *(("bias",) if config.bias != "none" else ()))
    strangers = [
        name
        for name, parameter in trainable(model).items()
        if parameter.untyped_storage().data_ptr() not in storages
        and not any(_within(name, word) for word in also)
    ]
    misscaled = [
        f"{name} ({one.scaling:g}, not {config.scaling:g})"
        for name, found in factors.items()
        for one in found
        if abs(float(one.scaling) - config.scaling) > tolerance.setting(config.scaling)
    ]
    elsewhere = sorted(
        name
        for name in factors.keys() & expected.keys()
        if not _in_place(name, factors[name], config)
    )
    beside = {
        name: p.numel()
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad and p.untyped_storage().data_ptr() not in storages
    }
    places = checkpoint.base_keys(dict.fromkeys(whole, ""), dict.fromkeys(beside, ""))
    frozen = [name for name, size in whole.items() if beside.get(places.get(name, "")) != size]
    total = sum(p.numel() for n, p in trainable(model).items() if n not in strangers)
    wanted = sum(expected.values())
    why = f"wrong count in {wrong[:3]}" if wrong else f"also trains {strangers[:3]}"
    if misscaled:
        why = f"another scaling than alpha and r give in {len(misscaled)}: {misscaled[0]}"
    if elsewhere:
        why = f"adapts other rows than enable_lora names in {elsewhere[:3]}"
    if frozen:
        why = f"does not train {len(frozen)} of modules_to_save: {frozen[:3]}"
    # With whole modules or biases trained, the count of factors is judged module by module alone.
    exact = bool(also) or total == wanted
    return judged(
        "only-lora-trains",
        "only LoRA trains, r·(in+out) each",
        not (wrong or strangers or misscaled or elsewhere or frozen) and exact,
        f"{sum(counts.values()):,} in {len(counts)} modules",
        f"{wanted:,} in {len(expected)}",
        why,
    )


def optimizer_holds(model: nn.Module, optimizer: Any) -> Proof:
    """Property 1, the other half: the optimizer's parameters are the trainable ones, by identity."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in trainable(model).values()}
    return judged(
        "optimizer-holds-lora",
        "the optimizer holds just those",
        held == wanted,
        f"{len(held)} tensors, {len(held - wanted)} others",
        f"{len(wanted)} tensors, 0 others",
    )


STILL = (
    "the learning rate was 0 in every step, as in warmup's first: nothing was trained; train longer"
)
"""Why what training would have changed cannot be judged."""


def checkpoint_is_whole(
    model: nn.Module, base: Mapping[str, str], folder: Path, *, moved: bool = True
) -> Proof:
    """Property 2, on both files as they lie on disk.

    All and only: as many numbers as train, each finite, B not zero after training; scalars such as
    alpha apart. No tensor has the bits of one of the base's, given by their fingerprints. `moved` says
    whether any step had a learning rate: without one, B is rightly zero, and what it proves open.
    """
    files = {
        name: checkpoint.read(folder / name) for name in (checkpoint.PLAIN, checkpoint.PICKLED)
    }
    state = files[checkpoint.PLAIN]
    same = checkpoint.digests(state) == checkpoint.digests(files[checkpoint.PICKLED])
    wanted = trainable(model)
    tensors = {key: value for key, value in state.items() if value.numel() != 1}
    zero = [key for key, value in tensors.items() if not value.any()]
    empty = [
        key
        for key, value in tensors.items()
        if not value.numel() or not value.isfinite().all() or (moved and key in zero)
    ]
    marks = set(base.values())
    held = checkpoint.digests(tensors)
    foreign = [key for key, mark in held.items() if mark in marks]
    numbers, want = (sum(v.numel() for v in each.values()) for each in (tensors, wanted))
    whole = same and not empty and not foreign and numbers == want
    claim = "the checkpoint is LoRA, and whole"
    if whole and zero and not moved:
        return unjudged("checkpoint-is-lora", claim, STILL, "not_run")
    live = checkpoint.digests(wanted)
    lacking = [name for name, mark in live.items() if mark not in held.values()]
    beside = [key for key, mark in held.items() if mark not in live.values()]
    why = f"lacks {lacking[:3]}, has beside what trains {beside[:3]}"
    if not same or empty or foreign:
        why = f"first at {(empty or foreign)[0]}" if same else "the two files differ"
    return judged(
        "checkpoint-is-lora",
        claim,
        whole,
        f"{numbers:,}; {len(empty)} empty, {len(foreign)} base",
        f"{want:,}; 0 empty, 0 base",
        why,
    )


def base_unchanged(before: Mapping[str, str], model: nn.Module) -> Proof:
    """Property 5: every tensor of the base has the bits it had before injection."""
    now = checkpoint.digests(model.state_dict())
    places = checkpoint.base_keys(before, now)
    changed = [
        name for name, mark in before.items() if name not in places or now[places[name]] != mark
    ]
    return judged(
        "base-unchanged",
        "the base, bit for bit as it was",
        not changed,
        f"{len(changed)} of {len(before)} tensors changed",
        "0",
        f"first {changed[:3]}",
    )


def _within(name: str, module: str) -> bool:
    """Whether a parameter lies in the module of that name, dotted or not."""
    words = name.split(".")
    return any(matches(".".join(words[:k]), module) for k in range(1, len(words) + 1))


def _in_place(name: str, found: Sequence[Factors], config: LoraConfig) -> bool:
    """Whether a fused projection's factors are those of the wanted parts: their count cannot tell."""
    parts = config.parts(name)
    if parts is None:
        return True
    rows = torch.arange(sum(size for size, _ in config.layout(name) or ()))
    held = [
        rows[one.rows.cpu() if isinstance(one.rows, torch.Tensor) else one.rows or slice(None)]
        for one in found
    ]
    return sorted(r.tolist() for r in held) == sorted(rows[part].tolist() for part in parts)


def _numbers(one: Factors) -> int:
    return sum(t.numel() for t in (one.A, one.B, one.bias) if t is not None)
