"""A folder of reports as a history: order, trend, the run at which a row changed, broken files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import report_samples as samples

from harness.cli import main
from harness.report.compare import compare
from harness.report.history import load
from harness.report.schema import parse, read
from harness.report.trend import trace


def test_a_folder_is_read_in_order_of_time(tmp_path):
    """Runs come by when they started, whatever their files are called."""
    days = [samples.check(name) for name in "cab"]
    for report, day in zip(days, (3, 1, 2), strict=True):
        report["started"] = samples.head("check", "x", day=day)["started"]
    samples.write(tmp_path, *days)

    assert [report["id"] for report in load([str(tmp_path)], [])] == [
        "check-a",
        "check-b",
        "check-c",
    ]


def test_a_broken_file_is_named_and_skipped(tmp_path, capsys):
    """A history with a broken file, a copy and a comparison in it is read without them."""
    samples.write(tmp_path, samples.night(1, 100), samples.night(2, 100))
    (tmp_path / "broken.json").write_text('{"schema_version": 1, "ki')
    (tmp_path / "copy.json").write_text(json.dumps(samples.night(2, 100)))
    (tmp_path / "past.json").write_text(json.dumps(samples.head("compare", "past")))

    assert main(["compare", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "broken.json: not JSON" in told.err
    assert "the same run as" in told.err
    assert "past.json" not in told.err
    assert "same" in told.out


def test_a_broken_file_given_by_name_is_an_error(tmp_path, capsys):
    """What a person names must be readable."""
    paths = samples.write(tmp_path, samples.night(1, 100))
    (tmp_path / "broken.json").write_text("{")

    assert main(["compare", str(paths[0]), str(tmp_path / "broken.json")]) == 2
    assert "broken.json: not JSON" in capsys.readouterr().err


def test_the_run_at_which_each_row_changed_is_told():
    """A spec that broke and mended, and a counter that rose, are told at their runs."""
    trend = trace(_read(samples.night(day, 120)) for day in (98, 99, 100, 199, 200, 214, 215))

    found = {
        (one.name, trend.runs[change.run].id, change.verdict)
        for one in trend.series
        for change in one.changes
    }
    assert found == {
        ("peft training-step flops", "bench-night-100", "worse"),
        ("merge/same-output", "bench-night-200", "worse"),
        ("merge/same-output", "bench-night-215", "better"),
    }


def test_a_row_that_comes_and_goes_keeps_its_place():
    """Readings stand at their runs, with nothing where a run had none."""
    nights = [samples.night(day, 80) for day in (1, 2, 3, 4)]
    for night in (nights[0], nights[2]):
        night["results"] = [one for one in night["results"] if one["spec"] != "merge/no-drift"]
    trend = trace(map(_read, nights))

    series = next(one for one in trend.series if one.name == "merge/no-drift")
    assert series.readings == [None, "passed", None, "passed"]
    assert [(change.run, change.verdict) for change in series.changes] == [
        (1, "added"),
        (2, "removed"),
        (3, "added"),
    ]


def test_a_trend_of_two_runs_says_what_their_comparison_says():
    """Where one of the runs has two versions of a thing, both key their rows in the same way."""
    row = {"subject": "peft", "metric": "flops", "unit": "FLOP"}
    one = samples.head("matrix", "one") | {"counters": [row | {"value": 1, "version": "1"}]}
    two = samples.head("matrix", "two") | {
        "counters": [row | {"value": 1, "version": "1"}, row | {"value": 2, "version": "2"}]
    }
    for runs in ((one, two), (two, one)):
        old, new = map(_read, runs)

        told = [(row.verdict, row.old, row.new) for row in compare(old, new).rows]
        changes = [
            (change.verdict, change.old, change.new)
            for series in trace([old, new]).series
            for change in series.changes
        ]
        assert changes == [one for one in told if one[0] != "same"]


def test_another_python_rules_out_its_calls_in_a_trend_too():
    """Where a comparison calls Python's calls incomparable, the trend does not call them worse."""
    runs = [samples.head("bench", name) for name in ("one", "two")]
    for run, calls in zip(runs, (100, 110), strict=True):
        run["counters"] = [{"subject": "peft", "metric": "python_calls", "value": calls}]
    runs[1]["environment"]["python"]["version"] = "3.12.1"

    (series,) = trace(map(_read, runs)).series
    assert [change.verdict for change in series.changes] == ["incomparable"]


def test_a_row_keeps_its_line_through_a_run_of_two_versions():
    """Before, in and after a run with two versions, the first version's values are one series."""
    row = {"subject": "peft", "metric": "flops", "unit": "FLOP"}
    runs = [
        samples.head("matrix", f"run-{at}")
        | {"counters": [row | {"value": int(one), "version": one} for one in versions]}
        for at, versions in enumerate(("1", "12", "2", "3"))
    ]

    found = trace(map(_read, runs))
    assert sorted(str(one.readings) for one in found.series) == [
        "[1, 1, None, None]",
        "[None, 2, 2, 3]",
    ]


def test_the_frame_has_a_row_a_series_and_a_column_a_run():
    """As a table of pandas, a trend has a line a row and a column a run."""
    trend = trace(_read(samples.night(day, 100)) for day in (1, 2, 3))

    frame = trend.frame()
    assert frame.shape == (len(trend.series), 3)
    assert frame.loc[("spec", "merge/no-drift", "", "")].tolist() == ["passed"] * 3


def test_three_reports_are_told_with_the_trend(tmp_path, capsys):
    """With three reports, the terminal says at which run a row changed."""
    paths = samples.write(tmp_path, *(samples.night(day, 100) for day in (98, 99, 100)))

    assert main(["compare", *map(str, paths)]) == 1
    told = capsys.readouterr().out
    assert "3 runs; where rows changed, the latest first:" in told
    assert "peft 0.21.2 tiny, 2026-04-11 03:00  worse    peft training-step flops" in told


def test_a_folder_of_several_series_shows_each(tmp_path, capsys):
    """A store with two implementations in it makes one page with both, and their histories."""
    other = {"adapter": {"name": "loralib", "version": "0.1.2"}}
    samples.write(
        tmp_path,
        *(samples.night(day, 100) for day in (1, 2)),
        *(samples.night(day, 100) | other | {"id": f"other-{day}"} for day in (1, 2, 3)),
    )
    page = tmp_path / "page.html"

    assert main(["report", str(tmp_path), "--html", str(page)]) == 0
    capsys.readouterr()
    assert "peft 0.21.2 tiny, 2026-01-03 03:00: 2 runs" in page.read_text()
    assert "loralib 0.1.2 tiny, 2026-01-04 03:00: 3 runs" in page.read_text()


@pytest.mark.parametrize(
    "other", [{"tier": "full"}, {"device": "cuda"}, {"dtype": "float32"}, {"model": "mini-4k"}]
)
def test_runs_that_were_asked_other_things_are_not_one_series(other, tmp_path, capsys):
    """A full run in a folder of core ones is compared with full ones, and one on a card with such."""
    asked = {"tier": "core", "device": "cpu", "dtype": None}
    for day, changes in enumerate(({}, other, {}, other)):
        samples.write(tmp_path, samples.check(f"day-{day}", **asked | changes))

    assert main(["compare", str(tmp_path)]) == 0
    assert "runs; where rows changed" not in capsys.readouterr().out


def test_an_empty_folder_is_told(tmp_path, capsys):
    """A folder without reports says so."""
    assert main(["report", str(tmp_path)]) == 2
    assert "no *.json in this folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_year_of_nights_fits_in_a_gibibyte_and_a_page(tmp_path):
    """365 reports of 500 rows are read and drawn in one process under 1 GiB, into under 2 MB."""
    year = tmp_path / "year"
    year.mkdir()
    samples.write(year, *(samples.night(day) for day in range(1, 366)))
    page = tmp_path / "year.html"
    code = (
        "import resource, sys; from harness.cli import main; code = main(sys.argv[1:]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )

    said = subprocess.run(
        [sys.executable, "-c", code, "report", str(year), "--html", str(page)],
        capture_output=True,
        text=True,
        check=True,
    )
    exit_code, peak = map(int, said.stdout.split()[-2:])
    assert exit_code == 0
    assert peak < 2**30
    assert page.stat().st_size < 2_000_000
    assert "365 runs" in page.read_text()


def _read(report):
    return parse(json.dumps(report).encode(), name=report["id"])


def test_reading_is_checked(tmp_path):
    """What the history reads, `read` has checked."""
    (path,) = samples.write(tmp_path, samples.night(1, 100))

    assert next(load([str(path)], [])) == read(path)
