"""What a fault can change: only what runs some of the code that it replaces.

    reference   merge/same-output at linear   ran  Reference.merge  Adapted.merged  Branch.delta ...
    fault       replaces Branch.delta         ──►  judged
    fault       replaces ConvBranch's delta   ──►  the reference's own answer: it would be judged alike
    fault       replaces Reference.load       ──►  likewise

A fault is the reference but for a few functions of a few classes, so a question whose answer took none
of those, on objects of those, has the same answer. What a question runs is traced once, on the
reference. Where a fault changes anything but functions, or a question asks another process, nothing is
known and all is judged.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from harness import fresh, worker
from harness.adapters.reference import Reference
from harness.session import Lost, Session
from harness.spec import catalogue

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from harness.adapter import Adapter

Ran = tuple["CodeType", type | None]
"""A function, and the class of the object that it ran on; None where that is not told apart."""

_ELSEWHERE: frozenset[Ran] = frozenset(
    {(fresh.call.__code__, None), (subprocess.Popen.__init__.__code__, None)}
)
"""What starts or asks another process, where nothing is traced."""

_OWN = frozenset({"__module__", "__qualname__", "__doc__", "__annotations__", "__parameters__"})
"""What every class has of its own, whatever it does."""

_PARTS = ("layer", "whole", "branches")
"""What the reference is composed of."""

_OURS = frozenset({Reference, Reference.layer, Reference.whole, *Reference.branches.values()})
"""The classes that a fault may be a subclass of."""

Memory = dict[str, tuple[dict[str, Any], set[Ran]]]


class Traced(Session):
    """A session with the reference in this process, which remembers each answer and what it ran."""

    def __init__(self) -> None:
        super().__init__(Reference())
        self.memory: Memory = {}

    def ask(self, request: dict[str, Any], *, limit: float) -> dict[str, Any] | Lost:
        """The answer, which no limit cuts off."""
        ran: set[Ran] = set()
        known = _replaceable()

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                code = frame.f_code
                if code in known:
                    kind = type(frame.f_locals.get("self")) if _is_method(code) else None
                    ran.add((code, kind if kind in _OURS else None))

        assert isinstance(self._adapter, Reference)
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            answer = worker.answer(self._adapter, catalogue(), request)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        if request["do"] in {"judge", "search"}:
            self.memory[json.dumps(request)] = answer, ran
        return answer


class Remembering(Session):
    """A session with a fault, of which only that is asked what the fault can change."""

    def __init__(self, adapter: Adapter, memory: Memory) -> None:
        super().__init__(adapter)
        self._memory = memory
        self._replaced = replaced(adapter)

    def ask(self, request: dict[str, Any], *, limit: float) -> dict[str, Any] | Lost:
        """The fault's answer, or the reference's where that is known to be the same."""
        answer, ran = self._memory.get(json.dumps(request), ({}, set()))
        if self._replaced is None or not answer or ran & (self._replaced | _ELSEWHERE):
            return super().ask(request, limit=limit)
        return answer


def replaced(adapter: Adapter) -> set[Ran] | None:
    """The reference's functions that an adapter replaces, by class; None where it changes more."""
    if not isinstance(adapter, Reference) or vars(adapter).keys() - set(_PARTS):
        return None
    pairs: list[tuple[type, type]] = [
        (type(adapter), Reference),
        (adapter.layer, Reference.layer),
        (adapter.whole, Reference.whole),
    ]
    if adapter.branches.keys() != Reference.branches.keys():
        return None
    pairs += [(adapter.branches[kind], base) for kind, base in Reference.branches.items()]
    found: set[Ran] = set()
    for changed, base in pairs:
        codes = _replaced(changed, base)
        if codes is None:
            return None
        found |= codes
    return found


def _replaced(changed: type, base: type) -> set[Ran] | None:
    if not issubclass(changed, base) or "<locals>" in changed.__qualname__:
        return None  # a class in a function cannot be pickled: that alone is a difference
    found: set[Ran] = set()
    for part in changed.__mro__[: changed.__mro__.index(base)]:
        for name in vars(part).keys() - _OWN - set(_PARTS):
            try:
                before = inspect.getattr_static(base, name)
            except AttributeError:
                # Of a module a new name is the fault's own; an adapter may be asked for one, if public.
                private = name.startswith("_") or issubclass(base, nn.Module)
                if private and not name.startswith("__"):
                    continue
                return None
            code = _code(before)
            if code is None:
                return None
            found.add((code, base if _is_method(code) else None))
    return found


@cache
def _replaceable() -> frozenset[CodeType]:
    """Every function that a fault might replace, and those that lead elsewhere: all that is traced."""
    own = {_code(inspect.getattr_static(kind, name)) for kind in _OURS for name in dir(kind)}
    return frozenset({code for code in own if code is not None} | {code for code, _ in _ELSEWHERE})


def _is_method(code: CodeType) -> bool:
    return code.co_argcount > 0 and code.co_varnames[0] == "self"


def _code(attribute: Any) -> CodeType | None:
    """Of a function, decorated or not, or a property that is only read."""
    if isinstance(attribute, property):
        return None if attribute.fset or attribute.fdel else _code(attribute.fget)
    if isinstance(attribute, staticmethod | classmethod):
        return _code(attribute.__func__)
    return getattr(inspect.unwrap(attribute), "__code__", None) if callable(attribute) else None
