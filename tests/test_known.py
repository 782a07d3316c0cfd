"""The list of known failures: what it takes, what it excuses, and that it cannot rot."""

from __future__ import annotations

import pytest

from harness import UsageError, check, known
from harness.case import Case
from harness.failure import Failure
from harness.spec import catalogue

ENTRY = {
    "spec": '"forward/scaling"',
    "kind": '"value"',
    "reason": '"alpha is not divided by r"',
    "url": '"https://example.org/acme/lora/issues/7"',
    "expires": "2030-01-01",
}
BUILT_IN = [
    pytest.param(entry, id=f"{name}-{entry.spec}-{number}")
    for name, version in (("peft", "0.21.2"), ("loralib", "0.1.2"), ("transformers", "5.23.0"))
    for number, entry in enumerate(known.built_in(name, version))
]


def written(tmp_path, **changes):
    """A file of one entry: `ENTRY` with other values, without those that are None."""
    values = {name: value for name, value in {**ENTRY, **changes}.items() if value is not None}
    lines = [f"{name} = {value}" for name, value in values.items()]
    path = tmp_path / "known.toml"
    path.write_text("\n".join(["[[known]]", *lines, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reason": None}, "entry 1: reason must be given, as a str"),
        ({"expires": '"2030-01-01"'}, "entry 1: expires must be given, as a date"),
        ({"expires": "2030-01-01T00:00:00"}, "entry 1: expires must be given, as a date"),
        ({"until": "2030-01-01"}, "entry 1: unknown key until"),
        ({"case": "{ colour = 1 }"}, "entry 1: unknown key colour"),
        ({"case": '"merged"'}, 'entry 1: case must be a table, such as { way = "merged" }'),
        ({"kind": '"wrong"'}, "entry 1: kind must be one of value, names,"),
        ({"spec": '"forward/scalign"'}, "entry 1: no spec is called 'forward/scalign'"),
        ({"versions": '"0.1.2"'}, "entry 1: versions must be a specifier such as"),
        ({"versions": "1"}, "entry 1: versions must be a specifier such as"),
        ({"spec": "forward"}, "known failures known.toml: not TOML: Invalid value"),
    ],
)
def test_an_entry_that_is_not_whole_is_refused_in_one_line(tmp_path, changes, said):
    """What is wrong with which entry of which file, in one line."""
    with pytest.raises(UsageError) as told:
        known.load(written(tmp_path, **changes))

    assert said in str(told.value)
    assert "known.toml" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_misspelt_table_is_refused(tmp_path):
    """A list under another name would excuse nothing, and nobody would notice."""
    path = tmp_path / "known.toml"
    path.write_text('[[knwon]]\nspec = "forward/scaling"\n', encoding="utf-8")

    with pytest.raises(UsageError, match=r"every entry starts with \[\[known\]\]"):
        known.load(path)


def test_a_list_of_anything_but_tables_is_refused(tmp_path):
    """What is no table has no keys to look at."""
    path = tmp_path / "known.toml"
    path.write_text("known = [1, 2]\n", encoding="utf-8")

    with pytest.raises(UsageError, match=r"entry 1: it must be a table, .*\[\[known\]\]"):
        known.load(str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    """The path is told, with the system's reason."""
    with pytest.raises(UsageError, match=r"nowhere\.toml: No such file"):
        known.load(tmp_path / "nowhere.toml")


def test_an_entry_excuses_its_own_kind_at_its_own_cases_alone(tmp_path):
    """Another kind of failure, another case or another spec is not excused."""
    case = '{ way = ["eval", "merged"], r = 3 }'
    (entry,) = known.load(written(tmp_path, case=case))
    failure = Failure(kind="value", case="", expected="", actual="")
    other = Failure(kind="raised", case="", expected="", actual="")

    assert entry.excuses("forward/scaling", Case(way="eval"), failure)
    assert entry.excuses("forward/scaling", Case(way="merged", dtype="bfloat16"), failure)
    assert not entry.excuses("forward/scaling", Case(way="eval"), other)
    assert not entry.excuses("forward/scaling", Case(way="train"), failure)
    assert not entry.excuses("forward/scaling", Case(way="eval", r=5), failure)
    assert not entry.excuses("forward/autocast", Case(way="eval"), failure)


@pytest.mark.parametrize(
    ("version", "there"),
    [("0.21.2", True), ("0.20.0", True), ("0.21.2+cu128", True), ("0.22.0", False), ("?", False)],
)
def test_a_built_in_entry_is_of_the_versions_it_names(version, there):
    """An open bug of PEFT's is known of the releases it was seen in, and of no later one."""
    specs = {entry.spec for entry in known.built_in("peft", version)}

    assert ("merge/tied-weights" in specs) is there


def test_an_implementation_without_a_list_has_none():
    """The reference has nothing to excuse, nor has a stranger, whatever it is called."""
    assert known.built_in("reference", "0.1") == []
    assert known.built_in("n" * 300, "1.0") == []
    assert known.built_in("a\0b", "1.0") == []
    assert known.built_in("../known/peft", "0.21.2") == []
    assert known.built_in("acme", "1.0") == []


@pytest.mark.parametrize("entry", BUILT_IN)
def test_every_built_in_entry_is_of_a_spec_and_a_case_that_exist_and_cites_a_page(entry):
    """An entry that matches nothing in any tier would never be looked at again."""
    item = catalogue()[entry.spec]
    cases = [*item.cases, *item.more_cases]

    assert any(case.matches(entry.case) for case in cases)
    assert entry.url.startswith("https://github.com/")
    assert entry.versions
    assert entry.reason


@pytest.fixture
def _strangers(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))


@pytest.mark.usefixtures("_strangers")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expires": "2020-01-01"}, "expired on 2020-01-01"),
        ({"case": '{ way = "nowhere" }'}, "matches no case: mend its selector or remove it"),
        ({}, "no longer fails: remove it"),
    ],
)
def test_an_entry_that_is_not_true_is_red(tmp_path, changes, said):
    """An expired entry, one that matches nothing, and one that no longer fails make a verdict red."""
    import strangers

    verdict = check(
        strangers.correct(), only=["forward/scaling"], known=written(tmp_path, **changes)
    )
    (failure,) = verdict.failed[0].failures

    assert verdict.verdict == "DOES NOT CONFORM"
    assert failure.kind == "known"
    assert said in failure.actual
    assert "known.toml" in failure.expected


def test_an_entry_of_a_case_that_is_not_judged_is_left_alone(tmp_path):
    """One of the full tier in a run of the core tier, or of what this adapter does not claim."""
    point = catalogue()["several/disabled-equals-base"].more_cases[0]
    known = written(
        tmp_path,
        spec='"several/disabled-equals-base"',
        case=f'{{ specimen = "{point.specimen}" }}',
    )
    verdict = check("reference", only=["several/disabled-equals-base"], known=known)

    assert verdict.verdict == "CONFORMS"


@pytest.mark.usefixtures("_strangers")
def test_an_entry_of_a_spec_that_is_not_run_is_left_alone(tmp_path):
    """`--only` another family is no reason to call the list untrue."""
    import strangers

    verdict = check(strangers.correct(), only=["trainable/count"], known=written(tmp_path))

    assert verdict.verdict == "CONFORMS"
