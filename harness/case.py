"""A case: one point at which a spec is judged, with a text form that reproduces it; and those of a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from harness.adapter import Capabilities
from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.spec import Spec


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
        """The case of a text form; raises `UsageError` on one that is none, or that cannot be made.

        What is let through here is judged: a point that nobody could meet would be told as a failure
        of the implementation.
        """
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
        case = cls(**values)  # type: ignore[arg-type]  # each value was made to its field's type
        if (
            wrong := _impossible(case)
            if values
            else "it is empty; give it as a failure record does"
        ):
            raise UsageError(f"--case {text!r}: {wrong}")
        return case

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


def _impossible(case: Case) -> str:
    """What about the case means nothing, and what would; empty where it can be made."""
    dtypes = Capabilities.KNOWN["dtypes"]
    shape = "x".join(map(str, case.shape))
    sizes = 4 if case.specimen in CONVOLUTIONS else 2
    if not case.specimen:
        return f"specimen is empty; give one of {', '.join(sorted(LAYER_SPECIMENS))}, or a model"
    if case.dtype not in dtypes:
        return f"dtype cannot be {case.dtype!r}; give one of {', '.join(dtypes)}"
    if case.shape and case.specimen not in LAYER_SPECIMENS:
        return f"shape is for layers, and {case.specimen} has its own; leave it out"
    if case.shape and (len(case.shape) != sizes or min(case.shape) < 1):
        example = "3x4x3x3" if sizes == 4 else "11x7"
        return (
            f"shape {shape} is not {sizes} sizes of at least 1 for {case.specimen}, say {example}"
        )
    if case.specimen == "grouped" and any(size % 2 for size in case.shape[:2]):
        return f"shape {shape} is in two groups: give even numbers of channels, say 4x6x3x3"
    if case.specimen in {"embedding", "tied"} and case.shape[:1] == (1,):
        return f"shape {shape} has no room for the padding index 1: give at least 2 rows"
    if case.r < 1:
        return f"r must be at least 1, not {case.r}"
    if not (case.alpha > 0 and math.isfinite(case.alpha)):
        return f"alpha must be a positive number, not {case.alpha:g}"
    if not 0 <= case.dropout < 1:
        return f"dropout must be at least 0 and less than 1, not {case.dropout:g}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", case.device):
        return f"device cannot be {case.device!r}; give cpu, cuda or cuda:0"
    if not 0 <= case.seed < SEEDS:
        return f"seed must be from 0 to {SEEDS - 1}, not {case.seed}"
    return ""


SEEDS = 2**32
"""How many seeds there are: NumPy takes no larger one."""

CONVOLUTIONS = frozenset({"conv2d", "dilated", "same", "circular", "reflect", "grouped"})
"""The specimens whose shape is that of a kernel."""

LAYER_OF: dict[str, str] = {
    "embedding": "embedding",
    **dict.fromkeys(("conv2d", "dilated", "same", "circular", "reflect"), "conv2d"),
    "grouped": "grouped_conv2d",
    "fused": "fused_linear",
    "fused-all": "fused_linear",
    "fused-unequal": "fused_linear",
    "nf4": "quantized_base",
}
"""What a specimen asks an implementation to claim: a kind of layer, linear where it is not named, or a
base of another kind."""

LAYER_SPECIMENS = frozenset(
    {
        *LAYER_OF,
        "linear",
        "bare",
        "stack",
        "tied",
        "shared",
        "headless",
        "headed",
        "normed",
        "underscored",
    }
)
"""The specimens made for the specs; any other name is a model's."""


@dataclass(frozen=True, slots=True)
class Points:
    """The points at which a spec is judged in this run."""

    only: Case | None
    model: str | None
    device: str | None
    dtype: str | None
    tier: str
    seed: int = 0

    @property
    def own(self) -> bool:
        """Whether they are the spec's own, but for the seed."""
        return self.only is None and not (self.model or self.device or self.dtype)

    def of(self, item: Spec) -> list[Case]:
        """The cases of one spec."""
        if self.only is not None:
            return [self.only]
        every = self.tier == "full" or self.dtype is not None
        found: dict[Case, None] = {}
        for case in (*item.cases, *(item.more_cases if every else ())):
            changes: dict[str, Any] = {}
            is_model = case.specimen not in LAYER_SPECIMENS
            if self.model and is_model:
                changes["specimen"] = self.model
            if self.device:
                changes["device"] = self.device
            if self.seed:
                changes["seed"] = case.seed + self.seed
            if self.dtype and case.dtype != self.dtype:
                # What holds in one dtype need not in another; a model is judged by its own rounding.
                if not (self.model and is_model):
                    continue
                changes["dtype"] = self.dtype
            found[case.with_(**changes)] = None
        return list(found)
