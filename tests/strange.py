"""A planted fault as a stranger would have made it: other names, and other numbers to start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.adapters.reference import Reference

if TYPE_CHECKING:
    from harness.adapter import Adapter
    from harness.faults.record import Fault


def stranger(fault: Fault) -> Adapter:
    """The fault under another name and version, with other keys and another draw of A.

    What the fault itself replaces stays: it is the sin.
    """
    adapter: Any = fault.make()
    kind = type(adapter)
    changes: dict[str, Any] = {"name": "acme", "version": "9.9"}
    if kind.key is Reference.key:
        changes["key"] = lambda self, path, name, branch: f"acme.{path}.{name}"
    if kind.generator is Reference.generator:
        changes["generator"] = lambda self, key: Reference.generator(self, f"acme/{key}")
    adapter.__class__ = type("Stranger", (kind,), changes)
    made: Adapter = adapter
    return made
