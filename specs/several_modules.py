"""Modules trained whole beside several adapters, or inside `disable`: each adapter's are its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import kept
from harness.specs.several import DESIGN, activate, same_as_base

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial


@spec(
    "several/disabled-leaves-saved-modules-out",
    claim="Inside `disable`, modules that were trained whole MUST be the base's again.",
    why="Half a base is none: the trained head on the bare body is a model that nobody asked for.",
    source=(
        DESIGN,
        "BUGS 95",
        "https://github.com/huggingface/peft/issues/493",
        "https://github.com/huggingface/peft/pull/736",
    ),
    needs=("several/disabled-equals-base", "training/loss-goes-down", "trainable/beside-factors"),
    features=("disable", "modules_to_save"),
    cases=(Case(specimen="stack"),),
    more_cases=(Case(specimen="tiny"),),
)
def disabled_leaves_saved_modules_out(trial: Trial) -> None:
    """Judge outputs inside and after, with a head that was trained."""
    x = trial.inputs()
    model, bare = _with_trained_head(trial, x)
    before = trial.call(model, x)
    adapter: Any = trial.adapter
    with adapter.disable(model):
        inside = trial.call(model, x)

    same_as_base(trial, inside, bare, "outputs while disabled, with a trained head")
    trial.same_bits(trial.call(model, x), before, "outputs after leaving `disable`")


@spec(
    "several/switch-saved-modules",
    claim="Activating an adapter without modules of its own MUST bring the base's modules back, and the "
    "first adapter's again with it.",
    why="Heads and norms trained for one task must not act in another.",
    source=(DESIGN, "BUGS 96", "https://github.com/huggingface/peft/pull/1615"),
    needs=("several/switch", "training/loss-goes-down", "trainable/beside-factors"),
    features=("multi_adapter", "modules_to_save"),
    cases=(Case(specimen="stack"),),
    more_cases=(Case(specimen="tiny"),),
)
def switch_saved_modules(trial: Trial) -> None:
    """Judge outputs of a second, fresh adapter, and of the first after it."""
    x = trial.inputs()
    model, bare = _with_trained_head(trial, x)
    before = trial.call(model, x)
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    activate(trial, model, "second")
    same_as_base(trial, trial.call(model, x), bare, "outputs of a fresh adapter without a head")
    activate(trial, model, "default")

    trial.same_bits(trial.call(model, x), before, "outputs after the first is activated again")


@spec(
    "several/saved-modules-of-their-own",
    claim="Two adapters with the same modules to save MUST have a copy each, which starts as the base's, and is "
    "in its own checkpoint.",
    why="A head that two tasks share is trained by both, and right for neither.",
    source=(
        "DESIGN.md, multi_adapter: `add` changes nothing of the others",
        "BUGS 52, 96",
        "https://github.com/huggingface/peft/pull/1615",
    ),
    needs=(
        "several/switch-saved-modules",
        "training/base-unchanged",
    ),
    features=("multi_adapter", "modules_to_save"),
    cases=(Case(specimen="stack"),),
    more_cases=(Case(specimen="tiny"),),
)
def saved_modules_of_their_own(trial: Trial) -> None:
    """Judge outputs of a fresh second adapter, and of the first once the second's head was trained."""
    x = trial.inputs()
    model, bare = _with_trained_head(trial, x)
    before = trial.call(model, x)
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config(modules_to_save=("lm_head",)))
    activate(trial, model, "second")
    same_as_base(
        trial, trial.call(model, x), bare, "outputs of a fresh adapter with a head of its own"
    )
    _train_head(trial, model, x)
    _train_head(trial, model, x)  # once more than the first's, so that they differ
    own, state = trial.call(model, x), kept(trial, model)
    activate(trial, model, "default")

    trial.same_bits(trial.call(model, x), before, "outputs of the first, the other's head trained")
    other = trial.inject(config=trial.config(modules_to_save=("lm_head",)))
    adapter.add(other, "second", trial.config(modules_to_save=("lm_head",)))
    activate(trial, other, "second")
    adapter.load_state_dict(other, state)
    trial.same_bits(trial.call(other, x), own, "outputs by the second's own checkpoint")


def _with_trained_head(trial: Trial, given: Any) -> tuple[nn.Module, Tensor]:
    """A model whose head was trained whole, and the base's outputs."""
    base = trial.base()
    bare = trial.call(base, given)
    model = trial.inject(base, trial.config(modules_to_save=("lm_head",)))
    _train_head(trial, model, given)
    return model, bare


def _train_head(trial: Trial, model: nn.Module, given: Any) -> None:
    """One step of the active adapter's head, which makes a difference."""
    import torch

    from harness import specimen, storage

    fresh = trial.call(model, given)
    model.train()
    ours = storage.elements(storage.handles(trial.factors(model)))
    # A base's `lora_gate` may train wrongly too: trainable/names-decide-nothing says so.
    heads = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad
        and not name.endswith("lora_gate.weight")
        and not storage.covered(p, ours)
    ]
    if not heads:
        fail("names", expected="lm_head, of modules_to_save, to be trainable", actual="it is not")
    optimizer = torch.optim.SGD(heads, lr=0.1)
    specimen.loss(model, given).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    model.zero_grad()
    trial.unmerged(model)
    if torch.equal(trial.call(model, given), fresh):
        fail("no-effect", expected="a trained lm_head to change the outputs", actual="none changed")


@spec(
    "several/frozen-is-frozen-whole",
    claim="While an adapter that was added frozen acts, nothing of it MUST train, its modules and biases "
    "neither.",
    why="A reference or a served adapter whose head trains on is another after the next step.",
    source=(
        "DESIGN.md, activate: with the trainability it was added with",
        "https://github.com/huggingface/peft/pull/2765",
    ),
    needs=("several/switch", "trainable/beside-factors"),
    features=("multi_adapter",),
    cases=(Case(specimen="stack", way="modules_to_save"), Case(way="lora_bias")),
)
def frozen_is_frozen_whole(trial: Trial) -> None:
    """Judge what trains after activation."""
    way = trial.case.way
    if not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    more: dict[str, Any] = (
        {"lora_bias": True} if way == "lora_bias" else {"modules_to_save": ("lm_head",)}
    )
    model = trial.adapted()
    adapter: Any = trial.adapter
    others = {p for p in model.parameters() if p.requires_grad}
    adapter.add(model, "frozen", trial.config(**more), trainable=False)
    activate(trial, model, "frozen")
    trains = [n for n, p in model.named_parameters() if p.requires_grad and p not in others]
    if trains:
        fail(
            "state",
            expected="nothing of a frozen adapter to train while it acts",
            actual=f"{len(trains)} do",
            where=trains[0],
        )
