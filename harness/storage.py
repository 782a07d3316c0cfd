"""Which elements of memory tensors are: how a parameter is matched to a factor, whatever its name.

A factor may be a parameter, a view of one, a slice of one or its transpose: what they have in common
is the storage, and which of its elements they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from harness.adapter import Factors

Elements = dict[int, torch.Tensor]
"""For each storage, by its address, a mask of the elements meant. Good while the tensors live."""


def handles(factors: Mapping[str, Iterable[Factors]]) -> list[Tensor]:
    """Every A, B and bias of an adapted model's factors."""
    return [
        tensor
        for parts in factors.values()
        for f in parts
        for tensor in (f.A, f.B, f.bias)
        if tensor is not None
    ]


def elements(tensors: Iterable[Tensor]) -> Elements:
    """The elements of storage that the tensors are, each once."""
    found: Elements = {}
    for tensor in tensors:
        if not tensor.numel():
            continue
        mask = found.setdefault(_address(tensor), torch.zeros(_length(tensor), dtype=torch.bool))
        _seen(mask, tensor).fill_(True)
    return found


def count(found: Elements) -> int:
    """How many elements they are."""
    return sum(int(mask.sum()) for mask in found.values())


def covered(tensor: Tensor, by: Elements) -> int:
    """How many of a tensor's elements are among `by`."""
    mask = by.get(_address(tensor))
    return 0 if mask is None or not tensor.numel() else int(_seen(mask, tensor).sum())


def trained(model: nn.Module, factors: Mapping[str, Iterable[Factors]]) -> list[nn.Parameter]:
    """The parameters that train and that factors are, or are views of."""
    ours = elements(handles(factors))
    return [p for p in model.parameters() if p.requires_grad and covered(p, ours)]


def gradient(model: nn.Module, handle: Tensor) -> Tensor | None:
    """The gradient of a handle, read off the parameters that it is a part of; None where none has one."""
    total = None
    for parameter in model.parameters():
        if parameter.grad is None or _address(parameter) != _address(handle):
            continue
        held = torch.zeros(_length(parameter), dtype=parameter.dtype, device=parameter.device)
        _seen(held, parameter).copy_(parameter.grad)
        part = _seen(held, handle)
        total = part if total is None else total + part
    return total


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _length(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _seen(flat: Tensor, tensor: Tensor) -> Tensor:
    """`flat`, one value for each element of a storage, in the shape that `tensor` sees of it."""
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
