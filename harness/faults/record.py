"""The `@fault` record and the list of all planted faults."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.adapter import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A correct adapter with one sin.

    Attributes:
        name: the sin, in the past of a sentence: `scale_applied_twice_on_merge`.
        sin: what it does wrong, in one sentence.
        killed_by: the id of the spec that must catch it.
        replays: rows of shared/BUGS.md ("12", "P-1"), or "" where no row has it.
        varies: what must vary for it to show.
        make: the adapter.
    """

    name: str
    sin: str
    killed_by: str
    replays: tuple[str, ...]
    varies: str
    make: Callable[[], Adapter]


UNREPLAYED: dict[str, str] = {
    "15": "transformers ties the head again when a whole merged model is reloaded: no adapter's call",
    "30": "an export of whole models skips shards: writing base weights is not in the contract",
    "40": "one CPU's slow bfloat16 product: a cost of the host, not of the adapter",
    "63": "needs sharded parameters on several processes (ZeRO-3)",
    "70": "needs a file written by a later release of the same implementation",
    "75": "needs a file written before an upstream rename",
    "78": "a default list of targets for phi3: the contract always names its targets",
    "106": "which model a preference trainer takes as its reference: no adapter is asked",
    "136": "a list of indices made again at each call: Python's time, no operation and no tensor more",
    "137": "matching of names that grows with the adapters there are: Python's time, which no verdict asks",
    "138": "hundreds of names against thousands of modules: Python's time, which no verdict asks",
    "144": "loads to the wrong device: needs an accelerator",
    "146": "blocks that an accelerator's allocator keeps: needs one",
}
"""Rows of BUGS.md that no fault replays, with the reason."""

_FAULTS: dict[str, Fault] = {}


def fault(
    *, sin: str, killed_by: str, replays: Sequence[str] = (), varies: str
) -> Callable[[Callable[[], Adapter]], Callable[[], Adapter]]:
    """Enter a factory of a wrong adapter; its function name is the fault's name."""

    def enter(make: Callable[[], Adapter]) -> Callable[[], Adapter]:
        name = make.__name__
        if name in _FAULTS and _FAULTS[name].make.__module__ != make.__module__:
            raise ValueError(f"two faults are called {name}")
        _FAULTS[name] = Fault(
            name=name,
            sin=sin,
            killed_by=killed_by,
            replays=tuple(replays),
            varies=varies,
            make=make,
        )
        return make

    return enter


def faults() -> dict[str, Fault]:
    """Every planted fault by name, in the order of their files."""
    from harness import faults as package

    for module in sorted(iter_modules(package.__path__), key=lambda m: m.name):
        if module.name in {"__main__", "matrix", "record"}:
            continue
        import_module(f"harness.faults.{module.name}")
    return dict(_FAULTS)
