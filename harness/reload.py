"""The two-stage load, in a process that has never seen the trained model.

    python -m harness.reload REQUEST.json

The base is loaded for its checkpoint, a second model is injected afresh and filled with NaN, and
then come the two stages, both `strict=False`: the pretrained checkpoint, then the adapter's. Filling
with NaN makes "missing" an observation: what a stage did not write is still NaN, whatever the
library reports. The logits of the probe are then compared bit for bit with the trained model's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import base, checkpoint, injection, library_log
from harness.errors import UsageError
from harness.proof import judged, unjudged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from harness.proof import Proof

PROBE = "probe.safetensors"
FOUND = "reload.json"


def probe(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of one fixed batch, without gradient. `(b, t)` -> `(b, t, vocab)`."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
    return logits


def reload(request: dict[str, Any]) -> dict[str, Any]:
    """Load in two stages into a new model; returns what was missing, unexpected and different."""
    from safetensors.torch import load_file

    from harness import recipe, registry

    folder = Path(request["folder"])
    asked = recipe.restored(request["recipe"])
    adapter = registry.resolve(request["adapter"])
    model = base.load(asked.model)
    config, _ = injection.fitted(model, asked.lora_config(), partial=True)
    torch.manual_seed(request["seed"] + 1)  # other factors than the trained model started from
    quantized = bool(asked.model["load_in_4bit"])
    pretrained = {} if quantized else {k: v.cpu().clone() for k, v in model.state_dict().items()}
    marks = checkpoint.digests(pretrained)
    injected = adapter.inject(model, config)
    injected.train()
    found: dict[str, Any] = {}
    if quantized:
        found["skipped"] = "a 4-bit base is quantised as it is loaded: it has no first stage"
        state = checkpoint.read(folder)
        for parameter in injection.trainable(injected).values():
            # TRL casts a 4-bit base's factors to bfloat16 before training, whatever they were.
            parameter.data = parameter.data.to(next(iter(state.values())).dtype)
        injection.load(adapter, injected, folder)
    else:
        found |= _two_stages(adapter, injected, pretrained, marks, checkpoint.read(folder))
    injection.evaluating(injected, adapter)
    kept = load_file(folder / PROBE)
    logits = probe(injected, kept["ids"], kept["mask"]).cpu()
    # Bits, not values: 0.0 and -0.0 differ, and NaN equals itself.
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[logits.element_size()]
    found["different"] = int((logits.view(width) != kept["logits"].view(width)).sum())
    found["compared"] = logits.numel()
    return found


def prove(found: Mapping[str, Any]) -> list[Proof]:
    """Property 3, from what the fresh process found."""
    claims = {
        "two-stage-load": "two-stage load in a new process",
        "reload-same-logits": "the same: logits, bit for bit",
    }
    if error := found.get("error"):
        return [judged(s, c, False, "–", "it loads", str(error)) for s, c in claims.items()]
    spec, claim = next(iter(claims.items()))
    keys = (
        unjudged(spec, claim, str(found["skipped"]), "not_claimed")
        if found.get("skipped")
        else judged(
            spec,
            claim,
            not found["unexpected"]
            and not found["missing_wrong"]
            and not found["unwritten"]
            and not found["disturbed"],
            f"{len(found['unexpected'])} unexpected, {len(found['missing_wrong'])} missing",
            "0, 0 but the other part",
            f"unexpected {found['unexpected'][:2]}, wrongly missing {found['missing_wrong'][:2]}, "
            f"left unwritten {found['unwritten'][:2]}, base disturbed {found['disturbed'][:2]}",
        )
    )
    logits = judged(
        "reload-same-logits",
        claims["reload-same-logits"],
        found["different"] == 0,
        f"{found['different']:,} of {found['compared']:,} differ",
        "0",
    )
    return [keys, logits]


def _two_stages(
    adapter: Any,
    model: nn.Module,
    pretrained: dict[str, Tensor],
    marks: dict[str, str],
    state: dict[str, Tensor],
) -> dict[str, Any]:
    live = model.state_dict()
    places = checkpoint.base_keys(marks, checkpoint.digests(live))
    renamed = {places.get(name, name): tensor for name, tensor in pretrained.items()}
    theirs = set(injection.trainable(model)) - set(renamed)
    with torch.no_grad():
        for key in [*renamed, *theirs]:
            if key in live and live[key].is_floating_point():
                live[key].fill_(float("nan"))
    first = model.load_state_dict(renamed, strict=False)
    unwritten = {key for key, tensor in model.state_dict().items() if _nan(tensor)}
    unexpected = list(first.unexpected_keys)
    wrong = sorted((set(first.missing_keys) ^ (set(live) - set(renamed))) | (unwritten ^ theirs))
    before = checkpoint.digests({key: live[key] for key in renamed if key in live})
    if state.keys() <= live.keys():
        second = model.load_state_dict(state, strict=False)
        unexpected += second.unexpected_keys
        wrong += sorted(set(second.missing_keys) ^ (set(live) - set(state)))
        wrong += sorted(theirs - set(state))
    else:
        # The implementation renames its keys on the way in; its own loader raises on what is left.
        device = next(model.parameters()).device
        adapter.load_state_dict(model, {key: value.to(device) for key, value in state.items()})
    after = model.state_dict()
    kept = checkpoint.digests({key: after[key] for key in before})
    return {
        "unexpected": sorted(unexpected),
        "missing_wrong": wrong,
        "unwritten": sorted(key for key, tensor in after.items() if _nan(tensor)),
        "disturbed": sorted(key for key in before if kept[key] != before[key]),
    }


def _nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def main(path: str) -> int:
    """Judge one request; the findings go to a file beside the adapter."""
    request = json.loads(Path(path).read_text("utf-8"))
    folder = Path(request["folder"])
    library_log.divert(folder)
    try:
        found = reload(request)
    except UsageError as error:
        found = {"error": str(error)}
    except Exception as error:  # noqa: BLE001  # a failure of the implementation on trial is a finding
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    (folder / FOUND).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
