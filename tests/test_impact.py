"""What a fault can change: the questions that the kill matrix need not ask it."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from harness.adapters.equation import Branch
from harness.adapters.reference import CAPABILITIES, Reference
from harness.adapters.wrapped import Adapted
from harness.case import Case
from harness.faults.impact import Remembering, Traced, replaced
from harness.faults.matrix import run
from harness.faults.merge import with_branches, with_layer
from harness.faults.record import faults

MERGED = "merge/same-output"


class MergesTwice(Adapted):
    def merge(self, merged):
        super().merge(merged)

    def of_its_own(self):
        return None


class Modes(Adapted):
    def train(self, mode=True):
        return super().train(mode)


class Scales(Branch):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Disables(Reference):
    @contextmanager
    def disable(self, model):
        yield


class Claims(Reference):
    capabilities = CAPABILITIES


class Asked(Reference):
    eval_merges = True


class Named(Adapted):
    def __deepcopy__(self, memo):
        return self


def asked(spec, **fields):
    return {"do": "judge", "spec": spec, "case": str(Case(**fields))}


def test_what_is_replaced_is_the_references_own_function():
    """Of a layer, a branch and the adapter; inherited from torch, made by __init__, decorated."""
    linear = next(iter(Reference.branches))

    assert replaced(Reference()) == set()
    assert replaced(with_layer(MergesTwice)) == {(Adapted.merge.__code__, Adapted)}
    assert replaced(with_layer(Modes)) == {(Adapted.train.__code__, Adapted)}
    assert replaced(with_branches({linear: Scales})) == {(Branch.__init__.__code__, Branch)}
    assert replaced(Disables()) == {(Reference.disable.__wrapped__.__code__, Reference)}


def test_what_is_no_function_may_change_everything():
    """Claims, a name that the harness may ask for, a method that copying looks for, a local class."""

    class Local(Adapted):
        pass

    strange = Reference()
    strange.memory = {}

    assert replaced(Claims()) is None
    assert replaced(Asked()) is None
    assert replaced(with_layer(Named)) is None
    assert replaced(with_layer(Local)) is None
    assert replaced(strange) is None
    assert replaced(object()) is None


def test_only_what_the_fault_can_change_is_asked_of_it():
    """Merging is its own answer, the forward pass the remembered one, marked here to be told apart."""
    session = Traced()
    merges, calls = asked(MERGED), asked("forward/equals-oracle")
    for request in (merges, calls):
        answer = session.ask(request, limit=60)
        answer["notes"] = ["remembered"]
    with Remembering(with_layer(MergesTwice), session.memory) as fault:
        assert fault.ask(merges, limit=60)["notes"] == []
        assert fault.ask(calls, limit=60)["notes"] == ["remembered"]
        assert fault.ask(asked(MERGED, seed=1), limit=60)["notes"] == []


def test_what_asks_another_process_is_always_asked():
    """Nothing is traced there."""
    session = Traced()
    request = asked("checkpoint/fresh-process")
    session.ask(request, limit=60)["notes"] = ["remembered"]
    with Remembering(with_layer(MergesTwice), session.memory) as fault:
        assert fault.ask(request, limit=60)["notes"] == []
    assert list(session.memory) == [json.dumps(request)]


@pytest.mark.slow
def test_the_whole_matrix_is_the_same():
    """Every tenth fault, judged in all that it cannot change as well."""
    names = list(faults())[::10]
    few, whole = (run([], only=names, whole=whole).faults for whole in (False, True))

    assert [(row.name, row.outcomes, row.failures) for row in few] == [
        (row.name, row.outcomes, row.failures) for row in whole
    ]
