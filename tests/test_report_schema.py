"""The one file of a run: growing, surviving, and refusing what is no report."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import report_samples as samples
from report_mutants import mutants

from harness.cli import main
from harness.errors import UsageError
from harness.report import schema as schema_module
from harness.report.schema import SCHEMA_VERSION, Recorder, parse, read, schema
from harness.report.shape import Misshapen, compile_schema

ROW = {"subject": "peft", "metric": "flops", "value": 8, "unit": "FLOP"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.json"


def test_a_report_is_whole_from_its_first_moment(path):
    """Before anything is added, the file is a report that says it is unfinished."""
    Recorder(path, kind="check", model="tiny")

    found = read(path)
    assert (found["finished"], found["model"], found["results"]) == (False, "tiny", [])


def test_a_report_grows_row_by_row(path):
    """What was added is on disk before the next is added."""
    report = Recorder(path, kind="bench")
    lengths = []
    for _ in range(3):
        report.add("counters", ROW)
        lengths.append(len(read(path)["counters"]))

    assert lengths == [1, 2, 3]


def test_closing_normally_finishes(path):
    """Leaving the block marks the end; what is read is what was recorded."""
    with Recorder(path, kind="check", seed=3) as report:
        report.add("results", [{"spec": "merge/no-drift", "outcome": "passed"}])
        report.set("verdict", "CONFORMS")

    found = read(path)
    assert found["finished"] is True
    assert found["ended"] >= found["started"]
    assert {key: found[key] for key in report.report} == report.report


def test_an_exception_leaves_it_unfinished_and_told(path):
    """A run that raised is not finished, and its report says by what it ended."""

    def run():
        with Recorder(path, kind="check") as report:
            report.add("counters", ROW)
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        run()

    found = read(path)
    assert found["finished"] is False
    assert found["notes"] == ["ended by ZeroDivisionError: division by zero"]
    assert len(found["counters"]) == 1


def test_what_is_not_a_number_is_spelled(path):
    """NaN and the infinities are kept as words, since JSON has no numbers for them."""
    with Recorder(path, kind="finetune") as report:
        report.set("training", {"loss": [[1, math.nan], [2, math.inf], [3, -math.inf]]})

    values = [value for _, value in read(path)["training"]["loss"]]
    assert values == ["NaN", "Infinity", "-Infinity"]


def test_a_row_that_does_not_fit_is_the_callers_mistake(path):
    """A row without a metric is refused when it is added, naming what it lacks."""
    report = Recorder(path, kind="bench")

    with pytest.raises(ValueError, match="counters has no 'metric'"):
        report.add("counters", {"subject": "peft", "value": 1})


def test_an_unwritable_path_is_one_line(tmp_path):
    """A path below a file cannot be written, and is told with the remedy."""
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match=r"cannot be written \(.*\); give a path that can"):
        Recorder(tmp_path / "file" / "report.json", kind="check")


def test_no_scraps_are_left(path):
    """Beside the report, nothing remains of its writing."""
    with Recorder(path, kind="check") as report:
        report.add("notes", "one")

    assert [one.name for one in path.parent.iterdir()] == ["report.json"]


WORKER = """
import sys
from harness.report.schema import Recorder
report = Recorder(sys.argv[1], kind="bench", environment={}, model="tiny")
print("open", flush=True)
for index in range(100_000):
    report.add("counters", {"subject": "peft", "metric": f"m{index}", "value": index})
    print(index, flush=True)
"""


def test_twenty_kills_leave_twenty_reports(tmp_path):
    """Killed with -9 at random moments, a report is whole, unfinished, and has all that was added."""
    chance = random.Random(5)
    for attempt in range(20):
        path = tmp_path / f"{attempt}.json"
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0.0, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        said = process.communicate()[0].splitlines()

        found = read(path)
        assert found["finished"] is False
        # One row may be on disk whose line had no time to be printed.
        assert len(found["counters"]) - len(said) in {0, 1}
        assert [row["value"] for row in found["counters"]] == list(range(len(found["counters"])))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty; run again with --json"),
        ("  \n", "empty; run again with --json"),
        ("not json", "not JSON as a report has it"),
        ('{"schema_version": 1, "kind"', "not JSON as a report has it"),
        ('{"schema_version": 1, "seed": NaN}', "NaN is no JSON number"),
        ('{"schema_version": 1, "seed": 1e999}', "beyond what a float holds"),
        ('{"schema_version": 1, "seed": ' + "9" * 400 + "}", "has 400 digits"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "not a report: no schema_version"),
        ('{"name": "left-pad", "version": "1.0.0"}', "not a report: no schema_version"),
        ('{"schema_version": 2}', "written under schema 2, and this lora-harness reads up to 1"),
        ('{"schema_version": true}', "schema_version is no number from 1 on"),
        ('{"schema_version": 1}', "report has no 'kind'"),
        (
            '{"schema_version": 1, "kind": "check", "id": "a", "started": "x", "finished": 1}',
            "report.finished is 1, should be boolean",
        ),
        ("\udcff", "not JSON as a report has it"),
    ],
)
def test_what_is_no_report_is_told_in_one_line(path, text, told):
    """Each way of being no report has a sentence with the file, the fault and the remedy."""
    path.write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(UsageError) as error:
        read(path)
    assert told in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_of_200_mb_is_refused_unread(path):
    """What is too large to be a report is refused by its size."""
    with path.open("wb") as file:
        file.truncate(200_000_000)

    with pytest.raises(UsageError, match="191 MiB, more than the 64 MiB a report may have"):
        read(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    """Neither is a report, and each is told as what it is."""
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)


def test_older_versions_are_brought_up(monkeypatch, path):
    """A report of an older schema passes through each upgrade on its way."""
    monkeypatch.setattr(schema_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    monkeypatch.setitem(
        schema_module._UPGRADES, SCHEMA_VERSION, lambda old: old | {"schema_version": 2, "seed": 7}
    )
    monkeypatch.setattr(schema_module, "_check", lambda: lambda _value, _place: None)
    samples.write(path.parent, samples.check("old"))

    assert read(path.parent / "check-old.json")["seed"] == 7


def test_a_lone_surrogate_is_made_printable(path):
    """A string that no encoding can write is mended on reading."""
    path.write_text(json.dumps(samples.check(label="a\ud800b")))

    assert read(path)["label"].encode() == b"a\xef\xbf\xbdb"


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(samples.check(label="@")).encode().replace(b"@", b"a\xed\xa0\x80b"),
        json.dumps(samples.check(label="a\ud800b")).encode("utf-16"),
        json.dumps(samples.check(label="a\ud800b"), ensure_ascii=False).encode(
            "utf-16-le", "surrogatepass"
        ),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_surrogate_in_any_encoding_is_made_printable(tmp_path, capsys, data, command):
    """Raw in UTF-8, or in UTF-16: pages and Markdown are written all the same."""
    paths = [*samples.write(tmp_path, samples.check("old")), tmp_path / "new.json"]
    paths[1].write_bytes(data)
    reports = paths if command == "compare" else paths[1:]

    page = tmp_path / "page.html"
    assert main([command, *map(str, reports), "--html", str(page)]) == 0
    assert main([command, *map(str, reports), "--markdown", "-"]) == 0
    capsys.readouterr().out.encode()
    assert read(paths[1])["label"] == "a\ufffdb"


@pytest.mark.parametrize("option", ["--html", "--json", "--markdown"])
@pytest.mark.parametrize("target", ["/", "loop/page", "a\0b"])
def test_a_path_that_is_no_files_is_told(tmp_path, capsys, option, target):
    """The root, a loop of links and a name with a NUL end in one line and exit 2."""
    (tmp_path / "loop").symlink_to("loop")
    paths = map(str, samples.write(tmp_path, samples.small("old"), samples.small("new")))

    assert main(["compare", *paths, option, str(tmp_path / target)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (" in line
    assert line.endswith("); give a path that can")


@pytest.mark.parametrize(
    ("option", "begins"),
    [("--html", "<!doctype html>"), ("--markdown", "## "), ("--json", '{"schema_version": 1')],
)
def test_a_pipe_gets_the_whole_text_once(tmp_path, option, begins):
    """/dev/stdout in a pipeline and a FIFO are written to, a growing report when it is done."""
    paths = samples.write(tmp_path, samples.small("old"), samples.small("new"))
    command = [sys.executable, "-m", "harness.cli", "compare", *map(str, paths), option]
    said = subprocess.run([*command, "/dev/stdout"], capture_output=True, text=True, check=True)
    assert said.stdout.count(begins) == 1

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([*command, str(fifo)], stdout=subprocess.DEVNULL) as process:
        text = fifo.read_text(encoding="utf-8")
    assert process.returncode == 0
    assert text.startswith(begins)


def test_the_schema_is_valid_and_takes_every_sample():
    """The committed schema is JSON Schema, and the samples of every kind fit it."""
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())

    for report in (samples.check(), samples.finetune(), samples.bench(), samples.night(1)):
        assert not list(validator.iter_errors(report))


def test_a_schema_never_promises_what_is_not_checked():
    """A keyword that the compiler does not know is refused, not passed over."""
    with pytest.raises(ValueError, match="'pattern'"):
        compile_schema({"type": "string", "pattern": "x"})


def test_the_compiled_schema_agrees_with_the_general_validator():
    """On 300 damaged reports, the closures and jsonschema give the same answer."""
    validator = jsonschema.Draft202012Validator(schema())
    check = compile_schema(schema())
    answers = set()
    for damaged in mutants(300, seed=11, of=samples.small()):
        try:
            value = json.loads(damaged)
        except ValueError:
            continue
        wanted = validator.is_valid(value)
        try:
            check(value, "report")
        except Misshapen:
            found = False
        else:
            found = True
        assert found == wanted, next(validator.iter_errors(value), None)
        answers.add(found)

    assert answers == {True, False}


def test_parse_completes_absent_sections():
    """A report without a section is indexed as one with an empty section."""
    found = parse(json.dumps(samples.head("check", "bare")).encode(), name="bare")

    assert (found["results"], found["training"], found["artefacts"]) == ([], None, {})
