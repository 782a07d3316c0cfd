"""Inside `disable`: what else is done there leaves the base acting, and is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import kept, tensors
from harness.specs.several import activate, same_as_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.trial import Trial

ASKS = {
    "activate": "multi_adapter",
    "add": "multi_adapter",
    "delete": "multi_adapter",
    "combine": "combine",
    "save": "save",
}
"""What must be claimed for a way to be judged."""


@spec(
    "several/disabled-whatever-is-done",
    claim="Whatever is done inside `disable` (train(), eval(), activating, adding, deleting, combining, loading, "
    "saving, asking for the checkpoint), the outputs inside MUST stay the base's, and it MUST be done, or "
    "raise.",
    why="A helper that switches adapters or loads one inside the block would switch the adapter on for the "
    "rest of it; one that saves there would write an adapter of nothing.",
    source=(
        "DESIGN.md, disable: inside, the base's outputs",
        "https://github.com/huggingface/peft/pull/2936",
    ),
    needs=(
        "several/disabled-equals-base",
        "several/switch",
        "checkpoint/round-trip-bits",
        "checkpoint/save-restores-settings",
    ),
    features=("disable",),
    cases=tuple(Case(way=way) for way in ("mode", "checkpoint", "load", *ASKS)),
)
def disabled_whatever_is_done(trial: Trial) -> None:
    """Judge the outputs inside after a call that may switch the adapter on, and what it did."""
    way = trial.case.way
    if way in ASKS and not trial.claims(ASKS[way]):
        trial.notes.append(f"{ASKS[way]} is not claimed")
        return
    base, x, folder = trial.base(), trial.inputs(), trial.folder()
    bare = trial.call(base, x)
    model = trial.adapted(base)
    adapter: Any = trial.adapter
    state, first = kept(trial, model), trial.call(model, x)
    acting = [first]
    if way in {"activate", "delete", "combine"}:
        adapter.add(model, "second", trial.config())
        activate(trial, model, "second")
        trial.randomize(model, seed=1)
        second = trial.call(model, x)
        activate(trial, model, "default")
        # Of the adapter that acted before and the one activated inside, which acts is not said.
        acting += [second] if way == "activate" else []
    if way == "load":  # other values, so that it shows
        trial.randomize(model, seed=2)
    before = trial.call(model, x)
    found: dict[str, Any] = {}
    act: dict[str, Callable[[], object]] = {
        "mode": lambda: trial.unmerged(model),
        "activate": lambda: adapter.activate(model, "second"),
        "add": lambda: adapter.add(model, "second", trial.config()),
        "delete": lambda: adapter.delete(model, "second"),
        "combine": lambda: adapter.combine(model, ["default", "second"], [0.7, 0.6], "both"),
        "load": lambda: adapter.load_state_dict(model, state),
        "checkpoint": lambda: found.update(kept(trial, model)),
        "save": lambda: adapter.save(model, folder),
    }
    refused = False
    with adapter.disable(model):
        try:
            act[way]()
        except Exception as error:  # noqa: BLE001  # any exception is loud
            refused = True
            trial.notes.append(f"{way} inside `disable` is refused: {type(error).__name__}")
        trial.unmerged(model)
        inside = trial.call(model, x)
    same_as_base(trial, inside, bare, f"outputs inside `disable`, after {way}")
    trial.unmerged(model)
    after = trial.call(model, x)
    if refused:
        trial.same_bits(after, before, f"outputs after leaving `disable`, {way} inside it refused")
        return
    if not any(after.equal(one) for one in acting):
        trial.same_bits(after, first, f"outputs after leaving `disable`, {way} inside it done")
    if way == "checkpoint":
        _same_checkpoint(trial, found, state)
    if way == "save":
        loaded = adapter.load(trial.base(), folder)
        trial.unmerged(loaded)
        trial.same_bits(trial.call(loaded, x), first, "outputs of what was saved inside `disable`")


def _same_checkpoint(trial: Trial, found: dict[str, Any], state: dict[str, Any]) -> None:
    """A checkpoint made inside `disable` is the one from before it."""
    lost = sorted(found.keys() ^ state.keys())
    if lost:
        fail(
            "names",
            expected=f"the {len(state)} entries of the checkpoint from before `disable`",
            actual=f"{len(found)} inside it, which differ in {', '.join(lost[:3])}",
            where=lost[0],
        )
    for key, value in tensors(state).items():
        trial.same_bits(found[key], value, f"{key} of the checkpoint inside `disable`")
