"""Diagnosis: a stranger's sin is called by its name, and nobody right is called anything."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
from strange import stranger

from harness import diagnosis, fresh, registry, worker
from harness.adapters.equation import Branch
from harness.case import Case
from harness.failure import Broken
from harness.faults.record import Fault, faults
from harness.faults.wrong import branches, wrong
from harness.spec import catalogue

if TYPE_CHECKING:
    import torch

    from harness.adapter import Adapter

SAMPLE = (
    "scale_applied_twice_on_merge",
    "merges_an_embedding_untransposed",
    "scales_by_alpha",
    "matches_ends_of_names",
    "marks_by_name",
    "ignores_keys_that_do_not_fit",
    "disables_the_first_layer_only",
    "detaches_the_branchs_input",
    "merges_twice",
    "zeros_stay_zero",
    "clips_the_rank_to_the_width",
    "truncates_when_merging",
    "draws_A_from_a_normal",
)
"""Of each family one or two."""


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine must not decide what is named."""
    monkeypatch.setattr(diagnosis, "LIMIT", 60.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the worker does: theirs are not what is judged
        yield


def diagnosed(fault: Fault) -> tuple[str, ...]:
    """What a stranger's copy of a fault is said to look like, where the fault's own spec fails it."""
    adapter, item = stranger(fault), catalogue()[fault.killed_by]
    case = next((c for c in item.cases if isinstance(_broken(adapter, fault, c), Broken)), None)
    if case is None and item.search is not None:
        case = Case.parse(worker.search(adapter, item, explore=False)["case"])
    return diagnosis.nearest(adapter, item, case) if case else ()


def _broken(adapter: Adapter, fault: Fault, case: Case) -> object:
    return worker.judge(adapter, catalogue()[fault.killed_by], case)[0]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_strangers_copy_of_a_fault_is_called_by_its_name(name: str) -> None:
    """Other names, other keys, another draw: the same sin."""
    assert name in diagnosed(faults()[name])


@pytest.mark.parametrize("name", ["reference", "peft", "loralib"])
def test_what_is_right_is_called_nothing(name: str) -> None:
    """Where a spec holds, no fault is named, however near one comes."""
    adapter = registry.resolve(name)
    for id_ in ("merge/same-output", "forward/equals-oracle", "trainable/only-lora"):
        assert diagnosis.nearest(adapter, catalogue()[id_], Case()) == ()


@pytest.mark.parametrize("width", [0.3, 0.43, 2.0])
def test_a_uniform_of_another_width_is_not_called_normal(width: float) -> None:
    """Where no fault fits, none is named; 0.43 has the normal's own spread."""

    def initialize(self: Branch, generator: torch.Generator) -> None:
        Branch.initialize(self, generator)
        self.lora_A.data.mul_(width)

    item, adapter = (
        catalogue()["initialization/distribution"],
        wrong(branches=branches(initialize=initialize)),
    )

    assert isinstance(worker.judge(adapter, item, item.cases[0])[0], Broken)
    assert diagnosis.nearest(adapter, item, item.cases[0]) == ()


@pytest.mark.slow
def test_nine_of_ten_faults_are_known_again() -> None:
    """Over all of them; which ones are not, the message says."""
    fresh.share()
    missed = [fault.name for fault in faults().values() if fault.name not in diagnosed(fault)]

    assert len(missed) <= 0.1 * len(faults()), ", ".join(missed)
