"""One cell of a bench: what is run, and what is measured there; `process` says in which process."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from harness.measure.ledger import Kind

BASE, FULL = "base", "full"
"""The rows without LoRA: the bare base's forward, and full fine-tuning."""

Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to run one implementation.

    Attributes:
        adapter: an adapter, or `base`, or `full`.
        r: rank; 0 where there is no LoRA.
        dtype: of the base; `nf4` is a 4-bit base that computes in bfloat16.
        repeats: samples of each time.
    """

    adapter: str
    model: str = "tiny"
    r: int = 8
    dtype: str = "float32"
    batch: int = 1
    sequence: int = 64
    checkpointing: bool = False
    device: str = "cpu"
    threads: int = 1
    repeats: int = 10
    budget: int | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """What its figures hold for; the subject and the model stand beside."""
        beside = {"adapter", "model", "repeats"}
        return {k: v for k, v in asdict(self).items() if k not in beside} | {
            "targets": "all-linear"
        }

    def __str__(self) -> str:
        """A few words for a progress line."""
        rank = f" r {self.r}" if self.r else ""
        checkpointing = " checkpointing" if self.checkpointing else ""
        return (
            f"{self.adapter}{rank} {self.dtype} {self.model} {self.batch}×{self.sequence}"
            f"{checkpointing}"
        )


def grid(
    *,
    adapter: Sequence[str],
    rank: Sequence[int],
    dtype: Sequence[str],
    model: Sequence[str],
    batch: Sequence[int],
    sequence: Sequence[int],
    checkpointing: Sequence[bool],
    **same: Any,
) -> list[Cell]:
    """Every combination, after the rows without LoRA that they are held against.

    Raises UsageError where there is no cell.
    """
    cells = []
    for m, d, b, s, c in itertools.product(model, dtype, batch, sequence, checkpointing):
        where = {"model": m, "dtype": d, "batch": b, "sequence": s, "checkpointing": c, **same}
        ours = [Cell(adapter=a, r=r, **where) for a in adapter for r in rank]
        # Four bits cannot be trained: such a base is run, not tuned in full.
        without = [BASE] if d == "nf4" else [BASE, FULL]
        cells += [Cell(adapter=name, r=0, **where) for name in without if ours] + ours
    if not cells:
        raise UsageError("the grid has no cell; give each of its axes at least one value")
    return cells


def measure(cell: Cell) -> Rows:
    """Run a cell in this process: counters, times, memory, as rows of a report."""
    import warnings

    import torch

    from harness import base, registry
    from harness.measure import clock

    warnings.simplefilter("ignore")
    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    if cell.budget is not None:
        clock.limit_gpu(cell.budget, cell.device)
    found: Any = base.load(_model_settings(cell))
    if cell.checkpointing:
        found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter: Any = None
    version = None
    if cell.adapter not in {BASE, FULL}:
        adapter = registry.resolve(cell.adapter)
        version = adapter.version
        if lacking := not_claimed(adapter, dtype=cell.dtype, checkpointing=cell.checkpointing):
            raise NotClaimed(lacking)
    where = {
        "subject": cell.adapter,
        "version": version,
        "model": cell.model,
        "conditions": cell.conditions,
    }
    return _measured(cell, found, adapter, where)


def _model_settings(cell: Cell) -> dict[str, Any]:
    nf4 = cell.dtype == "nf4"
    return {
        "name": cell.model,
        "dtype": "bfloat16" if nf4 else cell.dtype,
        "device": cell.device,
        "attn_implementation": "sdpa",
        "use_cache": False,
        "seed": 0,
        "load_in_4bit": nf4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def not_claimed(adapter: Any, *, dtype: str, checkpointing: bool) -> str:
    """What of a cell the adapter does not claim, in a few words; empty where it claims it all."""
    claims = adapter.capabilities
    lacking = []
    if dtype == "nf4" and "quantized_base" not in claims.features:
        lacking.append("quantized_base")
    if dtype != "nf4" and dtype not in claims.dtypes:
        lacking.append(dtype)
    if checkpointing and "gradient_checkpointing" not in claims.features:
        lacking.append("gradient_checkpointing")
    return f"{adapter.name} does not claim {' and '.join(lacking)}" if lacking else ""


class NotClaimed(Exception):  # noqa: N818  # it is no error: the cell is not asked for
    """A cell that the implementation does not claim: why."""


def _measured(cell: Cell, model: nn.Module, adapter: Any, where: dict[str, Any]) -> Rows:
    import torch

    from harness.adapter import LoraConfig
    from harness.measure import clock, phases
    from harness.measure.counters import counting

    rows: Rows = {"timings": [], "memory": [], "counters": []}
    full = cell.adapter == FULL
    given = phases.batch_of(model, batch=cell.batch, sequence=cell.sequence)
    asked = {"input_ids": given["input_ids"]}
    tokens = cell.batch * cell.sequence
    limit = clock.product_flops_per_second(
        cell.device, torch.bfloat16 if cell.dtype == "nf4" else getattr(torch, cell.dtype)
    )

    def timed(phase: str, work: Callable[[], object], flops: int) -> None:
        samples = clock.seconds_of(work, device=cell.device, repeats=cell.repeats)
        second = median(samples)
        row = {**where, "phase": phase}
        rows["timings"] += [
            row | {"metric": "seconds", "value": second, "unit": "s", "samples": samples},
            row
            | {
                "metric": "tokens_per_second",
                "value": tokens / second,
                "unit": "tokens/s",
                "better": "higher",
            },
            row
            | {
                "metric": "share_of_limit",
                "value": 100 * flops / second / limit,
                "unit": "%",
                "better": "higher",
            },
        ]

    def forward() -> None:
        with torch.no_grad():
            model(**asked)

    def counted(phase: str, work: Callable[[Any], object]) -> int:
        width = phases.vocabulary_of(model)
        trained: Kind = "base weights" if full else "adapters"
        with counting(model, logits_width=width, trained=trained) as count:
            work(count.ledger)
        result = count.result()
        rows["counters"] += result.rows(**where, phase=phase)
        rows["memory"] += result.memory_rows(**where, phase=phase)
        return result.total_flops

    if adapter is not None:
        config = LoraConfig(r=cell.r, lora_alpha=2.0 * cell.r, target_modules="all-linear")
        model = adapter.inject(model, config)
        state = adapter.state_dict(model)
    elif full:
        model.requires_grad_(True)
        state = model.state_dict()
    else:
        model.requires_grad_(False)
        state = {}
    if not getattr(adapter, "eval_merges", False):
        model.eval()
    forward()
    timed("evaluation-forward", forward, counted("evaluation-forward", lambda _: forward()))
    if cell.adapter != BASE:
        model.train()
        optimizer = phases.optimizer_of(model)
        phases.training_step(model, given, optimizer)
        flops = counted(
            "training-step",
            lambda ledger: phases.training_step(model, given, optimizer, ledger),
        )
        clock.reset_peak(cell.device)
        timed("training-step", lambda: phases.training_step(model, given, optimizer), flops)
        rows["memory"] += [
            {**where, "phase": "training-step", "metric": name, "value": size, "unit": "B"}
            | {"exact": False}
            for name, size in clock.peak_memory(cell.device).items()
        ]
        sizes = {
            "checkpoint_bytes": (phases.checkpoint_bytes(state), "B"),
            "trained_parameters": (
                sum(p.numel() for p in model.parameters() if p.requires_grad),
                "parameters",
            ),
        }
        rows["counters"] += [
            {**where, "phase": "training-step", "metric": metric, "value": value, "unit": unit}
            for metric, (value, unit) in sizes.items()
        ]
        del optimizer
    if adapter is not None and "merge" in adapter.capabilities.features:
        model.eval()
        adapter.merge(model)
        forward()
        timed("merged-forward", forward, counted("merged-forward", lambda _: forward()))
    return rows
