"""The judge on trial: every planted fault is killed by the spec named for it, and none is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.faults.matrix import MARGIN, NARROW, Matrix, Row, dependants, run
from harness.faults.record import UNREPLAYED, faults
from harness.spec import catalogue, select

KEPT = Path(__file__).parent.parent / "reports" / "kill-matrix.json"
CORRECT = ["reference", "parametrised:adapter", "transposed:adapter", "hooked:adapter"]


@pytest.fixture(scope="module")
def kept():
    return Matrix.read(json.loads(KEPT.read_text()))


def test_there_are_enough_faults_and_each_is_named_for_a_core_spec():
    """At least 70 faults; each names a spec that every ordinary run judges."""
    core = select((), "core")

    assert len(faults()) >= 70
    assert [f.name for f in faults().values() if f.killed_by not in core] == []


def test_the_kept_matrix_is_of_these_faults_and_specs(kept):
    """The matrix in reports/ was made from what is here."""
    assert {row.name: row.killed_by for row in kept.faults} == {
        fault.name: fault.killed_by for fault in faults().values()
    }
    assert set(kept.specs) == set(select((), "core"))
    assert {row.name for row in kept.correct} == set(CORRECT)


def test_every_narrow_margin_has_its_reason(kept):
    """A budget lies well between right and wrong, or it is said why it cannot."""
    narrow = {
        m["spec"]
        for m in kept.margins()
        if m["correct"] * MARGIN > 1 or (m["fault"] is not None and m["fault"] < MARGIN)
    }

    assert narrow <= NARROW.keys()


def test_the_kept_matrix_is_green(kept):
    """No fault survives, no spec is without its own, no correct implementation fails."""
    assert kept.problems() == []


def test_taking_any_one_spec_out_makes_it_red(kept):
    """Every spec earns its place."""
    for spec in kept.specs:
        assert kept.without(spec).problems(), f"{spec} could go and nothing would tell"


def test_every_row_of_the_bug_list_is_replayed_or_says_why_not():
    """Rows that no fault replays are listed with the reason: 116 real bugs and 20 plausible ones."""
    replayed = {row for fault in faults().values() for row in fault.replays}

    assert replayed.isdisjoint(UNREPLAYED)
    assert len(replayed | UNREPLAYED.keys()) == 116 + 20
    assert all(UNREPLAYED.values())


def test_a_fault_that_survives_is_red():
    """The matrix can fail: a fault nobody kills is a problem."""
    spec = next(iter(catalogue()))
    matrix = Matrix(
        faults=[Row(name="quiet", killed_by=spec, outcomes={spec: "passed"})],
        correct=[Row(name="right", outcomes={spec: "passed"})],
    )

    assert matrix.problems() == [
        "quiet survives",
        f"{spec} has no fault that only it and its dependants kill",
    ]


def test_dependants_are_transitive():
    """What needs a need is a dependant."""
    assert "merge/same-output" in dependants("targeting/exact-coverage")


@pytest.mark.slow
def test_the_matrix_made_now_is_green(monkeypatch, request):
    """Every fault is judged again by every core spec, with all correct implementations beside it."""
    implementations = request.path.parent / "implementations"
    monkeypatch.setenv("PYTHONPATH", str(implementations))
    matrix = run(CORRECT)

    assert matrix.problems() == []
