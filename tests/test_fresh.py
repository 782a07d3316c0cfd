"""A fresh process answers for what it was asked, and says what went wrong in one line."""

from __future__ import annotations

import sys

from harness import fresh


def test_a_call_that_works_says_nothing():
    """Nothing is said where nothing went wrong."""
    assert fresh.call("os.path", "abspath", ".") == ""


def test_an_exception_is_told_in_one_line():
    """What is raised there is named here, by its type and its words."""
    told = fresh.call("json", "loads", "{")

    assert told.startswith("JSONDecodeError: Expecting property name")
    assert "\n" not in told


def test_a_process_that_dies_does_not_end_the_server():
    """A child that ends itself is told, and the next one is asked as if nothing had been."""
    assert fresh.call("builtins", "exec", "import os; os._exit(7)") == "the process ended with 7"
    assert fresh.call("os.path", "abspath", ".") == ""


def test_it_is_fresh_and_hashes_otherwise(tmp_path):
    """What this process imported is not there, and text hashes to another number."""
    sys.modules["only_here"] = sys
    at = str(tmp_path / "said")
    try:
        fresh.call(
            "builtins",
            "exec",
            f"import sys; open({at!r}, 'w').write(f'{{hash(\"lora\")}} {{\"only_here\" in sys.modules}}')",
        )
    finally:
        del sys.modules["only_here"]
    there, present = (tmp_path / "said").read_text().split()

    assert int(there) != hash("lora")
    assert present == "False"
