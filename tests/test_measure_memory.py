"""Sizes: read, told, and held against a machine."""

from __future__ import annotations

import pytest

from harness.errors import UsageError
from harness.measure.memory import format_bytes, parse_bytes, require_memory


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
