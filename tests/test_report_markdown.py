"""Reports for a pull request: a screenful, the worst first, and nothing in them acts."""

from __future__ import annotations

import json

import report_samples as samples

from harness.cli import main
from harness.report import markdown
from harness.report.compare import compare
from harness.report.schema import parse

HOSTILE = "a|b`c`<script>alert(1)</script>\n| x | @someone ![](http://x) \x1b[31m"


def whole(report):
    return parse(json.dumps(report).encode(), name=report["id"])


def test_a_comparison_tells_the_worst_first():
    """The sum, the circumstances that differ, and the rows that moved."""
    old = samples.check("old")
    new = samples.check("new", {"merge/same-output": "failed"})
    new["environment"] = samples.environment(peft="0.22.0")
    new["results"] = [one for one in new["results"] if one["spec"] != "forward/conv2d"]

    assert markdown.comparison(compare(whole(old), whole(new))).splitlines() == [
        "## 🔴 1 worse, 1 removed, 71 same",
        "",
        "`peft 0.21.2 tiny, 2026-01-02 03:00` → `peft 0.21.2 tiny, 2026-01-02 03:00`",
        "",
        "| circumstance | old | new | so not compared |",
        "| --- | --- | --- | --- |",
        "| `peft` | `0.21.2` | `0.22.0` | – |",
        "",
        "| verdict | row | where | old | new | why |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 🔴 worse | `merge/same-output` |  | `passed` | `failed` | `passed → failed` |",
        "| 🔴 removed | `forward/conv2d` |  | `passed` | `–` | `no longer there` |",
    ]


def test_a_report_is_a_screenful():
    """Of many failures and costs, a screenful is shown and the rest is counted."""
    report = samples.check("bad", dict.fromkeys(samples.SPECS, "failed"))

    lines = markdown.report(whole(report | {"counters": samples.bench()["counters"]})).splitlines()
    assert len(lines) < 60
    assert "… and 48 more." in lines
    assert lines[0].startswith("## 🔴")


def test_a_blocked_spec_has_no_line_of_its_own():
    """One cause, one line: the failure has one, what it blocks is counted."""
    report = samples.check("bad", {"merge/same-output": "failed", "merge/no-drift": "blocked"})

    text = markdown.report(whole(report))
    assert "`merge/same-output`" in text
    assert "merge/no-drift" not in text
    assert "1 failed, 1 blocked, 71 passed." in text


def test_claims_without_a_judgement_are_told():
    """A line for what works unclaimed, and one for what is claimed and was not judged."""
    report = samples.check(unclaimed=["float64"], unjudged=["compile", "ddp"])

    lines = markdown.report(whole(report)).splitlines()
    assert lines[4:7] == [
        "Works, but is not claimed: `float64`.",
        "",
        "Claimed, not judged: `compile`, `ddp`.",
    ]
    assert "laimed" not in markdown.report(whole(samples.check()))


def test_an_unfinished_report_says_so():
    """A cut-off run is told as one."""
    assert "**Unfinished:**" in markdown.report(whole(samples.check(finished=False)))


def test_nothing_in_a_name_acts():
    """A pipe, a backtick, a tag, a newline or an escape sequence stays text in its cell."""
    report = samples.check("bad", {"merge/same-output": "failed"}, label=HOSTILE)
    report["results"][25] |= {"spec": HOSTILE, "failures": [samples.failure(expected=HOSTILE)]}

    for line in markdown.report(whole(report)).splitlines():
        outside = "".join(line.split("`")[::2])
        assert not set("<>@!\x1b") & set(outside)
        assert line.count("|") in {0, 7}


def test_github_gets_an_error_for_each_failure(tmp_path, capsys):
    """One annotation a failed spec, escaped as workflow commands want it."""
    report = samples.check("bad", {"merge/same-output": "failed"}, finished=False)
    report["results"][25]["level"] = "MUST"
    report["results"][0] |= {"level": "SHOULD", "outcome": "failed"}
    report["results"][0]["failures"] = [{"expected": None, "actual": None, "reproduce": None}]
    report["results"][25]["sentence"] = "100 % merged\n::error::not a command"
    (path,) = samples.write(tmp_path, report)

    assert main(["report", str(path), "--github"]) == 0
    should, error, warning = capsys.readouterr().out.splitlines()
    assert error == (
        "::error title=peft 0.21.2 tiny%2C 2026-01-02 03%3A00%3A merge/same-output::"
        "100 %25 merged ::error::not a command; expected W + ΔW within the budget of bfloat16; "
        "actual ΔW added twice; "
        "lora-harness check peft --only merge/same-output --case specimen=linear,dtype=bfloat16"
    )
    assert should.startswith("::warning title=")
    assert should.endswith("MUST hold exact coverage.")
    assert "None" not in should + error
    assert warning == (
        "::warning title=peft 0.21.2 tiny%2C 2026-01-02 03%3A00::the run was cut short"
    )


def test_github_hears_of_an_incomplete_verdict(tmp_path, capsys):
    """What could not be judged is an error with the specs' names, since the check was not green."""
    report = samples.check("idle", {"merge/no-drift": "not_run"}, verdict="INCOMPLETE")
    (path,) = samples.write(tmp_path, report)

    assert main(["report", str(path), "--github"]) == 0
    count = len(samples.SPECS)
    assert capsys.readouterr().out == (
        "::error title=peft 0.21.2 tiny%2C 2026-01-02 03%3A00::"
        f"INCOMPLETE: {count - 1} of {count} required specs ran; not run: merge/no-drift\n"
    )
