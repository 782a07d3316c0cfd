"""What makes two reports comparable or not, key by key.

kind, model ............ a difference rules out every row
adapter ................ the specs: two implementations are not one that changed
machine, GPU ........... memory and wall time
Python ................. Python calls: 3.12 enters no function for a comprehension, 3.11 did
threads, versions,
seed, device, recipe ... nothing: what changed is what a comparison is for, and it is told
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.report.words import compact, plain, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ALL = ("spec", "counter", "memory", "timing")
"""The sections of a comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One circumstance of both runs.

    Attributes:
        name: which.
        old: its value in the old report, in words; `–` where it is not told.
        new: in the new one.
        rules_out: sections that a difference makes incomparable.
    """

    name: str
    old: str
    new: str
    rules_out: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both runs agree."""
        return self.old == self.new

    def as_dict(self) -> dict[str, object]:
        """The key as JSON holds it."""
        return {
            "name": self.name,
            "old": self.old,
            "new": self.new,
            "same": self.same,
            "rules_out": [] if self.same else list(self.rules_out),
        }


def keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Key, ...]:
    """Every circumstance that either report tells, in the order of their weight."""
    left, right = dict(facts(old)), dict(facts(new))
    names = [*left, *(name for name in right if name not in left)]
    return tuple(
        Key(
            name=name,
            old=left.get(name, "–"),
            new=right.get(name, "–"),
            rules_out=_RULES_OUT.get(name, ()),
        )
        for name in names
    )


def ruled_out(found: tuple[Key, ...]) -> dict[str, Key]:
    """By section, the weightiest key that rules it out."""
    reasons: dict[str, Key] = {}
    for key in found:
        if not key.same:
            for section in key.rules_out:
                reasons.setdefault(section, key)
    return reasons


def bars(barred: Mapping[str, Key], name: str, metric: str) -> Key | None:
    """The key that rules out a cost, by its section and metric."""
    return barred.get(name) or (barred.get("calls") if metric == "python_calls" else None)


_MACHINE = ("memory", "timing")
_RULES_OUT: dict[str, tuple[str, ...]] = {
    "kind": ALL,
    "model": ALL,
    "adapter": ("spec",),
    "os": ("timing",),
    "architecture": _MACHINE,
    "cpu": _MACHINE,
    "cores": _MACHINE,
    "machine memory": ("timing",),
    "gpu": _MACHINE,
    "gpu driver": ("timing",),
    "gpu power limit": ("timing",),
    "threads": ("timing",),
    "python": ("calls",),
}


def facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A report's circumstances, each in words."""
    adapter = report.get("adapter") or {}
    environment = report.get("environment") or {}
    machine = environment.get("machine") or {}
    gpus = environment.get("gpus") or []
    yield "kind", report["kind"]
    yield "model", _word(report.get("model"))
    yield "adapter", _word(adapter.get("name"))
    yield "adapter version", _word(adapter.get("version"))
    yield "spec version", _word(report.get("spec_version"))
    yield "tier", _word(report.get("tier"))
    for name in ("device", "dtype"):
        if report.get(name) is not None:
            yield name, _word(report[name])
    yield "seed", _word(report.get("seed"))
    yield "os", _word(machine.get("os"))
    yield "architecture", _word(machine.get("architecture"))
    yield "cpu", _word(machine.get("cpu"))
    yield "cores", _amount(machine.get("logical_cores"))
    yield "machine memory", _amount(machine.get("memory"))
    yield "gpu", " + ".join(_word(gpu.get("name")) for gpu in gpus) or "none"
    if gpus:
        yield "gpu driver", _word(gpus[0].get("driver"))
        yield "gpu power limit", _amount(gpus[0].get("power_limit"))
    yield "threads", _threads(environment.get("threads") or {})
    yield "python", _word((environment.get("python") or {}).get("version"))
    yield "cuda", _word(environment.get("cuda"))
    for name, library in (environment.get("libraries") or {}).items():
        yield plain(name, limit=60), _library(library or {})
    yield "harness", _library(environment.get("harness") or {})
    for table, settings in (report.get("recipe") or {}).items():
        # Under the name that `--set` takes.
        if isinstance(settings, dict):
            for name, value in settings.items():
                yield plain(f"{table}.{name}", limit=60), _word(value)
        else:
            yield plain(f"recipe {table}", limit=60), _word(settings)


def _threads(threads: Mapping[str, Any]) -> str:
    told = (f"{plain(key, limit=30)}={_word(value)}" for key, value in threads.items() if value)
    return ", ".join(told) or "–"


def _word(value: object) -> str:
    return "–" if value is None else plain(compact(value), limit=80)


def _amount(value: Mapping[str, Any] | None) -> str:
    return "–" if value is None else quantity(value["value"], value["unit"])


def _library(library: Mapping[str, Any]) -> str:
    parts = [_word(library.get("version"))]
    if library.get("source") not in {None, "index"}:
        parts.append(plain(library["source"]))
    if library.get("commit"):
        parts.append(plain(library["commit"], limit=12).rstrip("…"))
    if library.get("dirty"):
        parts.append("dirty")
    return " ".join(parts)
