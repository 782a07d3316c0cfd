"""What trains beside the factors, written and read again: biases, and modules trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import disturb, kept
from harness.specs.trainable import factors_train, nothing_else_trains

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from harness.adapter import LoraConfig
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
    needs=(
        "checkpoint/every-layer",
        "checkpoint/round-trip-bits",
        "checkpoint/save-restores-settings",
        "checkpoint/same-frozen-or-not",
    ),
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


def _with(*settings: str) -> tuple[Case, ...]:
    """A case to load for inference, and one to train on, with these settings."""
    kinds = ("frozen", "trainable")
    return tuple(Case(specimen="normed", way=", ".join((kind, *settings))) for kind in kinds)


@spec(
    "checkpoint/load-trainability-beside-factors",
    claim="After `load`, biases and modules that were trained MUST train exactly if that is asked for.",
    why="A run that is taken up with its factors and without its head trains another model; a bias that "
    "is left free drifts in the next run on the same base.",
    source=(
        "DESIGN.md, load: trainability as asked",
        "BUGS 56",
        "https://github.com/huggingface/peft/issues/2759",
    ),
    features=("save",),
    needs=(
        "checkpoint/load-trainability",
        "checkpoint/save-restores-biases",
        "trainable/beside-factors",
    ),
    cases=(
        *_with("modules_to_save", "lora_only"),
        *_with("modules_to_save", "all"),
        *_with("lora_bias"),
    ),
    more_cases=(
        *_with("modules_to_save"),
        *_with("lora_only"),
        *_with("all"),
        *_with("modules_to_save", "lora_bias"),
    ),
)
def load_trainability_beside_factors(trial: Trial) -> None:
    """Compare what requires a gradient with what the settings ask for, by its values."""
    kind, *asked_for = trial.case.way.split(", ")
    settings = [feature for feature in asked_for if trial.claims(feature)]
    trial.notes += [f"{name} is not claimed" for name in asked_for if name not in settings]
    if not settings:
        return
    base, folder = trial.base(), trial.folder()
    given = {name: p.detach().clone() for name, p in base.named_parameters()}
    model, wanted = trial.inject(base, _asking(trial, settings)), _beside(given, settings)
    others = nothing_else_trains(model, trial.factors(model), wanted)
    # With other values than the base's a trained copy is told from the original that it came from.
    disturb(model, seed=1)
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it
    asked = kind == "trainable"
    loaded = trial.adapter.load(trial.base(), folder, trainable=asked)  # type: ignore[attr-defined]  # likewise

    factors = trial.factors(loaded)
    if asked:
        names = {id(p): name for name, p in model.named_parameters()}
        factors_train(loaded, factors)
        nothing_else_trains(loaded, factors, {names[id(p)]: p for p in others})
        return
    trains = [name for name, p in loaded.named_parameters() if p.requires_grad]
    if trains:
        fail(
            "state",
            expected="no trainable parameter after load(trainable=False)",
            actual=f"{len(trains)}: {', '.join(trains[:3])}",
            where=trains[0],
        )


def _asking(trial: Trial, settings: Iterable[str]) -> LoraConfig:
    """A configuration with the settings of these names."""
    fields: dict[str, dict[str, Any]] = {
        "modules_to_save": {"modules_to_save": ("head",)},
        "lora_bias": {"lora_bias": True},
        "lora_only": {"bias": "lora_only"},
        "all": {"bias": "all"},
    }
    asked = {key: value for name in settings for key, value in fields[name].items()}
    return trial.config(**asked)


def _beside(given: Mapping[str, Tensor], settings: Iterable[str]) -> dict[str, Tensor]:
    """What these settings train beside the factors, by its names in the base."""
    trained = {
        "modules_to_save": ["head.weight"],
        "lora_only": ["proj.bias"],
        "all": [name for name in given if name.endswith("bias")],
    }
    return {key: given[key] for name in settings for key in trained.get(name, ())}
