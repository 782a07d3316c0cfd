"""A truth is kept by the bits of what it was computed from, and by nothing less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness import memo
from harness.adapter import Factors


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(memo, "_KEPT", type(memo._KEPT)())


def asked(*question):
    """Whether the question was computed, and not answered from what is kept."""
    computed = []
    memo.kept(lambda: computed.append(True), *question)
    return bool(computed)


def linear(bias=True):
    """A layer that is the same each time."""
    torch.manual_seed(0)
    return nn.Linear(3, 2, bias=bias)


def test_the_same_bits_are_computed_once():
    """Another module, another tensor, the same numbers: one question."""
    factors = [{"proj": [Factors(torch.ones(1, 3), torch.ones(2, 1), 0.5)]} for _ in range(2)]

    assert asked("truth", linear(), factors[0], torch.arange(3.0))
    assert not asked("truth", linear(), factors[1], torch.arange(3.0))


@pytest.mark.parametrize(
    "other",
    [
        ("budget", linear(), torch.arange(3.0)),
        ("truth", nn.Linear(3, 2), torch.arange(3.0)),
        ("truth", linear(bias=False), torch.arange(3.0)),
        ("truth", nn.Sequential(linear()), torch.arange(3.0)),
        ("truth", linear(), torch.arange(3)),
        ("truth", linear(), torch.arange(3.0).view(3, 1)),
        ("truth", linear(), torch.tensor([0.0, 1.0, -2.0])),
        ("truth", linear().to(torch.bfloat16), torch.arange(3.0)),
    ],
    ids=["purpose", "weight", "no bias", "nested", "dtype", "shape", "sign", "module dtype"],
)
def test_other_bits_are_another_question(other):
    """One number, one shape or one dtype apart, and it is computed."""
    assert asked("truth", linear(), torch.arange(3.0))
    assert asked(*other)


def test_a_base_that_was_written_to_is_another_question():
    """A judge may disturb a base in place between two questions."""
    base = linear()
    assert asked("truth", base)
    with torch.no_grad():
        base.weight[0, 0] += 1

    assert asked("truth", base)


def test_factors_in_other_rows_are_another_question():
    """Rows and scaling count, as slices and as numbers."""
    A, B = torch.ones(1, 3), torch.ones(2, 1)
    assert asked([Factors(A, B, 0.5, rows=slice(0, 2))])
    assert asked([Factors(A, B, 0.5, rows=slice(2, 4))])
    assert asked([Factors(A, B, 0.25, rows=slice(0, 2))])


def test_a_module_with_hooks_is_always_computed():
    """What a hook does is not in the bits."""
    base = linear()
    base.register_forward_hook(lambda *_: None)

    assert asked("truth", base)
    assert asked("truth", base)


def test_a_large_model_is_always_computed(monkeypatch):
    """To look at its numbers, and to hold its outputs, costs more than it saves."""
    monkeypatch.setattr(memo, "LARGE", 5)

    assert asked("truth", linear())
    assert asked("truth", linear())


def test_old_answers_make_room(monkeypatch):
    """The least recently asked goes first."""
    monkeypatch.setattr(memo, "ENTRIES", 2)
    for question in ("a", "b", "a", "c"):
        asked(question)

    assert not asked("a")
    assert asked("b")
