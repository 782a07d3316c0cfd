"""Evidence, run by hand: how often paired timing errs on this machine now.

    python tests/benchmarks/paired_noise.py reports/paired-noise.json [pairs]

Alternates pairs of one side against itself with pairs whose second side is slowed by five per cent,
and writes all answers after every pair. Holds if at most 1 in 40 of the first kind is called better or
worse and, of the second, at least 38 in 40 are called worse and none better.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from harness.environment import collect
from harness.measure.paired import Side, compare

SECONDS = 45.0
SLOWDOWN = 0.05


def main() -> None:
    path, pairs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40
    found: dict[str, list[dict[str, object]]] = {"a-a": [], "slowed": []}
    for _ in range(pairs):
        for kind, slowdown in (("a-a", 0.0), ("slowed", SLOWDOWN)):
            before = os.getloadavg()[0]
            answer = compare(
                Side(adapter="peft"), Side(adapter="peft", slowdown=slowdown), seconds=SECONDS
            )
            told = {k: v for k, v in answer.as_dict().items() if k != "samples"}
            found[kind].append({**told, "load": before})
            print(time.strftime("%H:%M:%S"), kind, answer, f"load {before:.1f}", flush=True)
            write(path, found)


def write(path: Path, found: dict[str, list[dict[str, object]]]) -> None:
    calls = {kind: dict(Counter(a["verdict"] for a in all_)) for kind, all_ in found.items()}
    told = {
        "what": "paired timing of a tiny training step (peft, r 8, float32, 1×16): against itself, "
        "and against itself slowed by 5 %",
        "seconds_at_most": SECONDS,
        "margin": 0.02,
        "pairs": {kind: len(all_) for kind, all_ in found.items()},
        "called": calls,
        "environment": collect(),
        "answers": found,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
