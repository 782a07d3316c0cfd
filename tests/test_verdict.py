"""The judge comes to the right verdict on implementations that go wrong in every way."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from harness import Capabilities, UsageError, check, registry, worker
from harness.adapters import reference
from harness.case import Case
from harness.cli import main
from harness.failure import Failure, raised
from harness.faults.initialization import gives_a_convolution_a_bias
from harness.faults.state import leaves_another_default_dtype
from harness.judge import Result
from harness.reach import EVERY_KIND, kind_of, reach
from harness.spec import catalogue, select
from harness.telling import tell
from harness.verdict import Verdict, unjudged


def outcomes(verdict):
    return {result.spec: result.outcome for result in verdict.results}


@pytest.fixture(autouse=True)
def _strangers(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))


def stranger(name):
    import strangers

    return getattr(strangers, name)()


def test_a_correct_implementation_conforms():
    """A correct adapter conforms, and the verdict counts what it rests on."""
    verdict = check(stranger("correct"), only=["forward/equals-oracle", "merge/same-output"])

    assert verdict.verdict == "CONFORMS"
    assert verdict.ran == verdict.required == 2
    assert verdict.exit_code == 0


def test_inject_that_raises_is_one_failure_and_the_rest_blocked():
    """One cause, one line: what depends on a broken inject is blocked, not red."""
    verdict = check(stranger("inject_raises"))
    failed = [r for r in verdict.results if r.outcome == "failed"]

    assert len(failed) == 1
    assert failed[0].failures[0].kind == "raised"
    assert "RuntimeError: this build has no kernels" in failed[0].failures[0].actual
    assert "strangers.py" in failed[0].failures[0].where
    assert set(outcomes(verdict).values()) == {"failed", "blocked"}
    assert verdict.exit_code == 1


def test_what_an_implementation_says_is_not_the_terminals():
    """Neither its name nor its exceptions clear the screen or forge a verdict."""
    verdict = check(stranger("writes_to_the_terminal"), only=["targeting/exact-coverage"])
    lines = tell(verdict).splitlines()

    assert lines[0].startswith("acme CONFORMS: 9 of 9 [31m 1 2, core tier")
    assert [line for line in lines if line.startswith("CONFORMS")] == []
    assert "RuntimeError: [2J gone back" in tell(verdict)
    assert all(line.isprintable() for line in lines)
    assert all(line.isprintable() for line in verdict.adapter.values())


def test_an_exception_that_cannot_be_told_is_told_by_its_type():
    """The line it came from counts, and the process lives."""
    try:
        stranger("writes_to_the_terminal").merge()
    except Exception as error:  # noqa: BLE001  # whatever it is
        record = raised(error).record(case="", reproduce="")

    assert record.actual == "MuteError: (its message raised ValueError)"
    assert "strangers.py" in record.where


def test_what_fails_for_convolutions_alone_blocks_convolutions_alone():
    """A spec is judged at the kinds of layers that its needs hold for, and is no pass where one is left out."""
    asked = ["initialization/no-op", "forward/conv2d", "forward/gradients", "training/learns"]
    verdict = check(gives_a_convolution_a_bias(), only=asked)
    gradients = next(r for r in verdict.results if r.spec == "forward/gradients")
    cases = [case for case in catalogue()[gradients.spec].cases if "conv" not in kind_of(case)]

    assert outcomes(verdict) == dict(
        zip(asked, ("failed", "blocked", "blocked", "passed"), strict=True)
    )
    assert gradients.cases == len(cases)
    assert gradients.notes == ["needs initialization/no-op"]


@pytest.mark.parametrize(
    ("outcome", "told", "kinds"),
    [
        ("failed", {"case": "specimen=grouped,dtype=float32"}, {"grouped_conv2d"}),
        ("failed", {"case": "specimen=conv2d,dtype=float32"}, {"conv2d", "grouped_conv2d"}),
        ("failed", {"case": "specimen=stack,dtype=float32"}, EVERY_KIND),
        ("failed", {"case": "specimen=grouped,dtype=float32", "kind": "hang"}, EVERY_KIND),
        ("failed", {"case": "", "kind": "known"}, EVERY_KIND),
        ("known", {"case": "specimen=stack,dtype=float32"}, set()),
        ("not_run", None, EVERY_KIND),
    ],
)
def test_a_failure_reaches_the_kinds_of_layers_below_its_own(outcome, told, kinds):
    """What ended the judging, or is of no case, says nothing good of any kind."""
    given = {"kind": "value", "expected": "", "actual": ""}
    failures = [Failure(**(given | told))] if told else []

    assert reach(Result(spec="", level="MUST", outcome=outcome, failures=failures)) == kinds


def test_nonsense_that_a_line_of_the_harness_stumbles_over_is_told_as_that():
    """It fails, and nobody looks for the exception in the implementation."""
    verdict = check(
        stranger("saves_nothing"),
        only=["checkpoint/complete"],
        case=Case(),
    )
    failure = verdict.failed[0].failures[0]

    assert failure.kind == "raised"
    assert failure.actual == "AttributeError: 'NoneType' object has no attribute 'items'"
    assert failure.where.startswith("specs/checkpoint.py:")
    assert failure.where.endswith(", a line of the harness, on what the implementation gave it")


@pytest.mark.parametrize(
    ("only", "line"),
    [
        ("merge/no-drift", "merge/no-drift: needs"),  # by way of merge/restores-base
        ("several", "several/while-merged and 1 more: need"),
    ],
)
def test_what_is_blocked_from_outside_the_selection_names_its_cause(only, line):
    """One line says what did not hold in the end, and how to see it."""
    verdict = check("harness.faults.merge:scale_applied_twice_on_merge", only=[only])

    assert verdict.exit_code == 3
    assert tell(verdict).split("\n\n")[2] == (
        f"Blocked\n  {line} merge/same-output, which was not found to hold; "
        "see --only merge/same-output"
    )


def test_an_adapter_that_does_nothing_never_conforms():
    """Doing nothing at all is told apart from doing nothing wrong."""
    verdict = check(stranger("does_nothing"))

    assert verdict.verdict == "DOES NOT CONFORM"


def test_a_method_that_hangs_fails_its_spec_and_the_rest_goes_on():
    """A hang costs its limit, once, and is told as a hang."""
    verdict = check(
        stranger("hangs_on_merge"), only=["forward/scaling", "merge/same-output"], limit=9
    )
    merge = next(r for r in verdict.results if r.spec == "merge/same-output")

    assert outcomes(verdict)["forward/scaling"] == "passed"
    assert merge.failures[0].kind == "hang"
    assert merge.failures[0].expected == "an answer within 9 s"


def test_a_method_that_kills_the_process_fails_its_spec_and_the_verdict_is_written():
    """A crash takes down the worker, not the judge."""
    verdict = check(stranger("dies_on_merge"), only=["merge/same-output", "forward/output-dtype"])
    merge = next(r for r in verdict.results if r.spec == "merge/same-output")

    assert merge.failures[0].kind == "crash"
    assert merge.failures[0].actual == "the process ended with exit code 9"
    assert outcomes(verdict)["forward/output-dtype"] == "passed"


@pytest.mark.parametrize("given", [str, registry.resolve], ids=["name", "object"])
@pytest.mark.parametrize(
    ("name", "outcome"), [("leaves_a_child", "passed"), ("child_survives", "crash")]
)
def test_a_child_that_is_left_behind_holds_nothing_up(name, outcome, given):
    """It has the pipe that answers come by, and ends with the process that left it."""
    verdict = check(given(f"strangers:{name}"), only=["targeting/exact-coverage"])
    (result,) = verdict.results

    assert (result.failures[0].kind if result.failures else result.outcome) == outcome


def test_what_was_asked_for_wrongly_leaves_the_report_that_was_there(tmp_path):
    """A misspelt name costs a line, and not last night's report."""
    report = tmp_path / "base.json"
    report.write_text("last night's")

    assert main(["check", "referenec", "--json", str(report)]) == 2
    assert report.read_text() == "last night's"
    assert main(["check", "referenec", "--json", str(tmp_path / "new.json")]) == 2
    assert not (tmp_path / "new.json").exists()


def test_what_an_implementation_leaves_of_its_surroundings_is_put_back():
    """The next spec is judged as it would be by itself; and it is told what was left."""
    adapter, item = leaves_another_default_dtype(), catalogue()["forward/scaling"]
    broken, _, notes = worker.judge(adapter, item, item.cases[0])

    assert broken is None
    assert torch.get_default_dtype() is torch.float32
    assert notes == ["left torch's default dtype at torch.float64; put back"]


def test_wrong_usage_is_the_harness_s_to_tell():
    """Its own exception, raised by the implementation, is a failure of that."""
    item = catalogue()["targeting/exact-coverage"]
    broken, _, _ = worker.judge(stranger("says_wrong_usage"), item, item.cases[0])

    assert broken.kind == "raised"
    with pytest.raises(UsageError):
        worker.judge(stranger("correct"), item, Case(specimen="nowhere"))


@pytest.mark.parametrize("name", ["dead_copies", "wrong_shapes", "incomplete_factors"])
def test_factors_that_are_not_the_live_ones_fail(name):
    """Factors that are incomplete, dead copies or of the wrong shape do not conform."""
    verdict = check(stranger(name), only=["targeting", "forward"])

    assert verdict.verdict == "DOES NOT CONFORM"


def test_what_an_implementation_prints_does_not_reach_the_verdict():
    """Output of the implementation's own disturbs nothing."""
    verdict = check(stranger("prints_a_lot"), only=["forward/equals-oracle"])

    assert verdict.verdict == "CONFORMS"


def test_a_verdict_that_judged_nothing_is_not_green():
    """A run that judged nothing is INCOMPLETE."""
    verdict = check(stranger("claims_little"), only=["forward/embedding"])

    assert verdict.verdict == "INCOMPLETE"
    assert verdict.exit_code == 3


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ("nowhere:adapter", "nowhere"),
        ("strangers:absent", "absent"),
        ("strangers:ready_made", "ready_made"),
        ("strangers:raises_when_made", "OSError: no licence file"),
        ("strangers:refuses_at_length", "factory raised OSError: [2Jzzzz"),
        ("strangers:not_an_adapter", "`name` is missing"),
        ("nobody", "nobody"),
    ],
)
def test_a_factory_that_gives_no_adapter_is_one_line_and_exit_2(adapter, line, request):
    """A factory that is absent, not callable, raises, or makes something else is said in one line."""
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "check", adapter, "--only", "forward/equals-oracle"],
        capture_output=True,
        text=True,
        cwd=request.path.parent,
        check=False,
    )

    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert len(done.stderr) < 1000
    assert line in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_name_that_matches_no_spec_is_a_usage_error():
    """`--only` says what was meant."""
    with pytest.raises(UsageError, match="did you mean merge/same-output"):
        check("reference", only=["merge/same-outputs"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"adapter": reference}, "adapter 'module': `name` is missing; it must be a string"),
        ({"adapter": reference.adapter}, "adapter 'function': `name` is missing"),
        ({"adapter": None}, "adapter 'NoneType': `name` is missing"),
        ({"adapter": Result}, "is the class Result; it must be an instance of it"),
        ({"tier": "all"}, "--tier all: no such tier; give smoke, core, full"),
        ({"known": "nowhere.toml"}, "known failures nowhere.toml: No such file"),
        ({"only": "forward/scalign"}, "--only forward/scalign: no spec"),
    ],
)
def test_what_python_is_given_wrong_is_one_line_too(given, line):
    """No traceback, and no verdict on what is no adapter."""
    asked = {"adapter": stranger("correct"), "only": ["forward/scaling"], **given}

    with pytest.raises(UsageError, match=re.escape(line)):
        check(**asked)


def test_a_known_failure_is_named_and_never_conformance(tmp_path):
    """What is known to fail does not turn the run red, and the verdict says so."""
    known = tmp_path / "known.toml"
    entry = '[[known]]\nspec = "merge/same-output"\nkind = "{}"\nreason = "it sleeps"\nurl = "https://example.org/1"\nexpires = {}\n'
    known.write_text(entry.format("crash", "2999-01-01"))
    asked = {"only": ["merge/same-output"], "known": known}

    assert check(stranger("dies_on_merge"), **asked).verdict == "CONFORMS BUT FOR KNOWN FAILURES"
    assert check(stranger("correct"), **asked).verdict == "DOES NOT CONFORM"
    known.write_text(entry.format("crash", "2020-01-01"))
    assert check(stranger("dies_on_merge"), **asked).verdict == "DOES NOT CONFORM"
    known.write_text(entry.format("hang", "2999-01-01"))
    assert check(stranger("dies_on_merge"), **asked).verdict == "DOES NOT CONFORM"


def test_the_known_list_says_what_is_no_longer_true(tmp_path):
    """An entry that no longer fails is told in words that lead to it."""
    known = tmp_path / "known.toml"
    known.write_text(
        '[[known]]\nspec = "forward/equals-oracle"\nkind = "value"\nreason = "off by one"\n'
        'url = "https://example.org/1"\nexpires = 2999-01-01\n'
    )
    verdict = check(stranger("correct"), only=["forward/equals-oracle"], known=known)

    assert "no longer fails: remove it" in tell(verdict)


def test_the_verdict_as_json_holds_what_the_contract_says():
    """The JSON of a verdict has at least the published members."""
    verdict = check(stranger("wrong_shapes"), only=["targeting/exact-coverage"])
    found = json.loads(json.dumps(verdict.as_dict()))

    assert {
        "schema_version",
        "adapter",
        "environment",
        "verdict",
        "required",
        "ran",
        "results",
    } <= set(found)
    assert {"spec", "level", "outcome", "cases", "failures"} <= set(found["results"][0])
    failed = next(r for r in found["results"] if r["failures"])
    assert {"case", "expected", "actual", "measured", "allowed", "looks_like", "reproduce"} <= set(
        failed["failures"][0]
    )


def test_a_claim_that_no_spec_asks_for_is_named():
    """Of all that can be claimed, an ordinary run judges all but these; what is not claimed is not asked."""
    features = Capabilities.KNOWN["features"]
    core = [
        Result(spec=item.id, level=item.level, outcome="passed") for item in select(()).values()
    ]
    idle = [Result(spec=one.spec, level=one.level, outcome="not_claimed") for one in core]

    assert unjudged(features, core) == ["quantized_base in 8 bits", "compile", "ddp", "fsdp"]
    assert unjudged(["merge", "ddp"], idle) == ["merge", "ddp"]
    assert unjudged([], core) == []


def test_a_verdict_tells_what_it_has_not_judged():
    """Silence of a feature that is claimed is no proof of it; of a part of the specs nobody expects one."""
    verdict = check(stranger("correct"), tier="smoke")
    part = check(stranger("correct"), only=["forward/scaling"])

    assert {"compile", "ddp", "save"} <= set(verdict.unjudged)
    assert "merge" not in verdict.unjudged
    assert verdict.as_dict()["unjudged"] == verdict.unjudged
    assert part.unjudged == []


def test_what_is_said_of_claims_is_a_line_each():
    """What works unclaimed, and what is claimed and was not judged, stand before the last word."""
    verdict = Verdict(
        adapter={"name": "acme", "version": "1"},
        verdict="CONFORMS",
        required=1,
        ran=1,
        results=[],
        unclaimed=["float64"],
        unjudged=["compile", "ddp"],
    )

    assert tell(verdict).splitlines()[-5:] == [
        "Works, but is not claimed: float64",
        "",
        "Claimed, not judged: compile, ddp",
        "",
        "CONFORMS: 1 of 1 required specs ran",
    ]


def test_a_case_survives_its_text_form():
    """Every case of the catalogue is read back from what is printed of it."""
    cases = [case for spec in catalogue().values() for case in (*spec.cases, *spec.more_cases)]

    assert [Case.parse(str(case)) for case in cases] == cases


@pytest.mark.slow
def test_the_reproduce_line_fails_the_same_spec():
    """What a failure prints as its command fails the same id, for one fault of each family."""
    from harness.faults.record import faults

    for family in {spec.family for spec in catalogue().values()}:
        fault = next(f for f in faults().values() if f.killed_by.startswith(family + "/"))
        name = f"{fault.make.__module__}:{fault.name}"
        verdict = check(name, only=[fault.killed_by])
        failed = next(r for r in verdict.failed if r.spec == fault.killed_by)
        command = shlex.split(failed.failures[0].reproduce)
        done = subprocess.run(
            [sys.executable, "-m", "harness.cli", *command[1:]],
            capture_output=True,
            text=True,
            check=False,
        )

        assert f"{fault.killed_by}\n" in done.stdout, fault.name
        assert "✗" in done.stdout or "!" in done.stdout


def test_a_case_is_a_whole_point_in_python_too():
    """The command line's words: another dtype beside a case would not be heeded."""
    alone = "--case: it is one whole point; leave out --model, --device, --dtype and --seed"
    one = {"only": ["forward/scaling"], "case": Case()}

    for beside in ({"dtype": "bfloat16"}, {"seed": 1}, {"device": "cpu"}, {"model": "tiny"}):
        with pytest.raises(UsageError, match=f"^{alone}$"):
            check("reference", **one, **beside)
    with pytest.raises(UsageError, match=r"^--case: name the one spec to judge with --only ID$"):
        check("reference", case=Case())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"dtype": "fp32"}, "--dtype fp32: no such dtype; give one of float32, "),
        ({"seed": -1}, "--seed -1: must be from 0 to 4294967295"),
        ({"limit": float("nan")}, "--limit: seconds must be more than 0, not nan"),
    ],
)
def test_a_value_that_means_nothing_is_refused_in_python_too(given, line):
    """No verdict of nothing judged."""
    with pytest.raises(UsageError) as found:
        check("reference", only=["forward/scaling"], **given)

    assert str(found.value).startswith(line)
