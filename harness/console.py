"""Aligned text for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Rows as aligned columns, numbers to the right, two spaces apart, no trailing blanks."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = ([list(headers)] if headers else []) + body
    if not lines:
        return ""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    right = [bool(body) and all(_is_number(line[k]) for line in body) for k in range(len(lines[0]))]
    if headers:
        lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def terminal_width() -> int:
    """How wide text for people is wrapped: the terminal's width, and never more than 100."""
    return max(40, min(100, shutil.get_terminal_size((100, 24)).columns))


def wrapped(text: str, *, initial_indent: str = "", subsequent_indent: str = "") -> str:
    """A paragraph as wide as the terminal; ids, commands and paths stay whole."""
    return textwrap.fill(
        text,
        terminal_width(),
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def note(*notes: str) -> None:
    """Print notes on a run."""
    for one in notes:
        print(wrapped(f"note: {one}", initial_indent="  ", subsequent_indent="    "), flush=True)


def _is_number(cell: str) -> bool:
    return (
        cell[:1].isdigit()
        or cell in {"", "–"}
        or (cell[:1] in "-+<" and cell[1:].lstrip()[:1].isdigit())
    )
