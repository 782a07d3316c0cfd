"""Checkpoints of modules and adapters whose names are traps for who takes keys apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import disturb, kept, restores, same_factors, tensors

if TYPE_CHECKING:
    from torch import nn

    from harness.trial import Trial


@spec(
    "checkpoint/odd-names",
    claim="Modules and adapters called `weight…`, `lora_…`, `foo` beside `foobar`, `a.b_c` beside `a_b.c` "
    "or an adapter called as a module is MUST reload alike.",
    why="Keys taken apart by substrings lose exactly the layers whose names hold one, and those that "
    "are flattened save one layer in the place of two.",
    source=(
        "BUGS 51, 52",
        "https://github.com/huggingface/peft/issues/2772",
        "https://github.com/huggingface/peft/issues/2289",
        "https://github.com/huggingface/peft/issues/3433",
        "https://github.com/huggingface/peft/issues/3584",
        "https://github.com/huggingface/peft/pull/3268",
    ),
    needs=("checkpoint/round-trip-bits", "checkpoint/many-layers"),
    cases=(
        Case(specimen="stack", way="modules"),
        Case(specimen="stack", way="modules_to_save"),
        Case(specimen="stack", way="lora-saved-whole"),
        Case(specimen="underscored", way="flattened"),
        Case(way="adapter"),
        Case(specimen="stack", way="adapters"),
    ),
)
def odd_names(trial: Trial) -> None:
    """Reload an adapter of modules with traps for names; then one whose own name is a trap."""
    if trial.case.way == "modules":
        restores(trial, trial.config(target_modules=("weight_proj", "lora_gate", "foo", "foobar")))
    elif trial.case.way == "flattened":
        try:
            trial.adapter.state_dict(trial.inject())
        except Exception as refusal:  # noqa: BLE001  # refusing is right
            trial.notes.append(f"names that differ in . and _ alone are refused: {refusal}"[:200])
            return
        restores(trial)
    elif trial.case.way == "modules_to_save" and trial.claims("modules_to_save"):
        _reload_saved_modules(trial, "foo", "foobar", "weight_proj")
    elif trial.case.way == "lora-saved-whole" and trial.claims("modules_to_save"):
        _reload_saved_modules(trial, "lora_gate")
    elif trial.case.way == "adapter" and trial.claims("multi_adapter"):
        _reload_adapter_called(trial, "my_weight_lora_A")
    elif trial.case.way == "adapters" and trial.claims("multi_adapter"):
        _save_beside(trial, "foo", "default_2")


def _reload_saved_modules(trial: Trial, *whole: str) -> None:
    """Modules of these names trained whole, from one model into another."""
    config = trial.config(target_modules=("v_proj",), modules_to_save=whole)
    given = trial.inputs()
    source, other = trial.inject(config=config), trial.inject(config=config, seed=1)
    disturb(source, seed=1, gates="lora_gate" in whole)
    disturb(other, seed=2, gates="lora_gate" in whole)
    trial.adapter.load_state_dict(other, kept(trial, source))
    want = trial.call(source, given)
    trial.same_bits(trial.call(other, given), want, "output after loading modules_to_save")


def _reload_adapter_called(trial: Trial, name: str) -> None:
    adapter: Any = trial.adapter
    models = []
    for seed in (0, 1):
        model = trial.inject()
        if not _acts(trial, model, name, seed=seed):
            return
        models.append(model)
    factors = trial.snapshot(models[0])
    adapter.load_state_dict(models[1], kept(trial, models[0]))
    same_factors(trial, models[1], factors, f"factors of the adapter {name!r} after loading")


def _acts(trial: Trial, model: nn.Module, name: str, *, seed: int) -> bool:
    """Add an adapter of that name, which acts with values of its own; False, and noted, if refused."""
    adapter: Any = trial.adapter
    try:
        adapter.add(model, name, trial.config())
    except Exception as refusal:  # noqa: BLE001  # a name may be refused: it is another's then
        trial.notes.append(f"an adapter called {name} is refused: {refusal}"[:200])
        return False
    adapter.activate(model, name)
    trial.randomize(model, seed=seed)
    return True


def _save_beside(trial: Trial, *names: str) -> None:
    """The first adapter's checkpoint is what it was before others of these names were added."""
    adapter: Any = trial.adapter
    model = trial.adapted()
    alone = tensors(kept(trial, model))
    for seed, name in enumerate(names, start=1):
        _acts(trial, model, name, seed=seed)
    adapter.activate(model, "default")
    found = tensors(kept(trial, model))
    differing = sorted(alone.keys() ^ found.keys())
    if differing:
        fail(
            "names",
            expected=f"the {len(alone)} tensors of the first adapter's checkpoint, before adapters "
            f"called {', '.join(names)} were added",
            actual=f"{len(found)}, which differ in {', '.join(differing[:3])}",
            where=differing[0],
        )
    for key, value in alone.items():
        trial.same_bits(found[key], value, f"{key} of the first adapter, beside others")
