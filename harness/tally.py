"""What becomes of specs that run as tests: a judge for each implementation, and its verdict at the end.

Results travel as rows of JSON, since with several test processes the one that judges is not the one
that tells.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from harness.case import Points
from harness.errors import UsageError
from harness.failure import Failure
from harness.judge import Judge, Result
from harness.report.words import OUTCOMES, plain
from harness.session import Session
from harness.verdict import Verdict, summary

if TYPE_CHECKING:
    from harness.adapter import Adapter
    from harness.spec import Spec, Tier

Key = str | int


class Tally:
    """The judges of a run, and what they found of each implementation."""

    def __init__(self, *, model: str | None = None, device: str | None = None) -> None:
        self._model, self._device = model, device
        self._sessions: dict[Key, Session] = {}
        self._judges: dict[tuple[Key, Tier], Judge] = {}
        self.named: dict[str, dict[str, str]] = {}
        """Name and version of each implementation, by how it was spelled."""
        self._found: dict[str, dict[str, Result]] = {}
        self._called: dict[Key, str] = {}
        self._unusable: dict[Key, str] = {}
        """Why an implementation cannot be had: to find that out once takes long enough."""

    def called(self, adapter: str | Adapter) -> str:
        """How a run calls an implementation: as it was spelled, or its name; numbered where that is taken.

        To be asked in the order of collection first, which is the same in every test process.
        """
        key = _key(adapter)
        if key not in self._called:
            name = adapter if isinstance(adapter, str) else plain(getattr(adapter, "name", adapter))
            number = 1
            while (told := name if number == 1 else f"{name} #{number}") in self._called.values():
                number += 1
            self._called[key] = told
        return self._called[key]

    def judge(self, adapter: str | Adapter, tier: Tier) -> Judge:
        """The judge of one implementation in one tier, started when first asked for.

        Raises `UsageError` where the implementation or the device cannot be had.
        """
        from harness import known

        key = _key(adapter)
        if key in self._unusable:
            raise UsageError(self._unusable[key])
        if (key, tier) not in self._judges:
            try:
                session = self._sessions.setdefault(key, Session(adapter))
                made = Judge(session, Points(None, self._model, self._device, None, tier))
            except UsageError as error:
                self._unusable[key] = str(error)
                raise
            made.known = known.built_in(made.name, made.version)
            self._judges[key, tier] = made
            self.named[self.called(adapter)] = {"name": made.name, "version": made.version}
        return self._judges[key, tier]

    def result(self, adapter: str | Adapter, tier: Tier, item: Spec) -> tuple[Result, str]:
        """What becomes of a spec, and the row in which that travels."""
        judge = self.judge(adapter, tier)
        result = judge.result(item)
        judge.diagnose(result)
        name = self.called(adapter)
        return result, json.dumps([name, self.named[name], result.as_dict()])

    def take(self, row: str) -> dict[str, Any]:
        """Enter a row, of two of one spec the worse; returns it as a report has it."""
        name, named, found = json.loads(row)
        self.named[name] = named
        plain = ("spec", "level", "outcome", "cases", "notes", "seconds")
        failures = [
            Failure(**{**failure, "looks_like": tuple(failure["looks_like"])})
            for failure in found["failures"]
        ]
        result = Result(**{key: found[key] for key in plain}, failures=failures)
        of_name = self._found.setdefault(name, {})
        # Of two tiers, one may fail where the other passes.
        both = (result, of_name.get(result.spec, result))
        of_name[result.spec] = min(both, key=lambda one: list(OUTCOMES).index(one.outcome))
        return {**found, "adapter": name}

    def verdicts(self) -> dict[str, Verdict]:
        """What is to be said of each implementation, by how it was spelled."""
        return {
            name: Verdict(
                adapter=self.named[name], **summary(found.values()), results=[*found.values()]
            )
            for name, found in self._found.items()
        }

    @property
    def worst(self) -> Verdict | None:
        """The verdict by which the run ends; None where nothing was judged."""
        order = ("DOES NOT CONFORM", "INCOMPLETE", "CONFORMS BUT FOR KNOWN FAILURES", "CONFORMS")
        return min(self.verdicts().values(), key=lambda v: order.index(v.verdict), default=None)

    def told(self, adapter: str) -> str:
        """How a header calls an implementation: as it was spelled, with name and version."""
        named = self.named[adapter]
        name = f"{named['name']} {named['version']}"
        return name if adapter == named["name"] else f"{adapter} ({name})"

    def close(self) -> None:
        """End every implementation's process."""
        for session in self._sessions.values():
            session.close()


def _key(adapter: str | Adapter) -> Key:
    # An adapter is kept by its tests and by its session, so that its id stays its own.
    return adapter if isinstance(adapter, str) else id(adapter)
