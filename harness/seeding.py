"""Seeds: every generator set alike, and factors drawn the same for every implementation."""

from __future__ import annotations

import random
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


_SMALL = 100_000
"""Numbers in a layer's factors up to which what was drawn for them is kept for the next time."""


def normal(key: str, r: int, i: int, o: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal numbers for A (r, i), B (o, r) and the bias (o,), by a key; not to be written into."""
    return (_kept if r * (i + o) <= _SMALL else _kept.__wrapped__)(key, r, i, o)


@lru_cache(maxsize=2048)
def _kept(key: str, r: int, i: int, o: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    a, b = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((r, i), (o, r)))
    return a, b, torch.randn(o, generator=g, dtype=torch.float64)


def seed_all(seed: int) -> None:
    """Every generator that an implementation may draw from: Python's, NumPy's and torch's.

    As `torch.manual_seed`, which on a machine without CUDA formats a stack at each call.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the old global one is what they draw from
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
