"""One side of a pair: a process that builds its work once and runs it when asked.

    parent ── {"steps": n, "core": k} ──▶ side         a line of JSON each way
           ◀── {"seconds": [...], "wall": s} ──

It needs nothing of the harness's own environment but this package on its path, so that the side may
be another interpreter with other library versions.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Build what the first line asks for, then run and time it, line by line, until the input ends."""
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())

    def answer(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        from harness.measure.clock import OwnClock

        step, facts = build(asked)
        step()
        # A GPU's work goes on while this thread waits, so that there nothing may be taken off.
        clock = OwnClock() if asked["device"] == "cpu" else time.perf_counter
        answer(ready=True, **facts)
        gc.collect()
        gc.freeze()
        core = None
        for line in sys.stdin:
            told = json.loads(line)
            if told["core"] != core:
                core = told["core"]
                os.sched_setaffinity(0, {core})
            answer(**_run(step, told["steps"], asked["slowdown"], clock))
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "transformers"}:
            answer(error=f"ModuleNotFoundError: {error}"[:300])
        else:
            answer(usage=f"{sys.executable} has no {error.name}; install it there")
    except UsageError as error:
        answer(usage=" ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001  # a stranger's code; the parent tells of it
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def _run(step: Callable[[], object], steps: int, slowdown: float, clock: Any) -> dict[str, Any]:
    """Run the work `steps` times; a planted slowdown keeps each busy for its share longer."""
    gc.collect(0)
    gc.disable()
    seconds, wall = [], time.perf_counter()
    for _ in range(steps):
        start = clock()
        step()
        if slowdown:
            until = start + (clock() - start) * (1 + slowdown)
            while clock() < until:
                pass
        seconds.append(clock() - start)
    wall = time.perf_counter() - wall
    gc.enable()
    return {"seconds": seconds, "wall": wall}


def build(asked: dict[str, Any]) -> tuple[Callable[[], object], dict[str, Any]]:
    """The work of a side, a call that returns when it is done, and what is known of it.

    Reads `adapter`, `model`, `phase`, `r`, `dtype`, `batch`, `sequence`, `device`, `threads`.
    """
    import warnings

    warnings.simplefilter("ignore")
    import torch

    from harness import phi3, registry
    from harness.adapter import LoraConfig
    from harness.measure.clock import synchronize
    from harness.measure.phases import batch_of, optimizer_of, training_step

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    device = asked["device"]
    adapter: Any = registry.resolve(asked["adapter"])
    base = phi3.load(asked["model"], dtype=asked["dtype"], device=device)
    config = LoraConfig(r=asked["r"], lora_alpha=2.0 * asked["r"], target_modules="all-linear")
    model = adapter.inject(base, config)
    given = batch_of(model, batch=asked["batch"], sequence=asked["sequence"])
    facts = {"name": adapter.name, "version": adapter.version}
    if asked["phase"] == "training-step":
        model.train()
        optimizer = optimizer_of(model)

        def step() -> None:
            training_step(model, given, optimizer)
            synchronize(device)

        return step, facts
    if not getattr(adapter, "eval_merges", False):
        model.eval()
    if asked["phase"] == "merged-forward":
        model.eval()
        adapter.merge(model)
    ids = given["input_ids"]

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids)
        synchronize(device)

    return forward, facts


if __name__ == "__main__":
    main()
