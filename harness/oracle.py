"""Truth in float64, computed from the factors by the defining equation.

    ΔW = scaling · (B @ A)        laid out as the base weight is, in the rows of the part
    truth = the base, in float64, with W + ΔW in the place of W

Nothing here is read off the object on trial but the values of its factors. Source: arXiv 2106.09685,
section 4.1; layouts: `harness.adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import clone, storage
from harness.adapter import Factors
from harness.failure import fail

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Snapshot = dict[str, list[Factors]]
"""Factors by module name, copied, detached, float64: what the live ones held at one moment."""


def snapshot(factors: Mapping[str, Sequence[Factors]]) -> Snapshot:
    """The values of live factors, kept."""

    def keep(t: Tensor) -> Tensor:
        return t.detach().to("cpu", torch.float64, copy=True)

    return {
        name: [
            Factors(
                keep(f.A),
                keep(f.B),
                float(f.scaling),
                f.rows.detach().cpu().clone() if isinstance(f.rows, torch.Tensor) else f.rows,
                None if f.bias is None else keep(f.bias),
            )
            for f in parts
        ]
        for name, parts in factors.items()
    }


def delta(module: nn.Module, parts: Sequence[Factors], *, absolute: bool = False) -> Tensor:
    """ΔW of one module in float64, shaped as its weight.

    With `absolute`, |scaling|·(|B| @ |A|): the magnitude that rounding errors scale with.
    """
    weight_shape = tuple(weight_of(module).shape)
    total = torch.zeros(weight_shape, dtype=torch.float64)
    for f in parts:
        A, B, s = f.A.double(), f.B.double(), float(f.scaling)
        if absolute:
            A, B, s = A.abs(), B.abs(), abs(s)
        product = s * (B @ A)  # (o, r) @ (r, i)
        if isinstance(module, nn.Embedding):
            product = product.T  # (embedding_dim, num) -> (num, embedding_dim)
        elif isinstance(module, nn.Conv2d):
            product = product.reshape(weight_shape)  # (m, n) -> (o, i/groups, k, k)
        if f.rows is None:
            total += product
        else:
            total[f.rows] += product
    return total


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a base module, dequantised where it is stored in fewer bits."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    return weight


def check_shape(name: str, module: nn.Module, f: Factors) -> None:
    """Raise `Broken` where a factor pair cannot be the update of that module's weight."""
    A, B = tuple(f.A.shape), tuple(f.B.shape)
    size = torch.Size(getattr(module, "weight_shape", None) or weight_of(module).shape)
    if isinstance(module, nn.Embedding):
        fits = A[1:] == (size[0],) and B[:1] == (size[1],)
        wanted = f"A (r, {size[0]}) and B ({size[1]}, r)"
    elif isinstance(module, nn.Conv2d):
        fits = len(A) == len(B) == 2 and A[1] * B[0] == size.numel()
        wanted = f"A (r, n) and B (m, r), m·n = {size.numel()},"
    else:
        rows = size[0]
        if isinstance(f.rows, slice):
            rows = len(range(*f.rows.indices(size[0])))
        elif f.rows is not None:
            rows = int(f.rows.sum()) if f.rows.dtype == torch.bool else f.rows.numel()
        fits = A[1:] == (size[1],) and B[:1] == (rows,)
        wanted = f"A (r, {size[1]}) and B ({rows}, r)"
    if not fits or len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        fail(
            "value",
            expected=f"{wanted} for a weight {tuple(size)}",
            actual=f"A {A}, B {B}, rows {f.rows}",
            where=name,
        )


def dense(base: nn.Module) -> nn.Module:
    """A copy of the base, with `nn.Linear` of the dequantised weight for what is in fewer bits."""
    model: nn.Module = clone.cloned(base)
    for path, module in list(model.named_modules()):
        if not hasattr(getattr(module, "weight", None), "quant_state"):
            continue
        weight, (parent, _, name) = weight_of(module), path.rpartition(".")
        made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        made.weight, made.bias = nn.Parameter(weight, requires_grad=False), module.bias
        setattr(model.get_submodule(parent), name, made)
    return model


def merged(base: nn.Module, factors: Snapshot, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of the base in `dtype` and eval mode, with W + ΔW summed in float64, then rounded once.

    An adapted weight that another module shares is untied first: only the adapted use changes.
    """
    model: nn.Module = dense(base).to(dtype).eval()
    originals = dict(base.named_modules())
    for name, module in dict(model.named_modules()).items():
        parts = factors.get(name)
        if not parts:
            continue
        original = originals[name]
        W = weight_of(original).detach().cpu().double() + delta(original, parts)
        module.weight = nn.Parameter(
            W.to(dtype).to(weight_of(original).device), requires_grad=False
        )
        extra = bias_delta(original, parts)
        if extra is not None:
            held = getattr(original, "bias", None)
            b = extra if held is None else held.detach().cpu().double() + extra
            module.bias = nn.Parameter(b.to(dtype).to(module.weight.device), requires_grad=False)
    return model


def bias_delta(module: nn.Module, parts: Sequence[Factors]) -> Tensor | None:
    """What `lora_bias` adds to the output: scaling · bias, by rows; None where there is none."""
    if all(f.bias is None for f in parts):
        return None
    rows = weight_of(module).shape[1 if isinstance(module, nn.Embedding) else 0]
    total = torch.zeros(rows, dtype=torch.float64)
    for f in parts:
        if f.bias is not None:
            total[slice(None) if f.rows is None else f.rows] += f.scaling * f.bias.double()
    return total


def gradients(
    base: nn.Module, factors: Snapshot, given: Tensor, cotangent: Tensor
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of Σ cotangent · output in float64, for a base of one linear operation.

    Returns:
        That of the input, None where the input is indices, and those of each A, B and bias in turn.
    """
    model: nn.Module = dense(base).double().eval()

    def leaf(t: Tensor | None) -> Any:
        return None if t is None else t.clone().requires_grad_()

    leaves = {
        name: [Factors(leaf(f.A), leaf(f.B), f.scaling, f.rows, leaf(f.bias)) for f in parts]
        for name, parts in factors.items()
    }
    weights = {}
    for name, parts in leaves.items():
        module = model.get_submodule(name)
        held, bias = weight_of(module).detach(), getattr(module, "bias", None)
        weights[f"{name}.weight"] = held + delta(module, parts).to(held.device)
        extra = bias_delta(module, parts)
        if extra is not None:
            extra = extra.to(held.device)
            weights[f"{name}.bias"] = extra if bias is None else bias.detach() + extra
    x = given.detach().double().clone() if given.is_floating_point() else given
    x.requires_grad_(given.is_floating_point())
    y: Tensor = torch.func.functional_call(model, weights, (x,))
    variables = storage.handles(leaves)
    inputs = [x] if given.is_floating_point() else []
    found = torch.autograd.grad((y * cotangent.double()).sum(), [*inputs, *variables])
    return (found[0] if inputs else None), list(found[len(inputs) :])


def positive(base: nn.Module, factors: Snapshot) -> tuple[nn.Module, Snapshot]:
    """A base and its factors with every number made positive, for magnitudes of what they make."""
    model: nn.Module = dense(base).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    return model, {
        name: [
            Factors(
                f.A.abs(),
                f.B.abs(),
                abs(f.scaling),
                f.rows,
                None if f.bias is None else f.bias.abs(),
            )
            for f in parts
        ]
        for name, parts in factors.items()
    }


def magnitude(base: nn.Module, factors: Snapshot) -> nn.Module:
    """A copy of a base of one linear operation, with every term made positive.

    On |x| it gives, for each output, the sum of the absolute values of all products that an
    implementation may add up, in whatever order: the M of `harness.tolerance.outputs`.
    """
    return merged(*positive(base, factors))
