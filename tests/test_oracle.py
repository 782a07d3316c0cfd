"""The float64 truth: by the equation, for each layout, whatever order the implementation adds in."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness import oracle, registry, specimen, storage, tolerance
from harness.adapter import Factors
from harness.case import Case
from harness.descent import Equation, mean_loss
from harness.trial import Trial


def drawn(r: int, i: int, o: int, scaling: float = 1.5, rows: slice | None = None) -> Factors:
    g = torch.Generator().manual_seed(r + 100 * i + 10_000 * o)
    A = torch.randn(r, i, generator=g, dtype=torch.float64)
    B = torch.randn(o, r, generator=g, dtype=torch.float64)
    return Factors(A, B, scaling, rows)


def test_the_update_of_a_linear_layer_is_scaling_times_BA() -> None:
    """One element, written out."""
    f = drawn(3, 5, 4)
    by_hand = 1.5 * sum(float(f.B[2, k]) * float(f.A[k, 1]) for k in range(3))

    assert float(oracle.delta(nn.Linear(5, 4), [f])[2, 1]) == pytest.approx(by_hand, rel=1e-14)


def test_the_update_of_an_embedding_is_transposed() -> None:
    """A holds a column for each entry of the vocabulary."""
    f = drawn(3, 5, 4)
    update = oracle.delta(nn.Embedding(5, 4), [f])

    assert torch.equal(update, (1.5 * (f.B @ f.A)).T)


def test_the_update_of_a_convolution_is_reshaped() -> None:
    """m·n is the weight's size, whatever r' an implementation has."""
    conv = nn.Conv2d(3, 4, (2, 5))
    f = drawn(6, 3 * 5, 4 * 2)

    assert torch.equal(oracle.delta(conv, [f]), (1.5 * (f.B @ f.A)).reshape(4, 3, 2, 5))


def test_the_update_of_a_part_stays_in_its_rows() -> None:
    """Rows that no part names are zero, and parts that overlap add up."""
    update = oracle.delta(nn.Linear(5, 9), [drawn(3, 5, 2, rows=slice(1, 3))])

    assert update[1:3].all()
    assert not update[[0, 3, 4, 5, 6, 7, 8]].any()


@pytest.mark.parametrize(
    ("name", "lora_bias"),
    [
        *(
            (name, False)
            for name in ("linear", "embedding", "conv2d", "dilated", "grouped", "fused")
        ),
        *((name, True) for name in ("linear", "bare", "conv2d", "fused")),
    ],
)
def test_gradients_are_those_of_small_steps(name: str, lora_bias: bool) -> None:
    """A central difference in float64, which shares nothing with autograd."""
    trial = Trial(registry.resolve("reference"), Case(specimen=name))
    base, x = trial.base(), trial.inputs()
    if not x.is_floating_point():
        x = x.masked_fill(x == 1, 2)  # autograd gives the padding index no gradient
    factors = trial.snapshot(trial.adapted(config=trial.config(lora_bias=lora_bias)))
    y = trial.truth(base, factors, x)
    c = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    _, gradients = oracle.gradients(base, factors, x, c)

    for factor, gradient in zip(storage.handles(factors), gradients, strict=True):
        k, h = int(gradient.abs().argmax()), 2.0**-10
        ends = []
        for step in (h, -h):
            factor.view(-1)[k] += step
            ends.append(float((trial.truth(base, factors, x) * c).sum()))
            factor.view(-1)[k] -= step
        # The function is affine in one element, so the difference is exact but for rounding.
        found = (ends[0] - ends[1]) / (2 * h)
        assert found == pytest.approx(float(gradient.view(-1)[k]), rel=1e-9)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    r=st.integers(1, 48),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_every_arrangement_of_the_equation_stays_under_the_bound(
    shape: tuple[int, int], r: int, dtype: str, seed: int
) -> None:
    """Branch, merged weight, factors folded one way or the other: no order of summation exceeds it."""
    trial = Trial(registry.resolve("reference"), Case(shape=shape, r=r, dtype=dtype, seed=seed))
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    (f,) = factors["proj"]
    layer, t = base.proj, trial.dtype
    A, B = f.A.to(t), f.B.to(t)
    weight = layer.weight + (f.scaling * (B @ A)).to(t)
    arrangements = {
        "branch": trial.call(model, x),
        "merged": nn.functional.linear(x, weight, layer.bias),
        "scaled first": layer(x) + (f.scaling * x @ A.T) @ B.T,
        "B scaled": layer(x) + (x @ A.T) @ (f.scaling * B).T,
    }

    for name, actual in arrangements.items():
        # Factors rounded to the base's dtype are other factors: the truth of those is what counts.
        if name != "branch":
            held = {"proj": [Factors(A.double(), B.double(), f.scaling)]}
            truth, budget = trial.truth(base, held, x), trial.budget(base, held, x)
        used, _ = tolerance.margin(actual.detach(), truth, budget)
        assert used.used <= 1, (name, used)


def test_the_base_given_is_left_as_it_was() -> None:
    """The truth is computed on copies."""
    case = Case(specimen="stack")
    trial = Trial(registry.resolve("reference"), case)
    base = specimen.build(case)
    kept = copy.deepcopy(base.state_dict())
    factors = trial.snapshot(trial.adapted())
    oracle.merged(base, factors)

    assert all(torch.equal(kept[key], value) for key, value in base.state_dict().items())


def test_what_trains_beside_the_factors_steps_as_in_the_base_itself() -> None:
    """Where B is zero the adapted model is the base, whose own autograd says where its bias goes."""
    trial = Trial(registry.resolve("reference"), Case())
    base, x = trial.base().double(), trial.inputs().double()
    equation = Equation(trial.base(), trial.snapshot(trial.inject()), besides=("proj.bias",))
    equation.descend(x, lr=0.5)
    mean_loss(base, x).backward()

    expected = base.proj.bias - 0.5 * base.proj.bias.grad
    assert equation.besides["proj.bias"].tolist() == pytest.approx(expected.tolist(), rel=1e-12)
