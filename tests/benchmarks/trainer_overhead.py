"""Evidence, run by hand: what driving TRL's trainer through the harness costs beside a bare SFTTrainer.

    python tests/benchmarks/trainer_overhead.py [rounds] [report.json]

Both train the quick recipe's steps with PEFT from the same seed, in one process, in turn, which goes
first changing each round; building the trainer, logging and checkpoints are in the time, loading the
base and the proofs are not. The losses must be the same to the last digit: the same work was done.
Holds, and exits 0, if the median of the paired ratios of processor time is at most 1.05; wall time is
told beside it, and on a machine that does other things says little.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

from harness import library_log, recipe

ALLOWED = 1.05
OVERRIDES = (
    "model.device=cpu",
    "training_config.eval_strategy=no",
    "training_config.do_eval=false",
)


def bare(asked: recipe.Recipe, folder: Path) -> tuple[object, object]:
    """What a user of PEFT and TRL writes, up to the trainer."""
    import peft
    import torch
    from trl import SFTTrainer

    from harness import base, chat, trainer

    torch.manual_seed(asked.training_config["seed"])
    model = base.load(asked.model)
    wanted = asked.peft_config
    lora = peft.LoraConfig(
        r=wanted["r"],
        lora_alpha=wanted["lora_alpha"],
        lora_dropout=wanted["lora_dropout"],
        target_modules=wanted["target_modules"],
        task_type=wanted["task_type"],
    )
    torch.manual_seed(asked.training_config["seed"])
    model = peft.get_peft_model(model, lora)
    data, tokenizer = chat.dataset("shipped", "train"), chat.tokenizer("tiny")
    settings, _ = trainer.settings(asked, folder, device="cpu")

    def train() -> list[dict[str, float]]:
        one = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        one.train()
        return one.state.log_history

    return train, model


def harnessed(asked: recipe.Recipe, folder: Path) -> tuple[object, object]:
    """The same through the harness."""
    from harness.training import Run

    run = Run(
        {
            "recipe": asked.as_dict(),
            "folder": str(folder),
            "adapter": "peft",
            "budget": None,
            "partial": False,
            "start": None,
            "resume": False,
        }
    )
    run.inject()

    def train() -> list[dict[str, float]]:
        one, _, _ = run._train()
        return one.state.log_history

    return train, run


def timed(make, asked: recipe.Recipe) -> tuple[float, float, list[float]]:
    """Processor seconds, wall seconds, and the losses."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train, kept = make(asked, Path(folder))
        cpu, wall = time.process_time(), time.perf_counter()
        history = train()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        del kept
    return cpu, wall, [entry["loss"] for entry in history if "loss" in entry]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    sides = {"bare": bare, "harness": harnessed}
    rows = []
    with tempfile.TemporaryDirectory() as logs:
        library_log.divert(Path(logs))
        warnings.simplefilter("ignore")
        asked = recipe.load("quick", OVERRIDES)
        for make in sides.values():  # the first of each pays imports and caches
            timed(make, asked)
            library_log.settle()
        for k in range(rounds):
            order = list(sides) if k % 2 == 0 else list(reversed(sides))
            found = {name: timed(sides[name], asked) for name in order}
            assert found["bare"][2] == found["harness"][2], "they did not do the same work"
            row = {
                f"{clock}_{name}": found[name][place]
                for name in sides
                for place, clock in enumerate(("cpu", "wall"))
            }
            rows.append(row)
            print(
                f"round {k + 1}: bare {row['cpu_bare']:.2f} s, "
                f"harness {row['cpu_harness']:.2f} s of processor time; "
                f"wall {row['wall_bare']:.2f} s, {row['wall_harness']:.2f} s",
                flush=True,
            )
    ratios = {
        clock: median(row[f"{clock}_harness"] / row[f"{clock}_bare"] for row in rows)
        for clock in ("cpu", "wall")
    }
    print(
        f"harness / bare, median of {rounds}: {ratios['cpu']:.3f} of processor time, "
        f"{ratios['wall']:.3f} of wall time; allowed {ALLOWED}"
    )
    if len(sys.argv) > 2:
        from harness.environment import collect

        told = {"allowed": ALLOWED, "ratios": ratios, "rounds": rows, "environment": collect()}
        Path(sys.argv[2]).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(ratios["cpu"] > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
