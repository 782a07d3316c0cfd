"""An axis of a grid on the command line: a list separated by commas, or an option given again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 10**6
"""Of a rank, of rows in a batch, of tokens in a row: more makes tensors that nothing can count."""


class _Gather(argparse.Action):
    """A list that grows each time its option is given; the first takes the default's place."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: Any = None) -> None:
        held = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if held is self.default else [*held, *values])


def axis(
    p: argparse._ActionsContainer,
    option: str,
    parse: Callable[[str], list[Any]],
    default: list[Any],
    what: str = "",
) -> None:
    """An axis of a grid: a list separated by commas, or repeated."""
    told = f"{what} (default: {','.join(map(str, default))})".lstrip()
    metavar = "N,..." if parse is numbers else "NAME,..."
    p.add_argument(option, action=_Gather, type=parse, default=default, metavar=metavar, help=told)


def words(text: str) -> list[str]:
    """Words, separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """Whole numbers above zero, separated by commas."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",") if part]
    if any(not 1 <= number <= MOST for number in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers from 1 to {MOST:,}, such as 4,8,16"
        )
    return found


def names(*known: str) -> Callable[[str], list[str]]:
    """Some of the names known, separated by commas."""

    def parse(text: str) -> list[str]:
        given = words(text)
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return given

    return parse
