"""What a fresh adapter is: nothing yet, on a base that nobody touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial

PAPER = "LoRA, section 4.1, https://arxiv.org/abs/2106.09685"
LAYERS = ("linear", "bare", "embedding", "conv2d", "grouped", "fused", "stack")
DTYPES = ("bfloat16", "float16", "float64")


BASES = (
    *(Case(specimen=name) for name in (*LAYERS, "tied")),
    *(Case(dtype=dtype) for dtype in DTYPES),
)


@spec(
    "initialization/base-untouched",
    claim="The base's parameters and buffers MUST keep their bits through injection.",
    why="What is adapted is the pretrained model, and not a rounded or redrawn one.",
    source=(PAPER, "BUGS 45, 68", "https://github.com/microsoft/LoRA/pull/183"),
    needs=("targeting/exact-coverage",),
    tier="smoke",
    cases=BASES,
    more_cases=(
        Case(specimen="tiny"),
    ),  # has buffers; not in the smoke tier, which loads no library
)
def base_untouched(trial: Trial) -> None:
    """Judge the tensors held before injection."""
    if trial.case.specimen == "tied" and not trial.claims("tied_embeddings"):
        trial.notes.append("tied_embeddings is not claimed")
        return
    base = trial.base()
    held = [(name, t, t.detach().clone()) for name, t in _tensors(base)]
    trial.inject(base)

    for name, tensor, bits in held:
        trial.same_bits(tensor, bits, f"{name} of the base after injection")


@spec(
    "initialization/base-in-place",
    claim="The base's parameters and buffers MUST keep their storage through injection, and stay the "
    "tensors that the model computes with.",
    why="A base that is copied costs its memory twice, and what is held of it elsewhere is stale.",
    source=("BUGS 28, 41, 45", "https://github.com/unslothai/unsloth-zoo/pull/810"),
    needs=("initialization/base-untouched",),
    tier="smoke",
    cases=BASES,
    more_cases=(Case(specimen="tiny"),),
)
def base_in_place(trial: Trial) -> None:
    """Judge the tensors held before injection: storage, and whether they still act.

    A wrapper need not register the base: of a tensor that it does not, writing to it tells.
    """
    if trial.case.specimen == "tied" and not trial.claims("tied_embeddings"):
        trial.notes.append("tied_embeddings is not claimed")
        return
    base = trial.base()
    held = [(name, t, _storage(t)) for name, t in _tensors(base)]
    model = trial.inject(base)

    for name, tensor, storage in held:
        if _storage(tensor) != storage:
            fail("state", expected="the base's tensors where they were", actual="moved", where=name)
    now = {_storage(t) for _, t in _tensors(model)}
    for name, tensor, storage in held:
        if storage not in now and not _acts(trial, model, name, tensor):
            fail(
                "state",
                expected=f"all {len(held)} tensors of the base in use by the returned model",
                actual="one is not, a copy or nothing stands in its place",
                where=name,
            )


@spec(
    "initialization/no-op",
    claim="A fresh adapter MUST leave the outputs as the base gives them, in eval and in train mode, within "
    "the rounding of the base's dtype: the order of a sum is free. Its ΔW is zero, exactly.",
    why="Training starts from the pretrained model, not from a neighbour of it.",
    source=(
        PAPER,
        "BUGS 65, 121, 122",
        "https://github.com/meta-pytorch/torchtune/pull/409",
    ),
    needs=(
        "targeting/exact-coverage",
        "initialization/base-untouched",
        "forward/input-unchanged",
        "forward/output-dtype",
    ),
    tier="smoke",
    cases=(
        *(Case(specimen=name) for name in LAYERS),
        *(Case(specimen=name, way="unbiased") for name in ("conv2d", "grouped", "fused", "stack")),
        *(Case(specimen=name, dtype=dtype) for dtype in DTYPES for name in ("linear", "bare")),
        *(Case(specimen="bare", r=r) for r in (1, 13)),  # 13 is more than the layer is wide
        *(Case(specimen=name, way="lora_bias") for name in ("linear", "conv2d")),
    ),
)
def no_op(trial: Trial) -> None:
    """Judge the outputs before anything is written to the factors, and the factors' product."""
    x, base, used = trial.inputs(), trial.base(), trial.base()
    if trial.case.specimen == "stack":
        x = x / 100  # faint: the epsilon of the first norm counts
    trained = trial.case.way == "lora_bias"
    if trained and not trial.claims("lora_bias"):
        trial.notes.append("lora_bias is not claimed")
        return
    if trial.case.way == "unbiased":
        _unbias(base)
        _unbias(used)
    model = trial.inject(used, trial.config(lora_bias=trained))
    factors = trial.snapshot(model)
    for name, parts in factors.items():
        if any((f.B @ f.A).any() for f in parts):
            fail("value", expected="B·A zero in a fresh adapter", actual="it is not", where=name)
    # A lookup adds nothing up. The factors' dtype, which may be coarser, has no part in it yet.
    exact = trial.case.specimen == "embedding"
    expected = trial.call(base.eval(), x) if exact else trial.truth(base, {}, x)
    budget = 0.0 if exact else trial.budget(base, {}, x, coarse=trial.dtype)

    for train in (False, True):
        model.train(train)
        found, what = (
            trial.call(model, x),
            f"the base's output, in {'train' if train else 'eval'} mode",
        )
        trial.close(found, expected, budget, what)


@spec(
    "initialization/not-both-zero",
    claim="In a fresh adapter, of A and B at least one MUST be other than zero, and all finite.",
    why="Where both are zero, so are both gradients, for ever: the loss is finite and nothing learns.",
    source=(PAPER, "BUGS 101, P-3"),
    needs=("targeting/exact-coverage",),
    cases=(Case(r=1), *(Case(specimen=name) for name in LAYERS)),
)
def not_both_zero(trial: Trial) -> None:
    """Judge each pair of factors, and their product."""
    model = trial.inject()
    for name, parts in trial.snapshot(model).items():
        for f in parts:
            if not (f.A.isfinite().all() and f.B.isfinite().all()):
                fail("value", expected="finite factors", actual="A or B is not", where=name)
            if not f.A.any() and not f.B.any():
                fail(
                    "no-effect",
                    expected="A or B other than zero, so that a gradient can start",
                    actual="both are zero",
                    where=name,
                )


@spec(
    "initialization/seeded",
    claim="One torch seed MUST give one set of factors, bit for bit.",
    why="A run that cannot be repeated cannot be debugged; factors left as the memory they were "
    "allocated in are another run's numbers.",
    source=("BUGS 66", "https://github.com/Lightning-AI/lit-llama/pull/117"),
    needs=("targeting/exact-coverage",),
    cases=tuple(Case(specimen=name) for name in ("linear", "embedding", "conv2d", "stack")),
)
def seeded(trial: Trial) -> None:
    """Judge two injections after the same seed."""
    first, second = (trial.snapshot(trial.inject(seed=5)) for _ in range(2))
    for name, parts in first.items():
        for f, g in zip(parts, second[name], strict=True):
            trial.same_bits(g.A, f.A, f"A of {name} from the same seed")
            trial.same_bits(g.B, f.B, f"B of {name} from the same seed")


@spec(
    "initialization/factors-not-shared",
    claim="Each adapted module MUST have factors of its own.",
    why="Layers that share a factor are another, smaller model: the last one trained speaks for all.",
    source=("BUGS P-4",),
    needs=("targeting/exact-coverage",),
    cases=(Case(specimen="stack"),),
)
def factors_not_shared(trial: Trial) -> None:
    """Judge the elements of storage under the handles of each pair of modules."""
    from harness import storage

    factors = trial.factors(trial.inject())
    taken: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parts in factors.items():
        for address, mask in storage.elements(storage.handles({name: parts})).items():
            for other, theirs in taken.setdefault(address, []):
                if (mask & theirs).any():
                    fail(
                        "state",
                        expected="no element of storage in the factors of two modules",
                        actual=f"{int((mask & theirs).sum())} are also in those of {other}",
                        where=name,
                    )
            taken[address].append((name, mask))


@spec(
    "initialization/distribution",
    claim="A fresh A SHOULD be uniform on (-1/√in, 1/√in): Kaiming-uniform with a = √5, as loralib "
    "and PEFT have it.",
    why="Learning rates are published for that start; another scale of A is another learning rate.",
    source=(
        "https://github.com/microsoft/LoRA/blob/main/loralib/layers.py",
        "https://huggingface.co/docs/peft/developer_guides/lora",
    ),
    needs=("initialization/not-both-zero",),
    cases=(Case(shape=(256, 16), r=64), Case(specimen="bare", shape=(16, 16), r=64)),
)
def distribution(trial: Trial) -> None:
    """Judge the range, and the first two moments within what chance allows."""
    import torch

    from harness import tolerance

    (parts,) = trial.snapshot(trial.inject()).values()
    A = parts[0].A
    u = A * A.shape[1] ** 0.5  # uniform on (-1, 1)
    # Another width, or another shape, is another fault: diagnosis goes by the quantiles.
    at = torch.linspace(0.05, 0.95, 19, dtype=u.dtype)
    drawn = u.flatten().quantile(at)
    if float(u.abs().max()) > 1:
        fail(
            "value",
            expected="|A| ≤ 1/√in",
            actual=f"{float(u.abs().max()):.4g}/√in",
            measured=float(u.abs().max()),
            allowed=1.0,
            observed=drawn,
            truth=2 * at - 1,
        )
    for what, found, expected, width in (
        ("the mean of A·√in", u.mean(), 0.0, 2.0),
        ("the mean of A²·in", (u**2).mean(), 1 / 3, 1.0),
    ):
        off, allowed = abs(float(found) - expected), tolerance.chance(u.numel(), width)
        trial.margins.append(tolerance.Margin(off / allowed, off, allowed))
        if off > allowed:
            fail(
                "value",
                expected=f"{what} near {expected:.4g}",
                actual=f"{float(found):.4g}",
                measured=off,
                allowed=allowed,
                observed=drawn,
                truth=2 * at - 1,
            )


@spec(
    "initialization/global-rng-left-alone",
    claim="Injection SHOULD leave the global random state of torch, numpy and Python as it was.",
    why="Otherwise adding an adapter changes the order of the data and every comparison with a run "
    "without one.",
    source=("BUGS P-15",),
    needs=("targeting/exact-coverage",),
    cases=(Case(), Case(specimen="stack")),
)
def global_rng_left_alone(trial: Trial) -> None:
    """Judge the states before and after."""
    import random

    import numpy as np
    import torch

    base, config = trial.base(), trial.config()
    torch.manual_seed(11)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    trial.adapter.inject(base, config)
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    moved = [
        name
        for name, same in (
            ("torch", torch.equal(before[0], after[0])),
            ("numpy", before[1] == after[1]),
            ("Python", before[2] == after[2]),
        )
        if not same
    ]
    if moved:
        fail(
            "state",
            expected="the random states as they were",
            actual=f"numbers were drawn from {', '.join(moved)}'s",
        )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _storage(tensor: Tensor) -> int:
    """Where its numbers lie; nowhere, for a tensor subclass that wraps others."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return -1


def _acts(trial: Trial, model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the model answers otherwise once a tensor of the base is another, as the base does."""
    import torch

    x, twin = trial.inputs(), trial.base().eval()
    before, plain = trial.call(model, x), trial.call(twin, x)
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(1)
        dict(_tensors(twin))[name].add_(1)
    model.train()
    trial.unmerged(model)
    acts = trial.call(twin, x).equal(plain) or not trial.call(model, x).equal(before)
    with torch.no_grad():
        tensor.copy_(kept)  # or the sum of all such changes would drown the next
    return acts


def _unbias(base: nn.Module) -> None:
    """Take the biases of all linear layers and convolutions."""
    from torch import nn

    for module in base.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias = None
