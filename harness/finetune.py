"""`lora-harness finetune`: the documented procedure end to end, for one implementation after another.

Each implementation runs in a process of its own (`harness.run`); this module chooses the recipe and
the folders, starts the processes, and ends with one table for each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import recipe as recipes
from harness import run_folder
from harness.console import table
from harness.errors import UsageError
from harness.measure.memory import parse_bytes
from harness.registry import names
from harness.report.schema import read

if TYPE_CHECKING:
    import argparse

    from harness.recipe import Recipe
    from harness.run_folder import RunFolder

DEFAULT_ADAPTERS = ("peft", "loralib")
WIDTH = 100

MARKS = {"passed": "yes", "failed": "NO", "not_claimed": "not claimed", "not_run": "not judged"}


def command(args: argparse.Namespace) -> int:
    """The command line's `finetune`. Returns 0 where every property holds on every implementation.

    1 where one does not, 3 where one could not be judged, 2 on wrong usage and on Ctrl-C, which
    keeps what was done and says how to go on.
    """
    overrides = list(args.set)
    for option, key in (("model", "model.name"), ("device", "model.device"), ("data", "data.name")):
        if value := getattr(args, option, None):
            overrides.append(f"{key}={json.dumps(value)}")
    recipe = recipes.load(args.recipe, overrides)
    budget = parse_bytes(args.budget) if args.budget else None
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite: one goes on, the other starts afresh; give one")
    adapters = list(dict.fromkeys(args.adapter or _able(recipe)))
    for adapter in adapters:
        _known(adapter)
    start = getattr(args, "start", None)
    if args.generate is not None:
        return _generate(args, recipe, adapters, start)
    model = str(recipe.model["name"])
    folders = [
        run_folder.place(
            adapter, model, output=args.output, resume=args.resume, overwrite=args.overwrite
        )
        for adapter in adapters
    ]
    codes = []
    for k, (adapter, folder) in enumerate(zip(adapters, folders, strict=True)):
        if k:
            print()
        code = run(
            recipe,
            adapter,
            folder=folder,
            resume=args.resume,
            budget=budget,
            partial=args.allow_partial_targets,
            start=start,
        )
        if code == 2:
            return 2
        codes.append(code)
        if not folder.report.is_file():  # it broke down before there was anything to report
            continue
        report = read(folder.report)
        if report["finished"]:
            print(told(report, folder))
        if args.json:
            path = args.json if len(adapters) == 1 else _beside(args.json, adapter)
            _copy(folder.report, path)
    return next((code for code in (1, 3) if code in codes), 0)


def run(
    recipe: Recipe,
    adapter: str,
    *,
    folder: RunFolder,
    resume: bool = False,
    budget: int | None = None,
    partial: bool = False,
    start: Path | None = None,
) -> int:
    """Fine-tune one implementation in a process of its own and prove what it made.

    Args:
        recipe: what to train.
        adapter: an implementation, as `harness.registry.resolve` takes it.
        folder: where everything goes; replaced, unless `resume`.
        resume: go on from the folder's last checkpoint.
        budget: the most bytes of GPU memory to use.
        partial: go on where some target names match nothing.
        start: an adapter checkpoint to start from.

    Returns the process's exit code: 0 all hold, 1 one does not, 2 wrong usage, 3 one not judged.
    The report lies at `folder.report`.
    """
    if resume:
        _same(folder, recipe)
    else:
        run_folder.clear(folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.request.write_text(
            json.dumps(
                {
                    "adapter": adapter,
                    "recipe": recipe.as_dict(),
                    "notes": list(recipe.notes),
                    "folder": str(folder.path),
                    "resume": resume,
                    "budget": budget,
                    "partial": partial,
                    "start": None if start is None else str(start),
                },
                indent=1,
            ),
            encoding="utf-8",
        )
    except OSError as error:
        raise UsageError(
            f"output folder {folder.path}: cannot be written ({error.strerror}); give another --output"
        ) from error
    code = _process("harness.run", folder.request)
    if code < 0 or code not in (0, 1, 2, 3):
        raise UsageError(
            f"adapter {adapter}: its process ended with {_ending(code)}; "
            f"what it said is above, and in {folder.path / 'library.log'}"
        )
    return code


def _process(module: str, request: Path) -> int:
    """Run one of our modules on a request; Ctrl-C is the child's to answer, which has the work."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # The child must not inherit the ignored signal: Python installs its own only over the default.
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(module=module), str(request)],
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


_CHILD = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from {module} import main; sys.exit(main(sys.argv[1]))"
)


def told(report: dict[str, Any], folder: RunFolder) -> str:
    """A report as the table that ends a run: at most `WIDTH` columns."""
    rows = [
        (one["sentence"], MARKS[one["outcome"]], one["measured"], one["allowed"])
        for one in report["results"]
    ]
    lines = [
        "",
        _title(report),
        "",
        table(rows, ("property", "holds", "measured", "allowed")),
    ]
    lines += [
        textwrap.fill(
            f"{one['sentence']}: {one['reason']}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
        )
        for one in report["results"]
        if one.get("reason")
    ]
    before, after = report["answers"]["before"], report["answers"]["after"]
    lines += [
        "",
        *_said("prompt", before["prompt"]),
        *_said("before", before["reply"]),
        *_said("after", after["reply"]),
        "exact     "
        + " → ".join(
            f"{one['matched']} of {one['asked']} ({one['matched'] / one['asked']:.0%})"
            for one in (before, after)
        ),
        "",
        f"report    {folder.report}",
        f"adapter   {folder.path / 'adapter.safetensors'} and adapter.pt",
        f"log       {folder.log}",
    ]
    return "\n".join(lines)


def _title(report: dict[str, Any]) -> str:
    who = f"{report['adapter']['name']} {report['adapter']['version']} on {report['model']}"
    return f"{who}: {report['verdict']}, {report['ran']} of {report['required']} judged"


def _said(title: str, text: str) -> list[str]:
    body = textwrap.wrap(" ".join(text.split()) or "(nothing)", WIDTH - 10)[:4]
    return [f"{title if not k else '':<10}{line}" for k, line in enumerate(body)]


def _able(recipe: Recipe) -> tuple[str, ...]:
    """The default implementations, less one that is known not to take a 4-bit base."""
    if not recipe.model["load_in_4bit"]:
        return DEFAULT_ADAPTERS
    print("note: loralib has no layer for a 4-bit base; peft alone is run")
    return ("peft",)


def _known(adapter: str) -> None:
    """Raise UsageError early on a name that nobody knows, without importing what it names."""
    if ":" not in adapter and adapter not in names():
        from harness.registry import resolve

        resolve(adapter)


def _same(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UsageError where the run to go on with had another model or adapter shape."""
    then, now = folder.asked()["recipe"], recipe.as_dict()
    keys = [("model", key) for key in ("name", "seed", "dtype", "load_in_4bit")]
    keys += [("peft_config", key) for key in sorted(then["peft_config"] | now["peft_config"])]
    for section, key in keys:
        was, asked = then[section].get(key), now[section].get(key)
        if was != asked:
            raise UsageError(
                f"--resume: {folder.path} was made with {section}.{key} = {was!r}, not {asked!r}; "
                "resume with the same recipe, or start afresh"
            )


def _generate(
    args: argparse.Namespace, recipe: Recipe, adapters: list[str], start: Path | None
) -> int:
    """Answer one prompt, in a process of its own: with the base, and with an adapter where one is given."""
    import tempfile

    asked = recipe.as_dict()
    adapter = adapters[0]
    if start is None and args.output:
        folder = run_folder.place(
            adapter, str(recipe.model["name"]), output=args.output, resume=True, overwrite=False
        )
        asked, start = folder.asked()["recipe"], folder.path
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "adapter": adapter,
                    "recipe": asked,
                    "start": None if start is None else str(start),
                    "prompt": args.generate,
                    "partial": args.allow_partial_targets,
                    "folder": scratch,
                }
            ),
            encoding="utf-8",
        )
        return _process("harness.inference", request)


def _copy(report: Path, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, path)
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written ({error.strerror})") from error


def _beside(path: Path, adapter: str) -> Path:
    return path.with_name(f"{path.stem}-{adapter.replace(':', '-')}{path.suffix or '.json'}")


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"
