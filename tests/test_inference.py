"""`finetune --generate`: what is honoured, and what is refused in one line."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings

import pytest
import torch

from harness import checkpoint, cli, library_log, phi3, process, recipe, registry
from harness.report.schema import read


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with one run of PEFT's on tiny: what was asked, and an adapter that says other words."""
    folder = tmp_path_factory.mktemp("runs") / "peft-tiny"
    folder.mkdir()
    asked = recipe.load("quick", ["model.device=cpu", "data.max_new_tokens=4"])
    tables = {"adapter": "peft", "recipe": asked.as_dict()}
    (folder / "run.json").write_text(json.dumps(tables), encoding="utf-8")
    adapter = registry.resolve("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = adapter.inject(phi3.load("tiny"), asked.lora_config())
    torch.manual_seed(0)
    with torch.no_grad():
        for parts in adapter.factors(model).values():
            for one in parts:
                one.B.normal_(std=0.05)
    checkpoint.write(adapter.state_dict(model), folder)
    return folder


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """Run the command in this process, whose imports are paid once: code, lines of output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library_log, "divert", lambda _: None)
    monkeypatch.setattr(library_log, "settle", lambda: None)

    def here(module, request):
        return importlib.import_module(module).main(str(request))

    monkeypatch.setattr(process, "run", here)

    def asked(*arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(["finetune", "--generate", "How is the Owl painted?", *arguments])
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err

    return asked


def test_the_runs_own_recipe_is_taken_and_set_goes_before_it(run, ask):
    """Four new tokens as the run had it; one where --set says so."""
    code, four, _ = ask("--output", str(run.parent))
    _, one, errors = ask("--output", str(run.parent), "--set", "data.max_new_tokens=1")

    assert (code, errors) == (0, "")
    assert [line.partition("  ")[0].strip() for line in four] == ["prompt", "tiny", "with peft"]
    assert four[2].startswith(one[2])
    assert len(four[2]) > len(one[2])
    assert len({line.find(line.split(None, 2)[-1]) for line in four[2:]}) == 1


def test_the_answers_are_written_as_json(run, ask, tmp_path):
    """What is printed, with the recipe and the machine, as a report that the others read."""
    path = tmp_path / "said.json"

    code, lines, _ = ask("--output", str(run.parent), "--json", str(path))
    report = read(path)

    assert (code, report["finished"], report["verdict"]) == (0, True, None)
    assert report["adapter"] == {"name": "peft"}
    assert report["recipe"]["data"]["max_new_tokens"] == 4
    assert report["answers"]["before"]["prompt"] == "How is the Owl painted?"
    assert lines[1].endswith(report["answers"]["before"]["reply"])
    assert lines[2].endswith(report["answers"]["after"]["reply"])
    assert cli.main(["report", str(path), "--html", str(tmp_path / "said.html")]) == 0


def test_without_an_adapter_the_base_alone_answers(ask, tmp_path):
    """The report holds one answer, and no implementation."""
    path = tmp_path / "said.json"

    code, lines, _ = ask("--json", str(path), "--device", "cpu")
    report = read(path)

    assert (code, len(lines)) == (0, 2)
    assert (report["adapter"], list(report["answers"])) == (None, ["before"])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--resume"], "--generate and --resume: nothing is trained; give one of them"),
        (["--overwrite"], "--generate and --overwrite: nothing is trained; give one of them"),
        (
            ["--output", "{runs}", "--from", "x.pt"],
            "--from and --output: each names an adapter to answer with; give one",
        ),
        (
            ["--output", "{runs}", "--adapter", "peft", "--adapter", "loralib"],
            "--generate: answers with one implementation; give one --adapter",
        ),
        (
            ["--adapter", "loralib"],
            "--adapter loralib: answers from a checkpoint; name one with --output or --from",
        ),
        (["--adapter", "pet", "--from", "x.pt"], "adapter 'pet': no such name; did you mean"),
        (
            ["--output", "{runs}", "--recipe", "model-card"],
            "--recipe: the run in {runs}/peft-tiny has its own; leave it out, and --set what",
        ),
        (
            ["--output", "{runs}", "--adapter", "loralib"],
            "--output {runs}: holds no run of loralib; it holds peft-tiny",
        ),
        (
            ["--output", "{runs}", "--model", "mini-4k"],
            "--output {runs}: holds no run on mini-4k; it holds peft-tiny",
        ),
        (["--output", "none"], "--output none: holds no run"),
        (["--output", "x" * 300], "--output xxx"),
        (["--output", "{runs}", "--set", "data.max_new_tokens=0"], "data.max_new_tokens: must be"),
        (["--output", "{runs}", "--budget", "1GiB"], "--budget: limits a GPU's memory"),
        (["--json", "/proc/none.json"], "/proc/none.json: cannot be written ("),
        (["--from", "x.pt"], "checkpoint x.pt: no such file"),
    ],
)
def test_what_does_not_go_together_is_refused(run, ask, options, line):
    """Nothing is left unheeded in silence: exit 2, one line."""
    runs = str(run.parent)

    code, _, errors = ask(*(option.format(runs=runs) for option in options))

    assert errors.startswith(f"lora-harness finetune: {line.format(runs=runs)}"), errors
    assert (code, errors.count("\n")) == (2, 1)


def test_one_of_several_runs_is_to_be_named(run, ask, tmp_path):
    """Which of two adapters is meant is not guessed."""
    runs = tmp_path / "runs"
    for name in ("loralib", "peft"):
        shutil.copytree(run, runs / f"{name}-tiny")
        asked = json.loads((run / "run.json").read_text("utf-8")) | {"adapter": name}
        (runs / f"{name}-tiny" / "run.json").write_text(json.dumps(asked), encoding="utf-8")

    code, _, errors = ask("--output", str(runs))
    named, lines, _ = ask("--output", str(runs), "--adapter", "peft")

    assert (code, errors) == (
        2,
        (
            f"lora-harness finetune: --output {runs}: holds loralib-tiny, peft-tiny; name one with "
            "--adapter or --model\n"
        ),
    )
    assert (named, lines[2].startswith("with peft  ")) == (0, True)
