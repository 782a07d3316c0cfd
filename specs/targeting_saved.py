"""Which modules `modules_to_save` means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.spec import spec

if TYPE_CHECKING:
    from harness.trial import Trial


@spec(
    "targeting/unmatched-saved-module-is-loud",
    # That a name which matches nothing is loud is said of the modules adapted, so that it is no MUST here.
    claim="A name in `modules_to_save` that matches no module SHOULD raise or warn, also where others "
    "match.",
    why="The head that was to be trained stays what it was, or random where the task is new, and is "
    "missing from the checkpoint; nothing tells.",
    source=(
        "DESIGN: A name that matches nothing raises or warns",
        "BUGS 77, 86",
        "https://github.com/huggingface/peft/issues/1070",
    ),
    needs=("targeting/unmatched-name-is-loud", "trainable/beside-factors"),
    features=("modules_to_save",),
    cases=(Case(specimen="stack", way="none-matches"), Case(specimen="stack", way="one-of-two")),
)
def unmatched_saved_module_is_loud(trial: Trial) -> None:
    """Judge what is heard beyond what is heard where every name is a module's."""
    # Names of their own: who warns once of each has said that of the other.
    names = ("absent_head",) if trial.case.way == "none-matches" else ("lm_head", "lacking_head")

    trial.loud(
        lambda: trial.adapter.inject(trial.base(), trial.config(modules_to_save=names)),
        expected=f"an error or a warning, as {names[-1]} is not in the model",
        usual=lambda: trial.adapter.inject(
            trial.base(), trial.config(modules_to_save=("lm_head",))
        ),
    )
