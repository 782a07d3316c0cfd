"""Which updates training makes: against float64, however a batch is fed, stopped or checkpointed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.spec import spec

if TYPE_CHECKING:
    from torch import nn

    from harness.oracle import Snapshot
    from harness.trial import Trial

RATE = 1.0
"""Of one SGD step: updates are then as large as gradients, far above what storing them rounds."""

SMALL_RATE = 0.1
"""Of several steps, which must not run away from each other."""


@spec(
    "training/update-equivalence",
    claim="One SGD step on a batch MUST change the factors as the gradient of y = x·(W + scaling·B·A)ᵀ "
    "says, whether the batch is fed whole, accumulated, or in micro-batches.",
    why="A logged loss can look right while the update is several times too large, or is a mean of "
    "means: training then runs at a learning rate that nobody chose.",
    source=(
        "BUGS 112, 114, 116, 118, section 6.5",
        "https://github.com/huggingface/transformers/pull/35651",
        "https://github.com/huggingface/transformers/pull/34191",
    ),
    needs=("training/loss-goes-down", "initialization/factors-not-shared", "forward/scaling"),
    cases=(
        Case(),
        Case(way="accumulated"),
        Case(way="micro-batched"),
        Case(r=13, alpha=2.0),
        Case(dtype="bfloat16"),
        Case(specimen="fused"),
        Case(specimen="embedding", way="accumulated"),
        Case(specimen="conv2d", way="accumulated"),
    ),
    more_cases=(
        Case(specimen="tiny", way="accumulated"),
        Case(specimen="fused", way="micro-batched"),
        Case(specimen="grouped"),
        Case(specimen="tiny-gqa", way="micro-batched"),
        Case(dtype="float16"),
    ),
)
def update_equivalence(trial: Trial) -> None:
    """Judge the change of every factor after one step; samples count unevenly many targets."""
    given = _given(trial)
    model = trial.adapted()
    before = trial.snapshot(model)
    step(model, given, trial.case.way)

    _follows(trial, model, before, given)


@spec(
    "training/checkpointing-same-update",
    claim="Gradient checkpointing MUST leave the update what it is without, enabled before `inject` or "
    "after it, reentrant or not.",
    why="A checkpoint whose inputs need no gradient gives none to what it holds: training runs, the loss "
    "is finite, and the adapter stays as it was.",
    source=(
        "BUGS 99, 100, 101",
        "https://github.com/huggingface/peft/issues/404",
        "https://github.com/huggingface/transformers/issues/42489",
    ),
    needs=("training/update-equivalence", "forward/phi3"),
    features=("gradient_checkpointing",),
    cases=(
        Case(specimen="tiny", way="before-reentrant"),
        Case(specimen="tiny", way="after-reentrant"),
    ),
    more_cases=(
        Case(specimen="tiny", way="before"),
        Case(specimen="tiny", way="after"),
        Case(specimen="tiny-gqa", way="before-reentrant"),
        Case(specimen="tiny-gqa", way="after"),
    ),
)
def checkpointing_same_update(trial: Trial) -> None:
    """Judge the change of every factor after one step, of a whole batch or accumulated."""
    given = _given(trial)
    order, _, kind = trial.case.way.partition("-")
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    base: Any = trial.base()
    if order == "before":
        base.gradient_checkpointing_enable(**settings)
    model: Any = trial.adapted(base)
    if order == "after":
        if not callable(getattr(model, "gradient_checkpointing_enable", None)):
            trial.notes.append("the returned model has no gradient_checkpointing_enable")
            return
        model.gradient_checkpointing_enable(**settings)
    before = trial.snapshot(model)
    step(model, given, "accumulated" if order == "after" else "")

    _follows(trial, model, before, given)


@spec(
    "training/checkpointing-same-masks",
    claim="A checkpoint that is computed again MUST drop what it dropped the first time.",
    why="The gradient is then that of another network than the one whose loss was taken: noise, at "
    "every step, that no log shows.",
    source=(
        "BUGS 118",
        "https://docs.pytorch.org/docs/stable/checkpoint.html, preserve_rng_state",
    ),
    needs=("training/checkpointing-same-update", "forward/dropout-on-in-train"),
    features=("gradient_checkpointing", "dropout"),
    cases=(Case(specimen="tiny", way="reentrant", dropout=0.4),),
    more_cases=(
        Case(specimen="tiny", dropout=0.4),
        Case(specimen="tiny-gqa", way="reentrant", dropout=0.4),
    ),
)
def checkpointing_same_masks(trial: Trial) -> None:
    """Judge the update of a step with checkpointing against one without, from the same seed."""
    import torch

    from harness import descent, tolerance
    from harness.seeding import seed_all

    given, ends, losses = _given(trial), [], []
    kind = {"use_reentrant": trial.case.way == "reentrant"}
    for checkpointed in (False, True):
        base: Any = trial.base()
        if checkpointed:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        model = trial.adapted(base)
        before = trial.snapshot(model)
        seed_all(trial.case.seed)
        losses.append(step(model, given, ""))
        ends.append(trial.snapshot(model))
    if losses[0] != losses[1]:
        trial.notes.append("with checkpointing, other masks are drawn from the same seed")
        return
    truth = trial.descent(before, given, lr=RATE, dtype=torch.float64).factors[-1]
    rough = trial.descent(before, given, lr=RATE, dtype=trial.dtype).factors[-1]
    # Dropout is in neither: they tell how far rounding alone takes an update of this model.
    for name, (start, end, goal, exact, stray) in descent.pairs(before, *ends[::-1], truth, rough):
        budget = tolerance.updates(
            stray - exact, goal - start, end, dtype=trial.dtype, factor_dtype=trial.factor_dtype
        )
        trial.close(end - start, goal - start, budget, f"the change of {name}")


@spec(
    "training/same-trajectory-as-reference",
    claim="From the same factors, losses and updates of several SGD steps MUST follow those of LoRA "
    "written out as its equation.",
    why="An implementation can be right at every step that is looked at alone and still learn something "
    "else: by what it keeps from one step to the next.",
    source=("LoRA, section 4.1, https://arxiv.org/abs/2106.09685", "BUGS P-5"),
    needs=("training/update-equivalence",),
    cases=(
        Case(),
        Case(specimen="fused"),
        Case(specimen="embedding"),
        Case(specimen="conv2d"),
    ),
    more_cases=(
        Case(specimen="tiny"),
        Case(specimen="tiny-gqa"),
        Case(dtype="bfloat16"),
    ),
)
def same_trajectory_as_reference(trial: Trial) -> None:
    """Judge the losses before each step, and the factors' change after the last."""
    import torch

    from harness import tolerance

    steps = 4
    given = _given(trial)
    model = trial.adapted()
    before = trial.snapshot(model)
    losses = [step(model, given, "", rate=SMALL_RATE) for _ in range(steps)]
    after = trial.snapshot(model)
    # Rounding in the coarser of the base's and the factors' dtypes, with no implementation in the way.
    coarse = max(trial.dtype, trial.factor_dtype, key=tolerance.unit_roundoff)
    truth = trial.descent(before, given, lr=SMALL_RATE, dtype=torch.float64, steps=steps)
    rough = trial.descent(before, given, lr=SMALL_RATE, dtype=coarse, steps=steps)
    exact, seen = (torch.tensor(t.losses, dtype=torch.float64) for t in (truth, rough))
    trial.close(
        torch.tensor(losses, dtype=torch.float64),
        exact,
        tolerance.model(seen - exact, exact, coarse),
        "losses before each step",
    )
    _compare(trial, before, after, truth.factors[-1], rough.factors[-1], steps=steps)


@spec(
    "training/resume-equals-uninterrupted",
    claim="Training that is stopped, saved with its optimizer and taken up in a fresh injection MUST end "
    "on the same bits as training that was not stopped.",
    why="A resumed adapter that is frozen, wrapped twice or no longer the optimizer's trains nothing, or "
    "something else, after the first crash.",
    source=(
        "BUGS 56, 57, 58",
        "https://github.com/huggingface/transformers/issues/24463",
        "https://github.com/huggingface/trl/issues/652",
    ),
    needs=(
        "training/same-trajectory-as-reference",
        "training/deterministic",
        "training/base-unchanged",
        "checkpoint/round-trip-bits",
    ),
    cases=(
        Case(),
        *(
            Case(specimen=s, way="optimizer-first")
            for s in ("linear", "embedding", "conv2d", "fused")
        ),
    ),
    more_cases=(
        Case(specimen="tiny"),
        Case(specimen="tiny-gqa", way="optimizer-first"),
        Case(dtype="bfloat16"),
    ),
)
def resume_equals_uninterrupted(trial: Trial) -> None:
    """Judge the factors after two and two AdamW steps; the optimizer is made after the load, or before."""
    import copy

    import torch

    from harness import descent

    given = trial.inputs()

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

    model = trial.adapted()
    first = optimizer(model)
    _run(model, given, first)
    state = _state(trial, model)
    moments = copy.deepcopy(first.state_dict())
    _run(model, given, first)
    fresh = trial.inject(seed=1)
    early = optimizer(fresh) if trial.case.way == "optimizer-first" else None
    trial.adapter.load_state_dict(fresh, state)
    second = early or optimizer(fresh)
    second.load_state_dict(moments)
    _run(fresh, given, second)

    straight = trial.snapshot(model)
    for name, (whole, resumed) in descent.pairs(straight, trial.snapshot(fresh)):
        trial.same_bits(resumed, whole, f"{name} of the resumed training")


def _state(trial: Trial, model: nn.Module) -> dict[str, Any]:
    """The checkpoint, copied; it may hold scalars."""
    import torch

    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for key, value in trial.adapter.state_dict(model).items()
    }


def _given(trial: Trial) -> Any:
    """The case's inputs, without the padding index, whose gradient is nobody's promise."""
    import torch

    given = trial.inputs()
    if trial.case.specimen in {"embedding", "tied"}:
        return torch.where(given == 1, torch.zeros_like(given), given)
    return given


def step(model: nn.Module, given: Any, way: str, *, rate: float = RATE) -> float:
    """One SGD step on a batch, fed as asked; returns the loss before it."""
    import torch

    from harness import descent, specimen

    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    optimizer.zero_grad()
    batches = descent.samples(given) if way else [given]
    targets = descent.targets(lambda batch: specimen.call(model, batch), given)
    sums = []
    for k, batch in enumerate(batches):
        part = descent.terms(specimen.call(model, batch), batch, first=k)[0] / targets
        if way == "accumulated":
            part.backward()  # type: ignore[no-untyped-call]
            part = part.detach()
        sums.append(part)
    total = torch.stack(sums).sum()
    if way != "accumulated":
        total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(total.detach())


def _run(model: nn.Module, given: Any, optimizer: Any, *, steps: int = 2) -> None:
    """Steps on one batch, in train mode."""
    from harness import descent, specimen

    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        value = descent.mean_loss(lambda batch: specimen.call(model, batch), given)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _follows(trial: Trial, model: nn.Module, before: Snapshot, given: Any) -> None:
    """One SGD step went where the equation's gradient points."""
    import torch

    truth = trial.descent(before, given, lr=RATE, dtype=torch.float64).factors[-1]
    rough = trial.descent(before, given, lr=RATE, dtype=trial.dtype).factors[-1]
    _compare(trial, before, trial.snapshot(model), truth, rough, steps=1)


def _compare(
    trial: Trial,
    before: Snapshot,
    after: Snapshot,
    wanted: Snapshot,
    rough: Snapshot,
    *,
    steps: int,
) -> None:
    """Every factor changed as wanted, within what rounding strays."""
    from harness import descent, tolerance

    dtype = trial.factor_dtype
    for name, (start, end, goal, stray) in descent.pairs(before, after, wanted, rough):
        budget = tolerance.updates(
            stray - goal, goal - start, end, dtype=trial.dtype, factor_dtype=dtype, steps=steps
        )
        trial.close(end - start, goal - start, budget, f"the change of {name}")
