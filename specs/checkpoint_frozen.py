"""That what a checkpoint holds does not go by what trains at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import GUIDE, kept, tensors

if TYPE_CHECKING:
    from harness.trial import Trial


@spec(
    "checkpoint/same-frozen-or-not",
    claim="The checkpoint of a frozen model MUST be that of the model in training, bit for bit.",
    why="A saver that picks what requires a gradient writes an empty file for a model that was frozen "
    "to be evaluated.",
    source=(
        "DESIGN: the adapter checkpoint: factors, trained biases, modules_to_save; whole",
        GUIDE,
        "https://github.com/speechbrain/speechbrain/blob/develop/speechbrain/nnet/adapters.py",
    ),
    needs=("checkpoint/complete",),
    cases=(
        Case(),
        Case(specimen="embedding"),
        Case(way="lora_only"),
        Case(specimen="normed", way="modules_to_save"),
    ),
)
def same_frozen_or_not(trial: Trial) -> None:
    """Save before and after every parameter is frozen, those beside the factors too."""
    settings: dict[str, dict[str, Any]] = {
        "lora_only": {"bias": "lora_only"},
        "modules_to_save": {"modules_to_save": ("head",)},
    }
    way = trial.case.way
    if way and not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    model = trial.adapted(config=trial.config(**settings.get(way, {})))
    want = tensors(kept(trial, model))
    model.requires_grad_(False)
    found = tensors(kept(trial, model))
    lost = sorted(want.keys() ^ found.keys())
    if lost:
        fail(
            "names",
            expected=f"the {len(want)} tensors of the checkpoint before freezing",
            actual=f"{len(found)}, which differ in {', '.join(lost[:3])}",
            where=lost[0],
        )
    for key, value in want.items():
        trial.same_bits(found[key], value, f"{key} of the frozen model")
