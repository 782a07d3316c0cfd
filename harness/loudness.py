"""Loudness: whether a call raises, warns or logs a warning, and in what words."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def warned(act: Callable[[], object]) -> tuple[set[str], bool]:
    """What was warned or logged as a warning, without its numbers, and whether `act` raised."""
    raised = False
    with warnings.catch_warnings(record=True) as caught, _logged() as said:
        warnings.simplefilter("always")
        try:
            act()
        except Exception:  # noqa: BLE001  # any exception is loud
            raised = True
    words = [*said, *(str(w.message) for w in caught if not _is_housekeeping(w))]
    return {re.sub(r"0x[0-9a-f]+|\d+", "#", text) for text in words}, raised


def _is_housekeeping(caught: warnings.WarningMessage) -> bool:
    """Deprecations say nothing of the input."""
    return issubclass(
        caught.category,
        (DeprecationWarning, FutureWarning, PendingDeprecationWarning, ResourceWarning),
    )


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """What is logged as a warning or worse meanwhile: libraries warn by logging too."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(level=logging.WARNING)
    loggers = [logging.getLogger()] + [
        found
        for found in logging.Logger.manager.loggerDict.values()
        if isinstance(found, logging.Logger) and not found.propagate
    ]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
