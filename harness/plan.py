"""What fits a memory budget, with no GPU: every point is a whole training step on fake tensors.

points ──▶ those that the adapter claims ──▶ shapes ──▶ fits, or misses by how much and what to change
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.measure.memory import format_bytes, parse_bytes
from harness.measure.shapes import measure, points, weights

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from harness.adapter import Adapter
    from harness.measure.shapes import Planned, Point

NOTE = (
    "Tensors' own bytes, counted on fake CPU tensors with fused attention; on a card the CUDA context "
    "(about half a GiB) and the allocator's rounding and fragmentation come on top."
)


def claimed(adapter: Adapter, grid: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points that the adapter claims, and why the others are left out.

    Raises UsageError where it claims none.
    """
    from harness.measure.cell import not_claimed

    ours, lacking = [], []
    for point in grid:
        why = not_claimed(adapter, dtype=_dtype(point), checkpointing=point.checkpointing)
        if why:
            lacking.append(why)
        else:
            ours.append(point)
    told = [
        f"{count} of {len(grid)} points left out: {why}" for why, count in Counter(lacking).items()
    ]
    if not ours:
        raise UsageError(
            f"--adapter {adapter.name}: no point of the grid is claimed: {'; '.join(told)}"
        )
    return ours, told


def require_weights_fit(model: str, grid: Iterable[Point], budget: int) -> None:
    """Raise UsageError where not even the smallest form of the weights is within the budget."""
    forms = sorted({(p.dtype, p.quantization) for p in grid})
    size, dtype, quantization = min((weights(model, d, q), d, q) for d, q in forms)
    if size > budget:
        form = "NF4" if quantization == "nf4" else dtype
        raise UsageError(
            f"--budget: {format_bytes(budget)} is {format_bytes(size - budget)} less than the weights "
            f"of {model} alone, {format_bytes(size)} in {form}; give more, or a smaller model"
        )


def past_context(model: str, grid: Iterable[Point]) -> list[str]:
    """A line for each sequence that is longer than the model was made for."""
    from harness import phi3

    context = phi3.config(model).max_position_embeddings
    return [
        f"sequence {tokens} is past the context of {model}, {context} tokens"
        for tokens in sorted({point.sequence for point in grid})
        if tokens > context
    ]


FIELDS = ("quantization", "checkpointing", "batch", "sequence", "dtype", "r")


def advice(missed: Planned, everything: Sequence[Planned], budget: int, adapter: Adapter) -> str:
    """What to change so that a point which does not fit does: one thing that was seen to help.

    Failing that, what the largest kind of its peak is, and what is done about that kind.
    """
    for field in FIELDS:
        helps = [p for p in _beside(missed, everything, field) if p.peak_bytes <= budget]
        if helps:
            best = max(helps, key=lambda other: other.peak_bytes)
            return f"{_spoken(field, getattr(best.point, field))}: {format_bytes(best.peak_bytes)}"
    kind = next(iter(missed.kinds))
    remedy, fields = _remedy(kind, missed.point, adapter)
    ours = missed.point
    tried = any(
        other.point.tokens <= ours.tokens and other.point.r <= ours.r
        for field in fields
        for other in _beside(missed, everything, field)
    )
    return f"mostly {kind}: {remedy}{', and more than that alone' if tried else ''}"


def _beside(one: Planned, everything: Iterable[Planned], field: str) -> list[Planned]:
    """The points that differ from one in that field alone."""
    ours = asdict(one.point)
    return [
        other
        for other in everything
        if all((asdict(other.point)[f] == ours[f]) != (f == field) for f in FIELDS)
    ]


def _remedy(kind: str, point: Point, adapter: Adapter) -> tuple[str, tuple[str, ...]]:
    """What the adapter lets be done about a kind of memory, and the fields that this changes."""
    from harness.measure.cell import not_claimed

    if kind == "base weights":
        four_bit = not not_claimed(adapter, dtype="nf4", checkpointing=point.checkpointing)
        if point.quantization == "none" and four_bit:
            return "a 4-bit base", ("quantization",)
        return "a smaller model", ()
    if kind == "saved activations":
        checkpointed = not not_claimed(adapter, dtype=_dtype(point), checkpointing=True)
        if not point.checkpointing and checkpointed:
            return "gradient checkpointing", ("checkpointing",)
        return "a shorter sequence", ("sequence",)
    if kind == "logits":
        return "a shorter sequence or fewer of them", ("sequence", "batch")
    return "a lower rank", ("r",)


def _dtype(point: Point) -> str:
    """The base's, as a bench and an adapter's claims call it."""
    return point.dtype if point.quantization == "none" else point.quantization


def _spoken(field: str, value: object) -> str:
    if field == "checkpointing":
        return "gradient checkpointing" if value else "no gradient checkpointing"
    return f"a base in {value}" if field == "quantization" else f"{field} {value}"


# ---- the command ---------------------------------------------------------------------------------


def command(args: argparse.Namespace) -> int:
    """`lora-harness plan`: 0 where something fits, 1 where nothing does."""
    import warnings

    from harness import registry
    from harness.report.schema import Recorder

    warnings.simplefilter("ignore")  # a library's advice on shapes that are never run
    budget = parse_bytes(args.budget)
    if args.target is not None and args.target < 1:
        raise UsageError(f"--target: {args.target} tokens per step; give at least 1")
    grid = points(
        r=args.rank,
        dtype=args.dtype,
        batch=args.batch,
        sequence=args.sequence,
        checkpointing=[c == "on" for c in args.checkpointing],
        quantization=args.quantization,
    )
    adapter = registry.resolve(args.adapter)
    grid, left_out = claimed(adapter, grid)
    require_weights_fit(args.model, grid, budget)
    notes = [*left_out, *past_context(args.model, grid)]
    head = {
        "adapter": {"name": adapter.name, "version": adapter.version},
        "model": args.model,
        "budget": budget,
    }
    found: list[Planned] = []
    with Recorder(args.json, kind="plan", **head) as report:
        report.add("notes", [NOTE, *notes])
        planned = measure(adapter, args.model, grid, target=args.target)
        for one in _with_progress(planned, len(grid)):
            found.append(one)
            _record(report, one, adapter, args.model)
        _show(found, args.model, adapter, budget, args.target)
        for line in notes:
            print(line)
    return 0 if any(p.peak_bytes <= budget for p in found) else 1


def _with_progress(found: Iterable[Planned], total: int) -> Iterator[Planned]:
    import sys

    from tqdm import tqdm

    yield from tqdm(found, total=total, unit="point", leave=False, disable=not sys.stderr.isatty())


def _record(report: Any, found: Planned, adapter: Adapter, model: str) -> None:
    where = {
        "subject": adapter.name,
        "version": adapter.version,
        "model": model,
        "phase": "training-step",
        "conditions": {
            **asdict(found.point),
            "targets": "all-linear",
            "batches_per_step": found.batches,
            "device": "fake",
        },
    }
    whole = {**where, "metric": "peak_bytes", "value": found.peak_bytes, "unit": "B"}
    report.add("memory", whole | {"at": found.step.peak_at})
    report.add(
        "memory",
        [whole | {"kind": kind, "value": size} for kind, size in found.kinds.items()],
    )
    report.add("counters", found.step.rows(**where))


def _show(
    found: Sequence[Planned], model: str, adapter: Adapter, budget: int, target: int | None
) -> None:
    from harness.console import table, wrapped

    one = found[0]
    print(
        f"{model}: {one.base_parameters:,} parameters; {adapter.name} {adapter.version}, all-linear: "
        + ", ".join(
            f"r {r} trains {n:,} ({n / (n + p.base_parameters):.4%})"
            for r, (n, p) in {q.point.r: (q.lora_parameters, q) for q in found}.items()
        )
    )
    fits = [p for p in found if p.peak_bytes <= budget]
    # Fewer batches for a step first; then less work for a token, which checkpointing adds to.
    fits.sort(key=lambda p: (p.batches, -p.point.tokens, p.step.total_flops / p.point.tokens))
    print(f"\n{len(fits)} of {len(found)} fit {format_bytes(budget)}:\n")
    headers = ["r", "dtype", "base", "batch", "sequence", "checkpointing", "peak", "to spare"]
    headers += ["batches a step"] if target else []
    headers += ["largest", "then", "at"]
    if fits:
        print(table((_cells(p, budget, target) for p in fits), headers))
    missed = sorted((p for p in found if p.peak_bytes > budget), key=lambda p: p.peak_bytes)
    if missed:
        print("\nnearest misses, and what to change:\n")
        rows = (
            [*_cells(p, budget, target)[:8], advice(p, found, budget, adapter)] for p in missed[:5]
        )
        print(table(rows, [*headers[:7], "too much", "change to"]))
    print("\n" + wrapped(NOTE))


def _cells(found: Planned, budget: int, target: int | None) -> list[object]:
    p = found.point
    (first, first_size), (second, second_size), *_ = found.kinds.items()
    return [
        p.r,
        p.dtype,
        "dense" if p.quantization == "none" else p.quantization,
        p.batch,
        p.sequence,
        "on" if p.checkpointing else "off",
        format_bytes(found.peak_bytes),
        format_bytes(abs(budget - found.peak_bytes)),
        *([found.batches] if target else []),
        f"{first} {format_bytes(first_size)}",
        f"{second} {format_bytes(second_size)}",
        found.step.peak_at.removeprefix("aten."),
    ]
