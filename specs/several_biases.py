"""The base's own biases inside `disable`, once they were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import fresh_trial
from harness.case import Case
from harness.failure import Broken
from harness.spec import spec
from harness.specs.several import same_as_base

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from harness.trial import Trial

TOLD = "told"
"""The file that a fresh process leaves where it was warned."""


@spec(
    "several/disabled-tells-of-biases",
    claim="Inside `disable`, trained biases SHOULD not act; or it SHOULD be said that they do.",
    why="A reference policy with the biases of what it is the reference for is silently another model.",
    source=("BUGS 129", "https://github.com/huggingface/peft/pull/741"),
    needs=("several/disabled-equals-base", "trainable/bias-modes"),
    features=("disable",),
    cases=(Case(way="all"), Case(way="lora_only")),
)
def disabled_tells_of_biases(trial: Trial) -> None:
    """Judge outputs inside `disable` after one step of training the biases."""
    if not trial.claims(trial.case.way):
        trial.notes.append(f"bias {trial.case.way} is not claimed")
        return
    bare = trial.call(trial.base(), trial.inputs())
    inside, told = _disabled(trial)
    if told or inside.equal(bare):
        return
    # Who says it once a process may have said it to another spec.
    folder = trial.folder()
    if fresh_trial.done(trial, folder, look_there) and not (folder / TOLD).exists():
        same_as_base(trial, inside, bare, "outputs while disabled, or a warning that biases act")


def _disabled(trial: Trial) -> tuple[Tensor, bool]:
    """Outputs inside `disable` with trained biases, and whether anything was said."""
    import torch

    from harness import specimen

    x = trial.inputs()
    model = trial.inject(config=trial.config(bias=trial.case.way))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    specimen.loss(model, x).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    trial.unmerged(model)
    inside: list[Tensor] = []
    adapter: Any = trial.adapter

    def use() -> None:
        with adapter.disable(model):
            inside.append(trial.call(model, x))

    try:
        trial.loud(use, expected="a warning that trained biases act inside `disable`")
    except Broken:
        return inside[0], False
    return inside[0] if inside else x, True


def look_there(trial: Trial, folder: Path) -> None:
    """In the child."""
    if _disabled(trial)[1]:
        (folder / TOLD).touch()
