"""Copies of modules, as `copy.deepcopy` makes them, in a tenth of its time.

`deepcopy` walks a module's dozen empty dictionaries of hooks in Python; pickle walks them in C, with the
tensors handed round it and cloned once each, so that what is tied stays tied.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = (torch.Tensor, nn.Parameter)


class Mould:
    """What copies of one module are made from; the module must not change meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tensors: list[Tensor] = []
        tensors = [*module.parameters(), *module.buffers()]
        self._bytes = b""
        if all(type(t) in _PLAIN and t.grad is None and t.is_leaf for t in tensors):
            self._bytes = self._pickled(module)

    def copy(self) -> Any:
        """A copy that shares no tensor and no module with the original."""
        if not self._bytes:
            return copy.deepcopy(self._module)
        made: list[Tensor] = [_cloned(t) for t in self._tensors]
        loader = pickle.Unpickler(io.BytesIO(self._bytes))  # noqa: S301  # our own, from this process
        loader.persistent_load = made.__getitem__  # type: ignore[method-assign]
        return loader.load()

    def _pickled(self, module: nn.Module) -> bytes:
        file = io.BytesIO()
        numbers: dict[int, int] = {}
        tensors = self._tensors

        class Dumper(pickle.Pickler):
            def persistent_id(self, held: Any) -> int | None:
                if not isinstance(held, torch.Tensor):
                    return None
                if id(held) not in numbers:
                    numbers[id(held)] = len(tensors)
                    tensors.append(held)
                return numbers[id(held)]

        try:
            Dumper(file, protocol=5).dump(module)
        except (pickle.PicklingError, AttributeError, TypeError):
            return b""  # something in it that only `deepcopy` can copy
        return file.getvalue()


def cloned(module: nn.Module) -> Any:
    """One copy of a module."""
    return Mould(module).copy()


def _cloned(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)
