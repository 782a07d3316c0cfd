"""Derived error budgets: the only place where a tolerance is born.

    u      unit roundoff of a dtype: half the distance from 1 to the next number
    M      sum of the absolute values of all terms of an output, in float64
    n      reduction length: how many products one output adds up

A sum of n products, in any order, in precision u, errs by at most γ(n)·M with γ(n) = n·u/(1 - n·u)
(Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1). Matrix products in half
precision add up in float32 and round once when they store; every tensor an implementation may store
on the way costs one rounding u·M more. The bounds hold for every order of summation and for every
correct arrangement (branch, merged, parametrised), so a correct implementation cannot exceed them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

STORED = 8
"""How many tensors may be rounded on the way to an output: x cast, x·A, (x·A)·B, its scaling, the
base's product, its bias, the sum, the cast back."""

MODEL_MARGIN = 16.0
"""How much further than the model's own rounding noise a whole model may stray: the noise is one
sample of a random quantity, and an implementation adds a few roundings of its own to each layer."""


@dataclass(frozen=True, slots=True)
class Margin:
    """How much of a budget was used: 0 is exact, 1 the most that passes."""

    used: float
    measured: float
    allowed: float


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: 2⁻⁵³, 2⁻²⁴, 2⁻¹¹ and 2⁻⁸ for float64, float32, float16 and bfloat16."""
    return torch.finfo(dtype).eps / 2


def accumulation(n: int, dtype: torch.dtype) -> float:
    """γ(n) in the precision in which products of `dtype` are added up: float32, or float64's own."""
    u = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    return n * u / (1 - n * u)


def outputs(
    M: Tensor, *, n: int, dtype: torch.dtype, factor_dtype: torch.dtype | None = None
) -> Tensor:
    """The budget of one layer's outputs, elementwise.

    Args:
        M: float64, the magnitude of each output, from `harness.oracle.magnitude`.
        n: reduction length: in_features + r, or the kernel's size times its channels + r.
        dtype: of the base and of the output.
        factor_dtype: of the factors; the coarser of the two decides.
    """
    u = max(unit_roundoff(dtype), unit_roundoff(factor_dtype or dtype))
    coarse = dtype if unit_roundoff(dtype) >= unit_roundoff(factor_dtype or dtype) else factor_dtype
    assert coarse is not None
    return M * (STORED * u + accumulation(n + STORED, coarse)) + smallest(dtype)


def gradients(
    M: Tensor, *, n: int, dtype: torch.dtype, factor_dtype: torch.dtype | None = None
) -> Tensor:
    """The budget of a gradient of one layer, elementwise.

    A backward pass is products and sums as the forward pass is, over at most n terms, and stores as
    many tensors again; so twice the roundings of `outputs`.

    Args:
        M: float64, the gradient of the layer with every term, and the gradient of its output, made
            positive: the sum of the absolute values of all products that may be added up.
        n: reduction length: never more than all inputs, all outputs and the rank together.
        dtype: of the base, its input and its output.
        factor_dtype: of the factors; the coarser of the two decides.
    """
    return 2 * outputs(M, n=n, dtype=dtype, factor_dtype=factor_dtype)


def chance(draws: int, width: float, alarm: float = 1e-12) -> float:
    """How far the mean of independent draws may lie from its expectation.

    Hoeffding (1963): P(|mean - expectation| ≥ t) ≤ 2·exp(-2·draws·t²/width²) for draws within an
    interval of that width. The t at which that is `alarm`, the probability of a false alarm.
    """
    return width * math.sqrt(math.log(2 / alarm) / (2 * draws))


def setting(value: float) -> float:
    """The budget of a number computed from settings, as alpha/r is: two float32 roundings of it.

    Implementations may keep such a number in a float32 tensor; two divisions of float64 numbers
    that are equal in the reals differ by less.
    """
    return 2 * unit_roundoff(torch.float32) * abs(value)


def weights(
    W: Tensor, delta_magnitude: Tensor, *, r: int, dtype: torch.dtype, factor_dtype: torch.dtype
) -> Tensor:
    """The budget of a merged weight against W + ΔW, elementwise.

    One rounding of the sum to the weight's dtype, and those of ΔW on its way: stored up to three
    times (product, scaling, cast) in the coarser of the two dtypes.

    Args:
        W: float64, W + ΔW.
        delta_magnitude: float64, |scaling|·|B|·|A|.
        r: rank, the reduction length of B·A.
        dtype: of the weight.
        factor_dtype: of the factors.
    """
    u = unit_roundoff(dtype)
    v = max(u, unit_roundoff(factor_dtype))
    coarse = dtype if u >= unit_roundoff(factor_dtype) else factor_dtype
    # The base is within one ΔW of the sum, and one more rounding of each is allowed in the sum.
    return (
        W.abs() * u * 1.01
        + delta_magnitude * (4 * v + accumulation(r + 4, coarse))
        + smallest(dtype)
    )


def restored(
    W: Tensor,
    delta_magnitude: Tensor,
    *,
    r: int,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    cycles: int = 1,
) -> Tensor:
    """The budget of a weight after merging and unmerging, against the weight before.

    One rounding as it goes in and one as it comes out. Adding and taking out the same ΔW does not
    drift (FACTS: ten cycles are no worse than one): the first cycle lands on a number that the next
    returns to, give or take one rounding, so the budget does not grow with the cycles but for one
    rounding of tie-breaking.
    """
    once = weights(
        W.abs() + delta_magnitude, delta_magnitude, r=r, dtype=dtype, factor_dtype=factor_dtype
    )
    return once * (2 if cycles == 1 else 4)


def model(noise: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The budget of a whole model's outputs, from that model's own rounding.

    Args:
        noise: the truth's model evaluated in `dtype`, less the truth: what rounding alone does to
            this model on this input, with no implementation in the way.
        truth: float64.
        dtype: of the model.

    Returns:
        One number for all elements, as a tensor that broadcasts: `MODEL_MARGIN` times the larger of
        the noise's largest element and one rounding of the largest output.
    """
    floor = unit_roundoff(dtype) * truth.abs().max()
    return MODEL_MARGIN * torch.maximum(noise.double().abs().max(), floor).reshape(())


def updates(
    noise: Tensor,
    truth: Tensor,
    stored: Tensor,
    *,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    steps: int = 1,
) -> Tensor:
    """The budget of what some optimizer steps change in a factor, elementwise.

    The gradient's own error is that of a whole model, see `model`, whose backward pass rounds as often
    again. A step rounds the factor it stores,
    and so did the step before it: one rounding of the factor for each, and one for where it started.

    Args:
        noise: the same steps of the equation evaluated in `dtype`, less the truth.
        truth: float64, the change.
        stored: float64, the factor after the steps.
        dtype: of the base.
        factor_dtype: of the factors.
        steps: how many.
    """
    coarse = max(dtype, factor_dtype, key=unit_roundoff)
    gradient = 2 * model(noise, truth, coarse)
    return gradient + (steps + 1) * unit_roundoff(factor_dtype) * stored.abs()


def combined(magnitude: Tensor, *, r: int, factor_dtype: torch.dtype) -> Tensor:
    """The budget of a weighted sum of ΔWs that is stored as one pair of factors, elementwise.

    Three errors add up; S is the sum, |S| ≤ M = `magnitude` elementwise, so that M's norms bound S's.

    - The sum, or concatenated factors: three roundings of each entry (weight times scaling, times B,
      stored) and the product's own, (4u + γ(r + 4))·M.
    - Factored anew by an SVD: that of S + E, ‖E‖₂ ≤ p·u·‖S‖₂ (LAPACK Users' Guide, section 4.9), p growing
      modestly with the size n = max(m, n): √n, as roundings add up like a random walk (Higham and Mary,
      SIAM J. Sci. Comput. 41, 2019), and r + 4 more for the singular values that scale the factors.
      |E_ij| ≤ ‖E‖₂, and ‖S‖₂ ≤ ‖M‖_F. No SVD is computed in half precision.
    - Its factors, stored: P = UΣᵗ and Q = Σ¹⁻ᵗVᵀ, 0 ≤ t ≤ 1, rounded twice each, err by 4u·Σ_k |P_ik Q_kj|,
      at most 4u·‖P_i‖‖Q_j‖. As the rows of U and V are no longer than 1, that is no more than the longer
      of S's row i and column j. A convolution is factored in a layout of its own: ‖M‖_F there.

    Args:
        magnitude: float64, Σ |weight|·|scaling|·|B|·|A|.
        r: the ranks together.
        factor_dtype: of the factors.
    """
    u = unit_roundoff(factor_dtype)
    grown = accumulation(
        r + 4 + math.isqrt(max(len(magnitude), magnitude[0].numel())), factor_dtype
    )
    whole: Tensor = magnitude.norm()
    across = torch.maximum(magnitude.norm(dim=0), magnitude.norm(dim=1, keepdim=True))
    line = across if magnitude.dim() == 2 else whole
    summed = magnitude * (4 * u + accumulation(r + 4, factor_dtype))
    return summed + line * 4 * u + whole * grown


NF4_HALF_GAP = 0.152
"""Half the widest gap of NF4's code, -1 to -0.6962 (arXiv 2305.14314, appendix E): the most by which a
number in [-1, 1] is off its nearest code."""


def requantised(W: Tensor, *, block: int = 64) -> Tensor:
    """The budget of a weight that was merged and put into NF4 again, elementwise.

    A block of consecutive elements is scaled by its largest, and each is off by half a gap at most. An
    implementation that merges into a dense weight stays far below.

    Args:
        W: float64, W + ΔW.
        block: how many elements share a scale.
    """
    flat = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block)
    scale = flat.abs().amax(1, keepdim=True).expand_as(flat)
    return NF4_HALF_GAP * scale.flatten()[: W.numel()].view_as(W)


def smallest(dtype: torch.dtype) -> float:
    """The smallest normal number: what underflow may take from any term."""
    return float(torch.finfo(dtype).tiny)


def margin(actual: Tensor, truth: Tensor, budget: Tensor | float) -> tuple[Margin, tuple[int, ...]]:
    """How much of the budget the worst element uses, and which element that is.

    A number that is not finite uses an infinite part, unless the truth is the same. An empty tensor
    uses nothing.
    """
    a, t = actual.detach().cpu().double(), truth.detach().cpu().double()
    b = torch.as_tensor(budget, dtype=torch.float64).cpu().expand_as(t)
    if not t.numel():
        return Margin(0.0, 0.0, 0.0), ()
    error = (a - t).abs()
    error = torch.where((a == t) | (a.isnan() & t.isnan()), torch.zeros_like(error), error)
    error = torch.where(error.isnan(), torch.full_like(error, float("inf")), error)
    used = torch.where(error == 0, torch.zeros_like(error), error / b)
    k = int(used.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(k), t.shape))
    return Margin(float(used.flatten()[k]), float(error.flatten()[k]), float(b.flatten()[k])), where
