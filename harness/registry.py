"""A name, an entry point or "pkg.module:factory" -> a checked Adapter."""

from __future__ import annotations

import difflib
import inspect
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.adapter import FEATURE_METHODS, REQUIRED_METHODS, Adapter, Capabilities
from harness.errors import UsageError
from harness.failure import line
from harness.report.words import plain

if TYPE_CHECKING:
    from collections.abc import Callable

BUILT_IN = ("loralib", "peft", "reference", "transformers")
GROUP = "lora_harness.adapters"

ARGUMENTS = {
    "inject": "model, config",
    "factors": "model",
    "state_dict": "model",
    "load_state_dict": "model, state",
    "merge": "model",
    "unmerge": "model",
    "disable": "model",
    "add": "model, name, config, *, trainable=True",
    "activate": "model, name",
    "delete": "model, name",
    "combine": "model, names, weights, new_name",
    "save": "model, directory",
    "load": "base, directory, *, trainable=False",
}
KEYWORDS = {"add": ("trainable",), "load": ("trainable",)}


def names() -> list[str]:
    """What `resolve` knows by name: the built-in implementations, and installed entry points."""
    return sorted({*BUILT_IN, *_entry_points()})


def check_known(spec: str) -> None:
    """Raise UsageError on a name that nobody knows; nothing of an implementation is imported."""
    _factory(spec)


def resolve(spec: str) -> Adapter:
    """The adapter that `spec` names, made and checked.

    `spec` is a built-in name, the name of an entry point of the group `lora_harness.adapters`, or
    "pkg.module:factory", looked for in the working directory too. Raises UsageError, in one line,
    on a name nobody knows, and where the factory or what it returns is not what it should be.
    """
    return check(_factory(spec)(), spec)


def check(adapter: Any, spec: str) -> Adapter:
    """The same adapter; raises UsageError on the first member that is not as the contract has it."""
    if isinstance(adapter, type):
        raise _wrong(spec, f"is the class {adapter.__name__}; it must be an instance of it")
    for member in ("name", "version"):
        value = _member(adapter, member, spec)
        if not isinstance(value, str) or not value:
            raise _wrong(spec, f"`{member}` is {_told(adapter, member)}; it must be a string")
    if not isinstance(_member(adapter, "capabilities", spec), Capabilities):
        told = _told(adapter, "capabilities")
        raise _wrong(spec, f"`capabilities` is {told}; it must be a harness.Capabilities")
    for method in REQUIRED_METHODS:
        _check_method(adapter, method, spec, "every adapter has it")
    for feature in sorted(adapter.capabilities.features):
        for method in FEATURE_METHODS.get(feature, ()):
            _check_method(adapter, method, spec, f"the feature {feature!r} brings it")
    checked: Adapter = adapter
    return checked


def _member(adapter: Any, member: str, spec: str) -> Any:
    """What the member is, None where it is missing; raises UsageError where asking for it raises."""
    try:
        return getattr(adapter, member, None)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a stranger's property raises
        raise _wrong(spec, f"`{member}` raised {line(error)}") from None


def _check_method(adapter: Any, method: str, spec: str, why: str) -> None:
    """Raise UsageError unless the method can be called the way the harness calls it."""
    form = f"{method}({ARGUMENTS[method]})"
    call = _member(adapter, method, spec)
    if call is None:
        raise _wrong(spec, f"`{method}` is missing; {why}: {form}")
    if not callable(call):
        raise _wrong(spec, f"`{method}` is {_told(adapter, method)}; it must be a method: {form}")
    positional = [name for name in ARGUMENTS[method].split(", ") if name.isidentifier()]
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return  # written in C: nothing to read
    try:
        signature.bind(*positional, **dict.fromkeys(KEYWORDS.get(method, ())))
    except TypeError:
        raise _wrong(spec, f"`{method}` takes {signature}; it must take {form}") from None


def _factory(spec: str) -> Callable[[], Any]:
    """The factory that `spec` names, as a call that raises nothing but UsageError."""
    if spec in BUILT_IN:
        return lambda: _call(spec, f"harness.adapters.{spec}", "adapter")
    if entry := _entry_points().get(spec):
        return lambda: _call(spec, entry.module, entry.attr)
    if ":" in spec:
        module, _, attribute = spec.partition(":")
        return lambda: _call(spec, module, attribute)
    near = difflib.get_close_matches(spec, names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(names())},"
    raise UsageError(f"adapter {spec!r}: no such name; {hint} or name yours as pkg.module:factory")


def _call(spec: str, module_name: str, attribute: str) -> Any:
    """Import, look up, call; each step's failure is one line."""
    if not module_name or not attribute:
        raise UsageError(f"adapter {spec!r}: nothing beside the colon; write pkg.module:factory")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # a user's adapter lies beside the user's tests
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"adapter {spec!r}: no module {error.name!r} here; install it, or run where it lies"
            ) from None
        raise UsageError(
            f"adapter {spec!r}: {module_name} needs {error.name!r}, which is not installed"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a stranger's module raises
        raise UsageError(
            f"adapter {spec!r}: importing {module_name} raised {line(error)}"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(
                part, [n for n in dir(found) if callable(getattr(found, n, None))], n=1
            )
            hint = f"did you mean {near[0]!r}?" if near else "name its factory"
            raise UsageError(f"adapter {spec!r}: {module_name} has no {attribute!r}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            f"adapter {spec!r}: {attribute!r} is of type {type(found).__name__}; "
            "name a function that takes nothing and returns an adapter"
        )
    try:
        return found()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a stranger's factory raises
        raise UsageError(f"adapter {spec!r}: the factory raised {line(error)}") from None


def _entry_points() -> dict[str, EntryPoint]:
    """Installed adapters by name; the harness's own names win."""
    return {e.name: e for e in entry_points(group=GROUP) if e.name not in BUILT_IN}


def _wrong(spec: str, what: str) -> UsageError:
    return UsageError(f"adapter {spec!r}: {what}")


def _told(adapter: Any, member: str) -> str:
    if not hasattr(adapter, member):
        return "missing"
    text = plain(repr(getattr(adapter, member)))
    return text if len(text) <= 60 else f"a {type(getattr(adapter, member)).__name__}"
