"""Clocks: what is timed is what was done, edge to edge, and every raw sample is kept.

On a GPU, CUDA events between two synchronisations; on the CPU, the monotonic clock with a fixed number
of threads. Warm-up is left out. A clock informs: it is never compared across machines.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch

from harness.environment import printed
from harness.measure.ledger import uncollected

if TYPE_CHECKING:
    from collections.abc import Callable


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class OwnClock:
    """The monotonic clock less the time in which the kernel had this thread wait for a core.

    On a shared machine a step's wall time is mostly its neighbours': at a load of six on two cores it
    doubles and triples at random, while this clock stays within a per cent. What the thread itself
    sleeps or waits for is in it. Linux tells of the waiting; elsewhere this is the plain clock.
    """

    def __init__(self) -> None:
        try:
            # One file a thread; the path is resolved for the thread that opens it.
            self._waits: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            self()
        except (OSError, ValueError, IndexError):
            self._waits = None

    def __call__(self) -> float:
        """Seconds since some moment."""
        if self._waits is None:
            return time.perf_counter()
        # ns on a core, ns waiting for one, times put on one: Documentation/scheduler/sched-stats
        waited = int(os.pread(self._waits, 64, 0).split()[1])
        return time.perf_counter() - waited / 1e9


def seconds_of(
    work: Callable[[], object],
    *,
    device: str = "cpu",
    warmup: int = 2,
    repeats: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each of `repeats` runs by `clock`, after `warmup` runs that are not kept.

    A GPU has a clock of its own, whatever is given. Garbage collection is held off: when it strikes depends on what ran before.
    """
    for _ in range(warmup):
        work()
    if torch.device(device).type == "cuda":
        return _cuda_seconds(work, device, repeats)
    samples = []
    with uncollected():
        for _ in range(repeats):
            start = clock()
            work()
            samples.append(clock() - start)
    return samples


def _cuda_seconds(work: Callable[[], object], device: str, repeats: int) -> list[float]:
    samples = []
    with torch.cuda.device(device), uncollected():
        for _ in range(repeats):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
    return samples


def reset_peak(device: str) -> None:
    """Forget the allocator's highest moment so far."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> dict[str, int]:
    """Bytes at the highest moment, by who counts: allocator, its pool, driver; CPU: the process.

    `peak_allocated` and `peak_reserved` are the caching allocator's; `driver` what the driver says
    that this process holds now, its context among it. On the CPU `peak_resident` is the process's,
    from its start on.
    """
    if torch.device(device).type != "cuda":
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_resident": peak if sys.platform == "darwin" else peak * 1024}
    torch.cuda.synchronize(device)
    found = {
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
    }
    used = _driver_bytes()
    return found | ({"driver": used} if used is not None else {})


def _driver_bytes() -> int | None:
    """What the driver says this process holds on all its cards; None where it does not say."""
    said = printed(
        "nvidia-smi",
        "--query-compute-apps=pid,used_memory",
        "--format=csv,noheader,nounits",
        seconds=20,
    )
    held = [line.split(",") for line in (said or "").splitlines() if line.count(",") == 1]
    ours = [size.strip() for pid, size in held if pid.strip() == str(os.getpid())]
    whole = [int(size) for size in ours if size.isdecimal()]
    return sum(whole) * 2**20 if whole else None


def product_flops_per_second(device: str, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP per second of a square matrix product: the limit that this machine has now.

    The best of a few runs, since a limit is what can be reached.
    """
    n = size or (4096 if torch.device(device).type == "cuda" else 512)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    best = min(seconds_of(lambda: a @ b, device=device, warmup=2, repeats=5))
    return 2 * n**3 / best


def limit_gpu(budget: int, device: str = "cuda") -> None:
    """Let this process take no more than `budget` bytes of the card: beyond, out of memory."""
    if torch.device(device).type == "cuda":
        # Of torch's calls that name a card, this one alone takes no "cuda" without a number.
        card = torch.device(device).index
        card = torch.cuda.current_device() if card is None else card
        total = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), card)
