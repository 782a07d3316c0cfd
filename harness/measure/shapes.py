"""Training steps on shapes alone: what a point costs, to the byte, with no memory behind it.

    point = rank × dtype × batch × sequence × checkpointing × quantization
      │  inject, forward, backward, optimizer step, each operation dispatched on shapes
      ▼
    live bytes by kind over time ──▶ peak

Nothing is scaled up from fewer layers. One thing is by formula: the storage of an NF4 base, after
bitsandbytes, with its dense copy of a weight during each product. Where several batches make a step,
the one counted is the last, which the gradients of those before it live through.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from harness.adapter import Adapter
    from harness.measure.counters import Counters

Quantization = Literal["none", "nf4"]


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
    """Every combination once; UsageError where there is none."""
    grid = [
        Point(r=r_, dtype=d, batch=b, sequence=s, checkpointing=c, quantization=q)
        for r_, d, b, s, c, q in itertools.product(
            r, dtype, batch, sequence, checkpointing, quantization
        )
    ]
    if not grid:
        raise UsageError("the grid has no cell; give each of its axes at least one value")
    return list(dict.fromkeys(grid))


def measure(
    adapter: Adapter, model: str, grid: Iterable[Point], *, target: int | None = None
) -> Iterator[Planned]:
    """The cost of each point, as soon as it is known, with as many batches a step as reach `target`.

    Points that differ only in quantization are one run, and those that differ in batch and sequence
    share a model. Takes seconds a run and no memory to speak of.

    Raises UsageError where the adapter cannot do with shapes alone.
    """
    from harness.measure.fake import fake_mode, fake_tensors
    from harness.measure.ledger import uncollected

    def setting(point: Point) -> tuple[int, str, bool]:
        return point.r, point.dtype, point.checkpointing

    # What was imported stays: to walk through it at each collection is a tenth of a point's time.
    gc.freeze()
    try:
        for (r, dtype, checkpointing), same in itertools.groupby(
            sorted(grid, key=setting), key=setting
        ):
            mode = fake_mode()
            with fake_tensors(mode), _on_shapes(adapter), uncollected():
                base, adapted = _adapted(
                    adapter, model, r=r, dtype=dtype, checkpointing=checkpointing
                )
            runs: dict[tuple[int, int], list[Point]] = {}
            for point in same:
                runs.setdefault((point.batch, point.sequence), []).append(point)
            for alike in runs.values():
                one = alike[0]
                batches = max(1, math.ceil(target / one.tokens)) if target else 1
                with fake_tensors(mode), _on_shapes(adapter):
                    found = list(_run(adapter, base, adapted, alike, batches))
                yield from found  # outside: the caller's own tensors are real
    finally:
        gc.unfreeze()


@contextmanager
def _on_shapes(adapter: Adapter) -> Iterator[None]:
    """What the adapter raises there, as one line: it looks at values, or it is wrong."""
    # torch logs the traceback of what is raised, which is told in one line.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
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
