"""What LoRA may cost, in counters that are the same on every run.

    extra FLOPs of a forward     2 · tokens · r · (in + out)        not 2 · r · in · out
    extra bytes of a forward     tokens · (in + r + out), a few times
    while merged                 the base's own operations
    a checkpoint                 numbers × bytes of one, and a header

A judge counts what is dispatched; clocks are asked nothing. Most of these are SHOULD: a correct
implementation may choose to pay.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import NotRun, fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn

    from harness.measure.counters import Count
    from harness.trial import Trial

PAPER = "LoRA, arXiv 2106.09685"
WIDE = (512, 384)
"""(in, out): ΔW is some ten times what a branch's few activations and factors take together."""

A_FEW = 4
"""How often an implementation may make the same thing again: a cast, a scaled copy, a transpose."""


# -- what is counted -------------------------------------------------------------------------------


def _forward(trial: Trial, model: nn.Module) -> Count:
    """One forward without gradient, warm."""
    import torch

    from harness import specimen
    from harness.measure.counters import counting

    given = trial.inputs()
    with torch.no_grad():
        specimen.call(model, given)
        with counting(model) as count:
            specimen.call(model, given)
    return count


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _factor_tensors(trial: Trial, model: nn.Module) -> list[Tensor]:
    return [
        tensor
        for parts in trial.factors(model).values()
        for f in parts
        for tensor in (f.A, f.B, f.bias)
        if tensor is not None
    ]


def _adapted_weights(trial: Trial, model: nn.Module, base: nn.Module) -> list[Tensor]:
    """The base's weights and biases that the model adapts."""
    modules: dict[str, Any] = dict(base.named_modules())
    return [p for name in trial.factors(model) for p in modules[name].parameters(recurse=False)]


def _is_parametrized(model: nn.Module) -> bool:
    """Whether W + ΔW is made by torch's parametrization, which makes it whole on purpose."""
    from torch.nn.utils.parametrize import is_parametrized

    return any(is_parametrized(module) for module in model.modules())


def _layer_bytes(trial: Trial, model: nn.Module) -> int:
    """What the adapted layers take and give in one forward, which each may cache."""
    from harness import specimen

    base = trial.base()
    modules = dict(base.named_modules())
    seen = 0

    def take(_module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        nonlocal seen
        seen += _bytes([given[0], out])

    for name in trial.factors(model):
        modules[name].register_forward_hook(take)
    specimen.call(base, trial.inputs())
    return seen


def _at_most(what: str, measured: int, allowed: int, unit: str = "bytes") -> None:
    if measured > allowed:
        fail(
            "cost",
            expected=f"{what}: at most {allowed:,} {unit}",
            actual=f"{measured:,} {unit}",
            measured=measured,
            allowed=allowed,
        )


# -- the specs -------------------------------------------------------------------------------------


@spec(
    "cost/inject-allocates-little",
    claim="Injection SHOULD leave no more memory held than a few times the adapter's bytes, and take no "
    "more on the way than that and one layer.",
    why="A base that fits a card just so must still fit when it is adapted: a copy of it does not.",
    source=(f"{PAPER}, section 4.2: memory is the adapter's", "BUGS 140"),
    needs=("targeting/exact-coverage",),
    cases=(Case(specimen="stack", shape=(128, 192)),),
)
def inject_allocates_little(trial: Trial) -> None:
    """Live bytes, over the injection of a whole model."""
    from harness.measure.counters import counting

    base = trial.base()
    largest = max(p.numel() * p.element_size() for p in base.parameters())
    with counting(base) as count:
        before = _bytes(base.parameters())
        model = trial.inject(base)
        held = count.ledger.growth
    allowed = A_FEW * _bytes(_factor_tensors(trial, model))
    _at_most("what injection leaves held", held, allowed)
    _at_most(
        "what injection takes at its highest moment",
        count.result().peak_bytes - before,
        allowed + 2 * largest,
    )


@spec(
    "cost/no-full-delta-in-forward",
    claim="The cost of an unmerged forward SHOULD grow with r, not with in × out: ΔW is never made whole.",
    why="A product of in × out at every step undoes what low rank is for; loralib's MergedLinear does it.",
    source=(f"{PAPER}, section 4.1: h = Wx + BAx", "BUGS 135"),
    needs=("targeting/exact-coverage",),
    cases=(
        Case(specimen="bare", shape=WIDE),
        Case(specimen="bare", shape=WIDE, dtype="bfloat16"),
        Case(specimen="fused", shape=(512, 128)),
    ),
)
def no_full_delta_in_forward(trial: Trial) -> None:
    """FLOPs and fresh bytes of the adapted forward, less the base's."""
    base = trial.base()
    bare = _forward(trial, base).result()
    model = trial.adapted()
    if _is_parametrized(model):
        raise NotRun("W + ΔW is a torch parametrization, which makes ΔW whole by design")
    ours = _forward(trial, model).result()
    given = trial.inputs()
    tokens = given.numel() // given.shape[-1]
    pairs = [f for parts in trial.factors(model).values() for f in parts]
    flops = sum(2 * tokens * (f.A.numel() + f.B.numel()) for f in pairs)
    out = sum(p.shape[0] for p in base.parameters() if p.dim() > 1)
    # Each part may pass through the input, r and the output, padded to all rows, in float32.
    passing = 4 * tokens * sum(given.shape[-1] + f.A.shape[0] + out for f in pairs)
    _at_most(
        "FLOPs of the branches",
        ours.total_flops - bare.total_flops,
        2 * flops,
        "FLOP",
    )
    _at_most(
        "bytes made by the branches",
        ours.allocated_bytes - bare.allocated_bytes,
        A_FEW * (passing + 4 * sum(f.A.numel() + f.B.numel() for f in pairs)),
    )


@spec(
    "cost/merged-costs-what-the-base-costs",
    claim="A merged model SHOULD run the base's operations and no more.",
    why="No added latency is the paper's promise; a branch that still runs, or a check per call, breaks it.",
    source=(f"{PAPER}, section 4.1: no additional inference latency", "BUGS 145"),
    features=("merge",),
    needs=("merge/same-output", "forward/inference-mode-first"),
    cases=(Case(specimen="bare", shape=WIDE), Case(specimen="tiny")),
)
def merged_costs_what_the_base_costs(trial: Trial) -> None:
    """Operations by name, FLOPs and fresh bytes of the merged forward against the base's."""
    bare = _forward(trial, trial.base().eval()).result()
    model = trial.adapted()
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # claimed
    model.eval()
    ours = _forward(trial, model).result()
    _at_most("FLOPs while merged", ours.total_flops, bare.total_flops, "FLOP")
    _at_most("bytes made while merged", ours.allocated_bytes, bare.allocated_bytes)
    more = {
        name: count - bare.operations.get(name, 0)
        for name, count in ours.operations.items()
        if count > bare.operations.get(name, 0)
    }
    if more:
        name, count = max(more.items(), key=lambda item: item[1])
        fail(
            "cost",
            expected=f"the base's {bare.total_operations} operations",
            actual=f"{ours.total_operations}, among them {count} more of {name}",
            measured=ours.total_operations,
            allowed=bare.total_operations,
        )


@spec(
    "cost/merge-in-place",
    claim="Merging SHOULD hold at most one more copy of the weights it changes, and unmerging nothing.",
    why="A merge that gathers ΔW for all layers, or leaves copies behind, runs out of memory at the end.",
    source=("DESIGN: merge folds ΔW into the base weights", "BUGS 21"),
    features=("merge", "unmerge"),
    needs=("merge/same-output",),
    cases=(Case(specimen="stack", shape=(128, 192)),),
)
def merge_in_place(trial: Trial) -> None:
    """Live bytes while merged, and after two cycles."""
    from harness.measure.counters import counting

    adapter: Any = trial.adapter
    model = trial.adapted()
    changed = _bytes(_adapted_weights(trial, model, trial.base()))
    little = _bytes(_factor_tensors(trial, model))
    with counting(model) as count:
        adapter.merge(model)
        merged = count.ledger.growth
        adapter.unmerge(model)
        adapter.merge(model)
        adapter.unmerge(model)
        after = count.ledger.growth
    _at_most("what is held more while merged", merged, changed + little)
    _at_most("what two cycles leave held", after, little)


@spec(
    "cost/no-needless-upcast",
    claim="A forward SHOULD make no tensor in a dtype wider than the base's and the factors' both.",
    why="Each cast of an input is a copy of it, kept for the backward pass: half as much memory again.",
    source=(
        "BUGS 134: PEFT #1706, forward allocations +55 %",
        "PyTorch, automatic mixed precision",
    ),
    needs=("targeting/exact-coverage",),
    cases=(Case(specimen="bare", shape=WIDE), Case(specimen="bare", shape=WIDE, dtype="bfloat16")),
)
def no_needless_upcast(trial: Trial) -> None:
    """The dtypes of all that comes into being."""
    model = trial.adapted()
    widest = max([trial.dtype, *(t.dtype for t in _factor_tensors(trial, model))], key=_width)
    given = trial.inputs()
    tokens = given.numel() // given.shape[-1]
    for (dtype, size), count in _forward(trial, model).ledger.births.items():
        numbers = size // _width(dtype)
        if dtype.is_floating_point and _width(dtype) > _width(widest) and numbers >= tokens:
            fail(
                "cost",
                expected=f"nothing wider than {widest}",
                actual=f"{count} tensors of {numbers:,} numbers in {dtype}",
                measured=_width(dtype),
                allowed=_width(widest),
            )


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


@spec(
    "cost/checkpoint-size",
    claim="A checkpoint MUST be as large as its trained numbers, and a header: a view drags nothing along.",
    why="10,000 times smaller is the paper's promise, and torch.save writes the whole storage of a view.",
    source=(f"{PAPER}, section 4.2: 350 GB to 35 MB", "BUGS P-17"),
    needs=("targeting/exact-coverage", "checkpoint/only-lora"),
    cases=(Case(specimen="stack", shape=(128, 192)), Case(specimen="bare", shape=WIDE)),
)
def checkpoint_size(trial: Trial) -> None:
    """The bytes that `torch.save` writes of `state_dict`."""
    import torch

    model = trial.adapted()
    state = trial.adapter.state_dict(model)
    file = io.BytesIO()
    torch.save(dict(state), file)
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    factors = max(trained, _bytes(_factor_tensors(trial, model)))
    # A zip entry, a name and alignment for each tensor.
    header = 4_096 + 1_024 * len(state)
    _at_most("the checkpoint's file", file.getbuffer().nbytes, factors + header)


@spec(
    "cost/step-memory",
    claim="From step to step, training MUST hold no more than the adapter's gradients and optimizer state, "
    "and what its layers cache of the last batch.",
    why="What each step leaves behind is out of memory some hours later.",
    source=(f"{PAPER}, section 4.2: optimizer states of the adapter alone", "BUGS 140, 141"),
    needs=("targeting/exact-coverage",),
    cases=(Case(specimen="bare", shape=WIDE),),
    more_cases=(Case(specimen="stack", shape=(128, 192)),),
)
def step_memory(trial: Trial) -> None:
    """Live bytes over the first step, then over two more."""
    import torch

    from harness import specimen
    from harness.measure.counters import counting

    model = trial.adapted()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    given = trial.inputs()
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> None:
        specimen.loss(model, given).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    specimen.call(model, given)  # a workspace, made once and used again, is no step's

    with counting(model) as count:
        step()
        first = count.ledger.growth
        optimizer.zero_grad(set_to_none=True)
        step()
        optimizer.zero_grad(set_to_none=True)
        settled = count.ledger.growth
        step()
        optimizer.zero_grad(set_to_none=True)
        later = count.ledger.growth
    # A gradient and two moments a number; a step count and a scalar a tensor; and, once, what a layer
    # caches of the last batch. What grows from step to step is judged by itself.
    adapter, each = _bytes(trained), 64 * len(trained)
    cached = A_FEW * _layer_bytes(trial, model)
    _at_most("what the first step leaves held", first, A_FEW * adapter + each + cached)
    _at_most("what a later step adds to it", later - settled, each)


@spec(
    "cost/inference-keeps-no-graph",
    claim="With nothing left to train, a forward MUST build no graph and keep nothing for a backward pass.",
    why="An inference server that keeps a graph needs several times the memory, and grows with the output.",
    source=("BUGS 142", "PyTorch, autograd mechanics: requires_grad"),
    needs=("targeting/exact-coverage",),
    cases=(Case(specimen="bare", shape=WIDE), Case(specimen="stack")),
)
def inference_keeps_no_graph(trial: Trial) -> None:
    """Saved bytes and `requires_grad` of the outputs, without `no_grad`."""
    from harness import specimen
    from harness.measure.counters import counting

    model = trial.adapted()
    model.requires_grad_(False)
    with counting(model) as count:
        out = specimen.call(model, trial.inputs())
    if out.requires_grad:
        fail(
            "cost",
            expected="outputs that need no gradient",
            actual=f"outputs of a graph that keeps {count.ledger.saved_bytes:,} bytes",
        )
    _at_most("what is kept for a backward pass", count.ledger.saved_bytes, 0)
