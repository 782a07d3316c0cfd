"""Benchmarks of a tiny training step and forward, for `--benchmark-enable` and its options.

Ordinary pytest runs each once and times nothing.
"""

from __future__ import annotations

import time

import pytest

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

SIDES = ("reference", "peft", "loralib")


def synchronized():
    """Seconds, once a GPU has done what it was asked."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=synchronized, group="training-step")
@pytest.mark.parametrize("adapter", SIDES)
def test_training_step(benchmark, adapter):
    """Forward, backward and AdamW on tiny, r 8, 1 × 64; the loss is a number."""
    loss = benchmark(work(adapter, "training-step"))

    assert loss.isfinite()


@pytest.mark.benchmark(timer=synchronized, group="evaluation-forward")
@pytest.mark.parametrize("adapter", SIDES)
def test_evaluation_forward(benchmark, adapter):
    """An unmerged forward without gradient."""
    logits = benchmark(work(adapter, "evaluation-forward"))

    assert logits.isfinite().all()


def work(adapter, phase):
    """One call of a phase."""
    import torch

    from harness import LoraConfig, phi3, registry
    from harness.measure.phases import batch_of, optimizer_of, training_step

    implementation = registry.resolve(adapter)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = implementation.inject(phi3.load("tiny"), config)
    given = batch_of(model, batch=1, sequence=64)
    if phase == "training-step":
        model.train()
        optimizer = optimizer_of(model)
        return lambda: training_step(model, given, optimizer).detach()
    if not getattr(implementation, "eval_merges", False):
        model.eval()

    def forward():
        with torch.no_grad():
            return model(input_ids=given["input_ids"]).logits

    return forward
