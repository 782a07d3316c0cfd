"""JSON as reports have it: finite numbers, and strings that can be printed.

JSON has no NaN and no infinity, though Python writes them: here they are the words `NaN`,
`Infinity` and `-Infinity` on the way out, and an error on the way in.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile(r"\\u[dD]|[\ud800-\udfff]")
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def loads(data: bytes) -> Any:
    """The value in these bytes.

    Raises:
        ValueError: not JSON, or with a number that no float or no sane integer holds.
        RecursionError: nested too deeply.
    """
    # Surrogates are let through here, raw ones in UTF-8 too, and are mended below.
    text = data.decode(json.detect_encoding(data), "surrogatepass")
    value = json.loads(text, parse_constant=_constant, parse_float=_float, parse_int=_int)
    return _without_surrogates(value) if _SURROGATE.search(text) else value


def dumps(value: object) -> str:
    """JSON with NaN and the infinities as words, and records, paths, sets and scalars made plain."""
    try:
        return json.dumps(value, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=_plain)


def _plain(value: Any) -> object:
    """What JSON has for a value of ours: records, scalars of array libraries, paths, sets."""
    if hasattr(value, "as_dict"):
        return _finite(value.as_dict())
    if hasattr(value, "item"):
        return _finite(value.item())
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)


def _finite(value: Any) -> Any:
    """The value with NaN and the infinities spelled as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE[str(value)]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond what a float holds")
    return value


def _int(text: str) -> int:
    if len(text) > 30:
        raise ValueError(f"{text[:20]}... has {len(text)} digits")
    return int(text)


def first_line(error: Exception) -> str:
    """An error's message, short enough for a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _without_surrogates(value: Any) -> Any:
    """Strings that no encoding can write, made writable: a lone surrogate becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value
