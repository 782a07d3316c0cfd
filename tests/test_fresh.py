"""A fresh process answers for what it was asked, and says what went wrong in one line."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager

import pytest
import torch

from harness import fresh, worker
from harness.adapters.reference import Reference
from harness.spec import catalogue


def test_a_call_that_works_says_nothing():
    """Nothing is said where nothing went wrong."""
    assert fresh.call("os.path", "abspath", ".") == ""


def test_a_card_is_left_to_the_children(monkeypatch):
    """Importing bitsandbytes asks for the cards, after which no copy of a process may use them."""
    imported = []
    monkeypatch.setattr(fresh, "import_module", imported.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fresh.warm_up()

    assert imported == [name for name in fresh.LIBRARIES if name != "bitsandbytes"]


def _judged(adapter):
    item = catalogue()["checkpoint/fresh-process"]
    return worker.judge(adapter, item, item.cases[0])


def test_an_implementation_with_a_name_is_made_there_by_it(monkeypatch):
    """One that cannot be pickled is judged all the same: its factory is called there."""

    class Local(Reference):
        pass

    monkeypatch.setattr(fresh, "ADAPTER", "reference")
    broken, margins, notes = _judged(Local())

    assert (broken, notes) == (None, [])
    assert margins


def test_one_that_is_an_object_and_cannot_go_there_is_not_to_blame():
    """The contract asks for no pickle: a note says that nothing was judged."""

    class Local(Reference):
        pass

    broken, margins, notes = _judged(Local())

    assert (broken, margins) == (None, [])
    assert "give pkg.module:factory" in notes[0]


def test_what_a_factory_refuses_there_is_told(monkeypatch):
    """A name that makes nothing in a fresh process is a failure."""
    monkeypatch.setattr(fresh, "ADAPTER", "reference_of_nobody")

    assert "no such name" in str(_judged(Reference())[0])


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


SAID = []


class WarnsOnce(Reference):
    """Of biases that act inside `disable`, once a process."""

    @contextmanager
    def disable(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inside = super().disable(model)
            inside.__enter__()
        if not SAID:
            SAID.append("the trained biases act")
            warnings.warn(SAID[0], stacklevel=2)
        try:
            yield
        finally:
            inside.__exit__(None, None, None)


@pytest.mark.parametrize("case", [0, 1])
def test_who_warns_once_a_process_is_heard_in_a_fresh_one(case):
    """The warning may have been another spec's: it is silent here from the second case on."""
    item = catalogue()["several/disabled-tells-of-biases"]
    SAID.append("said to another spec")
    broken, _, notes = worker.judge(WarnsOnce(), item, item.cases[case])

    assert (broken, notes) == (None, [])
