"""Evidence, run by hand: what the harness's clock adds to a step, against a bare loop.

    python tests/benchmarks/overhead.py reports/measure-overhead.json [rounds]

One process, one model; in each round three steps timed by `seconds_of` and three in a bare loop, in
alternating order, by the clock that leaves out waiting for a core. Holds if the median of the rounds'
ratios is within one per cent of 1.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from pathlib import Path
from statistics import median

from harness.environment import collect
from harness.measure.clock import OwnClock, seconds_of
from harness.measure.interval import median_interval
from harness.measure.side import build

STEPS = 3


def main() -> None:
    path, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400
    step, _ = build(
        {
            "adapter": "peft",
            "model": "tiny",
            "phase": "training-step",
            "r": 8,
            "dtype": "float32",
            "batch": 1,
            "sequence": 16,
            "device": "cpu",
            "threads": 1,
        }
    )
    clock = OwnClock()
    gc.collect()
    gc.freeze()

    def ours() -> float:
        return sum(seconds_of(step, warmup=0, repeats=STEPS, clock=clock))

    def bare() -> float:
        gc.collect()
        gc.disable()
        start = clock()
        for _ in range(STEPS):
            step()
        took = clock() - start
        gc.enable()
        return took

    for _ in range(5):
        ours(), bare()
    ratios = []
    for k in range(rounds):
        if k % 2:
            mine, theirs = ours(), bare()
        else:
            theirs, mine = bare(), ours()
        ratios.append(math.log(mine / theirs))
    found = median_interval(ratios, 0.05)
    told = {
        "what": "seconds_of over a bare loop, a tiny training step (peft, r 8, float32, 1×16)",
        "rounds": rounds,
        "ratio": math.exp(median(ratios)),
        "low": math.exp(found.low),
        "high": math.exp(found.high),
        "load": os.getloadavg()[0],
        "environment": collect(),
    }
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print({k: v for k, v in told.items() if k != "environment"})


if __name__ == "__main__":
    main()
