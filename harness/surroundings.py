"""What an implementation shares with all else in its process: looked at, and put back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_PUT: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch's float32 precision of products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch's anomaly detection": (
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
    ),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the working folder": (os.getcwd, os.chdir),
}
"""By name, how each is asked for and put back."""


def look() -> dict[str, Any]:
    """How they are."""
    return {name: ask() for name, (ask, _) in _PUT.items()}


def put_back(before: dict[str, Any]) -> dict[str, Any]:
    """As they were; returns those that had been changed, and to what."""
    changed = {name: now for name, now in look().items() if now != before[name]}
    for name in changed:
        _PUT[name][1](before[name])
    return changed
