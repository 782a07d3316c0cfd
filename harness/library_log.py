"""What libraries log and warn, kept in a file: the terminal is the user's."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIBRARIES = ("transformers", "trl", "datasets", "accelerate", "peft")


def divert(folder: Path) -> None:
    """Send warnings and log entries to `library.log` in `folder`, and turn libraries' bars off.

    Called before the libraries are imported: some read these variables then.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "warning"
    handler = logging.FileHandler(folder / "library.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    warnings.simplefilter("default")


def settle() -> None:
    """The same for the libraries that brought handlers of their own: called once they are imported."""
    for library in LIBRARIES:
        logger = logging.getLogger(library)
        logger.handlers, logger.propagate = [], True
