"""The truth about training: losses, gradients and SGD steps in float64, by the defining equation.

    loss(A, B) = Σ terms(base with W + scaling·B·A) / targets        A ← A - lr · ∂loss/∂A,  B likewise

Autograd goes through the base and ΔW alone; no LoRA code is in the way. The targets are fixed, and sample
k of a batch counts every (k+1)-th of its own, so that samples weigh unevenly: an implementation, or a
trainer, that takes a mean of means is seen (BUGS 116).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.nn import functional

from harness import oracle
from harness.adapter import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from harness.oracle import Snapshot


@dataclass(frozen=True, slots=True)
class Track:
    """Where a descent went: the loss before each step, and the factors after each."""

    losses: list[float]
    factors: list[Snapshot]


def samples(given: Any) -> list[Any]:
    """A batch's samples, each a batch of one."""
    if isinstance(given, dict):
        size = len(given["input_ids"])
        return [{key: value[k : k + 1] for key, value in given.items()} for k in range(size)]
    return [given[k : k + 1] for k in range(len(given))]


def terms(out: Tensor, given: Any, first: int = 0) -> tuple[Tensor, int]:
    """The loss of some samples, summed, and how many targets were counted.

    Next-token cross-entropy for a Phi-3's logits `(b, t, v)`; squared distance to fixed goals for a
    layer's outputs. `first` is the number of the first sample in its batch.
    """
    wide = out if out.dtype == torch.float64 else out.float()
    if isinstance(given, dict):
        errors = functional.cross_entropy(
            wide[:, :-1].transpose(1, 2), given["input_ids"][:, 1:], reduction="none"
        )  # (b, t-1)
    else:
        flat = wide.flatten(1)  # (b, e)
        goal = torch.linspace(-1, 1, flat.shape[1], device=flat.device, dtype=flat.dtype)
        errors = (flat - goal) ** 2
    keep = counted(errors.shape[1], len(errors), first).to(errors.device)
    return (errors * keep).sum(), int(keep.sum())


def targets(call: Callable[[Any], Tensor], given: Any) -> int:
    """How many targets a whole batch counts; a layer's follow from its outputs."""
    if isinstance(given, dict):
        batch, t = given["input_ids"].shape
        return int(counted(t - 1, batch).sum())
    with torch.no_grad():
        return terms(call(given), given)[1]


def counted(targets: int, batch: int, first: int = 0) -> Tensor:
    """Which targets count, `(b, targets)`: every one of sample 0, every second of sample 1, and so on."""
    position = torch.arange(targets)
    every = torch.arange(first + 1, first + batch + 1)[:, None]
    return position % every == 0


def mean_loss(call: Callable[[Any], Tensor], given: Any) -> Tensor:
    """The mean over the targets of a whole batch."""
    total, count = terms(call(given), given)
    return total / count


class Equation:
    """A base with W + ΔW in the place of W, differentiable in the factors and in what trains beside them.

    Args:
        base: bare; it is copied.
        factors: the values to start from.
        dtype: what it is evaluated in; ΔW is summed in float64 whatever that is.
        besides: names of the base's parameters that train too.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Snapshot,
        dtype: torch.dtype = torch.float64,
        besides: Sequence[str] = (),
    ) -> None:
        self.base = oracle.dense(base).to(dtype).eval().requires_grad_(False)
        self.dtype = dtype
        self.modules = {name: base.get_submodule(name) for name in factors}
        self.factors = {name: [_leaves(f) for f in parts] for name, parts in factors.items()}
        self.besides = {
            name: base.get_parameter(name).detach().double().clone().requires_grad_()
            for name in besides
        }

    def leaves(self) -> list[Tensor]:
        """The factors, and what trains beside them, in a fixed order."""
        factors = [t for parts in self.factors.values() for f in parts for t in _tensors(f)]
        return [*factors, *self.besides.values()]

    def __call__(self, given: Any) -> Tensor:
        """The outputs."""
        weights = {name: t.to(self.dtype) for name, t in self.besides.items()}
        for name, parts in self.factors.items():
            module = self.modules[name]
            weight = oracle.weight_of(module).detach().double()
            delta = oracle.delta(module, parts).to(weight.device)
            weights[f"{name}.weight"] = (weight + delta).to(self.dtype)
            extra = oracle.bias_delta(module, parts)
            if extra is not None:
                bias: Any = self.besides.get(f"{name}.bias", module.bias)
                extra = extra.to(weight.device)
                weights[f"{name}.bias"] = (bias.double() + extra).to(self.dtype)
        if isinstance(given, dict):
            told = functional_call(self.base, weights, (), given, tie_weights=False)
            return told.logits  # type: ignore[no-any-return]
        x = given.to(self.dtype) if given.is_floating_point() else given
        out: Tensor = functional_call(self.base, weights, (x,), tie_weights=False)
        return out

    def descend(
        self,
        given: Any,
        *,
        lr: float,
        steps: int = 1,
        loss: Callable[[Tensor], Tensor] | None = None,
    ) -> Track:
        """SGD on the whole batch, without momentum, decay or clipping; on another loss of the outputs."""
        track = Track([], [])
        for _ in range(steps):
            value = loss(self(given)) if loss else mean_loss(self, given)
            leaves = self.leaves()
            slopes = torch.autograd.grad(value, leaves)
            with torch.no_grad():
                for leaf, slope in zip(leaves, slopes, strict=True):
                    leaf.sub_(lr * slope)
            track.losses.append(value.item())
            track.factors.append(oracle.snapshot(self.factors))
        return track


def pairs(*snapshots: Snapshot) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The tensors of several snapshots side by side, with a name for each."""
    for name, parts in snapshots[0].items():
        for k in range(len(parts)):
            for kind in ("A", "B", "bias"):
                found = tuple(getattr(s[name][k], kind) for s in snapshots)
                if found[0] is not None:
                    part = f", part {k}" if len(parts) > 1 else ""
                    yield f"{kind} of {name}{part}", found


def _leaves(f: Factors) -> Factors:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(True)

    bias = None if f.bias is None else leaf(f.bias)
    return Factors(leaf(f.A), leaf(f.B), f.scaling, f.rows, bias)


def _tensors(f: Factors) -> list[Tensor]:
    return [f.A, f.B] if f.bias is None else [f.A, f.B, f.bias]
