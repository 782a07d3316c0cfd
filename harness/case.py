"""A case: one point at which a spec is judged, with a text form that reproduces it."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One point: what is adapted, at which size, in which dtype, from which seed.

    The defaults are odd on purpose: alpha is never r, nothing is square (BUGS section 6.1).

    Attributes:
        specimen: name of the base, see `harness.specimen.SPECIMENS`, or any model name.
        shape: the specimen's sizes, its own default where empty; `(in, out)` for a linear layer.
        way: which variation of the spec this is, in the spec's own words; empty if it has one.
    """

    specimen: str = "linear"
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    r: int = 3
    alpha: float = 7.0
    dropout: float = 0.0
    way: str = ""
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        """The text form: what differs from the defaults, `specimen` and `dtype` always."""
        default = type(self)()
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in {"specimen", "dtype"} or value != getattr(default, item.name):
                text = "x".join(map(str, value)) if isinstance(value, tuple) else _plain(value)
                parts.append(f"{item.name}={text}")
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of a text form; raises `UsageError` on one that is none."""
        values: dict[str, object] = {}
        names = [item.name for item in fields(cls)]
        for part in filter(None, re.split(r",(?=[a-z]+=)", text)):
            name, equals, value = part.partition("=")
            if not equals or name not in names:
                raise UsageError(
                    f"--case {text!r}: {part!r} is not one of {', '.join(names)} with =value"
                )
            try:
                if name == "shape":
                    values[name] = tuple(int(size) for size in value.split("x"))
                elif name in {"r", "seed"}:
                    values[name] = int(value)
                elif name in {"alpha", "dropout"}:
                    values[name] = float(value)
                else:
                    values[name] = value
            except ValueError:
                raise UsageError(f"--case {text!r}: {name} cannot be {value!r}") from None
        return cls(**values)  # type: ignore[arg-type]  # each value was made to its field's type

    def matches(self, selector: Mapping[str, object]) -> bool:
        """Whether every field named by the selector has one of the values given for it."""
        return all(
            _plain(getattr(self, name))
            in ([_plain(v) for v in want] if isinstance(want, list) else [_plain(want)])
            for name, want in selector.items()
        )

    def with_(self, **changes: object) -> Case:
        """This case with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]  # field names are checked by replace


def _plain(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


LAYER_OF: dict[str, str] = {
    "embedding": "embedding",
    "conv2d": "conv2d",
    "dilated": "conv2d",
    "grouped": "grouped_conv2d",
    "fused": "fused_linear",
    "fused-unequal": "fused_linear",
}
"""The layer kind a specimen asks an implementation to claim; linear where it is not named."""

LAYER_SPECIMENS = frozenset({*LAYER_OF, "linear", "bare", "stack", "tied", "shared", "nf4"})
"""The specimens made for the specs; any other name is a model's."""
