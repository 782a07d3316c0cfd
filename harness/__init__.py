"""Is this LoRA implementation right, and did it get slower or hungrier?

The surface an implementer needs; everything loads when first used, so that importing `harness`
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from harness._version import __version__

if TYPE_CHECKING:
    from harness.adapter import Adapter, Capabilities, Factors, LoraConfig, load_exactly
    from harness.errors import UsageError
    from harness.plugin import parametrize_with_specs
    from harness.verdict import Verdict, check

__all__ = [
    "Adapter",
    "Capabilities",
    "Factors",
    "LoraConfig",
    "UsageError",
    "Verdict",
    "__version__",
    "check",
    "load_exactly",
    "parametrize_with_specs",
]

_HOME = {
    "Adapter": "adapter",
    "Capabilities": "adapter",
    "Factors": "adapter",
    "LoraConfig": "adapter",
    "UsageError": "errors",
    "Verdict": "verdict",
    "check": "verdict",
    "load_exactly": "adapter",
    "parametrize_with_specs": "plugin",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"harness.{_HOME[name]}"), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
