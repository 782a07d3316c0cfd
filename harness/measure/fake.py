"""Fake tensors: shapes, dtypes and storages, and no memory behind them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Every tensor made inside is fake, on the CPU.

    The CPU on purpose, also to plan for a GPU: a build of torch without CUDA cannot index fake CUDA
    tensors. Both devices' fused attentions keep the same for backward (q, k, v, the output, and one
    float32 a row), so that the bytes are the same; their names differ.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    # The memo holds weak references to fresh fake tensors; `Module.to` refuses to convert a
    # parameter that has one, even to what it is already (torch 2.13, `torch.utils.swap_tensors`).
    # No real tensor is converted twice here, which is all that the memo is for.
    mode.fake_tensor_converter.set_tensor_memo = _forget  # type: ignore[method-assign]
    with mode:
        yield


def _forget(real: torch.Tensor, fake: torch.Tensor) -> None:
    pass


def fake_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model of a configuration, uninitialised; call it under `fake_tensors`."""
    from transformers import AutoModelForCausalLM

    with skipped_initialization():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@contextmanager
def skipped_initialization() -> Iterator[None]:
    """Leave weights as they come: values of fake tensors are worth no time."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers before 5
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield
