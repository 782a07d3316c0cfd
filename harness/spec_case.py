"""Specs as tests of pytest: what `parametrize_with_specs` gives a test, and the items of `--adapter`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import UsageError
from harness.options import given, gpu_tier, tier_of, usage_errors
from harness.spec import TIERS, select
from harness.tally import Tally
from harness.verdict import summary

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness.adapter import Adapter
    from harness.judge import Result
    from harness.report.schema import Recorder
    from harness.spec import Spec, Tier


@dataclass(slots=True)
class SpecCase:
    """One spec on one implementation, ready to run."""

    adapter: str | Adapter
    spec: Spec
    tier: Tier = "core"

    def run(self) -> Result:
        """Judge; fail the test with the failure record, or skip it where there is nothing to judge.

        A SHOULD that is not met is an expected failure: it is told, and the run still holds.
        """
        __tracebackhide__ = True
        with contextlib.ExitStack() as stack:
            if ACTIVE:
                state = ACTIVE[-1]
            else:
                state = State(None)
                stack.callback(state.tally.close)
            stack.enter_context(usage_errors(ends=state.tells))
            result, row = state.tally.result(self.adapter, self.tier, self.spec)
            state.pending.append(row)
        if result.outcome == "failed":
            from harness.telling import failure_text

            if summary([result])["verdict"] == "DOES NOT CONFORM":
                pytest.fail(failure_text(result), pytrace=False)
            pytest.xfail(f"SHOULD not met: {result.failures[0].actual}")
        if result.outcome in {"blocked", "not_claimed", "not_run"}:
            pytest.skip(f"{result.outcome.replace('_', ' ')}: {'; '.join(result.notes)}")
        return result


def parametrize_with_specs(
    adapter: str | Adapter, *, only: Sequence[str] = (), tier: Tier = "core"
) -> pytest.MarkDecorator:
    """Parametrise a test over the specs, as its argument `spec_case`.

    Args:
        adapter: `pkg.module:factory`, a known name, or the object itself.
        only: ids or families.
        tier: smoke, core or full.

    Raises:
        UsageError: a name in `only` matches nothing, or there is no such tier.
    """
    if tier not in TIERS:
        raise _WrongUseError(f"tier={tier!r}: no such tier; give {', '.join(TIERS)}")
    try:
        specs = select(only, tier)
    except UsageError as error:
        raise _WrongUseError(str(error).replace("--only ", "only=", 1)) from None
    cases = [SpecCase(adapter, item, tier) for item in specs.values()]
    return pytest.mark.parametrize("spec_case", cases, ids=list(specs))


class _WrongUseError(UsageError, pytest.Collector.CollectError):
    """Wrong usage in a test file: pytest shows the line alone, without our frames."""

    def __init__(self, told: str) -> None:
        super().__init__(f"parametrize_with_specs: {told}")


class SpecItem(pytest.Item):
    """A spec of `pytest --adapter`, with no test file behind it."""

    def __init__(self, *, case: SpecCase, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case

    def runtest(self) -> None:
        """Judge the spec."""
        self.case.run()

    def reportinfo(self) -> tuple[str, None, str]:
        """The line a report shows."""
        return str(self.case.adapter), None, self.nodeid


class Specs(pytest.Collector):
    """The specs of one implementation of `pytest --adapter`; its name is the implementation's."""

    def collect(self) -> Iterable[SpecItem]:
        """An item a spec."""
        tier = tier_of(self.config)
        for id_, item in select(given(self.config, "--spec") or (), tier).items():
            made = SpecItem.from_parent(self, name=id_, case=SpecCase(self.name, item, tier))
            if gpu_tier(self.config):
                made.add_marker("gpu")
            yield made


def case_of(item: pytest.Item) -> SpecCase | None:
    """The spec that a test judges; None where it is a test like any other."""
    if isinstance(item, SpecItem):
        return item.case
    found = getattr(getattr(item, "callspec", None), "params", {}).get("spec_case")
    return found if isinstance(found, SpecCase) else None


class State:
    """What a pytest session keeps.

    With xdist a test runs in one process and the session is told in another: a result travels with
    its test's report, and is counted where the reports arrive.
    """

    def __init__(self, config: pytest.Config | None) -> None:
        model, device = (
            (given(config, name) if config else None) for name in ("--model", "--device")
        )
        self.tally = Tally(model=model, device=device)
        self.pending: list[str] = []
        self.report: Recorder | None = None
        self.tells = not hasattr(config, "workerinput")
        self.tests = 0


STATE = pytest.StashKey[State]()
ACTIVE: list[State] = []
