"""Sizes: read, told, and held against a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness import plugin
from harness.errors import UsageError
from harness.measure import clock
from harness.measure.memory import GPU_BUDGET, format_bytes, parse_bytes, require_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("2TB", 2 * 10**12),
        ("64KiB", 65_536),
        ("1024", 1024),
        (" 7 B ", 7),
    ],
)
def test_a_size_means_its_bytes(text, size):
    """Binary units are powers of 1024, decimal ones powers of 1000."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["8G", "", "GiB", "-1GiB", "1e9", "8 apples", "٨GiB", "0", "0.0GiB"]
)
def test_what_is_no_size_is_refused_in_one_line(text):
    """The message names the option, what was given and a form that is right."""
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)

    assert str(caught.value).startswith(f"--budget: {text!r} is no")
    assert "8GiB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (8_042_361_487, "7.49 GiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_a_size_is_told_in_its_largest_unit(size, text):
    """FACTS' 7.49 GiB reads so."""
    assert format_bytes(size) == text


def test_what_a_machine_cannot_hold_is_refused():
    """Real tensors of a pebibyte: one line with both sizes and the way out."""
    with pytest.raises(UsageError, match=r"^--model huge: needs 1024\.00 TiB .* lora-harness plan"):
        require_memory(2**50, subject="--model huge")


def test_a_gpu_budget_binds_pytest_and_hands_itself_on(monkeypatch):
    """`--gpu-budget` caps this process, and is in the environment of those it starts."""
    capped = []
    monkeypatch.setenv(GPU_BUDGET, "1")  # so that it is put back
    monkeypatch.setattr("harness.measure.clock.limit_gpu", lambda *a: capped.append(a))
    plugin._cap(2**30, "cuda:1")

    assert capped == [(2**30, "cuda:1")]
    assert os.environ[GPU_BUDGET] == str(2**30)


@pytest.mark.parametrize(("device", "card"), [("cuda", 3), ("cuda:1", 1)])
def test_a_budget_is_a_share_of_one_card(monkeypatch, device, card):
    """By number, as torch's own check of the call wants it; of the card that is current, else."""
    capped = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**33)
    )
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda *a: capped.append(a), raising=False
    )
    clock.limit_gpu(2**31, device)

    assert capped == [(0.25, card)]


WORKER = """
import torch
from harness import worker
from harness.measure import clock
torch.cuda.is_available = lambda: True
clock.limit_gpu = print
for device in ("cpu", "cuda:1", "cuda:1"):
    worker.ready(device)
"""


@pytest.mark.parametrize(("budget", "said"), [({GPU_BUDGET: "4096"}, "4096 cuda:1\n"), ({}, "")])
def test_the_process_of_an_implementation_heeds_the_budget(budget, said):
    """On the card it is judged on, once; without a budget it takes what it needs."""
    env = {k: v for k, v in os.environ.items() if k != GPU_BUDGET} | budget
    done = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, env=env, check=True
    )

    assert done.stdout == said
