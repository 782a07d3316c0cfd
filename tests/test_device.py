"""On another device: what a GPU would say of the specs is asked of a made-up one, with no GPU.

What the made-up device has not, autocast or fused attention say, raises in its own words; what is
looked for is a tensor that a spec, or the reference, left on the CPU or took from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

JUDGED = """
import dataclasses, json, warnings
warnings.simplefilter("ignore")
import made_up_device, torch
from harness import registry, worker
from harness.spec import select
torch.set_num_threads(1)
adapter = registry.resolve("reference")
for item in select((), "core").values():
    for case in item.cases[:2]:
        broken = worker.judge(adapter, item, dataclasses.replace(case, device=made_up_device.NAME))[0]
        print(json.dumps([item.id, str(case), broken and broken.actual]))
"""
"""The first two cases of each spec."""


def test_no_spec_mixes_devices():
    """Nearly all hold there, and none fails for a tensor that lies elsewhere."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot be given a device in Python (2.9 can)")
    done = subprocess.run(
        [sys.executable, "-c", JUDGED],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    mixed = [each for each in found if "on one device" in (each[2] or "")]

    assert not mixed
    assert sum(each[2] is None for each in found) > 0.9 * len(found) > 200
