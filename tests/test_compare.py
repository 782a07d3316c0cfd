"""Two reports side by side: which rows get which of the seven words, and why."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import report_samples as samples

from harness.cli import main
from harness.errors import UsageError
from harness.report.compare import compare, parse_words
from harness.report.results import judge_spec
from harness.report.rows import VERDICTS, cost_row
from harness.report.schema import parse, read
from harness.report.terminal import tell


def whole(report):
    """The report as `read` returns it."""
    return parse(json.dumps(report).encode(), name=report["id"])


def of(verdict, found):
    """The rows that have a verdict, by section, name and place."""
    return {(row.section, row.name, row.where) for row in found.rows if row.verdict == verdict}


# ── rows ──


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("passed", "passed", "same"),
        ("passed", "failed", "worse"),
        ("passed", "known", "worse"),
        ("passed", "blocked", "inconclusive"),
        ("passed", "not_run", "removed"),
        ("passed", "not_claimed", "removed"),
        ("passed", None, "removed"),
        ("failed", "passed", "better"),
        ("failed", "failed", "same"),
        ("failed", "known", "same"),
        ("failed", "blocked", "inconclusive"),
        ("failed", None, "removed"),
        ("known", "passed", "better"),
        ("known", "failed", "worse"),
        ("blocked", "failed", "worse"),
        ("blocked", "passed", "added"),
        ("not_run", "not_claimed", "same"),
        ("not_claimed", "passed", "added"),
        ("not_claimed", "blocked", "inconclusive"),
        ("not_claimed", "not_run", "inconclusive"),
        (None, "passed", "added"),
        (None, "failed", "worse"),
    ],
)
def test_outcomes_are_judged(before, after, verdict):
    """Each change of a spec's outcome has its word; one no longer judged is as loud as a failure."""
    result = lambda outcome: outcome and {"spec": "a/b", "outcome": outcome}  # noqa: E731

    assert judge_spec(result(before), result(after), finished=True)[0] == verdict


@pytest.mark.parametrize(
    ("before", "after", "verdict", "why"),
    [
        (["r=8"], ["r=8", "r=4"], "worse", "still fails, on 1 further case"),
        (["r=8", "r=4"], ["r=8"], "better", "still fails, on 1 case less"),
        (["r=8"], ["r=8"], "same", "still fails"),
        (["r=8"], ["r=4"], "worse", "still fails, on 1 further case"),
    ],
)
def test_a_spec_that_still_fails_is_judged_by_its_cases(before, after, verdict, why):
    """A spec that failed and fails, known or not, is worse where a further case fails."""
    result = lambda outcome, cases: {  # noqa: E731
        "outcome": outcome,
        "failures": [samples.failure(case=case) for case in cases],
    }
    judged = lambda *outcomes: judge_spec(  # noqa: E731
        *map(result, outcomes, (before, after)), finished=True
    )

    assert judged("failed", "failed") == (verdict, why)
    assert judged("known", "known") == (verdict, why.replace("fails", "known"))
    assert judged("failed", "known")[0] == verdict


@pytest.mark.parametrize("changed", ["seed=1", "device=cuda", "device=cuda:0,seed=3"])
def test_another_seed_or_device_makes_no_further_case(changed):
    """Seed and device are the run's: the same fault found with others is no worse."""
    result = lambda *cases: {  # noqa: E731
        "outcome": "failed",
        "failures": [samples.failure(case=case) for case in cases],
    }
    ways = [f"specimen=linear,dtype=float32,way=train, {way}" for way in ("seeded", "frozen")]
    old, new = result(*ways), result(*(f"{way},{changed}" for way in ways))

    assert judge_spec(old, new, finished=True) == ("same", "still fails")
    assert judge_spec(result(ways[0], f"{ways[0]},seed=1"), new, finished=True)[0] == "worse"


@pytest.mark.parametrize(
    ("before", "after", "verdict", "why"),
    [
        ((5, {"a": "value"}), (5, {"a": "raised"}), "inconclusive", "in another way on 1 case: value → raised"),
        ((5, {"a": "value"}), (1, {"a": "crash"}), "worse", "now with a crash"),
        ((5, {"a": "value", "e": "value"}), (1, {"a": "crash"}), "worse", "now with a crash"),
        ((1, {"a": "crash"}), (1, {"a": "crash"}), "same", ""),
        ((1, {"a": "crash"}), (5, {"a": "value"}), "better", "no longer with a crash"),
        ((1, {"a": "hang"}), (5, {"c": "value"}), "inconclusive", "on 1 further case; the old run ended in a hang before"),
        ((3, {"c": "crash"}), (1, {"a": "crash"}), "worse", "on 1 further case"),
        ((5, {"a": "value", "e": "value"}), (3, {"a": "value"}), "removed", None),
    ],
)  # fmt: skip
def test_how_a_spec_fails_is_told_and_what_a_crash_hid_is_no_news(before, after, verdict, why):
    """Another kind of failure is no further case, nor is what was not reached before a crash was mended."""
    result = lambda cases, failures: {  # noqa: E731
        "outcome": "failed",
        "cases": cases,
        "failures": [samples.failure(case=case, kind=kind) for case, kind in failures.items()],
    }
    told = judge_spec(result(*before), result(*after), finished=True)

    fails = ", ".join(part for part in ("still fails", why) if part)
    assert told == (verdict, "judged on 3 of 5 cases" if why is None else fails)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "why"),
    [
        (("MUST", "passed"), ("SHOULD", "passed"), "removed", "passed, MUST → SHOULD"),
        (("MUST", "failed"), ("SHOULD", "failed"), "removed", "still fails, MUST → SHOULD"),
        (("MUST", "passed"), ("SHOULD", "failed"), "worse", "passed → failed"),
        (("SHOULD", "passed"), ("MUST", "passed"), "same", "passed, SHOULD → MUST"),
        (("SHOULD", "failed"), ("MUST", "failed"), "worse", "still fails, SHOULD → MUST"),
    ],
)
def test_a_level_that_changed_is_told(before, after, verdict, why):
    """A MUST that became a SHOULD is gone as a requirement, and is as loud as one that vanished."""
    result = lambda level, outcome: {"level": level, "outcome": outcome}  # noqa: E731

    assert judge_spec(result(*before), result(*after), finished=True) == (verdict, why)


def test_a_spec_judged_on_fewer_cases_is_removed():
    """A spec that passes on fewer cases than before has lost some."""
    result = lambda cases: {"outcome": "passed", "cases": cases}  # noqa: E731

    assert judge_spec(result(40), result(3), finished=True) == (
        "removed",
        "judged on 3 of 40 cases",
    )
    assert judge_spec(result(3), result(40), finished=True)[0] == "same"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (("linear", "bfloat16"), ("linear", "float16"), "no longer judged at dtype=bfloat16"),
        (("conv2d", "float32"), ("embedding", "float32"), "no longer judged at specimen=conv2d"),
        (("linear", "float32,seed=1"), ("linear", "float32,seed=2"), ""),
    ],
)
def test_a_spec_judged_on_other_cases_in_their_place_is_removed(old, new, why):
    """As many cases in another dtype or at another kind of layer are not those that were judged."""
    always = {"case": "specimen=linear,dtype=float32", "used": 0.1}
    result = lambda specimen, dtype: {  # noqa: E731
        "outcome": "passed",
        "cases": 2,
        "margins": [always, {"case": f"specimen={specimen},dtype={dtype}", "used": 0.1}],
    }

    judged = judge_spec(result(*old), result(*new), finished=True)
    unknown = judge_spec(result(*old), result(*new) | {"cases": 3}, finished=True)
    assert judged == (("removed", why) if why else ("same", "passed"))
    assert unknown == ("same", "passed")  # the third may be what is not named: no margin, it raised


def cost(value, **changes):
    return {"subject": "peft", "metric": "bytes", "value": value, "unit": "B"} | changes


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (100, 100, "same"),
        (100, 101, "worse"),
        (100, 99, "better"),
        (100, None, "removed"),
        (None, 100, "added"),
        (100, "NaN", "inconclusive"),
    ],
)
def test_counters_are_compared_exactly(before, after, verdict):
    """One byte more is worse, one less better, none of either."""
    row = lambda value: value and cost(value)  # noqa: E731

    assert cost_row("counter", row(before), row(after)).verdict == verdict


@pytest.mark.parametrize("old", [2**53, 2**53 + 1, 10**25])
def test_large_counts_keep_every_bit(old):
    """One more or one less is told where floats would call them equal."""
    assert cost_row("counter", cost(old), cost(old - 1)).verdict == "better"
    assert cost_row("counter", cost(old), cost(old + 1)).verdict == "worse"


def test_a_count_names_what_there_is_more_of():
    """The operations whose number moved, the most first, three of them; also where the sum is the same."""
    old = {"mm": 7, "add": 3, "mul": 1}
    told = lambda **new: cost_row(  # noqa: E731
        "counter",
        cost(sum(old.values()), by_name=old),
        cost(sum(new.values()), by_name=new),
    )

    assert told(mm=7, add=5, mul=1).why == "more (+18 %): add +2"
    assert told(mm=7, add=1, div=2, sub=1).why == "as many: add -2, div +2, mul -1 and 1 more"
    assert told(mm=7, add=3, mul=1).why == "exactly"


def test_conditions_are_one_whatever_their_order():
    """The same nested conditions, written in another order, are the same row."""
    nested = {"plan": {"a": 1, "b": [2, {"c": 3, "d": 4}]}}
    other = {"plan": {"b": [2, {"d": 4, "c": 3}], "a": 1}}
    old = whole(samples.head("bench", "old") | {"counters": [cost(1, conditions=nested)]})
    new = whole(samples.head("bench", "new") | {"counters": [cost(1, conditions=other)]})

    assert [row.verdict for row in compare(old, new).rows] == ["same"]


def test_a_row_may_say_which_way_is_better():
    """Throughput that rises is better; a count that must not change is worse either way."""
    higher, equal = {"better": "higher"}, {"better": "equal"}

    assert cost_row("counter", cost(1), cost(2, **higher)).verdict == "better"
    assert cost_row("counter", cost(2), cost(1, **equal)).verdict == "worse"


def test_memory_is_exact_on_the_cpu_and_within_a_step_on_a_gpu():
    """2 MiB, the step of CUDA's allocator, is nothing on a GPU and worse on the CPU."""
    on = lambda device, size: cost(size, conditions={"device": device})  # noqa: E731
    verdict = lambda device, more: (  # noqa: E731
        cost_row("memory", on(device, 10**9), on(device, 10**9 + more)).verdict
    )

    assert verdict("cpu", 1) == "worse"
    assert verdict("cuda:0", 2 * 2**20) == "same"
    assert verdict("cuda:0", 2 * 2**20 + 1) == "worse"


def test_wall_time_is_judged_only_where_it_was_paired():
    """Ten times slower in another hour says nothing; a pair says what it found."""
    alone = cost_row("timing", cost(1.0), cost(10.0))
    pair = _paired_against("night-1")
    assert (alone.verdict, alone.ratio) == (None, 10.0)
    assert (pair.verdict, pair.low, pair.high) == ("worse", 1.04, 1.1)


@pytest.mark.parametrize(
    ("against", "version", "judged"),
    [
        ("night-1", "0.8.1", True),
        ("before", "0.8.1", True),
        ("peft 0.8.1", "0.8.2", True),
        ("peft 0.8.1", "0.8.1", False),  # the row's own version: --aa
        ("peft", "0.8.2", False),
        ("0.8.1", "0.8.2", False),
        ("loralib 0.1.2", "0.8.2", False),
        (None, "0.8.2", False),
    ],
)
def test_a_pair_answers_for_the_old_run_alone(against, version, judged):
    """Only a pair that names the old run, by id, label or version, says what became of the row."""
    assert (_paired_against(against, version=version).verdict == "worse") is judged


def _paired_against(against, version="0.8.1"):
    paired = {"verdict": "worse", "ratio": 1.07, "low": 1.04, "high": 1.1, "against": against}
    return cost_row(
        "timing",
        cost(1.0, version="0.8.1"),
        cost(1.0, version=version, paired=paired),
        run={"id": "night-1", "label": "before"},
    )


def test_a_report_that_pairs_two_versions_is_the_same_as_itself():
    """Both sides of the pair lie in one report: beside its equal, nothing is worse."""
    paired = {"verdict": "worse", "ratio": 1.07, "low": 1.04, "high": 1.1}
    for against in ("peft 0.8.1", "peft"):
        old, new = (
            whole(
                samples.head("bench", name)
                | {
                    "timings": [
                        cost(1.0, version="0.8.1"),
                        cost(1.0, version="0.8.2", paired=paired | {"against": against}),
                    ]
                }
            )
            for name in ("old", "new")
        )

        assert compare(old, new).counts["worse"] == 0


def test_what_varies_is_shown_and_not_judged():
    """A row that says it is not exact is never better or worse."""
    assert cost_row("memory", cost(1), cost(2, exact=False)).verdict is None


# ── reports ──


def test_equal_runs_are_the_same_in_every_row():
    """Twenty pairs of runs that differ in clocks alone: no row worse, better or anything else."""
    for seed in range(20):
        old, new = samples.bench("old", seed=seed), samples.bench("new", seed=seed + 100)
        new["timings"] = [row | {"value": row["value"] * 1.3} for row in new["timings"]]

        found = compare(whole(old), whole(new))
        assert {word for word, count in found.counts.items() if count} == {"same", "shown"}
        assert found.exit_code(VERDICTS[:2]) == 0


def test_a_planted_fault_differs_in_its_rows_alone():
    """One spec fails and what needs it is blocked: these rows are told, and no other."""
    old = whole(samples.check("old"))
    new = whole(samples.check("new", {"merge/same-output": "failed", "merge/no-drift": "blocked"}))

    found = compare(old, new)
    assert of("worse", found) == {("spec", "merge/same-output", "")}
    assert of("inconclusive", found) == {("spec", "merge/no-drift", "")}
    assert found.counts["same"] == len(samples.SPECS) - 2
    assert found.exit_code(("worse", "removed")) == 1


def test_a_planted_cost_differs_in_its_row_alone():
    """One operation more in one cell of the grid is the one row that is worse."""
    old, new = whole(samples.bench("old")), whole(samples.bench("new"))
    new["counters"][9]["value"] += 1

    found = compare(old, new)
    assert of("worse", found) == {
        (
            "counter",
            "base training-step flops",
            "mini-4k, r=8, dtype=bfloat16, batch=1, sequence=2048, device=cuda:0",
        )
    }
    assert found.counts["better"] == 0


def test_a_vanished_spec_fails_like_a_failed_one():
    """With the default words, a spec that is gone exits 1 as one that fails does."""
    old, new = whole(samples.check("old")), whole(samples.check("new"))
    gone = new["results"].pop()

    found = compare(old, new)
    assert of("removed", found) == {("spec", gone["spec"], "")}
    assert found.exit_code(("worse", "removed")) == 1


def test_an_unfinished_run_has_lost_nothing_yet():
    """What a cut-off run had no time for is inconclusive, not removed."""
    old, new = whole(samples.check("old")), whole(samples.check("new", finished=False))
    new["results"].pop()

    found = compare(old, new)
    assert (found.counts["removed"], found.counts["inconclusive"]) == (0, 1)
    assert found.exit_code(("worse", "removed")) == 3


def test_an_unfinished_run_is_never_green():
    """A run that was cut short after the last spec of the old one decides nothing, and says so."""
    found = compare(whole(samples.check("old")), whole(samples.check("new", finished=False)))

    assert found.exit_code(("worse", "removed")) == 3
    assert found.exit_code(()) == 0
    assert tell(found).splitlines()[-2:] == ["undecided: the new run did not finish", "73 same"]


def test_a_report_of_blocked_specs_is_never_green():
    """With all specs but one blocked, what is the same says too little."""
    new = samples.check("new", dict.fromkeys(samples.SPECS[1:], "blocked"))

    found = compare(whole(samples.check("old")), whole(new))
    assert found.exit_code(("worse", "removed")) == 3
    assert found.undecided == f"{len(samples.SPECS) - 1} specs inconclusive"


@pytest.mark.parametrize(
    ("change", "key", "ruled_out"),
    [
        ({"model": "medium-4k"}, "model", {"spec", "counter", "memory", "timing"}),
        ({"adapter": {"name": "loralib", "version": "0.1.2"}}, "adapter", {"spec"}),
    ],
)
def test_unlike_runs_are_incomparable_key_by_key(change, key, ruled_out):
    """Another model rules out every row, another implementation the specs, and both are named."""
    old, new = whole(samples.small("old")), whole(samples.small("new") | change)

    found = compare(old, new)
    assert [one.name for one in found.keys if not one.same and one.rules_out] == [key]
    barred = {row.section for row in found.rows if row.verdict == "incomparable"}
    assert barred == ruled_out
    assert all(
        row.why.startswith(f"{key} differs") for row in found.rows if row.verdict == "incomparable"
    )


def test_rows_of_another_model_are_incomparable_and_not_removed():
    """Where the model differs, rows that only one side has are no news of their own."""
    old, new = samples.bench("old"), samples.bench("new", model="tiny")
    for section in ("counters", "timings", "memory"):
        new[section] = [row | {"model": "tiny"} for row in new[section]]

    found = compare(whole(old), whole(new))
    assert {word for word, count in found.counts.items() if count} == {"incomparable"}
    assert found.exit_code(("worse", "removed")) == 3


def test_another_machine_rules_out_memory_and_not_counters():
    """Memory is not compared across machines; what does not vary is."""
    old, new = samples.bench("old"), samples.bench("new")
    new["environment"]["machine"]["cpu"] = "another"

    found = compare(whole(old), whole(new))
    assert {row.section for row in found.rows if row.verdict == "incomparable"} == {
        "memory",
        "timing",
    }
    assert {row.section for row in found.rows if row.verdict == "same"} == {"counter"}


def test_another_python_rules_out_its_calls_alone():
    """The same code enters other functions there."""
    old, new = samples.head("bench", "old"), samples.head("bench", "new")
    for report, calls in ((old, 100), (new, 90)):
        report["counters"] = [cost(7), cost(calls, metric="python_calls", unit="calls")]
    new["environment"]["python"]["version"] = "3.12.1"

    found = compare(whole(old), whole(new))
    assert {row.name: row.verdict for row in found.rows} == {
        "peft bytes": "same",
        "peft python_calls": "incomparable",
    }


def test_another_version_is_told_and_rules_out_nothing():
    """That a library changed is what a comparison is for."""
    old, new = samples.check("old"), samples.check("new")
    new["environment"] = samples.environment(peft="0.22.0")

    found = compare(whole(old), whole(new))
    differing = [(one.name, one.old, one.new) for one in found.keys if not one.same]
    assert differing == [("peft", "0.21.2", "0.22.0")]
    assert found.counts["incomparable"] == 0


def test_several_versions_in_one_report_stay_apart():
    """Where one report measures two versions of one thing, their rows do not mix."""
    rows = [cost(10, version="1"), cost(20, version="2")]
    old = whole(samples.head("matrix", "old") | {"counters": rows})
    new = whole(samples.head("matrix", "new") | {"counters": rows[::-1]})

    assert compare(old, new).counts["same"] == 2


@pytest.mark.parametrize(
    ("rows", "fail_on", "code"),
    [
        ([("passed", "passed")], "worse,removed", 0),
        ([("passed", "failed")], "worse,removed", 1),
        ([("passed", "failed")], "none", 0),
        ([("passed", None)], "worse", 0),
        ([("passed", "blocked")], "worse,removed", 3),
        ([("passed", "blocked")], "none", 0),
        ([("passed", "blocked"), ("passed", None)], "worse,removed", 1),
        ([("passed", "blocked"), ("passed", "passed")], "worse,inconclusive", 3),
        ([("passed", "blocked"), ("passed", "failed")], "worse,inconclusive", 1),
        ([(None, "passed")], "added", 1),
        ([], "worse", 3),
        ([("blocked", "blocked"), ("not_run", "not_run")], "worse,removed", 3),
        ([(None, "blocked")], "worse,removed", 3),
        ([("not_run", "not_claimed")], "worse,removed", 3),
        ([("blocked", "blocked"), ("failed", "failed")], "worse,removed", 0),
        ([("not_claimed", "not_claimed"), ("known", "known")], "worse,removed", 0),
        ([("not_claimed", "blocked"), ("passed", "passed")], "worse,removed", 3),
        ([("blocked", "blocked")], "none", 0),
    ],
)
def test_exit_codes(rows, fail_on, code):
    """1 for a word asked about, 3 where the question stays open or nothing was judged, else 0."""
    reports = [samples.head("check", name) | {"results": []} for name in ("old", "new")]
    for index, outcomes in enumerate(rows):
        for report, outcome in zip(reports, outcomes, strict=True):
            if outcome:
                report["results"].append({"spec": f"a/{index}", "outcome": outcome})

    assert compare(*map(whole, reports)).exit_code(parse_words(fail_on)) == code


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [(7, 7, 0), (7, "NaN", 3), (None, None, 3), ("NaN", 7, 3)],
)
def test_a_cost_that_is_no_number_leaves_the_question_open(old, new, code):
    """Beside a cost that is the same, one that became NaN is undecided; one never measured says nothing."""
    beside = [cost(7, metric="flops")] if None not in {old, new} else []
    runs = [
        whole(samples.head("bench", name) | {"counters": [cost(value), *beside]})
        for name, value in (("old", old), ("new", new))
    ]

    found = compare(*runs)
    assert found.exit_code(("worse", "removed")) == code
    assert found.undecided == ("1 cost inconclusive" if "NaN" in {old, new} else "")


def test_an_incomplete_run_is_never_green():
    """What a run required and did not judge is undecided, also where the run before did not either."""
    runs = [
        whole(samples.check(name, {"merge/no-drift": "not_run"}, verdict="INCOMPLETE"))
        for name in ("old", "new")
    ]

    found = compare(*runs)
    assert (found.counts["same"], found.undecided) == (73, "the new run is INCOMPLETE")
    assert found.exit_code(("worse", "removed")) == 3


@pytest.mark.parametrize("text", ["worser", "worse,gone", "", ","])
def test_an_unknown_word_of_fail_on_is_told(text):
    """A word that is none of the seven is refused, with the seven."""
    with pytest.raises(UsageError, match=r"--fail-on: .*; give some of worse, removed"):
        parse_words(text)


def test_the_frame_has_every_row():
    """As a table of pandas, a comparison has a line a row."""
    found = compare(whole(samples.small("old")), whole(samples.small("new")))

    frame = found.frame()
    assert len(frame) == len(found.rows)
    assert frame["verdict"].value_counts()["same"] == found.counts["same"]


# ── the command ──


def test_the_terminal_is_told_the_worst_first(tmp_path, capsys):
    """What differs in circumstance, then the rows by loudness, then the sum."""
    old = samples.check("old")
    new = samples.check("new", {"merge/same-output": "failed"})
    new["environment"] = samples.environment(peft="0.22.0")
    new["results"] = [one for one in new["results"] if one["spec"] != "forward/conv2d"]

    code = main(["compare", *map(str, samples.write(tmp_path, old, new))])
    assert code == 1
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "old  peft 0.21.2 tiny, 2026-01-02 03:00",
        "new  peft 0.21.2 tiny, 2026-01-02 03:00",
        "",
        "circumstance     old     new  rules out",
        "────────────  ──────  ──────  ─────────",
        "peft          0.21.2  0.22.0  nothing",
        "",
        "verdict  row                where  old     new     why",
        "───────  ─────────────────  ─────  ──────  ──────  ───────────────",
        "worse    merge/same-output         passed  failed  passed → failed",
        "removed  forward/conv2d            passed  –       no longer there",
        "",
        "1 worse, 1 removed, 71 same",
    ]


def test_a_pair_is_told_with_its_interval():
    """A paired time is shown as a ratio between its ends."""
    old, new = whole(samples.bench("old")), whole(samples.bench("new"))
    pair = {"verdict": "worse", "ratio": 1.07, "low": 1.04, "high": 1.1, "against": "bench-old"}
    new["timings"][0]["paired"] = pair

    assert "paired: 1.070 times, 1.040 to 1.100" in tell(compare(old, new))


def test_the_terminal_has_a_screenful_of_what_is_not_loud():
    """Every loud row is told; of the rest a screenful, and how many more there are."""
    old, new = whole(samples.bench("old")), whole(samples.bench("new"))
    for row in new["counters"]:
        row["value"] += 1

    lines = tell(compare(old, new)).splitlines()
    assert sum(line.startswith("worse ") for line in lines) == len(new["counters"])
    assert sum(line.startswith("shown ") for line in lines) == 25
    assert "… and 87 more; --html and --json have them all" in lines


def test_a_killed_check_has_said_what_it_was_asked(tmp_path, monkeypatch):
    """Before the first spec, the report has what makes it comparable: model, tier, device, dtype."""
    path = tmp_path / "check.json"

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.verdict.check", killed)
    options = ["--model", "tiny", "--tier", "smoke", "--dtype", "float32", "--json", str(path)]
    assert main(["check", "peft", *options]) == 130

    found = read(path)
    names = ("model", "tier", "device", "dtype", "finished")
    assert [found[name] for name in names] == ["tiny", "smoke", "cpu", "float32", False]


def test_another_device_and_dtype_are_told():
    """Where a check says on what it judged, a difference is named and rules out nothing."""
    old = samples.check("old", device="cpu", dtype=None)
    new = samples.check("new", device="cuda", dtype="float32")

    found = compare(whole(old), whole(new))
    assert [(key.name, key.old, key.new) for key in found.keys if not key.same] == [
        ("device", "cpu", "cuda"),
        ("dtype", "–", "float32"),
    ]
    assert found.counts["incomparable"] == 0


def test_another_recipe_is_told_setting_by_setting():
    """Two fine-tunings with other learning rates differ in that, and in nothing that is ruled out."""
    old, new = samples.finetune("old"), samples.finetune("new")
    new["recipe"]["training_config"]["learning_rate"] = 1e-3
    del new["recipe"]["peft_config"]["lora_alpha"]
    new["recipe"]["name"] = "mine"

    found = compare(whole(old), whole(new))
    assert [key.as_dict() for key in found.keys if not key.same] == [
        {"name": name, "old": old, "new": new, "same": False, "rules_out": []}
        for name, old, new in (
            ("recipe name", "quick", "mine"),
            ("training_config.learning_rate", "0.0002", "0.001"),
            ("peft_config.lora_alpha", "32", "–"),
        )
    ]


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    """A file against itself, or against its copy, is no comparison."""
    (path,) = samples.write(tmp_path, samples.check())

    assert main(["compare", str(path), str(path)]) == 2
    assert "the same run as" in capsys.readouterr().err


def test_one_report_is_too_few(tmp_path, capsys):
    """One report, or a folder with one, asks for a second."""
    samples.write(tmp_path, samples.check())

    assert main(["compare", str(tmp_path)]) == 2
    assert "1 report to compare, and two are needed" in capsys.readouterr().err


def test_every_output_is_written(tmp_path, capsys):
    """Markdown, JSON and HTML each land where they were asked for; JSON is a report."""
    old, new = samples.small("old"), samples.small("new")
    paths = samples.write(tmp_path, old, new)
    out = tmp_path / "out"

    outputs = ["--json", "c.json", "--markdown", "c.md", "--html", "c.html"]
    outputs[1::2] = [str(out / name) for name in outputs[1::2]]
    code = main(["compare", *map(str, paths), *outputs])
    capsys.readouterr()
    assert code == 0
    written = json.loads((out / "c.json").read_text())
    assert written["kind"] == "compare"
    assert written["comparison"]["counts"]["worse"] == 0
    assert written["finished"] is True
    assert (out / "c.md").read_text().startswith("## 🟢")
    assert (out / "c.html").read_text().startswith("<!doctype html>")


def test_an_output_that_cannot_be_written_is_told(tmp_path, capsys):
    """An unwritable page is one line and exit 2."""
    paths = samples.write(tmp_path, samples.small("old"), samples.small("new"))

    assert main(["compare", *map(str, paths), "--html", str(paths[0] / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_neither_torch_nor_pandas_is_loaded(tmp_path):
    """Comparing two files loads nothing that takes a second to load."""
    paths = samples.write(tmp_path, samples.small("old"), samples.small("new"))
    code = (
        "import sys; from harness.cli import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'pandas', 'jinja2'} & sys.modules.keys()))"
    )

    said = subprocess.run(
        [sys.executable, "-c", code, "compare", *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines()[-1] == "[]"


def test_reports_are_left_as_they_were():
    """Comparing changes neither report."""
    old, new = whole(samples.small("old")), whole(samples.small("new"))
    before = copy.deepcopy((old, new))

    compare(old, new)
    assert (old, new) == before
