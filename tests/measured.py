"""A small Phi-3 for tests of counters, and a script that tells all its counters as one digest."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def small(layers=1):
    """A layer of tiny's sizes, seeded."""
    import torch
    from transformers import Phi3ForCausalLM

    from harness import phi3

    config = phi3.config("tiny")
    config.num_hidden_layers = layers
    config.use_cache = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).eval()


def lora(r=4):
    """A configuration over all four kinds of projection."""
    from harness import LoraConfig

    return LoraConfig(r=r, lora_alpha=2.0 * r, target_modules=TARGETS)


def digest(adapter):
    """All counters of all phases, as one string."""
    from harness import registry
    from harness.measure.phases import count_phases

    found = count_phases(registry.resolve(adapter), small, lora(), sequence=5)
    told = {phase: asdict(counters) for phase, counters in found.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    import gc

    import peft  # noqa: F401

    gc.freeze()  # every count collects garbage first: nothing of the libraries is any
    print(*(digest(adapter) for adapter in sys.argv[1].split(",") for _ in range(5)))
