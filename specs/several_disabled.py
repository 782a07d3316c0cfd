"""Inside `disable`: the base, whole; and on leaving everything as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.several import activate, same_as_base
from harness.specs.state import keep_norms_in_eval

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    needs=(
        "quantized/forward-equals-dequantised-oracle",
        "forward/base-unchanged",
        "forward/equals-oracle",
        "forward/dropout-off-in-eval",
    ),
    features=("disable",),
    cases=(
        Case(),
        Case(way="train", dropout=0.4),
        Case(way="exception"),
        Case(specimen="fused"),
        Case(specimen="embedding"),
        Case(specimen="stack"),
        Case(specimen="tiny", way="train"),
        Case(specimen="conv2d"),
        Case(specimen="stack", way="mixed"),
        Case(specimen="bare", dtype="bfloat16"),  # a bias may be added last, and round again
        Case(specimen="nf4"),
        Case(way="lora_bias"),
    ),
    more_cases=(Case(specimen="tiny-gqa"),),
)
def disabled_equals_base(trial: Trial) -> None:
    """Judge outputs inside; outputs, trainability, modes and factors after."""
    way = trial.case.way
    if way == "lora_bias" and not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    base, x = trial.base(), trial.inputs()
    bare = trial.call(base, x)
    # Where `eval()` merges, outputs are compared in train mode: dropout would make them random.
    steady = getattr(trial.adapter, "eval_merges", False) or not trial.claims("dropout")
    settings: dict[str, Any] = {"lora_dropout": 0.0} if steady else {}
    model = trial.adapted(base, trial.config(lora_bias=way == "lora_bias", **settings))
    before, values = trial.call(model, x), trial.snapshot(model)
    if way == "train":
        model.train()
    if way == "mixed":
        model.train()
        keep_norms_in_eval(model)
    state = _state(model)
    adapter: Any = trial.adapter
    inside = None
    try:
        with adapter.disable(model):
            inside = trial.call(model, x)
            if way == "exception":
                raise Interrupted  # noqa: TRY301  # what is judged is how the context leaves
    except Interrupted:
        pass

    assert inside is not None
    same_as_base(trial, inside, bare, "outputs while disabled")
    _same_state(model, state, f"after leaving `disable`{' by an exception' * (way == 'exception')}")
    trial.unmerged(model)
    trial.same_bits(trial.call(model, x), before, "outputs after leaving `disable`")
    _same(trial, trial.snapshot(model), values, "after leaving `disable`")


class Interrupted(BaseException):
    """What ends a block as KeyboardInterrupt does: no `except Exception` sees it."""


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
    needs=("several/other-settings", "several/disabled-equals-base"),
    features=("disable", "multi_adapter"),
    cases=(Case(), Case(specimen="headless", way="targets")),
    more_cases=(Case(specimen="stack"), Case(specimen="embedding")),
)
def disabled_keeps_the_active(trial: Trial) -> None:
    """Judge outputs inside, and outputs, trainability, modes and factors of the second after."""
    base, x = trial.base(), trial.inputs()
    bare = trial.call(base, x)
    model = trial.adapted(base)
    adapter: Any = trial.adapter
    # In another layer than the first.
    other: dict[str, Any] = (
        {"target_modules": ("embed_out",)} if trial.case.way == "targets" else {}
    )
    adapter.add(model, "second", trial.config(**other))
    activate(trial, model, "second")
    values = trial.randomize(model, seed=1)
    before, state = trial.call(model, x), _state(model)
    with adapter.disable(model):
        inside = trial.call(model, x)

    when = "after leaving `disable` with a second adapter active"
    same_as_base(trial, inside, bare, "outputs while disabled, a second adapter being active")
    trial.same_bits(trial.call(model, x), before, f"outputs {when}")
    _same_state(model, state, when)
    _same(trial, trial.snapshot(model), values, when)


@spec(
    "several/disabled-nested",
    claim="Leaving a `disable` inside another MUST leave the base acting until the outer one is left; or "
    "entering it raises.",
    why="A helper that asks for the base inside a block that does so too would switch the adapter on for "
    "the rest of the block.",
    source=(
        "DESIGN.md, disable: on leaving everything as it was",
        "https://github.com/huggingface/peft/issues/3507",
        "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5945",
    ),
    needs=("several/disabled-equals-base",),
    features=("disable",),
    cases=(Case(),),
    more_cases=(Case(specimen="stack"), Case(specimen="embedding"), Case(specimen="fused")),
)
def disabled_nested(trial: Trial) -> None:
    """Judge outputs between leaving the inner and leaving the outer one, and after both."""
    base, x = trial.base(), trial.inputs()
    bare = trial.call(base, x)
    model = trial.adapted(base)
    before, state = trial.call(model, x), _state(model)
    adapter: Any = trial.adapter
    with adapter.disable(model):
        try:
            with adapter.disable(model):
                trial.call(model, x)
        except Exception as error:  # noqa: BLE001  # any exception is loud
            trial.notes.append(f"a `disable` inside another is refused: {type(error).__name__}")
        inside = trial.call(model, x)

    same_as_base(trial, inside, bare, "outputs while disabled, an inner `disable` being left")
    when = "after leaving both"
    _same_state(model, state, when)
    trial.same_bits(trial.call(model, x), before, f"outputs {when}")


@spec(
    "several/disabled-in-training",
    claim="A step of training that asks for the base's outputs between two backward passes MUST end on "
    "the same bits as one that does not.",
    why="Preference training asks its reference policy in the middle of a step: a gradient that is "
    "dropped there, or a head that stays frozen, is missing from every step.",
    source=(
        "DESIGN.md, disable: on leaving everything as it was, trainability too",
        "BUGS P20",
        "https://github.com/huggingface/peft/pull/2936",
    ),
    needs=("several/disabled-equals-base", "training/deterministic"),
    features=("disable",),
    cases=(Case(), Case(way="all"), Case(specimen="normed", way="modules_to_save")),
    more_cases=(Case(specimen="stack"), Case(way="lora_only"), Case(dtype="bfloat16")),
)
def disabled_in_training(trial: Trial) -> None:
    """Judge the gradients after leaving, and what trains after the step, beside a step without it."""
    way = trial.case.way
    if way and not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    settings: dict[str, Any] = {"modules_to_save": ("head",)} if way == "modules_to_save" else {}
    if way in {"all", "lora_only"}:
        settings = {"bias": way}
    ends = [_step(trial, settings, disabled=disabled) for disabled in (False, True)]

    for (name, straight), asked in zip(ends[0].items(), ends[1].values(), strict=True):
        trial.same_bits(asked, straight, f"{name} after a step with a `disable` in it")


def _step(trial: Trial, settings: dict[str, Any], *, disabled: bool) -> dict[str, Tensor]:
    """What trains, after one step whose gradient comes in two parts."""
    import torch

    from harness import specimen

    model = trial.adapted(config=trial.config(lora_dropout=0.0, **settings)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for part in range(2):
        specimen.loss(model, trial.inputs(part)).backward()  # type: ignore[no-untyped-call]
        if disabled and not part:
            _ask_the_base(trial, model, trained)
    optimizer.step()
    return {name: p.detach() for name, p in trained.items()}


def _ask_the_base(trial: Trial, model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Call the model disabled; the gradients that there were are there again."""
    held = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    adapter: Any = trial.adapter
    with adapter.disable(model):
        trial.call(model, trial.inputs())
    for name, gradient in held.items():
        now = trained[name].grad
        if now is None:
            fail(
                "state",
                expected="a gradient to be there after `disable`, as before",
                actual="it is gone",
                where=name,
            )
        trial.same_bits(now, gradient, f"gradient of {name} after `disable`")
