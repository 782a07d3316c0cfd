"""What training an adapted model does, and what it leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from harness.adapter import Factors, LoraConfig
    from harness.trial import Trial

GUIDE = "guide, step 3: only LoRA parameters train, https://github.com/microsoft/LoRA"


@spec(
    "training/gradients-reach-every-factor-and-no-other",
    claim="A backward pass MUST give every factor a gradient that is not zero, and nothing else any.",
    why="A factor that gets none never learns; a base that gets one drifts or fills the memory.",
    source=(GUIDE, "BUGS 10, 101, 109, 124", "https://github.com/huggingface/trl/issues/5977"),
    needs=("trainable/only-lora", "forward/equals-oracle", "forward/inference-mode-first"),
    cases=(
        Case(),
        Case(way="after-inference"),
        Case(specimen="fused"),
        Case(specimen="fused", way="after-inference"),
        Case(specimen="embedding"),
        Case(specimen="tiny", way="head"),
    ),
    more_cases=(Case(specimen="tiny-gqa"), Case(dtype="bfloat16")),
)
def gradients_reach_every_factor_and_no_other(trial: Trial) -> None:
    """Judge one backward pass with random factors: A's first gradient is zero while B is."""
    import torch

    from harness import storage

    base, given = trial.base(), trial.inputs()
    held = dict(base.named_parameters())
    model = trial.adapted(base, _config(trial))
    if trial.case.way == "after-inference":
        model.eval()
        with torch.inference_mode():
            model(given)
    model.train()
    _loss(model, given).backward()  # type: ignore[no-untyped-call]

    factors = trial.factors(model)
    for where, factor in _named(factors):
        slope = storage.gradient(model, factor)
        if slope is None or not slope.any() or not slope.isfinite().all():
            fail(
                "no-effect",
                expected="a gradient that is finite and not zero",
                actual="none" if slope is None else f"one of norm {float(slope.norm()):.3g}",
                where=where,
            )
    ours = storage.elements(storage.handles(factors))
    others = {**{f"base {n}": p for n, p in held.items()}, **dict(model.named_parameters())}
    for name, parameter in others.items():
        if parameter.grad is not None and not storage.covered(parameter, ours):
            fail(
                "state",
                expected="no gradient for what is not LoRA",
                actual=f"one of norm {float(parameter.grad.norm()):.3g}",
                where=name,
            )


def _named(factors: Mapping[str, Sequence[Factors]]) -> Iterator[tuple[str, Tensor]]:
    """Every A and B with a name for it."""
    for name, parts in factors.items():
        for k, f in enumerate(parts):
            part = f", part {k}" if len(parts) > 1 else ""
            yield f"A of {name}{part}", f.A
            yield f"B of {name}{part}", f.B


@spec(
    "training/loss-goes-down",
    claim="Training a fresh adapter on one batch MUST bring that batch's loss down.",
    why="It is what an adapter is for; factors that both start at zero, or a gradient that points up, "
    "never get there.",
    source=("LoRA, section 4.1, https://arxiv.org/abs/2106.09685", "BUGS P-3, P-5"),
    needs=("training/gradients-reach-every-factor-and-no-other", "initialization/not-both-zero"),
    cases=(
        Case(),
        Case(specimen="fused"),
        Case(specimen="embedding"),
    ),
    more_cases=(Case(specimen="tiny"), Case(specimen="tiny-gqa"), Case(dtype="bfloat16")),
)
def loss_goes_down(trial: Trial) -> None:
    """Judge a few AdamW steps from the start that `inject` gives."""
    given = trial.inputs()
    model = trial.inject()
    losses = _train(model, given, steps=6, lr=0.01)

    if not losses[-1] < losses[0]:
        fail(
            "no-effect" if losses[-1] == losses[0] else "value",
            expected=f"a loss below the first, {losses[0]:.6g}, after {len(losses) - 1} AdamW steps",
            actual=f"{losses[-1]:.6g}",
        )


@spec(
    "training/base-unchanged",
    claim="Training under AdamW with weight decay MUST leave the base as it was, bit for bit.",
    why="A base that drifts makes the adapter useless on the pretrained checkpoint, where it is loaded.",
    source=(GUIDE, "BUGS 58, 88, 130, P-5, P-6"),
    needs=(
        "training/loss-goes-down",
        "trainable/optimizer-holds-only-lora",
        "forward/sees-factors-now",
    ),
    cases=(
        Case(),
        Case(specimen="fused"),
        Case(specimen="embedding"),
    ),
    more_cases=(Case(specimen="tiny"), Case(specimen="tiny-gqa"), Case(dtype="bfloat16")),
)
def base_unchanged(trial: Trial) -> None:
    """Judge by the base's own tensors, by outputs with zero factors, and by `base_weight`."""
    from harness import oracle

    base, given = trial.base(), trial.inputs()
    held = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    kept = {name: tensor.detach().clone() for name, tensor in held.items()}
    model = trial.inject(base)
    _silence(trial, model)
    before = trial.call(model, given)  # the base's, by the adapted layers' own order of adding up
    trial.randomize(model)
    _train(model, given, steps=3, lr=0.05, decay=0.5)
    trial.unmerged(model)

    for name, tensor in held.items():
        trial.same_bits(tensor, kept[name], f"the base's {name} after training")
    factors = trial.factors(model)
    if weight := getattr(trial.adapter, "base_weight", None):
        modules = dict(trial.base().named_modules())
        for name in factors:
            W = oracle.weight_of(modules[name])
            trial.same_bits(weight(model, name), W, f"base_weight of {name} after training")
    _silence(trial, model)
    trial.same_bits(trial.call(model, given), before, "outputs after training, with zero factors")


def _silence(trial: Trial, model: nn.Module) -> None:
    import torch

    with torch.no_grad():
        for f in (f for parts in trial.factors(model).values() for f in parts):
            f.A.zero_()
            f.B.zero_()


@spec(
    "training/deterministic",
    claim="Two trainings from one seed MUST give the same bits, dropout included.",
    why="A run that cannot be repeated cannot be debugged, compared or resumed.",
    source=(
        "BUGS section 2, P16, and P-15",
        "https://pytorch.org/docs/stable/notes/randomness.html",
    ),
    needs=("training/loss-goes-down", "initialization/seeded"),
    cases=(Case(), Case(specimen="fused"), Case(specimen="conv2d")),
    more_cases=(Case(specimen="tiny"), Case(specimen="embedding")),
)
def deterministic(trial: Trial) -> None:
    """Judge two runs in one process; with dropout where that is claimed."""
    from harness import descent

    ends = []
    for _ in range(2):
        asked = trial.claims("dropout") and trial.case.specimen != "embedding"
        dropout = 0.3 if asked else 0.0
        model = trial.inject(config=trial.config(lora_dropout=dropout))
        _train(model, trial.inputs(), steps=3, lr=0.01)
        ends.append(trial.snapshot(model))

    for name, (first, second) in descent.pairs(*ends):
        trial.same_bits(second, first, f"{name} after a second training from the same seed")


@spec(
    "training/small-steps-count",
    claim="A step that bfloat16 is too coarse to take SHOULD move the factors on a bfloat16 base.",
    why="Factors in bfloat16 lose every step below half a unit in their last place: at the small "
    "learning rates of the samples (5e-6) most of training vanishes.",
    source=("BUGS 107, 108", "https://github.com/huggingface/peft/pull/1706"),
    needs=("training/loss-goes-down", "trainable/dtype-stated"),
    cases=tuple(
        Case(specimen=s, dtype="bfloat16") for s in ("linear", "embedding", "conv2d", "fused")
    ),
)
def small_steps_count(trial: Trial) -> None:
    """Judge one AdamW step a quarter of what bfloat16 resolves at the factors' size.

    AdamW's first step is lr whatever the gradient. Factors are put into ±[1/4, 1/2), where half a unit
    in bfloat16's last place is 2⁻¹⁰: a step of 2⁻¹² is rounded away there, and taken in float16 or wider.
    """
    import torch

    from harness import descent

    model = trial.adapted()
    with torch.no_grad():
        for f in (f for parts in trial.factors(model).values() for f in parts):
            for t in (f.A, f.B):
                t.copy_(torch.where(t < 0, -0.25, 0.25) * (1 + t.abs() % 0.9))
    before = trial.snapshot(model)
    _train(model, trial.inputs(), steps=1, lr=2.0**-12)

    for name, (start, end) in descent.pairs(before, trial.snapshot(model)):
        still = int((start == end).sum())
        if still > start.numel() // 2:
            fail(
                "no-effect",
                expected="a step of 2⁻¹² to be taken by most elements",
                actual=f"{still} of {start.numel()} did not move",
                where=name,
            )


def _config(trial: Trial) -> LoraConfig:
    """The case's; under `head`, the output head beside another layer."""
    return (
        trial.config(target_modules=("lm_head", "o_proj"))
        if trial.case.way == "head"
        else trial.config()
    )


def _loss(model: nn.Module, given: Any) -> Tensor:
    from harness import descent, specimen

    return descent.mean_loss(lambda batch: specimen.call(model, batch), given)


def _train(
    model: nn.Module, given: Any, *, steps: int, lr: float, decay: float = 0.0
) -> list[float]:
    """AdamW over all parameters on one batch, in train mode: the loss before each step and after all."""
    import torch

    torch.manual_seed(7)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = _loss(model, given)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.item())
    with torch.no_grad():
        losses.append(_loss(model, given).item())
    return losses
