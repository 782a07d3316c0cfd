"""The matrix: its report grows leg by leg, and its folder is looked at first."""

from __future__ import annotations

import zipfile

import pytest

from harness import matrix
from harness.cli import main
from harness.report.schema import read

RUN = ("--leg", "here", "--leg", "peft==0.8.2", "--", "check", "peft")


def test_a_matrix_cut_short_keeps_the_legs_that_ran(tmp_path, monkeypatch, capsys):
    """The file is there before the first leg, and holds each leg as soon as it is over."""
    path = tmp_path / "matrix.json"
    held = []

    def leg(requirements, run, folder):
        held.append([leg["exit_code"] for leg in read(path)["legs"]])
        if requirements:
            raise KeyboardInterrupt
        return matrix.Leg(requirements=requirements, exit_code=1)

    monkeypatch.setattr(matrix, "run_leg", leg)
    code = main(["matrix", "--environments", str(tmp_path), "--json", str(path), *RUN])
    report = read(path)

    assert code == 130
    assert held == [[], [1]]
    assert not report["finished"]
    assert [leg["exit_code"] for leg in report["legs"]] == [1]


def test_what_fails_in_one_leg_is_told_below_the_table(tmp_path, monkeypatch, capsys):
    """The spec, what was expected, what was found and where; what fails in every leg is not news."""
    wrong = {"expected": "ΔW of linear", "actual": "0.25", "where": "a.b"}

    def leg(requirements, run, folder):
        outcome = "failed" if requirements else "passed"
        results = [
            {
                "spec": "merge/idempotent",
                "outcome": outcome,
                "failures": [wrong] * bool(requirements),
            },
            {"spec": "merge/no-drift", "outcome": "failed", "failures": [wrong]},
        ]
        return matrix.Leg(requirements=requirements, exit_code=1, report={"results": results})

    monkeypatch.setattr(matrix, "run_leg", leg)
    main(["matrix", "--environments", str(tmp_path), *RUN])
    table, told = capsys.readouterr().out.split("\n\n")[-2:]

    assert "merge/idempotent" in table
    assert "no-drift" not in table + told
    assert told == (
        "peft==0.8.2\n  ✗ merge/idempotent: expected ΔW of linear; actual 0.25, at a.b\n"
    )


def _cost(value, **changes):
    row = {"subject": "peft", "phase": "inject", "metric": "flops", "value": value, "unit": "FLOP"}
    return row | changes


@pytest.mark.parametrize(
    ("reports", "told"),
    [
        (
            (
                {"counters": [_cost(7), _cost(100, conditions={"r": 8}, version="0.21.2")]},
                {"counters": [_cost(7), _cost(104, conditions={"r": 8}, version="0.8.2")]},
            ),
            ["costs              where      here  peft==0.8.2",
             "─────────────────  ─────  ────────  ───────────",
             "peft inject flops  r=8    100 FLOP     104 FLOP"],
        ),
        (
            ({"memory": [_cost(7, exact=False)]}, {"memory": [_cost(8, exact=False)]}),
            ["no counted cost differs between the legs"],
        ),
        (({"results": [{"spec": "a/b", "outcome": "passed"}]},) * 2, ["no spec differs between the legs"]),
        (({"timings": [_cost(7)]}, {"timings": [_cost(8)]}), ["no leg judged a spec or counted a cost"]),
        (({"counters": [_cost(7)]}, {}), []),
    ],
)  # fmt: skip
def test_what_a_bench_counts_is_set_side_by_side(tmp_path, monkeypatch, capsys, reports, told):
    """A cost that is another in one leg is shown; what nobody judged or counted is not called equal."""

    def leg(asked, *_):
        return matrix.Leg(requirements=asked, exit_code=0, report=reports[bool(asked)])

    monkeypatch.setattr(matrix, "run_leg", leg)
    main(["matrix", "--environments", str(tmp_path), *RUN[:-2], "bench"])

    assert capsys.readouterr().out.splitlines()[3:] == told


@pytest.mark.parametrize(
    ("leg", "requirements"),
    [
        ("peft==0.13.2,transformers==4.46.1", ("peft==0.13.2", "transformers==4.46.1")),
        ("peft==0.13.2 transformers==4.46.1", ("peft==0.13.2", "transformers==4.46.1")),
        ("peft>=0.5,<0.6,torch!=2.1,~=2.0", ("peft>=0.5,<0.6", "torch!=2.1,~=2.0")),
        ("'peft>=0.5, <0.6', torch", ("peft>=0.5, <0.6", "torch")),
        ("acme[cpu,gpu]>=1,peft", ("acme[cpu,gpu]>=1", "peft")),
    ],
)
def test_a_comma_parts_requirements_and_no_range(tmp_path, monkeypatch, capsys, leg, requirements):
    """A range of versions, and extras, reach pip whole."""
    wanted = []
    monkeypatch.setattr(
        matrix,
        "run_leg",
        lambda asked, *_: wanted.append(asked) or matrix.Leg(requirements=asked, exit_code=0),
    )
    main(["matrix", "--environments", str(tmp_path), "--leg", leg, *RUN[2:]])

    assert wanted == [requirements, ("peft==0.8.2",)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--leg", "peft'", *RUN],
            "--leg \"peft'\": no closing quotation; give it as --leg 'peft==0.13.2,transformers==4.46.1', or --leg here",
        ),
        (
            ["--leg", "", *RUN],
            "--leg '': is empty; give it as --leg 'peft==0.13.2,transformers==4.46.1', or --leg here",
        ),
        (
            [*RUN, "--json", "mine.json"],
            "--json after -- would be one file for all legs; give it before --, and it holds each",
        ),
    ],
)
def test_what_a_leg_cannot_be_given_is_wrong_usage(capsys, arguments, told):
    """A quote left open, and one file for what every leg writes: one line before any leg runs."""
    assert main(["matrix", *arguments]) == 2
    assert capsys.readouterr().err == f"lora-harness matrix: {told}\n"


@pytest.mark.parametrize("folder", ["{tmp}/file", "{tmp}/file/below", "/proc/nothing", "/proc"])
def test_a_folder_that_cannot_hold_environments_is_wrong_usage(tmp_path, capsys, folder):
    """A file, or where nothing can be made: one line before any leg runs."""
    (tmp_path / "file").touch()
    folder = folder.format(tmp=tmp_path)

    assert main(["matrix", "--environments", folder, *RUN]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lora-harness matrix: --environments {folder}: cannot hold environments")
    assert err.count("\n") == 1


def test_an_environment_that_cannot_be_made_is_a_leg_of_exit_2(tmp_path, monkeypatch):
    """A full disk, say: the leg says so, and the others go on."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matrix.venv, "create", full)
    leg = matrix.run_leg(("peft==0.8.2",), ("check", "peft"), tmp_path)

    assert leg.exit_code == 2
    assert "no environment can be made" in leg.said
    assert "No space left on device" in leg.said


def test_what_clashes_in_a_leg_is_told_and_kept(tmp_path):
    """A wheel of nothing called numpy 0.0.1, installed for real: pandas requires another."""
    wheel = tmp_path / "numpy-0.0.1-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("numpy-0.0.1.dist-info/METADATA", about)
        file.writestr("numpy-0.0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("numpy-0.0.1.dist-info/RECORD", "")

    first, again = (matrix.environment([str(wheel)], tmp_path) for _ in range(2))
    told = matrix.clashes(again)

    assert first == again
    assert any(
        line.startswith("pandas ") and line.endswith(", but you have numpy 0.0.1") for line in told
    )
