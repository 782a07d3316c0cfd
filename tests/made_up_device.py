"""A device of its own, `made_up`, whose tensors lie on the CPU; as on a GPU, nothing may be mixed.

    tensor on made_up ──▶ operator ──▶ the same on the CPU ──▶ tensor on made_up
    tensor on made_up, tensor on cpu ──▶ RuntimeError, but for copies, numbers and indices

Importing this gives torch the device, for good: in a process of its own.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "made_up"
MIXED = "all tensors must be on one device"

# What CUDA's operators take from the CPU beside their own: what is copied, and indices.
_MIXES = {"aten::copy_", "aten::index", "aten::index_put", "aten::index_put_"}


class Module(_DummyBackendModule):
    """`torch.made_up`: one card, which has nothing to wait for."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1


_setup_privateuseone_for_python_backend(NAME, backend_module=Module())  # type: ignore[no-untyped-call]


class Tensor(torch.Tensor):
    """A tensor on the device; `raw` is its numbers."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _again(self.raw.detach().clone(), *_kind(self))
        return memo[id(self)]

    def __reduce_ex__(self, _: Any) -> Any:
        return _again, (self.raw.detach(), *_kind(self))


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return isinstance(tensor, torch.nn.Parameter), tensor.requires_grad


def _again(raw: torch.Tensor, parameter: bool, requires_grad: bool) -> torch.Tensor:
    made = Tensor(raw)
    if parameter:
        return torch.nn.Parameter(made, requires_grad=requires_grad)
    return made.requires_grad_(requires_grad)


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operator, on the numbers; RuntimeError where devices are mixed."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(x.raw): x for x in leaves if isinstance(x, Tensor)}
    others = {id(x): x for x in leaves if not isinstance(x, Tensor)}
    name = func._schema.name
    if ours and any(x.dim() for x in others.values()) and name not in _MIXES:
        raise RuntimeError(f"{MIXED}: {name}")
    here = bool(ours)
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("generator") is not None and here:
        raise RuntimeError(f"{MIXED}: {name} and its generator")
    kwargs.pop("pin_memory", None)
    raw_args, raw_kwargs = tree_map(lambda x: x.raw if isinstance(x, Tensor) else x, (args, kwargs))
    out = func(*raw_args, **raw_kwargs)

    def told(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in ours:
            return ours[id(x)]
        return Tensor(x) if here and id(x) not in others else x

    return tree_map(told, out)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    layout = memory_format or torch.contiguous_format
    return Tensor(torch.empty(size, dtype=dtype, memory_format=layout))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Tensor(torch.empty_strided(size, stride, dtype=dtype))


everything = torch.library.Library("_", "IMPL")
everything.fallback(run, "PrivateUse1")
factories = torch.library.Library("aten", "IMPL")
factories.impl("empty.memory_format", _empty, "PrivateUse1")
factories.impl("empty_strided", _empty_strided, "PrivateUse1")
