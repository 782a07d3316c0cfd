"""The inference part of the guide's notebook: a prompt, and the model's answer with and without LoRA.

`finetune --generate` asks here. The answers come from a process of their own:
python -c "from harness.inference import main; main(REQUEST.json)"
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import library_log, process, recipe, run_folder
from harness.console import note
from harness.errors import UsageError, first_line
from harness.measure.memory import parse_bytes
from harness.registry import check_known

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from harness.recipe import Recipe

DEFAULT = "peft"
"""Whose checkpoint `--from` names where no --adapter says."""


def command(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Answer one prompt: with the base, and with an adapter where one is given.

    A run's own recipe goes before the default's, and `--set` before both. Returns the exit code.
    """
    for option in ("resume", "overwrite"):
        if getattr(args, option):
            raise UsageError(f"--generate and --{option}: nothing is trained; give one of them")
    if args.start and args.output:
        raise UsageError("--from and --output: each names an adapter to answer with; give one")
    adapters = list(dict.fromkeys(args.adapter or ()))
    if len(adapters) > 1:
        raise UsageError("--generate: answers with one implementation; give one --adapter")
    if adapters and not (args.start or args.output):
        raise UsageError(
            f"--adapter {adapters[0]}: answers from a checkpoint; name one with --output or --from"
        )
    for one in adapters:
        check_known(one)
    start, adapter = args.start, next(iter(adapters), DEFAULT)
    if args.output:
        run = run_folder.held(args.output, adapter=next(iter(adapters), None), model=args.model)
        if args.recipe is not None:
            raise UsageError(
                f"--recipe: the run in {run.path} has its own; leave it out, and --set what is to differ"
            )
        asked = run.asked()
        start, adapter = run.path, str(asked.get("adapter", adapter))
        wanted = recipe.restored(asked["recipe"], overrides)
    else:
        wanted = recipe.load(args.recipe or recipe.NAMES[0], overrides)
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "adapter": adapter,
                    "recipe": wanted.as_dict(),
                    "start": None if start is None else str(start),
                    "prompt": args.generate,
                    "partial": args.allow_partial_targets,
                    "budget": parse_bytes(args.budget) if args.budget else None,
                    "json": None if args.json is None else str(args.json.resolve()),
                    "folder": scratch,
                }
            ),
            encoding="utf-8",
        )
        return process.run("harness.inference", request)


def main(path: str) -> int:
    """Answer the request's prompt; returns the exit code."""
    request: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    library_log.divert(Path(request["folder"]))
    try:
        return _answer(request)
    except UsageError as error:
        print(f"lora-harness finetune: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("lora-harness finetune: interrupted", file=sys.stderr)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever the implementation raises
        print(
            f"lora-harness finetune: {request['adapter']} failed: {type(error).__name__}: "
            f"{first_line(error)}",
            file=sys.stderr,
        )
        return 1
    return 2


def _answer(request: dict[str, Any]) -> int:
    from harness import base, environment
    from harness.report.schema import Recorder

    asked = recipe.restored(request["recipe"])
    where = base.device(asked.model)
    base.hold_to(request["budget"], where)
    with Recorder(
        request["json"],
        kind="finetune",
        adapter={"name": request["adapter"]} if request["start"] else None,
        model=str(asked.model["name"]),
        recipe=asked.as_dict(),
        environment=environment.collect(accelerator=where != "cpu"),
        notes=["a prompt was answered, nothing was trained or judged"],
    ) as report:
        report.set("answers", _answers(request, asked))
    return 0


def _answers(request: dict[str, Any], asked: Recipe) -> dict[str, Any]:
    """What the model says before and after the adapter is loaded, told as it comes."""
    from harness import base, chat, injection, registry

    name = str(asked.model["name"])
    model = base.load(asked.model)
    library_log.settle()
    tokenizer = chat.tokenizer(name)
    prompt = request["prompt"] or asked.data.get("prompt")
    if not prompt:
        rows = chat.dataset(asked.data["name"], "eval")
        prompt = next(m["content"] for m in rows[0]["messages"] if m["role"] == "user")
    tokens = int(asked.data["max_new_tokens"])
    titles = ["prompt", name, *([f"with {request['adapter']}"] if request["start"] else ())]
    width = max(map(len, titles))
    said = chat.reply(model, tokenizer, prompt, tokens)
    print(f"{titles[0]:<{width}}  {prompt}")
    print(f"{titles[1]:<{width}}  {said}", flush=True)
    answers = {"before": {"prompt": prompt, "reply": said}}
    if request["start"]:
        adapter = registry.resolve(request["adapter"])
        injection.check_claims(adapter, asked)
        config, notes = injection.fitted(
            model, asked.lora_config(), partial=bool(request["partial"])
        )
        note(*notes)
        injected = adapter.inject(model, config)
        injection.load(adapter, injected, Path(request["start"]))
        injection.evaluating(injected, adapter)
        said = chat.reply(injected, tokenizer, prompt, tokens)
        print(f"{titles[2]:<{width}}  {said}")
        answers["after"] = {"prompt": prompt, "reply": said}
    return answers
