"""The LoRA paper's claims beside what was measured, each with its conditions.

Never a ratio alone: the one published table on Phi-3-mini shows LoRA with more memory than full
fine-tuning (litgpt, A10G, micro-batch 4 without checkpointing: 19.75 GB against 17.01 GB).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.console import table
from harness.measure.cell import BASE, FULL
from harness.measure.memory import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PUBLISHED = {
    "memory": "3× less: 1.2 TB → 350 GB (GPT-3 175B, Adam)",
    "time": "+32.6 % tokens/s, −24.6 % time: 32.5 → 43.1 tokens/s (GPT-3 175B)",
    "checkpoint": "10,000× smaller: 350 GB → 35 MB (GPT-3 175B, r 4, q and v)",
    "latency when merged": "none added: the base's operations (GPT-2 M, 1449.4 ± 0.8 ms)",
}
"""Hu et al., arXiv 2106.09685, sections 1, 4.2 and 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One claim in one cell.

    Attributes:
        claim: a key of `PUBLISHED`.
        found: what was measured, in words.
        conditions: who, on what and how: the same ones in the same order for every cell.
    """

    claim: str
    found: str
    conditions: tuple[str, ...]


def measured(report: Mapping[str, Any]) -> list[Measured]:
    """Each claim for each LoRA cell of a bench's report, claim by claim."""
    read = _reader([*report["timings"], *report["memory"], *report["counters"]])
    found = []
    for row in report["timings"]:
        ours = row["phase"] == "training-step" and row["metric"] == "seconds"
        if not ours or row["subject"] in {BASE, FULL} or row["value"] is None:
            continue
        conditions = row["conditions"]
        us = (row["subject"], row["model"], conditions)
        full = (FULL, row["model"], {**conditions, "r": 0})
        base = (BASE, row["model"], {**conditions, "r": 0})
        spoken = (row["subject"], row["model"], *_spell(conditions))
        found += [
            Measured(claim=claim, found=words, conditions=spoken)
            for claim, words in _measured(read, us, full, base)
        ]
    return sorted(found, key=lambda one: list(PUBLISHED).index(one.claim))


def tell(report: Mapping[str, Any]) -> str:
    """The claims for a terminal: conditions that all cells share once, then a line a cell."""
    found = measured(report)
    if not found:
        return ""
    axes = list(zip(*(one.conditions for one in found), strict=True))
    shared = ", ".join(axis[0] for axis in axes if len(set(axis)) == 1)
    told = ["The LoRA paper's claims, and what was measured here" + f" ({shared})" * bool(shared)]
    for claim, published in PUBLISHED.items():
        rows = [
            [
                "",
                *(c for c, axis in zip(one.conditions, axes, strict=True) if len(set(axis)) > 1),
                one.found,
            ]
            for one in found
            if one.claim == claim
        ]
        if rows:
            told += ["", f"{claim}, published: {published}", table(rows)]
    return "\n".join(told)


def _spell(conditions: Mapping[str, Any]) -> tuple[str, ...]:
    """Conditions in a few words, with what a ratio hangs on."""
    return (
        f"r {conditions['r']}",
        conditions["dtype"],
        f"{conditions['batch']}×{conditions['sequence']}",
        "checkpointing" if conditions["checkpointing"] else "no checkpointing",
        conditions["device"],
        "AdamW",
    )


def _measured(read: Any, us: Any, full: Any, base: Any) -> Iterable[tuple[str, str]]:
    ours, theirs = (
        read(us, "training-step", "peak_bytes"),
        read(full, "training-step", "peak_bytes"),
    )
    if ours and theirs:
        yield "memory", f"{theirs / ours:.2f}× less: {format_bytes(theirs)} → {format_bytes(ours)}"
    ours, theirs = read(us, "training-step", "seconds"), read(full, "training-step", "seconds")
    if ours and theirs:
        yield (
            "time",
            f"{100 * (theirs / ours - 1):+.1f} % tokens/s, {100 * (ours / theirs - 1):+.1f} % time",
        )
    ours = read(us, "training-step", "checkpoint_bytes")
    theirs = read(full, "training-step", "checkpoint_bytes")
    if ours and theirs:
        yield (
            "checkpoint",
            f"{theirs / ours:,.1f}× smaller: {format_bytes(theirs)} → {format_bytes(ours)}",
        )
    ours, theirs = (
        read(us, "merged-forward", "operations"),
        read(base, "evaluation-forward", "operations"),
    )
    mine = read(us, "merged-forward", "seconds")
    bare = read(base, "evaluation-forward", "seconds")
    if ours and theirs and mine and bare:
        same = "the same" if ours == theirs else f"{ours - theirs:+,}"
        yield (
            "latency when merged",
            f"{same} operations ({ours:,}); {1e3 * mine:.1f} ms, base {1e3 * bare:.1f} ms",
        )


def _reader(rows: Sequence[Mapping[str, Any]]) -> Any:
    index = {
        (r["subject"], r["model"], _key(r["conditions"]), r["phase"], r["metric"]): r["value"]
        for r in rows
        if "kind" not in r
    }

    def read(who: tuple[str, str, Mapping[str, Any]], phase: str, metric: str) -> Any:
        subject, model, conditions = who
        return index.get((subject, model, _key(conditions), phase, metric))

    return read


def _key(conditions: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(conditions.items()))
