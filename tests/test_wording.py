"""What a failure says: the right thing by its name, and of many blocked specs what they wait for."""

from __future__ import annotations

import torch
from torch import nn

from harness import worker
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.case import Case
from harness.failure import Broken
from harness.faults.wrong import after_injection, layer, wrong
from harness.judge import Result
from harness.spec import catalogue
from harness.telling import waits


def broken(adapter, spec, case):
    """How an adapter fails one spec at one case."""
    found, _, _ = worker.judge(adapter, catalogue()[spec], case)
    assert isinstance(found, Broken)
    return found


def test_a_bias_that_does_not_train_is_named():
    """`back.bias` was asked for, and is frozen."""
    adapter = wrong(biases=lambda self, model: {})

    told = broken(adapter, "trainable/bias-modes", Case(specimen="shared", way="lora_only"))

    assert told.expected == "beside the factors, back.bias trains"
    assert told.actual == "1 of them does not"


def test_what_trains_and_was_not_asked_for_is_counted():
    """What was asked for is not counted with it."""
    adapter = after_injection(lambda _, model: model.first.bias.requires_grad_(True))
    target = Case(specimen="shared", way="lora_only")
    unasked = after_injection(lambda _, model: model.proj.base.requires_grad_(True))

    one, two = (
        broken(adapter, "trainable/bias-modes", target),
        broken(unasked, "trainable/only-lora", Case()),
    )

    assert one.expected == "nothing trains but the factors and back.bias"
    assert (one.actual, one.where) == ("1 parameter more does", "first.bias")
    assert two.actual == "2 parameters more do"


def test_a_bias_that_is_not_saved_is_named():
    """By the name it has in the model."""
    adapter = wrong(
        state_dict=lambda self, model: {
            k: t.detach() for k, t in self.factor_tensors(model).items()
        }
    )

    told = broken(adapter, "trainable/bias-modes", Case(specimen="shared", way="lora_only"))

    assert told.actual == "back.base.bias is not, as it now is"


def test_the_shapes_of_factors_are_those_of_their_layer():
    """An embedding's are the other way round than a linear layer's."""

    def factors(self, model):
        found = Reference.factors(self, model)
        for (f,) in found.values():
            f.A.data = f.A.data.T
        return found

    def wanted(case):
        return broken(wrong(factors=factors), "forward/equals-oracle", case).expected

    assert wanted(Case()) == "A (r, 11) and B (7, r) for a weight (7, 11)"
    assert wanted(Case(specimen="embedding")) == "A (r, 13) and B (5, r) for a weight (13, 5)"
    assert wanted(Case(specimen="conv2d")) == (
        "A (r, n) and B (m, r), m·n = 108, for a weight (4, 3, 3, 3)"
    )


def test_a_merged_layer_with_a_bias_of_its_own_is_told_as_that():
    """Not as an element of the weight."""

    def merge(self, merged):
        merged.bias = nn.Parameter(torch.full((7,), 0.25), requires_grad=False)
        Adapted.merge(self, merged)

    told = broken(
        wrong(layer=layer(merge=merge)), "merge/weight-equals-oracle", Case(specimen="bare")
    )

    assert told.expected.startswith("bias beside the merged weight, seen in the output of zeros")
    assert told.actual == "0.25"


def test_what_is_blocked_is_told_by_what_it_waits_for():
    """Once for each spec that fails, the one most waited for first."""

    def one(spec, outcome, *needs):
        notes = [f"needs {', '.join(needs)}"] if needs else []
        return Result(spec=spec, level="MUST", outcome=outcome, notes=notes)

    lines = waits(
        [
            one("a/fails", "failed"),
            one("b/fails", "failed"),
            one("c/waits", "blocked", "b/fails"),
            one("d/waits", "blocked", "a/fails", "b/fails"),
            one("e/elsewhere", "blocked", "f/not-asked"),
        ]
    )

    assert lines == ["  2 specs wait for b/fails", "  1 spec waits for a/fails"]
