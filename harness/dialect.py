"""What releases of transformers say and do differently, from 4.41 to 5.x."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def version() -> tuple[int, int]:
    """Major and minor of the one that is installed."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def attention(wanted: str) -> str:
    """What is wanted; eager for sdpa where this transformers' Phi-3 has none, as 4.41's."""
    from transformers import Phi3ForCausalLM

    has = getattr(Phi3ForCausalLM, "_supports_sdpa", False)
    return "eager" if wanted == "sdpa" and not has else wanted


def dtype_argument() -> str:
    """`dtype` since transformers 4.56, `torch_dtype` before."""
    return "dtype" if version() >= (4, 56) else "torch_dtype"


def mask_in_double() -> None:
    """Let Phi-3 be evaluated in float64, in which the truth is computed, on transformers before 4.43.

    Those fill the causal mask in torch's default dtype, where float64's least number overflows. From
    float32's it is as good: what is masked has weight zero.
    """
    if version() >= (4, 43):
        return
    import torch
    from transformers.modeling_attn_mask_utils import AttentionMaskConverter

    theirs: Any = AttentionMaskConverter._make_causal_mask  # noqa: SLF001  # nothing public makes it
    if getattr(theirs, "in_double", False):
        return

    def mask(shape: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> torch.Tensor:
        narrow = torch.float32 if dtype == torch.float64 else dtype
        made: torch.Tensor = theirs(shape, narrow, *args, **kwargs).to(dtype)
        return made

    mask.in_double = True  # type: ignore[attr-defined]  # so that it is not wrapped twice
    AttentionMaskConverter._make_causal_mask = staticmethod(mask)  # noqa: SLF001  # likewise


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and load reports, which are told as errors instead."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
