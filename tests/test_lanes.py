"""Two processes judge one implementation, and find what one finds."""

from __future__ import annotations

import os

import pytest

from harness import UsageError, check, lanes
from harness.judge import Judge
from harness.session import Ended, Session
from harness.spec import catalogue, select


@pytest.fixture(autouse=True)
def _strangers(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))


def told(results):
    """What must not depend on which process judged."""
    return {
        result.spec: (
            result.outcome,
            result.cases,
            result.notes,
            result.margins,
            [failure.as_dict() for failure in result.failures],
        )
        for result in results
    }


def in_one(adapter):
    with Session(adapter) as session:
        judge = Judge(session)
        return [judge.result(item) for item in select(()).values()]


def in_two(adapter):
    with Session(adapter) as session, Session(adapter) as second:
        judge = Judge(session)
        return list(lanes.judge_in_two((judge, judge.beside(second)), select(())))


def test_two_find_what_one_finds():
    """Passed, failed and blocked alike, across the lanes, to the words and the margins."""
    wrong = "harness.faults.merge:scale_applied_twice_on_merge"
    found = told(in_two(wrong))

    assert {outcome for outcome, *_ in found.values()} >= {"passed", "failed", "blocked"}
    assert found == told(in_one(wrong))


def test_a_lane_is_a_matter_of_the_spec_alone():
    """The halves are fixed, and each spec is in one."""
    sizes = [sum(lanes.lane_of(item) == lane for item in catalogue().values()) for lane in range(2)]

    assert min(sizes) > sum(sizes) / 4
    assert {item.family for item in catalogue().values()} > lanes.SECOND


def test_what_a_lane_raises_is_raised():
    """Here or there, and no spec is waited for that will not come."""

    class Broken:
        elsewhere = None

        def result(self, item):
            if lanes.lane_of(item):
                raise UsageError("it is gone")
            return self.elsewhere(catalogue()["forward/equals-oracle"])

    with pytest.raises(UsageError, match="it is gone"):
        list(lanes.judge_in_two((Broken(), Broken()), select(())))


def test_a_run_that_is_over_starts_no_process():
    """Who still asks is told, and nothing is left behind."""
    with Session("reference") as session:
        session.start()
        pid = session._process.pid
    with pytest.raises(Ended):
        session.ask({"do": "describe"}, limit=1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_adapter_that_cannot_be_loaded_is_one_line():
    """Both processes fail to load it; one says so."""
    with pytest.raises(UsageError, match="no_such_module"):
        check("no_such_module:adapter")
