"""Sizes: read from text, told in text, and held against what a machine has."""

from __future__ import annotations

import os
import re

from harness.errors import UsageError

GPU_BUDGET = "LORA_HARNESS_GPU_BUDGET"
"""The environment variable that hands a budget on to the processes that implementations run in."""

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1 << 10 * power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str, *, subject: str = "--budget") -> int:
    """Bytes meant by a size such as `8GiB`, `500 MB` or `1073741824`.

    KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB powers of 1000; no unit is bytes.

    Raises:
        UsageError: on what is no size or not above zero; `8G` is refused for meaning two sizes.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{subject}: {text!r} is no size; write one such as 8GiB, 500MB or 1024")
    size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size < 1:
        raise UsageError(f"{subject}: {text!r} is nothing; give a size above zero, such as 8GiB")
    return size


def format_bytes(size: float) -> str:
    """A size in the largest binary unit that leaves a whole number before the point: `7.49 GiB`."""
    if size < 0:
        return "-" + format_bytes(-size)
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def require_memory(needed: int, *, subject: str) -> None:
    """Raise UsageError where this machine's free memory is under `needed` bytes of real tensors."""
    import psutil

    free = int(psutil.virtual_memory().available)
    if needed > free:
        raise UsageError(
            f"{subject}: needs {format_bytes(needed)} of real tensors and this machine has "
            f"{format_bytes(free)} free; lora-harness plan measures it without any"
        )


def require_room(model: str, dtype: str, device: str, *, times: int = 1) -> None:
    """Raise UsageError where a model's weights, so many times, are more than this machine has free.

    Of a card nothing is asked but what a 4-bit base needs here: it is made from the whole one.
    """
    from harness import phi3
    from harness.measure.shapes import weights

    here = device == "cpu" or dtype == "nf4"
    if here and model in phi3.NAMES and not model.startswith("tiny"):
        size = weights(model, "bfloat16" if dtype == "nf4" else dtype, "none")
        require_memory(times * size, subject=f"--model {model} in {dtype}")


def heed_gpu_budget(device: str) -> None:
    """Hold this process to the memory of a card that whoever started it was given."""
    budget = os.environ.get(GPU_BUDGET)
    if budget is None:
        return
    from harness.measure import clock

    clock.limit_gpu(parse_bytes(budget), device)
