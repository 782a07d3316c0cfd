"""Reports made up for the tests of what is done with reports: seeded, and shaped like real ones."""

from __future__ import annotations

import json
import random
from datetime import date, timedelta

FAMILIES = {
    "targeting": "exact-coverage unmatched-name-is-loud all-linear-leaves-the-head second-injection-is-loud-or-equal arguments-unchanged",
    "trainable": "only-lora count bias-modes optimizer-holds-only-lora dtype-stated",
    "initialization": "no-op base-untouched seeded factors-not-shared distribution global-rng-left-alone",
    "forward": "equals-oracle scaling dropout-off-in-eval dropout-on-in-train fused-parts embedding conv2d output-dtype autocast",
    "merge": "same-output weight-equals-oracle restores-base no-drift idempotent only-targets-change tied-weights bias-scaled refuses-nan same-generation",
    "checkpoint": "only-lora complete two-stage-load misfit-is-loud round-trip-bits dtype-kept same-merged-or-not odd-names many-layers safe-file same-bytes-under-another-hash-seed fresh-process",
    "training": "loss-goes-down gradients-reach-every-factor-and-no-other base-unchanged update-equivalence learns resume-equals-uninterrupted deterministic same-trajectory-as-reference",
    "several": "switch isolation disabled-equals-base combination unknown-name-is-loud delete",
    "state": "read-only-calls mode-calls-return-self deepcopy-and-pickle attributes-left-behind",
    "cost": "inject-allocates-little no-full-delta-in-forward merged-costs-what-the-base-costs merge-in-place no-needless-upcast checkpoint-size step-memory inference-keeps-no-graph",
}
SPECS = [f"{family}/{claim}" for family, claims in FAMILIES.items() for claim in claims.split()]

KINDS = (
    "base weights",
    "adapters",
    "gradients",
    "optimizer",
    "saved activations",
    "logits",
    "other",
)


def environment(**libraries):
    """A machine with one GPU, and its libraries' versions; `torch="2.12.0"` changes one."""
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "loralib": "0.1.2"}
    quantity = lambda value, unit: {"value": value, "unit": unit}  # noqa: E731
    return {
        "machine": {
            "os": "Debian GNU/Linux 12 (bookworm), Linux 6.1.0",
            "architecture": "x86_64",
            "cpu": "AMD EPYC 9R14",
            "physical_cores": quantity(2, "1"),
            "logical_cores": quantity(2, "1"),
            "usable_cores": quantity(2, "1"),
            "memory": quantity(16 * 2**30, "B"),
            "load": quantity(0.31, "1"),
        },
        "gpus": [
            {
                "name": "NVIDIA L4",
                "driver": "570.86.15",
                "memory": quantity(23034 * 2**20, "B"),
                "clock": quantity(2040.0, "MHz"),
                "clock_limit": quantity(2040.0, "MHz"),
                "memory_clock": quantity(6251.0, "MHz"),
                "power_limit": quantity(72.0, "W"),
                "temperature": quantity(41.0, "Cel"),
            }
        ],
        "python": {"version": "3.11.7", "implementation": "CPython"},
        "cuda": "13.0",
        "cudnn": "91002",
        "threads": {"OMP_NUM_THREADS": "1", "torch": 1},
        "libraries": {
            name: {"version": version, "source": "index", "commit": None, "dirty": None}
            for name, version in (versions | libraries).items()
        },
        "harness": {"version": "0.1.0", "commit": "0123456789abcdef0123", "dirty": False},
    }


def failure(case="specimen=linear,dtype=bfloat16", **changes):
    """One failure record."""
    return {
        "kind": "value",
        "case": case,
        "expected": "W + ΔW within the budget of bfloat16",
        "actual": "ΔW added twice",
        "measured": 0.0312,
        "allowed": 0.0041,
        "where": "weight[17, 4]",
        "looks_like": ["merge-adds-twice"],
        "reproduce": f"lora-harness check peft --only merge/same-output --case {case}",
    } | changes


def results(outcomes=None, seed=0):
    """Every spec, passed but where `outcomes` says otherwise."""
    chance = random.Random(seed)
    found = []
    for spec in SPECS:
        outcome = (outcomes or {}).get(spec, "passed")
        cases = chance.randint(1, 40)
        used = chance.uniform(0.01, 0.7)
        found.append(
            {
                "spec": spec,
                "level": "SHOULD" if chance.random() < 0.15 else "MUST",
                "outcome": outcome,
                "sentence": f"An implementation MUST hold {spec.split('/')[1].replace('-', ' ')}.",
                "why": "A wrong scale trains, and trains wrong.",
                "source": "arXiv 2106.09685, section 4.1",
                "reason": "merge/same-output fails" if outcome == "blocked" else None,
                "cases": cases,
                "failures": [failure()] if outcome in {"failed", "known"} else [],
                "margins": [
                    {
                        "case": "dtype=float32",
                        "used": used if outcome == "passed" else 7.6,
                        "allowed": 1.0,
                    }
                ],
            }
        )
    return found


def head(kind, name, *, day=1, **changes):
    """What every report begins with."""
    return {
        "schema_version": 1,
        "kind": kind,
        "id": f"{kind}-{name}",
        "started": f"{date(2026, 1, 1) + timedelta(days=day)}T03:00:00Z",
        "ended": f"{date(2026, 1, 1) + timedelta(days=day)}T03:04:10Z",
        "finished": True,
        "adapter": {"name": "peft", "version": "0.21.2"},
        "model": "tiny",
        "verdict": None,
        "required": None,
        "ran": None,
        "seed": 0,
        "spec_version": "1",
        "environment": environment(),
    } | changes


def check(name="one", outcomes=None, **changes):
    """A verdict on one implementation."""
    found = results(outcomes)
    bad = any(one["outcome"] == "failed" for one in found)
    return (
        head("check", name)
        | {
            "verdict": "DOES NOT CONFORM" if bad else "CONFORMS",
            "required": len(found),
            "ran": sum(one["outcome"] not in {"not_run", "blocked"} for one in found),
            "results": found,
        }
        | changes
    )


def finetune(name="tuned", seed=0, **changes):
    """A fine-tuning with its curves."""
    chance = random.Random(seed)
    loss = [[step, 1.1 + 3.4 * 0.97**step + chance.gauss(0, 0.04)] for step in range(1, 121)]
    held_out = [[step, 1.2 + 3.4 * 0.97**step] for step in range(10, 121, 10)]
    rate = [[step, 2e-4 * min(step / 12, (120 - step) / 108)] for step in range(1, 121)]
    return (
        head("finetune", name)
        | {
            "verdict": "CONFORMS",
            "training": {"loss": loss, "eval_loss": held_out, "learning_rate": rate},
            "recipe": {
                "name": "quick",
                "training_config": {
                    "learning_rate": 2e-4,
                    "max_steps": 120,
                    "bf16": False,
                    "gradient_checkpointing_kwargs": {"use_reentrant": False},
                },
                "peft_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            },
            "artefacts": {"adapter": "adapter_model.safetensors", "checkpoints": 3},
        }
        | changes
    )


def bench(name="measured", seed=0, **changes):
    """A grid of costs over implementation, rank and dtype."""
    chance = random.Random(seed)
    counters, timings, memory = [], [], []
    for subject, extra in (("base", 1.0), ("peft", 1.32), ("loralib", 1.24), ("reference", 1.18)):
        for dtype, scale in (("float32", 1.0), ("bfloat16", 0.55)):
            for r in (1, 4, 8, 16, 32, 64, 128):
                where = {"r": r, "dtype": dtype, "batch": 1, "sequence": 2048, "device": "cuda:0"}
                common = {
                    "subject": subject,
                    "version": "0.21.2",
                    "model": "mini-4k",
                    "phase": "training-step",
                    "conditions": where,
                }
                rank = 0 if subject == "base" else r
                flops = 15_000_000_000_000 + rank * 25_165_824 * 4
                time = 0.61 * scale * extra * (1 + rank / 900)
                counters.append(common | {"metric": "flops", "value": flops, "unit": "FLOP"})
                timings.append(
                    common
                    | {
                        "metric": "step_time",
                        "value": time,
                        "unit": "s",
                        "samples": [time * chance.uniform(0.98, 1.06) for _ in range(9)],
                    }
                )
                timings.append(
                    common
                    | {
                        "metric": "throughput",
                        "value": 2048 / time,
                        "unit": "token/s",
                        "better": "higher",
                    }
                )
                kinds = {
                    "base weights": int(7.6e9 * scale),
                    "adapters": rank * 1_572_864 * 4,
                    "gradients": rank * 1_572_864 * 4,
                    "optimizer": rank * 1_572_864 * 8,
                    "saved activations": int(6.1e9 * scale * extra),
                    "logits": 2048 * 32064 * 4,
                    "other": 120_000_000,
                }
                memory += [
                    common | {"metric": "peak_bytes", "kind": kind, "value": size, "unit": "B"}
                    for kind, size in kinds.items()
                ]
                memory.append(
                    common | {"metric": "peak_bytes", "value": sum(kinds.values()), "unit": "B"}
                )
    return (
        head("bench", name)
        | {
            "adapter": None,
            "model": "mini-4k",
            "budget": 16 * 2**30,
            "counters": counters,
            "timings": timings,
            "memory": memory,
        }
        | changes
    )


def large_bench(name):
    """A grid of 182 cells with 43 costs or more each, none of which is equal to another's."""
    chance = random.Random(name)
    counters, timings, memory = [], [], []
    for cell in range(182):
        where = {
            "r": (0, 1, 4, 8, 16, 64, 128)[cell % 7],
            "alpha": 16,
            "dtype": ("float32", "bfloat16")[cell // 7 % 2],
            "batch": 1 + cell // 14,
            "sequence": 2048,
            "checkpointing": "off",
            "device": "cuda:0",
            "threads": 1,
        }
        common = {
            "subject": "peft",
            "version": "0.21.2",
            "model": "mini-4k",
            "conditions": where,
        }
        for phase in ("inject", "training-step", "evaluation", "merged"):
            row = common | {"phase": phase}
            for at, metric in enumerate(("flops", "operations", "python_calls", "bytes_live")):
                value = 10**12 + cell * 7_919 + at * 104_729
                counters.append(row | {"metric": metric, "value": value, "unit": "1"})
            value = chance.uniform(0.1, 0.2)
            samples = [value] * 10
            timings.append(
                row | {"metric": "seconds", "value": value, "unit": "s", "samples": samples}
            )
            memory += [
                row | {"metric": "peak_bytes", "kind": kind, "value": 10**9 + cell, "unit": "B"}
                for kind in KINDS[:6]
            ]
    return head("bench", name) | {"counters": counters, "timings": timings, "memory": memory}


def night(day, rows=500):
    """One night of a year: `rows` rows, few of which ever change."""
    chance = random.Random(day)
    specs = results({"merge/same-output": "failed"} if 200 <= day < 215 else {}, seed=0)
    count = (rows - len(specs)) // 2
    counters = [
        {
            "subject": "peft",
            "version": "0.21.2",
            "model": "tiny",
            "phase": "training-step",
            "conditions": {"r": 2 ** (index % 8), "dtype": "float32", "batch": 1 + index // 8},
            "metric": "flops",
            "value": 1_000_000 + index * 1_000 + (17 if day >= 100 and index == 3 else 0),
            "unit": "FLOP",
        }
        for index in range(count)
    ]
    timings = [
        row | {"metric": "step_time", "unit": "s", "value": 0.01 * chance.uniform(0.9, 1.2)}
        for row in counters
    ]
    return head("bench", f"night-{day}", day=day) | {
        "results": specs,
        "counters": counters,
        "timings": timings,
        "memory": [],
    }


def write(folder, *reports):
    """The reports as files named by their ids; their paths."""
    paths = []
    for report in reports:
        path = folder / f"{report['id']}.json"
        path.write_text(json.dumps(report), encoding="utf-8")
        paths.append(path)
    return paths


def small(name="small", **changes):
    """A report with a little of everything, for tests that damage it."""
    found = bench(name)
    pair = {"verdict": "same", "ratio": 1.0, "low": 0.99, "high": 1.01, "against": "bench-old"}
    return (
        found
        | {
            "adapter": {"name": "peft", "version": "0.21.2"},
            "results": results({"merge/same-output": "failed", "merge/no-drift": "blocked"})[25:30],
            "counters": found["counters"][7:10],
            "timings": [row | {"paired": pair} for row in found["timings"][14:18]],
            "memory": found["memory"][56:72],
            "training": {"loss": [[1, 3.0], [2, "NaN"], [3, 2.0]], "eval_loss": [[2, 2.5]]},
            "recipe": {"name": "quick", "training_config": {"max_steps": 3}},
            "answers": {
                "before": {"prompt": "Where?", "reply": "?", "matched": 0, "asked": 4},
                "after": {"prompt": "Where?", "reply": "At berth 4.", "matched": 4, "asked": 4},
            },
            "notes": ["a note"],
        }
        | changes
    )
