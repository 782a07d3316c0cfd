"""The GPU tier: the built-in implementations judged on the card, in the dtypes it is bought for."""

from __future__ import annotations

import pytest

from harness import check
from harness.telling import tell

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("adapter", ["reference", "peft", "loralib"])
def test_the_built_in_implementations_hold_on_the_card(adapter):
    """What conforms on the CPU conforms on the card."""
    verdict = check(adapter, device="cuda")

    assert verdict.exit_code == 0, tell(verdict)


def test_a_fault_is_caught_on_the_card():
    """The judge is no milder there."""
    verdict = check(
        "harness.faults.merge:scale_applied_twice_on_merge", only=["merge"], device="cuda"
    )

    assert verdict.verdict == "DOES NOT CONFORM"
