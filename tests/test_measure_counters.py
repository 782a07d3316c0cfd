"""Counters: the same on every run, and different where something costs more."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import LoraConfig, phi3, registry, worker
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.failure import Broken, NotRun
from harness.faults.cost import forward_makes_delta_whole, training_keeps_every_input
from harness.measure.counters import counting, counting_calls
from harness.measure.fake import fake_model, fake_tensors
from harness.measure.phases import (
    PHASES,
    batch_of,
    checkpoint_bytes,
    count_base_forward,
    count_phases,
    count_step,
    optimizer_of,
    training_step,
)
from harness.spec import catalogue

# PEFT and the reference ask transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

sys.path.insert(0, str(Path(__file__).parent))
from measured import TARGETS, lora, small  # noqa: E402  # beside this file


def test_counters_are_equal_over_runs_processes_and_hash_seeds():
    """20 runs: two adapters, five runs each, in two processes under two hash seeds."""
    script = Path(__file__).with_name("measured.py")
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), "reference,peft"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )
        for seed in ("1", "4242")
    ]
    first, second = (run.communicate()[0].split() for run in runs)

    assert len(first) == 10
    assert first == second
    assert len(set(first)) == 2  # one digest for each adapter


@pytest.fixture(scope="module")
def honest():
    """The reference's counters by phase."""
    return count_phases(Reference(), small, lora(), sequence=9)


class AddsAnOperation(Adapted):
    def forward(self, x):
        return super().forward(x) + 0


class CopiesItsInput(Adapted):
    def forward(self, x):
        return super().forward(x.clone())


def with_layer(kind):
    made = Reference()
    made.layer = kind
    return made


def test_one_added_operation_per_layer_shows(honest):
    """Four adapted layers, four more additions in each forward."""
    found = count_phases(with_layer(AddsAnOperation), small, lora(), sequence=9)

    phase = "evaluation-forward"
    more = {
        name: count - honest[phase].operations.get(name, 0)
        for name, count in found[phase].operations.items()
        if count != honest[phase].operations.get(name, 0)
    }
    assert more == {"aten.add.Tensor": len(TARGETS)}


def test_one_extra_copy_of_the_input_shows_in_bytes(honest):
    """A clone of each layer's input: 9 tokens of 64 numbers, and of 160 into down_proj."""
    found = count_phases(with_layer(CopiesItsInput), small, lora(), sequence=9)

    phase = "evaluation-forward"
    widths = [m.in_features for n, m in small().named_modules() if n.endswith(TARGETS)]
    extra = found[phase].allocated_bytes - honest[phase].allocated_bytes
    assert extra == sum(widths) * 9 * 4


def test_a_forgotten_no_grad_shows_in_saved_bytes(honest):
    """An evaluation that keeps a graph saves bytes; one that does not saves none."""
    model = Reference().inject(small(), lora())
    given = batch_of(model, batch=1, sequence=9)
    with counting(model) as count:
        model(input_ids=given["input_ids"])

    assert honest["evaluation-forward"].saved_bytes == 0
    assert count.result().saved_bytes > 0


def test_flops_of_a_product_are_two_a_multiplication():
    """(5, 7) times (7, 3): 2·5·7·3, under no_grad and inference_mode alike."""
    layer = torch.nn.Linear(7, 3)
    x = torch.ones(5, 7)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), counting() as count:
            layer(x)

        assert count.result().total_flops == 2 * 5 * 7 * 3


def test_bytes_and_peak_follow_what_lives():
    """Two tensors of 4,000 bytes made one after the other, the first gone before the second."""
    with counting() as count:
        a = torch.empty(1000)
        del a
        b = torch.empty(1000)
        view = b[10:20]
        del b
    result = count.result()

    assert view.numel() == 10
    assert result.allocated_bytes == 8000
    assert result.peak_bytes == 4000
    assert count.ledger.growth == 4000


def test_a_literal_is_fresh_and_an_input_is_not():
    """What lives before is no allocation; what is made inside is one."""
    before = torch.ones(100)
    with counting() as count:
        torch.tensor([1.0, 2.0]) + 1
        before.add_(1)

    assert count.result().allocated_bytes == 16
    assert count.result().peak_bytes == 416


def test_saved_bytes_count_a_storage_once_and_no_weight():
    """X is saved by two layers and counts once; the weights do not count."""
    one, two = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    x = torch.ones(3, 8)
    with counting(torch.nn.ModuleList([one, two])) as count:
        out = one(x) + two(x)
    result = count.result()

    assert out.requires_grad
    assert result.saved_bytes == x.numel() * 4


def test_the_step_knows_the_kinds_of_its_memory():
    """Weights, factors and moments are what they are by count; logits are tokens × vocabulary."""
    model = Reference().inject(small(), lora())
    factors = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers())
    step = count_step(model, batch_of(model, batch=2, sequence=16), adapter=Reference())

    assert step.peak["adapters"] == 4 * factors
    assert step.peak["base weights"] == 4 * (frozen + buffers)
    assert 8 * factors <= step.peak["optimizer"] <= 8 * factors + 8 * 2 * len(TARGETS)
    assert step.peak["logits"] % (2 * 16 * 4) == 0
    assert step.peak["saved activations"] > 0
    assert step.peak_bytes == sum(step.peak.values())
    assert "backward" in step.peak_at


def test_merged_forward_runs_the_base_s_operations(honest):
    """No added latency: operations, FLOPs and bytes are the base's own; its layer is a call more."""
    bare = count_base_forward(small(), sequence=9)

    told_apart = {"peak": {}, "peak_at": "", "python_calls": None}
    assert replace(honest["merged-forward"], **told_apart) == replace(bare, **told_apart)


def test_every_phase_is_counted(honest):
    """The reference claims all that a life has."""
    assert tuple(honest) == PHASES


@pytest.mark.parametrize("adapter", ["reference", "peft", "loralib"])
def test_fake_tensors_peak_where_real_ones_do(adapter):
    """The same step on shapes alone: the same bytes at the highest moment, to the byte."""
    implementation = registry.resolve(adapter)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    real = implementation.inject(phi3.load("tiny"), config)
    found = count_step(real, batch_of(real, batch=2, sequence=24), adapter=implementation)
    with fake_tensors():
        fake = implementation.inject(fake_model("tiny", "float32"), config)
        planned = count_step(fake, batch_of(fake, batch=2, sequence=24), adapter=implementation)

    assert planned.peak == found.peak
    assert planned.flops == found.flops
    assert planned.saved_bytes == found.saved_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_kept_answer_is_the_operators_own(checkpointing):
    """Torch's own cross-check of each answer that its cache gives to our shorter questions."""
    checked = torch._dynamo.config.patch(fake_tensor_cache_crosscheck_enabled=True)
    before = FakeTensorMode.cache_info().hits
    with checked, fake_tensors():
        base = fake_model("tiny", "bfloat16")
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
        model = registry.resolve("peft").inject(base, config)
        count_step(model, batch_of(model, batch=2, sequence=24))

    assert FakeTensorMode.cache_info().hits > before + 1000


def test_the_peak_is_the_allocator_s_within_two_per_cent():
    """A step dominated by tensors, against the allocations that torch's profiler saw."""
    implementation = registry.resolve("peft")
    model = implementation.inject(phi3.load("tiny"), lora(8))
    model.train()
    batch = batch_of(model, batch=4, sequence=256)
    counted = count_step(model, batch, adapter=implementation).peak_bytes
    optimizer = optimizer_of(model)
    training_step(model, batch, optimizer)
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    held += [v for s in optimizer.state.values() for v in s.values()]
    before = sum({t.data_ptr(): t.numel() * t.element_size() for t in held}.values())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        training_step(model, batch, optimizer)
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = highest = before
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        highest = max(highest, live)

    assert 0.98 < counted / highest < 1.02


def test_python_calls_leave_generators_out():
    """Two functions entered; how often a generator is resumed does not count."""

    def inner():
        return any(x == 2 for x in (1, 2, 3))

    def outer():
        return inner()

    with counting_calls() as calls:
        outer()
    once = calls.count
    with counting_calls() as calls:
        outer()
        outer()

    assert calls.count - once == 2


def test_a_checkpoint_weighs_its_numbers():
    """25 numbers in float32, two in bfloat16, and a scalar that is no tensor."""
    state = {"a": torch.ones(5, 5), "b": torch.ones(2, dtype=torch.bfloat16), "alpha": 3.0}

    assert checkpoint_bytes(state) == 104


class CachesTheLast(Adapted):
    def forward(self, x):
        self.last = x.detach().clone()
        self.gave = super().forward(x)
        return self.gave


class LeavesARing(Adapted):
    def forward(self, x):
        kept = {"x": x.detach().clone()}
        kept["itself"] = kept
        return super().forward(x)


def judged(adapter, spec_id):
    """What a spec finds at its first case."""
    item = catalogue()[spec_id]
    return worker.judge(adapter, item, item.cases[0])[0]


def test_a_cache_of_the_last_batch_is_no_leak():
    """It is as large after a thousand steps as after one; what every step adds to is found."""
    assert judged(with_layer(CachesTheLast), "cost/step-memory") is None
    assert (
        judged(with_layer(LeavesARing), "cost/step-memory") is None
    )  # the collector's, not a leak
    assert isinstance(judged(training_keeps_every_input(), "cost/step-memory"), Broken)


def test_a_weight_made_whole_by_design_is_not_said_to_pass(monkeypatch):
    """What a parametrization makes is told as not judged, and the fault is found."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "implementations"))
    parametrised = registry.resolve("parametrised:adapter")

    assert isinstance(judged(parametrised, "cost/no-full-delta-in-forward"), NotRun)
    assert isinstance(judged(forward_makes_delta_whole(), "cost/no-full-delta-in-forward"), Broken)
