"""The part of JSON Schema that reports are written in, compiled to closures.

A general validator spends minutes on a year of reports; these closures spend seconds, and the tests
hold their answers against the general one's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Check = Callable[[object, str], None]

_TYPES: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}
_ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description"}


class Misshapen(Exception):  # noqa: N818  # it names what the data is
    """Data that does not have the shape: the place, what is there and what should be."""


def compile_schema(schema: Mapping[str, Any]) -> Check:
    """A function `check(value, place)` that raises `Misshapen` where a value breaks the schema.

    Knows `type`, `const`, `enum`, `minLength`, `required`, `properties`, `additionalProperties`,
    `items`, `minItems`, `maxItems`, `anyOf`, `allOf` and `$ref` into `$defs`; raises `ValueError` on
    any other keyword, so that a schema never promises what is not checked.
    """
    return _compile(schema, {}, schema.get("$defs", {}))


def _compile(schema: Any, seen: dict[str, Check], defs: Mapping[str, Any]) -> Check:
    if schema is True:
        return lambda _value, _place: None
    checks: list[Check] = []
    for keyword, argument in schema.items():
        match keyword:
            case _ if keyword in _ANNOTATIONS:
                pass
            case "type":
                checks.append(_type(argument))
            case "const":
                checks.append(_one_of([argument]))
            case "enum":
                checks.append(_one_of(argument))
            case "minLength" | "minItems":
                checks.append(_length(argument, at_least=True))
            case "maxItems":
                checks.append(_length(argument, at_least=False))
            case "required":
                checks.append(_required(argument))
            case "properties":
                parts = {name: _compile(part, seen, defs) for name, part in argument.items()}
                checks.append(_properties(parts))
            case "additionalProperties":
                known = frozenset(schema.get("properties", ()))
                checks.append(_others(known, _compile(argument, seen, defs)))
            case "items":
                checks.append(_items(_compile(argument, seen, defs)))
            case "anyOf":
                checks.append(_any_of([_compile(part, seen, defs) for part in argument]))
            case "allOf":
                checks.extend(_compile(part, seen, defs) for part in argument)
            case "$ref":
                name = argument.removeprefix("#/$defs/")
                if name not in seen:
                    seen[name] = _compile(defs[name], seen, defs)
                checks.append(seen[name])
            case _:
                raise ValueError(f"keyword {keyword!r} of the schema is not one that is checked")
    if len(checks) == 1:
        return checks[0]

    def check(value: object, place: str) -> None:
        for one in checks:
            one(value, place)

    return check


def _type(names: str | list[str]) -> Check:
    wanted = [names] if isinstance(names, str) else names
    # JSON's true is no number, though Python's True is an int; the exact class is asked for.
    classes = frozenset(kind for name in wanted for kind in _TYPES[name])

    def check(value: object, place: str) -> None:
        if value.__class__ not in classes:
            raise Misshapen(f"{place} is {_told(value)}, should be {' or '.join(wanted)}")

    return check


def _one_of(allowed: list[object]) -> Check:
    # 1, 1.0 and True are equal in Python and unlike in JSON.
    wanted = {(one.__class__, one) for one in allowed}

    def check(value: object, place: str) -> None:
        if value.__class__ in (list, dict) or (value.__class__, value) not in wanted:
            raise Misshapen(
                f"{place} is {_told(value)}, should be {' or '.join(map(_told, allowed))}"
            )

    return check


def _length(bound: int, *, at_least: bool) -> Check:
    def check(value: object, place: str) -> None:
        if isinstance(value, (str, list)):
            length = len(value)
            if (length < bound) if at_least else (length > bound):
                word = "least" if at_least else "most"
                raise Misshapen(f"{place} has length {length}, should have at {word} {bound}")

    return check


def _required(names: list[str]) -> Check:
    def check(value: object, place: str) -> None:
        if isinstance(value, dict):
            for name in names:
                if name not in value:
                    raise Misshapen(f"{place} has no {name!r}")

    return check


def _properties(parts: dict[str, Check]) -> Check:
    def check(value: object, place: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                part = parts.get(name)
                if part is not None:
                    part(item, f"{place}.{name}")

    return check


def _others(known: frozenset[str], part: Check) -> Check:
    def check(value: object, place: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                if name not in known:
                    part(item, f"{place}.{name}")

    return check


def _items(part: Check) -> Check:
    def check(value: object, place: str) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                part(item, f"{place}[{index}]")

    return check


def _any_of(parts: list[Check]) -> Check:
    def check(value: object, place: str) -> None:
        told: list[str] = []
        for part in parts:
            try:
                part(value, place)
            except Misshapen as error:
                told.append(str(error))
            else:
                return
        # The branch that got furthest in says most.
        raise Misshapen(max(told, key=lambda text: len(text.split(" ", 1)[0])))

    return check


def _told(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
