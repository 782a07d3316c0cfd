"""What fits a memory budget, with no GPU: every point is a whole training step on fake tensors.

    point = rank × dtype × batch × sequence × checkpointing × quantization
      │  inject, forward, backward, optimizer step, each operation dispatched on shapes
      ▼
    live bytes by kind over time ──▶ peak ──▶ fits, or misses by how much and what to change

Nothing is scaled up from fewer layers. One thing is by formula: the storage of an NF4 base, after
bitsandbytes, with its dense copy of a weight during each product. Where `--target` asks for several
batches a step, the one counted is the last, which the gradients of those before it live through.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import UsageError, first_line
from harness.measure.memory import format_bytes, parse_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from harness.adapter import Adapter
    from harness.measure.counters import Counters

Quantization = Literal["none", "nf4"]
NOTE = (
    "Tensors' own bytes, counted on fake CPU tensors with fused attention; on a card the CUDA context "
    "(about half a GiB) and the allocator's rounding and fragmentation come on top."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to train; its fields are the conditions of its figures."""

    r: int = 16
    dtype: str = "bfloat16"
    batch: int = 1
    sequence: int = 2048
    checkpointing: bool = False
    quantization: Quantization = "none"

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return self.batch * self.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A point and what its step costs.

    Attributes:
        point: the conditions.
        step: counters of a step's last batch and its update; its peak is that of the point's
            quantization.
        base_parameters: numbers in the base.
        lora_parameters: numbers that train.
        weight_bytes: the base's bytes, as stored.
        batches: batches whose gradients are added up for one optimizer step.
    """

    point: Point
    step: Counters
    base_parameters: int
    lora_parameters: int
    weight_bytes: int
    batches: int = 1

    @property
    def peak_bytes(self) -> int:
        """Live bytes at the highest moment."""
        return self.step.peak_bytes

    @property
    def kinds(self) -> dict[str, int]:
        """The peak by kind, largest first."""
        return dict(sorted(self.step.peak.items(), key=lambda item: -item[1]))


def nf4_bytes(numbers: int) -> int:
    """Bytes of a weight as bitsandbytes stores it in NF4 with double quantization.

    Half a byte a number; for each block of 64 a scale in one byte; for each 256 scales a float32;
    and per weight the 16 values of NF4, the 256 values of a scale's byte and their offset, in
    float32 (bitsandbytes, `functional.quantize_4bit` with `compress_statistics`; QLoRA, arXiv
    2305.14314, section 3).
    """
    blocks = math.ceil(numbers / 64)
    return math.ceil(numbers / 2) + blocks + 4 * (math.ceil(blocks / 256) + 16 + 256 + 1)


def points(
    *,
    r: Sequence[int] = (16,),
    dtype: Sequence[str] = ("bfloat16",),
    batch: Sequence[int] = (1, 4),
    sequence: Sequence[int] = (512, 2048),
    checkpointing: Sequence[bool] = (False, True),
    quantization: Sequence[Quantization] = ("none", "nf4"),
) -> list[Point]:
    """Every combination; UsageError where there is none."""
    grid = [
        Point(r=r_, dtype=d, batch=b, sequence=s, checkpointing=c, quantization=q)
        for r_, d, b, s, c, q in itertools.product(
            r, dtype, batch, sequence, checkpointing, quantization
        )
    ]
    if not grid:
        raise UsageError("the grid has no cell; give each of its axes at least one value")
    return grid


def measure(
    adapter: Adapter, model: str, grid: Iterable[Point], *, target: int | None = None
) -> Iterator[Planned]:
    """The cost of each point, as soon as it is known, with as many batches a step as reach `target`.

    Points that differ only in quantization are one run, and those that differ in batch and sequence
    share a model. Takes seconds a run and no memory to speak of.

    Raises UsageError where the adapter cannot do with shapes alone.
    """
    from harness.measure.fake import fake_tensors

    def setting(point: Point) -> tuple[int, str, bool]:
        return point.r, point.dtype, point.checkpointing

    for (r, dtype, checkpointing), same in itertools.groupby(
        sorted(grid, key=setting), key=setting
    ):
        with fake_tensors(), _on_shapes(adapter):
            base, adapted = _adapted(adapter, model, r=r, dtype=dtype, checkpointing=checkpointing)
            runs: dict[tuple[int, int], list[Point]] = {}
            for point in same:
                runs.setdefault((point.batch, point.sequence), []).append(point)
            for alike in runs.values():
                one = alike[0]
                batches = max(1, math.ceil(target / one.tokens)) if target else 1
                yield from _run(adapter, base, adapted, alike, batches)


@contextmanager
def _on_shapes(adapter: Adapter) -> Iterator[None]:
    """What the adapter raises there, as one line: it looks at values, or it is wrong."""
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        raise
    except Exception as error:
        kind = type(error).__name__
        looks = kind in {"DataDependentOutputException", "DynamicOutputShapeException"}
        raise UsageError(
            f"--adapter {adapter.name}: cannot be planned on shapes alone: "
            + (
                f"it looks at the values of tensors ({first_line(error)}); lora-harness bench measures it"
                if looks
                else f"{kind}: {first_line(error)}; see lora-harness check"
            )
        ) from error


def claimed(adapter: Adapter, grid: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points that the adapter claims, and why the others are left out.

    Raises UsageError where it claims none.
    """
    from harness.measure.cell import not_claimed

    ours, lacking = [], []
    for point in grid:
        dtype = point.dtype if point.quantization == "none" else point.quantization
        why = not_claimed(adapter, dtype=dtype, checkpointing=point.checkpointing)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What is known of a base before an adapter changes its modules."""

    parameters: int
    quantizable: tuple[Tensor, ...]
    weight_bytes: int


def _adapted(
    adapter: Adapter, model: str, *, r: int, dtype: str, checkpointing: bool
) -> tuple[_Base, nn.Module]:
    import torch

    from harness.adapter import LoraConfig
    from harness.measure.fake import fake_model

    base: Any = fake_model(model, dtype)
    head = base.get_output_embeddings()
    parameters = list(base.parameters())
    facts = _Base(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        # bitsandbytes and transformers leave the output head dense
        quantizable=tuple(
            m.weight for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head
        ),
    )
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=r, lora_alpha=2.0 * r, target_modules="all-linear")
    return facts, adapter.inject(base, config)


def _run(
    adapter: Adapter, base: _Base, model: nn.Module, alike: Sequence[Point], batches: int
) -> Iterator[Planned]:
    """The last batch of a step; a record for each quantization of it."""
    from harness.measure.counters import counting
    from harness.measure.phases import batch_of, optimizer_of, training_step, vocabulary_of

    first = alike[0]
    model.train()
    batch = batch_of(model, batch=first.batch, sequence=first.sequence)
    optimizer = optimizer_of(model)
    if batches > 1:  # a batch before, whose gradients live on
        model(**batch).loss.backward()
    with counting(model, adapter=adapter, logits_width=vocabulary_of(model)) as count:
        count.ledger.pack(base.quantizable, nf4_bytes)
        training_step(model, batch, optimizer, count.ledger)
    saved = sum(p.numel() * p.element_size() - nf4_bytes(p.numel()) for p in base.quantizable)
    for point in alike:
        packed = point.quantization == "nf4"
        yield Planned(
            point=point,
            step=count.result(packed=packed),
            base_parameters=base.parameters,
            lora_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weight_bytes=base.weight_bytes - (saved if packed else 0),
            batches=batches,
        )


def weights(model: str, dtype: str, quantization: Quantization) -> int:
    """Bytes of the base's weights alone, from its shapes, in an instant."""
    from harness.measure.fake import fake_model, fake_tensors

    with fake_tensors():
        base: Any = fake_model(model, dtype)
        import torch

        head = base.get_output_embeddings()
        dense: int = sum(p.numel() * p.element_size() for p in base.parameters())
        if quantization == "none":
            return dense
        linear = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        saved: int = sum(
            m.weight.numel() * m.weight.element_size() - nf4_bytes(m.weight.numel()) for m in linear
        )
        return dense - saved


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


def advice(missed: Planned, everything: Sequence[Planned], budget: int) -> str:
    """What to change so that a point which does not fit does: one thing that was seen to help.

    Failing that, what the largest kind of its peak is, and what is done about that kind.
    """
    fields = ("quantization", "checkpointing", "batch", "sequence", "dtype", "r")
    ours = asdict(missed.point)
    for field in fields:
        helps = [
            other
            for other in everything
            if other.peak_bytes <= budget
            and all((asdict(other.point)[f] == ours[f]) != (f == field) for f in fields)
        ]
        if helps:
            best = max(helps, key=lambda other: other.peak_bytes)
            return f"{_spoken(field, getattr(best.point, field))}: {format_bytes(best.peak_bytes)}"
    kind = next(iter(missed.kinds))
    remedy = {
        "base weights": "a 4-bit base"
        if missed.point.quantization == "none"
        else "a smaller model",
        "saved activations": "a shorter sequence"
        if missed.point.checkpointing
        else "gradient checkpointing",
        "logits": "a shorter sequence or fewer of them",
    }.get(kind, "a lower rank")
    return f"mostly {kind}: {remedy}, and more than that alone"


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
    head = {
        "adapter": {"name": adapter.name, "version": adapter.version},
        "model": args.model,
        "budget": budget,
    }
    found: list[Planned] = []
    with Recorder(args.json, kind="plan", **head) as report:
        report.add("notes", [NOTE, *left_out])
        planned = measure(adapter, args.model, grid, target=args.target)
        for one in _with_progress(planned, len(grid)):
            found.append(one)
            _record(report, one, adapter, args.model)
        _show(found, args.model, adapter, budget, args.target)
        for line in left_out:
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
    from harness.console import table

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
        rows = ([*_cells(p, budget, target)[:8], advice(p, found, budget)] for p in missed[:5])
        print(table(rows, [*headers[:7], "too much", "change to"]))
    print(f"\n{NOTE}")


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
