"""Inside `disable`: the base, whole, and everything as it was on leaving; and modules trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import Broken, fail
from harness.spec import spec
from harness.specs.several import DESIGN, activate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.oracle import Snapshot
    from harness.trial import Trial


@spec(
    "several/disabled-equals-base",
    claim="Inside `disable` the outputs MUST be the base's, and on leaving, by an exception too, "
    "everything MUST be as it was.",
    why="The base is the reference policy, the teacher and the control; and a model left disabled, or "
    "in another mode, goes on as another model.",
    source=(
        "DESIGN.md, disable",
        "BUGS P-20, P20",
        "https://github.com/huggingface/peft/pull/368",
    ),
    needs=("forward/base-unchanged", "forward/equals-oracle", "forward/dropout-off-in-eval"),
    features=("disable",),
    cases=(
        Case(),
        Case(way="train", dropout=0.4),
        Case(way="exception"),
        Case(specimen="fused"),
        Case(specimen="embedding"),
        Case(specimen="stack"),
        Case(specimen="tiny", way="train"),
    ),
    more_cases=(Case(specimen="conv2d"), Case(specimen="tiny-gqa"), Case(dtype="bfloat16")),
)
def disabled_equals_base(trial: Trial) -> None:
    """Judge outputs inside; outputs, trainability, modes and factors after."""
    base, x = trial.base(), trial.inputs()
    bare = trial.call(base, x)
    way = trial.case.way
    # Where `eval()` merges, outputs are compared in train mode: dropout would make them random.
    steady = getattr(trial.adapter, "eval_merges", False) or not trial.claims("dropout")
    model = trial.adapted(base, trial.config(lora_dropout=0.0) if steady else trial.config())
    before, values = trial.call(model, x), trial.snapshot(model)
    if way == "train":
        model.train()
    state = _state(model)
    adapter: Any = trial.adapter
    inside = None
    try:
        with adapter.disable(model):
            inside = trial.call(model, x)
            if way == "exception":
                raise _Interrupted  # noqa: TRY301  # what is judged is how the context leaves
    except _Interrupted:
        pass

    assert inside is not None
    trial.same_bits(inside, bare, "outputs while disabled")
    _same_state(model, state, f"after leaving `disable`{' by an exception' * (way == 'exception')}")
    trial.unmerged(model)
    trial.same_bits(trial.call(model, x), before, "outputs after leaving `disable`")
    _same(trial, trial.snapshot(model), values, "after leaving `disable`")


class _Interrupted(Exception):  # noqa: N818  # what a user's own code raises inside the context
    pass


def _state(model: nn.Module) -> dict[str, bool]:
    """Which parameters train, and which modules are in train mode."""
    trains = {f"requires_grad of {n}": p.requires_grad for n, p in model.named_parameters()}
    modes = {f"training of {n or 'the model'}": m.training for n, m in model.named_modules()}
    return {**trains, **modes}


def _same_state(model: nn.Module, then: dict[str, bool], when: str) -> None:
    now = _state(model)
    for name, was in then.items():
        if now.get(name) != was:
            fail(
                "state", expected=f"{name} as before: {was}", actual=str(now.get(name)), where=when
            )


def _same(trial: Trial, now: Snapshot, then: Snapshot, when: str) -> None:
    from harness import descent

    for where, (new, old) in descent.pairs(now, then):
        trial.same_bits(new, old, f"{where} {when}")


@spec(
    "several/disabled-keeps-the-active",
    claim="With a second adapter active, `disable` MUST give the base, and on leaving that adapter MUST "
    "act again.",
    why="A run whose reference policy is the base goes on, after the first comparison, with another "
    "adapter's outputs and gradients.",
    source=("DESIGN.md, disable: on leaving everything as it was, the active adapter too",),
    needs=("several/switch", "several/disabled-equals-base"),
    features=("disable", "multi_adapter"),
    cases=(Case(),),
    more_cases=(Case(specimen="stack"), Case(specimen="embedding")),
)
def disabled_keeps_the_active(trial: Trial) -> None:
    """Judge outputs inside, and outputs, trainability, modes and factors of the second after."""
    base, x = trial.base(), trial.inputs()
    bare = trial.call(base, x)
    model = trial.adapted(base)
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    activate(trial, model, "second")
    values = trial.randomize(model, seed=1)
    before, state = trial.call(model, x), _state(model)
    with adapter.disable(model):
        inside = trial.call(model, x)

    when = "after leaving `disable` with a second adapter active"
    trial.same_bits(inside, bare, "outputs while disabled, a second adapter being active")
    trial.same_bits(trial.call(model, x), before, f"outputs {when}")
    _same_state(model, state, when)
    _same(trial, trial.snapshot(model), values, when)


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
    needs=("several/disabled-equals-base", "training/loss-goes-down"),
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

    trial.same_bits(inside, bare, "outputs while disabled, with a trained head")
    trial.same_bits(trial.call(model, x), before, "outputs after leaving `disable`")


@spec(
    "several/switch-saved-modules",
    claim="Activating an adapter without modules of its own MUST bring the base's modules back, and the "
    "first adapter's again with it.",
    why="Heads and norms trained for one task must not act in another.",
    source=(DESIGN, "BUGS 96", "https://github.com/huggingface/peft/pull/1615"),
    needs=("several/switch", "training/loss-goes-down"),
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
    trial.same_bits(trial.call(model, x), bare, "outputs of a fresh adapter without a head")
    activate(trial, model, "default")

    trial.same_bits(trial.call(model, x), before, "outputs after the first is activated again")


@spec(
    "several/saved-modules-of-their-own",
    claim="Two adapters with the same modules to save MUST have a copy each, which starts as the base's.",
    why="A head that two tasks share is trained by both, and right for neither.",
    source=(
        "DESIGN.md, multi_adapter: `add` changes nothing of the others",
        "BUGS 52, 96",
        "https://github.com/huggingface/peft/pull/1615",
    ),
    needs=("several/switch-saved-modules",),
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
    trial.same_bits(trial.call(model, x), bare, "outputs of a fresh adapter with a head of its own")
    _train_head(trial, model, x)
    activate(trial, model, "default")

    trial.same_bits(trial.call(model, x), before, "outputs of the first, the other's head trained")


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
    import torch

    from harness import specimen

    if not trial.claims(trial.case.way):
        trial.notes.append(f"bias {trial.case.way} is not claimed")
        return
    base, x = trial.base(), trial.inputs()
    bare = trial.call(base, x)
    model = trial.inject(base, trial.config(bias=trial.case.way))
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
        trial.same_bits(inside[0], bare, "outputs while disabled, or a warning that biases act")
