"""`lora-harness finetune`: the documented procedure end to end, for one implementation after another.

Each implementation runs in a process of its own (`harness.run`); this module chooses the recipe and
the folders, starts the processes, and ends with one table for each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from harness import inference, process, run_folder
from harness import recipe as recipes
from harness.console import table, terminal_width, wrapped
from harness.errors import UsageError
from harness.measure.memory import parse_bytes
from harness.registry import check_known
from harness.report.schema import read

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from harness.recipe import Recipe
    from harness.run_folder import RunFolder

DEFAULT_ADAPTERS = ("peft", "loralib")
NARROWEST = 12
"""Columns of a table's column at the least."""

MARKS = {"passed": "yes", "failed": "NO", "not_claimed": "not claimed", "not_run": "not judged"}


def command(args: argparse.Namespace) -> int:
    """The command line's `finetune`. Returns 0 where every property holds on every implementation.

    1 where one does not, 3 where one could not be judged, 2 on wrong usage and on Ctrl-C, which
    keeps what was done and says how to go on.
    """
    overrides = list(args.set)
    for option, key in (("model", "model.name"), ("device", "model.device"), ("data", "data.name")):
        value = getattr(args, option, None)
        if value is not None and not value.strip():
            raise UsageError(f"--{option}: is empty; name one, or leave it out")
        if value is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    if args.generate is not None:
        return inference.command(args, overrides)
    recipe = recipes.load(args.recipe or recipes.NAMES[0], overrides)
    budget = parse_bytes(args.budget) if args.budget else None
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite: one goes on, the other starts afresh; give one")
    adapters = list(dict.fromkeys(args.adapter or _able(recipe)))
    for adapter in adapters:
        check_known(adapter)
    start = getattr(args, "start", None)
    model = str(recipe.model["name"])
    folders = [
        run_folder.place(
            adapter, model, output=args.output, resume=args.resume, overwrite=args.overwrite
        )
        for adapter in adapters
    ]
    copies: list[Path | None] = [None] * len(adapters)
    if args.json:
        single = len(adapters) == 1
        copies = [args.json if single else _beside(args.json, adapter) for adapter in adapters]
    codes = []
    with contextlib.ExitStack() as undo:
        for adapter, copy in zip(adapters, copies, strict=True):
            if copy:
                undo.callback(run_folder.begin(copy, adapter, model))
        for k, (adapter, folder, copy) in enumerate(zip(adapters, folders, copies, strict=True)):
            if k:
                print()
            older = run_folder.verdict(folder.report)[0]
            code = run(
                recipe,
                adapter,
                folder=folder,
                resume=args.resume,
                budget=budget,
                partial=args.allow_partial_targets,
                start=start,
                copy=copy,
            )
            if code == 2:
                return 2
            codes.append(code)
            if run_folder.verdict(folder.report)[0] in {None, older}:
                continue  # it broke down before there was anything to report
            report = read(folder.report)
            if report["finished"]:
                print(told(report, folder))
                if copy:
                    print(f"json      {copy}")
        undo.pop_all()
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
    copy: Path | None = None,
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
        copy: where else the report is written, from its first row on.

    Returns the process's exit code: 0 all hold, 1 one does not, 2 wrong usage, 3 one not judged.
    The report lies at `folder.report`.
    """
    if resume:
        _same(folder, recipe, adapter)
    else:
        run_folder.put_aside(folder)
    earlier = run_folder.verdict(folder.report)[0]
    try:
        code = _trained(
            {
                "adapter": adapter,
                "recipe": recipe.as_dict(),
                "notes": list(recipe.notes),
                "folder": str(folder.path.resolve()),  # an implementation may change directory
                "resume": resume,
                "budget": budget,
                "partial": partial,
                "start": None if start is None else str(start),
                "json": None if copy is None else str(copy.resolve()),
            },
            folder,
        )
    except BaseException:
        run_folder.bring_back(folder, with_log=True)
        raise
    name, verdict = run_folder.verdict(folder.report)
    judged = verdict is not None and name != earlier
    if judged:
        run_folder.forget(folder)
    else:  # the old run is gone from the first step on; before it, whatever the code, it comes back
        run_folder.bring_back(folder, with_log=code != 2)
    if code in (0, 3) and not judged:
        print(
            f"lora-harness finetune: {adapter}: its process ended with {process.ending(code)} before "
            "it was judged; an implementation that ends the process does not conform",
            file=sys.stderr,
        )
        return 1
    return code


def _trained(request: dict[str, Any], folder: RunFolder) -> int:
    """Run the process on a request that is written into the folder; returns its exit code."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.request.write_text(
            json.dumps(request, indent=1),
            encoding="utf-8",
        )
    except OSError as error:
        raise UsageError(
            f"output folder {folder.path}: cannot be written ({error.strerror}); give another --output"
        ) from error
    code = _process("harness.run", folder.request)
    if code < 0 or code not in (0, 1, 2, 3):
        raise UsageError(
            f"adapter {request['adapter']}: its process ended with {process.ending(code)}; "
            f"what it said is above, and in {folder.path / 'library.log'}"
        )
    return code


_process = process.run


def told(report: dict[str, Any], folder: RunFolder) -> str:
    """A report as the table that ends a run, as wide as the terminal."""
    rows = [
        (one["sentence"], MARKS[one["outcome"]], one["measured"], one["allowed"])
        for one in report["results"]
    ]
    lines = [
        "",
        wrapped(_title(report), subsequent_indent="    "),
        "",
        _table(rows, ("property", "holds", "measured", "allowed")),
    ]
    lines += [
        wrapped(
            f"{one['sentence']}: {one['reason']}", initial_indent="  ", subsequent_indent="    "
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


def _table(rows: Sequence[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    """The table, its cells broken between words where the terminal is narrower than it."""
    width = terminal_width()
    widths = [max(len(row[k]) for row in (headers, *rows)) for k in range(len(headers))]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    broken = []
    for row in rows:
        cells = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
        broken += list(itertools.zip_longest(*cells, fillvalue=""))
    return table(broken, headers)


def _title(report: dict[str, Any]) -> str:
    who = f"{report['adapter']['name']} {report['adapter']['version']} on {report['model']}"
    return f"{who}: {report['verdict']}, {report['ran']} of {report['required']} judged"


def _said(title: str, text: str) -> list[str]:
    body = textwrap.wrap(" ".join(text.split()) or "(nothing)", terminal_width() - 10)[:4]
    return [f"{title if not k else '':<10}{line}" for k, line in enumerate(body)]


def _able(recipe: Recipe) -> tuple[str, ...]:
    """The default implementations, less one that is known not to take a 4-bit base."""
    if not recipe.model["load_in_4bit"]:
        return DEFAULT_ADAPTERS
    print("note: loralib has no layer for a 4-bit base; peft alone is run")
    return ("peft",)


def _same(folder: RunFolder, recipe: Recipe, adapter: str) -> None:
    """Raise UsageError where the run to go on with had another implementation, model, shape or loss."""
    asked = folder.asked()
    then, now = asked["recipe"], recipe.as_dict()
    differing = [("adapter", asked.get("adapter", adapter), adapter)]
    keys = [("model", key) for key in ("name", "seed", "dtype", "load_in_4bit")]
    keys += [("data", "name")]
    keys += [("training_config", key) for key in ("max_length", "assistant_only_loss", "packing")]
    keys += [("peft_config", key) for key in sorted(then["peft_config"] | now["peft_config"])]
    differing += [
        (f"{section}.{key}", then[section].get(key), now[section].get(key)) for section, key in keys
    ]
    for name, was, wanted in differing:
        if was != wanted:
            raise UsageError(
                f"--resume: {folder.path} was made with {name} = {was!r}, not {wanted!r}; "
                "resume with the same recipe, or start afresh"
            )


def _beside(path: Path, adapter: str) -> Path:
    return path.with_name(f"{path.stem}-{adapter.replace(':', '-')}{path.suffix or '.json'}")
