"""What trains beside the factors, written and read again: biases, and modules trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.spec import spec
from harness.specs.checkpoint import disturb, kept

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial


@spec(
    "checkpoint/save-restores-biases",
    claim="Biases that train MUST be in what `save` writes, and in what `load` gives back.",
    why="A bias that is trained and not saved is the base's again after a reload, in silence.",
    source=(
        "BUGS 43",
        "https://github.com/huggingface/peft/issues/3306",
        "https://github.com/huggingface/peft/pull/3490",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings", "trainable/bias-modes"),
    cases=(Case(specimen="stack", way="lora_only"), Case(specimen="stack", way="all")),
)
def save_restores_biases(trial: Trial) -> None:
    """Give every trained bias another value, save, load into a bare base, and compare outputs."""
    mode = trial.case.way
    if not trial.claims(mode):
        trial.notes.append(f"bias={mode!r} is not claimed")
        return
    given, folder = trial.inputs(), trial.folder()
    model = trial.inject(config=trial.config(bias=mode))
    disturb(model, seed=1)
    trial.randomize(model)
    want = trial.call(model, given)
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it
    loaded = trial.adapter.load(trial.base(), folder)  # type: ignore[attr-defined]  # likewise
    trial.unmerged(loaded)
    trial.same_bits(trial.call(loaded, given), want, f"output after save and load, bias={mode!r}")


@spec(
    "checkpoint/saved-module-buffers",
    # DESIGN says that a module is saved whole, and not in so many words that its buffers are of it.
    claim="A module that is saved whole SHOULD come back with its buffers, such as running statistics.",
    why="Training moves them without a gradient, and eval mode computes with them: a reloaded model "
    "without them is another than the one that was measured.",
    source=(
        "DESIGN.md, modules_to_save: modules trained and saved whole",
        "https://github.com/huggingface/peft/issues/1732",
        "https://github.com/huggingface/peft/pull/1734",
    ),
    needs=("checkpoint/every-layer",),
    features=("modules_to_save",),
    cases=(Case(specimen="normed"), Case(specimen="normed", way="save")),
)
def saved_module_buffers(trial: Trial) -> None:
    """Move a batch norm's statistics, load what was saved into a second model, compare in eval mode."""
    if trial.case.way == "save" and not trial.claims("save"):
        trial.notes.append("save is not claimed")
        return
    config = trial.config(modules_to_save=("norm",))
    adapter: Any = trial.adapter
    model = trial.adapted(config=config)
    fresh = _evaluated(trial, model)
    model.train()
    for seed in range(3):
        trial.call(model, trial.inputs(seed))
    want = _evaluated(trial, model)
    if want.equal(fresh):
        trial.notes.append("vacuous: calls in train mode move no running statistics")
        return
    if trial.case.way == "save":
        folder = trial.folder()
        adapter.save(model, folder)
        other = adapter.load(trial.base(), folder)
    else:
        other = trial.inject(config=config, seed=1)
        adapter.load_state_dict(other, kept(trial, model))

    found = _evaluated(trial, other)
    trial.same_bits(found, want, "output in eval mode, with the batch norm that was saved")


def _evaluated(trial: Trial, model: nn.Module) -> Tensor:
    """Outputs in eval mode, merged where that merges."""
    model.eval()
    outputs = trial.call(model, trial.inputs())
    trial.unmerged(model)
    return outputs
