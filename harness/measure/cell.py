"""One cell of a bench: what is run, and what is measured there; `process` says in which process."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """Every combination once, after the rows without LoRA that they are held against.

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
    return list(dict.fromkeys(cells))


def measure(cell: Cell) -> Rows:
    """Run a cell in this process, which is its own: counters, times, memory, as rows of a report."""
    import gc
    import warnings

    import torch

    from harness import registry
    from harness.measure import clock, phases
    from harness.measure.meter import Meter

    warnings.simplefilter("ignore")
    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    if cell.budget is not None:
        clock.limit_gpu(cell.budget, cell.device)
    adapter: Any = None
    if cell.adapter not in {BASE, FULL}:
        adapter = registry.resolve(cell.adapter)
        if lacking := not_claimed(adapter, dtype=cell.dtype, checkpointing=cell.checkpointing):
            raise NotClaimed(lacking)
    where = {
        "subject": cell.adapter,
        "version": adapter and adapter.version,
        "model": cell.model,
        "conditions": cell.conditions,
    }
    phases.settle_torch()
    gc.freeze()  # every count and clock collects garbage first: nothing of the libraries is any
    # What a first time costs (caches, imports) would hang on what ran before: it is paid beforehand.
    _live(replace(cell, model="tiny", batch=1, sequence=8), adapter, Meter(cell, where).count)
    gc.freeze()
    meter = Meter(cell, where)
    _live(cell, adapter, meter)
    return meter.rows


def _live(cell: Cell, adapter: Any, meter: Any) -> None:
    """The phases that the cell has, on a base of its own, each by the meter."""
    from harness import base
    from harness.adapter import LoraConfig
    from harness.measure import phases

    model: Any = base.load(_model_settings(cell))
    if cell.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    given = phases.batch_of(model, batch=cell.batch, sequence=cell.sequence)
    if adapter is not None:
        config = LoraConfig(r=cell.r, lora_alpha=2.0 * cell.r, target_modules="all-linear")
        phases.live(adapter, model, config, given, meter)
    elif cell.adapter == FULL:
        phases.train(model.requires_grad_(True), given, meter)
    else:
        phases.evaluate(model.requires_grad_(False), given, meter)


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
