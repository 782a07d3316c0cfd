"""Paired timing: what is decided from rounds, and what becomes of a side that fails."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from harness.errors import UsageError
from harness.measure import paired
from harness.measure.interval import LOOKS, decide, median_interval
from harness.measure.paired import Side, compare, rows
from harness.measure.side_process import Late, SideProcess


def rounds(n, *, shift=0.0, seed=0):
    """Log-ratios as a shared machine gives them: small noise, and a burst in one round of ten."""
    draw = random.Random(seed)
    return [
        shift
        + draw.gauss(0, 0.02)
        + (draw.choice((-1, 1)) * draw.expovariate(2)) * (draw.random() < 0.1)
        for _ in range(n)
    ]


def test_the_interval_is_that_of_the_sign_test():
    """Of 10 values the 2nd and 9th enclose the median but for 2·(1 + 10)/1024 = 2.1 %."""
    found = median_interval([float(k) for k in range(1, 11)], 0.05)

    assert (found.low, found.middle, found.high) == (2.0, 5.5, 9.0)


def test_too_few_values_say_nothing():
    """Five signs cannot reach 5 %: 2/32 is 6.25 %."""
    found = median_interval([1.0] * 5, 0.05)

    assert (found.low, found.high) == (-math.inf, math.inf)


def test_the_interval_misses_no_more_often_than_it_says():
    """2,000 draws of 48 rounds with bursts: misses within three deviations of 5 %, or fewer."""
    missed = 0
    for seed in range(2000):
        found = median_interval(rounds(48, seed=seed), 0.05)
        missed += not found.low <= 0 <= found.high

    assert missed <= 0.05 * 2000 + 3 * math.sqrt(0.05 * 0.95 * 2000)


def answer(seed, shift):
    """The first answer over all looks, as `compare` asks."""
    values = rounds(LOOKS[-1], shift=shift, seed=seed)
    for n in LOOKS:
        verdict, _ = decide(values[:n], margin=0.02)
        if verdict != "inconclusive":
            return verdict
    return "inconclusive"


def test_looking_again_and_again_does_not_cry_wolf():
    """Of 400 pairs that are the same, looked at seven times each, none is called a change."""
    verdicts = [answer(seed, 0.0) for seed in range(400)]

    assert set(verdicts) == {"same"}


def test_the_error_is_that_of_both_ends_of_the_margin():
    """Of 100 pairs each: slowed by half the margin, at most 5 % are worse; by all of it, the same."""
    half = Counter(answer(seed, math.log1p(0.02) / 2) for seed in range(100))
    whole = Counter(answer(seed, math.log1p(0.02)) for seed in range(100))

    assert half["worse"] + half["better"] <= 5
    assert whole["same"] + whole["better"] <= 5


def test_five_per_cent_are_found():
    """Of 200 pairs slowed by 5 %, all are called worse; of 200 sped up, all better."""
    assert {answer(seed, math.log(1.05)) for seed in range(200)} == {"worse"}
    assert {answer(seed, -math.log(1.05)) for seed in range(200)} == {"better"}


def test_looks_are_spread():
    """Each look has twice the rounds of the one before."""
    assert all(b == 2 * a for a, b in pairwise(LOOKS))


def interpreter(tmp_path, name, body):
    """An executable in the place of a Python: it speaks the protocol, and loads no library."""
    script = tmp_path / name
    script.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys, time\n"
        "def say(**words): print(json.dumps(words), flush=True)\n"
        "asked = json.loads(sys.stdin.readline())\n"
        f"{body}\n"
    )
    script.chmod(0o755)
    return str(script)


STEADY = """
say(ready=True)
k = 0
for line in sys.stdin:
    k += 1
    n = json.loads(line)["steps"]
    say(seconds=[{second} * (1 + 0.001 * (k % 7))] * n, wall=0)
"""


def steady(tmp_path, second):
    return Side(
        adapter="x", python=interpreter(tmp_path, f"steady-{second}", STEADY.format(second=second))
    )


@pytest.mark.parametrize(
    ("second", "verdict"), [(0.02, "same"), (0.0212, "worse"), (0.0189, "better")]
)
def test_a_pair_is_decided_at_a_look(tmp_path, second, verdict):
    """Steady sides are told apart at the first look that can."""
    found = compare(steady(tmp_path, 0.02), steady(tmp_path, second), seconds=30)

    assert found.verdict == verdict
    assert found.rounds in LOOKS
    assert len(found.samples) == found.rounds
    assert found.low <= found.ratio <= found.high
    assert str(found).startswith(f"{verdict}: ")


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the second side (x) ended with SIGKILL"),
        ("os.kill(os.getpid(), 40)", "the second side (x) ended with signal 40"),
        ("sys.exit(5)", "the second side (x) ended with exit code 5"),
        (
            "say(ready=True)\nsys.stdin.readline()\nos.kill(os.getpid(), signal.SIGKILL)",
            "the second side (x) ended with SIGKILL",
        ),
        (
            "print('first', file=sys.stderr)\nsys.exit('no torch for you\\n')",
            "the second side (x) ended with exit code 1; its last words: no torch for you",
        ),
        (
            "time.sleep(60)",
            "the second side (x) hangs or is too slow: no answer when the time was up",
        ),
        ("say(error='ValueError: no')", "the second side (x) raised ValueError: no"),
    ],
)
def test_a_side_that_fails_makes_the_answer_inconclusive(tmp_path, body, note):
    """Dead at the start, dead in a round, hanging, raising: told, never a traceback."""
    broken = Side(adapter="x", python=interpreter(tmp_path, "broken", body))
    seconds = 3 if "sleep" in body else 30
    found = compare(steady(tmp_path, 0.02), broken, seconds=seconds)

    assert found.verdict == "inconclusive"
    assert found.note == note
    assert str(found) == f"inconclusive: {note}"


class Slowing:
    """A side that is late with one block, and has been silent for some seconds when the time is up."""

    late = 0
    silence = 0.0
    ending = 0.0

    def __init__(self, side, name):
        self.blocks, self.second = 0, name == "second"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        time.sleep(self.ending)

    def begin(self):
        pass

    def ready(self, deadline):
        return {}

    def run(self, steps, deadline, core=None):
        self.blocks += 1
        if self.second and self.blocks == self.late:
            raise Late("the second side (x) hangs", self.silence)
        return 0.03 if self.second else 0.02


@pytest.mark.parametrize(
    ("late", "silence", "verdict", "note"),
    [
        (33, 1.0, "worse", ""),
        (33, 8.0, "inconclusive", "the second side (x) hangs"),
        (1, 1.0, "inconclusive", "10 s were over before the first round"),
        (3, 1.0, "inconclusive", "10 s were over before the first round"),
    ],
)
def test_one_slow_block_at_the_end_is_no_hang(monkeypatch, late, silence, verdict, note):
    """What the rounds before it say holds; a side that was silent for most of the time hangs."""
    monkeypatch.setattr(paired, "SideProcess", Slowing)
    monkeypatch.setattr(Slowing, "late", late)
    monkeypatch.setattr(Slowing, "silence", silence)
    found = compare(Side(adapter="x"), Side(adapter="x"), seconds=10)

    assert (found.verdict, found.note) == (verdict, note)
    assert found.rounds == max(0, (late - 3) // 2)  # two blocks of warm-up, then two a round


def test_the_seconds_end_with_the_answer(monkeypatch):
    """To end two processes that hold much memory takes a moment, after the answer."""
    monkeypatch.setattr(paired, "SideProcess", Slowing)
    monkeypatch.setattr(Slowing, "late", 33)
    monkeypatch.setattr(Slowing, "ending", 0.3)
    found = compare(Side(adapter="x"), Side(adapter="x"), seconds=10)

    assert found.seconds < 0.6


def test_a_side_is_silent_from_the_last_question_on(tmp_path):
    """The time in which it was built, or in which the other side worked, is not counted."""
    body = "time.sleep(1)\nsay(ready=True)\ntime.sleep(60)"
    side = Side(adapter="x", python=interpreter(tmp_path, "slow", body))
    with SideProcess(side, "second") as process:
        process.begin()
        process.ready(time.monotonic() + 30)
        with pytest.raises(Late) as late:
            process.run(1, time.monotonic() + 0.1)

    assert 0.1 <= late.value.silence < 1


def test_what_a_side_has_started_is_ended_with_it(tmp_path):
    """A wrapper around a Python leaves a child that holds the pipe: nobody waits for it."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    wrapper.chmod(0o755)
    began = time.monotonic()
    compare(steady(tmp_path, 0.02), Side(adapter="x", python=str(wrapper)), seconds=2)

    took = time.monotonic() - began
    child = int((tmp_path / "child").read_text())
    while at_work(child) and time.monotonic() - began < 30:
        time.sleep(0.01)  # a signal takes a moment

    assert took < 30
    assert not at_work(child)


def at_work(pid):
    """Whether there is such a process; one that nobody has buried yet is none."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_interpreter_that_is_not_there_is_wrong_usage(tmp_path):
    """One line that says which."""
    with pytest.raises(UsageError, match=r"^--python /no/such/python: cannot be run"):
        compare(Side(adapter="x", python="/no/such/python"), steady(tmp_path, 1), seconds=1)


@pytest.mark.parametrize(
    ("seconds", "margin"), [(0, 0.02), (math.inf, 0.02), (math.nan, 0.02), (1, 0), (1, 1)]
)
def test_bounds_that_answer_nothing_are_wrong_usage(seconds, margin):
    """No time, or a margin that everything or nothing is within."""
    with pytest.raises(UsageError, match=r"^paired timing: .* answer nothing"):
        compare(Side(adapter="x"), Side(adapter="x"), seconds=seconds, margin=margin)


def test_rows_keep_raw_samples_and_the_answer(tmp_path):
    """Both sides' samples; the answer beside the second, against the first."""
    first, second = steady(tmp_path, 0.02), steady(tmp_path, 0.03)
    found = compare(first, second, seconds=30)
    one, two = rows(found, first, second)

    assert len(one["samples"]) == len(two["samples"]) == found.rounds
    assert "paired" not in one
    assert two["paired"]["verdict"] == "worse"
    assert two["paired"]["against"] == "x"


def test_each_side_s_own_version_is_in_its_rows(tmp_path):
    """Two interpreters may hold two versions of one library; ours says nothing of either."""
    sides = []
    for version in ("0.8.1", "0.8.2"):
        told = STEADY.replace("ready=True", f"ready=True, name='peft', version='{version}'")
        python = interpreter(tmp_path, version, told.format(second=0.02))
        sides.append(Side(adapter="peft", python=python))
    found = compare(*sides, seconds=30)
    one, two = rows(found, *sides)

    assert [(row["name"], row["version"]) for row in (one, two)] == [
        ("peft", "0.8.1"),
        ("peft", "0.8.2"),
    ]
    assert two["paired"]["against"] == "peft 0.8.1"


@pytest.mark.parametrize("program", ["/bin/true", "/bin/echo"])
def test_a_program_that_is_no_interpreter_is_wrong_usage(program):
    """One that says nothing and ends well, and one that says what is no answer."""
    with pytest.raises(
        UsageError, match=rf"^--python {program}: does not answer as a Python would"
    ):
        compare(Side(adapter="x", python=program), Side(adapter="x", python=program), seconds=30)


def test_what_a_side_cannot_be_is_wrong_usage(tmp_path):
    """An adapter that nobody knows is no noise."""
    unknown = Side(
        adapter="x", python=interpreter(tmp_path, "unknown", "say(usage='no such name')")
    )
    with pytest.raises(UsageError, match=r"^the second side \(x\): no such name$"):
        compare(steady(tmp_path, 0.02), unknown, seconds=30)


def test_the_committed_evidence_holds():
    """Of at least 40 pairs of equals at most one is called a change; of 40 slowed ones, 38 worse."""
    path = Path(__file__).parents[1] / "reports" / "paired-noise.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    calls = found["called"]
    equals, slowed = Counter(calls["a-a"]), Counter(calls["slowed"])

    assert min(found["pairs"].values()) >= 40
    assert equals["better"] + equals["worse"] <= 1
    assert slowed["worse"] >= 38
    assert slowed["better"] == 0
    assert all(
        a["seconds"] <= found["seconds_at_most"] for kind in found["answers"].values() for a in kind
    )
