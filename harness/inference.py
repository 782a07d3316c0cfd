"""The inference part of the guide's notebook: a prompt, and the model's answer with and without LoRA.

python -c "from harness.inference import main; main(REQUEST.json)"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import library_log, recipe
from harness.errors import UsageError, first_line


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
    from harness import base, chat, injection, registry
    from harness.training import reply

    asked = recipe.restored(request["recipe"])
    name = str(asked.model["name"])
    model = base.load(asked.model)
    library_log.settle()
    tokenizer = chat.tokenizer(name)
    prompt = request["prompt"] or asked.data.get("prompt")
    if not prompt:
        rows = chat.dataset(asked.data["name"], "eval")
        prompt = next(m["content"] for m in rows[0]["messages"] if m["role"] == "user")
    tokens = int(asked.data["max_new_tokens"])
    print(f"prompt      {prompt}")
    print(f"{name:<10}  {reply(model, tokenizer, prompt, tokens)}", flush=True)
    if request["start"]:
        adapter = registry.resolve(request["adapter"])
        config, _ = injection.fitted(model, asked.lora_config(), partial=bool(request["partial"]))
        injected = adapter.inject(model, config)
        injection.load(adapter, injected, Path(request["start"]))
        injection.evaluating(injected, adapter)
        print(f"with {adapter.name:<6} {reply(injected, tokenizer, prompt, tokens)}")
    return 0
