"""Fake tensors: shapes, dtypes and storages, and no memory behind them."""

from __future__ import annotations

from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, TensorMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Phi3ForCausalLM


_PLAIN = frozenset({int, float, bool, str, NoneType, torch.dtype, torch.device, torch.layout})


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Fake tensors whose cache is asked in a third of the time: no size here is a symbol.

    torch looks an operator's result up by what its arguments are, field by field, each tested for
    symbols; that is most of what a fake operator costs (torch 2.5 to 2.15).
    """

    def _prep_args_for_hash(self, result: list[Any], args: Any, *more: Any) -> None:
        if isinstance(args, dict):
            result.append(tuple(args))
            args = tuple(args.values())
        result.append((type(args), len(args)))
        for arg in args:
            if type(arg) is FakeTensor and arg.fake_mode is self and arg.constant is None:
                result.append(
                    (
                        arg.dtype,
                        arg.shape,
                        arg.stride(),
                        arg.fake_device,
                        arg.storage_offset(),
                        arg.untyped_storage().nbytes(),
                        arg.requires_grad,
                        arg.is_inference(),
                        arg.is_conj(),
                        arg.is_neg(),
                    )
                )
            elif type(arg) in _PLAIN:
                result += type(arg), arg
            elif isinstance(arg, list | tuple):
                self._prep_args_for_hash(result, arg, *more)
            else:
                super()._prep_args_for_hash(result, [arg], *more)


def fake_mode() -> FakeTensorMode:
    """What makes tensors fake: those of one mode are no other's."""
    mode = _Mode() if hasattr(TensorMetadata, "_flatten_into") else FakeTensorMode()
    # The memo holds weak references to fresh fake tensors; `Module.to` refuses to convert a
    # parameter that has one, even to what it is already (torch 2.13, `torch.utils.swap_tensors`).
    # No real tensor is converted twice here, which is all that the memo is for.
    mode.fake_tensor_converter.set_tensor_memo = _forget  # type: ignore[method-assign, assignment]
    return mode


@contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Every tensor made inside is fake, on the CPU; with a mode that was left, inside it again.

    The CPU on purpose, also to plan for a GPU: a build of torch without CUDA cannot index fake CUDA
    tensors. Both devices' fused attentions keep the same for backward (q, k, v, the output, and one
    float32 a row), so that the bytes are the same; their names differ.
    """
    with mode or fake_mode(), _one_sequence_a_row():
        yield


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that no row holds packed sequences.

    It would look at position ids, which have no values here, and on failing to would make a mask for
    each layer that a real run has not (transformers 5, `masking_utils`).
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    if not hasattr(masking_utils, name):
        yield
        return
    real = getattr(masking_utils, name)
    setattr(masking_utils, name, _none)
    try:
        yield
    finally:
        setattr(masking_utils, name, real)


def _none(*_: object, **__: object) -> None:
    return None


def _forget(real: torch.Tensor, fake: torch.Tensor) -> None:
    pass


def fake_model(name: str, dtype: str) -> Phi3ForCausalLM:
    """A named Phi-3 of shapes alone, as `harness.phi3.load` makes a real one; under `fake_tensors`."""
    from transformers import AutoModelForCausalLM

    from harness import phi3

    config = phi3.config(name)
    config.use_cache = False
    # transformers before 4.56 knew the argument as torch_dtype; the default dtype suits all.
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with _uninitialized():
            model: Phi3ForCausalLM = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa"
            )
    finally:
        torch.set_default_dtype(before)
    return model


@contextmanager
def _uninitialized() -> Iterator[None]:
    """Leave weights as they come: the values of fake tensors are worth no time."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers before 5
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield
