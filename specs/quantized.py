"""LoRA on a base in four bits: the base stays, the branch is exact, and merging is honest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.forward_dropout import drops_each_input
from harness.specs.forward_training import gradients_right

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.oracle import Snapshot
    from harness.trial import Trial

QLORA = "QLoRA, https://arxiv.org/abs/2305.14314"


@spec(
    "quantized/only-lora",
    claim="On a 4-bit base exactly the factors MUST be trainable, and they MUST be of a floating dtype.",
    why="Preparing a quantised model freezes everything: done after injection, the adapter too.",
    source=(QLORA, "BUGS 105", "https://github.com/huggingface/trl/issues/3926"),
    needs=("trainable/only-lora",),
    features=("quantized_base",),
    cases=(Case(specimen="nf4"),),
    more_cases=(Case(specimen="nf4", dtype="bfloat16"),),
)
def only_lora(trial: Trial) -> None:
    """Judge the trainable elements against the factors."""
    from harness import storage

    model = trial.inject()
    factors = trial.factors(model)
    for name, parts in factors.items():
        for f in parts:
            if not (f.A.is_floating_point() and f.B.is_floating_point()):
                fail("dtype", expected="floating factors", actual=f"{f.A.dtype}", where=name)
    ours = storage.elements(storage.handles(factors))
    trained = storage.elements(p for p in model.parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and storage.covered(parameter, ours) != parameter.numel():
            fail("names", expected="only factors to train", actual="it does too", where=name)
    for tensor in storage.handles(factors):
        if storage.covered(tensor, trained) != tensor.numel():
            fail("state", expected="every factor trainable", actual="one is frozen")


@spec(
    "quantized/forward-equals-dequantised-oracle",
    claim="On a 4-bit base the output MUST equal x·(W + scaling·B·A)ᵀ + bias for the dequantised W.",
    why="An adapter trained against other weights than those it is served with makes up for an error "
    "that is not there.",
    source=(QLORA, "BUGS 28, 125", "https://github.com/unslothai/unsloth-zoo/pull/482"),
    needs=("quantized/only-lora", "forward/equals-oracle"),
    features=("quantized_base",),
    cases=(Case(specimen="nf4"),),
    more_cases=(Case(specimen="nf4", dtype="bfloat16"), Case(specimen="nf4", r=13, alpha=2.0)),
)
def forward_equals_dequantised_oracle(trial: Trial) -> None:
    """Judge one layer with random factors."""
    x = trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    base = trial.base()
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)

    trial.close(trial.call(model, x), truth, budget, "output on the dequantised base")


@spec(
    "quantized/base-bits-unchanged",
    claim="Training on a 4-bit base MUST move the factors, and leave the codes, their scales and the "
    "outputs with zero factors bit for bit.",
    why="A base that is quantised again on the way is another base than the checkpoint's.",
    source=(QLORA, "BUGS P9"),
    needs=("quantized/forward-equals-dequantised-oracle", "training/base-unchanged"),
    features=("quantized_base",),
    cases=(Case(specimen="nf4"),),
    more_cases=(Case(specimen="nf4", dtype="bfloat16"),),
)
def base_bits_unchanged(trial: Trial) -> None:
    """Judge AdamW with decay: what the quantised layer holds, and outputs with zero factors."""
    import torch

    from harness import descent, specimen

    base, x = trial.base(), trial.inputs()
    weight = _weight(base)
    held = {"codes": weight.data, "scales": weight.quant_state.absmax}
    kept = {name: tensor.clone() for name, tensor in held.items()}
    model = trial.inject(base)
    one_layer.silence(trial, model)
    silent = trial.call(model, x)
    before = trial.randomize(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        specimen.loss(model, x).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for name, (start, end) in descent.pairs(before, trial.snapshot(model)):
        if torch.equal(start, end):
            fail("no-effect", expected="training to move every factor", actual="none", where=name)
    for name, tensor in held.items():
        trial.same_bits(tensor, kept[name], f"the base's {name} after training")
    one_layer.silence(trial, model)
    trial.same_bits(trial.call(model, x), silent, "outputs after training, with zero factors")


@spec(
    "quantized/gradients",
    claim="On a 4-bit base the gradients of the input and of each factor MUST be those of the equation "
    "for the dequantised W.",
    why="A base that is called without gradients trains the last layer alone.",
    source=(QLORA, "BUGS 101"),
    needs=("quantized/base-bits-unchanged", "forward/gradients"),
    features=("quantized_base",),
    cases=(Case(specimen="nf4"),),
    more_cases=(Case(specimen="nf4", r=13, alpha=2.0),),
)
def gradients(trial: Trial) -> None:
    """Judge against float64."""
    gradients_right(trial, trial.base())


@spec(
    "quantized/dropout",
    claim="On a 4-bit base dropout MUST act on the branch as on any other, and leave the base's path alone.",
    why="A layer of its own for a quantised base is another place to forget it in.",
    source=(QLORA, "BUGS 117"),
    needs=("quantized/base-bits-unchanged", "forward/dropout-on-in-train"),
    features=("quantized_base", "dropout"),
    cases=(Case(specimen="nf4", dropout=0.5),),
)
def dropout(trial: Trial) -> None:
    """Judge each input of the branch, call by call."""
    drops_each_input(trial, trial.inject())


@spec(
    "quantized/merge-error-bounded",
    claim="Merging into a 4-bit base MUST give W + ΔW within what rounding to four bits takes, or raise.",
    why="A merge that drops or doubles the update looks like quantisation error, and is not.",
    source=(QLORA, "BUGS 12, 28", "https://github.com/unslothai/unsloth-zoo/pull/810"),
    needs=("quantized/forward-equals-dequantised-oracle", "merge/train-mode"),
    features=("quantized_base", "merge"),
    cases=(Case(specimen="nf4"),),
    more_cases=(Case(specimen="nf4", dtype="bfloat16"), Case(specimen="nf4", r=13, alpha=2.0)),
)
def merge_error_bounded(trial: Trial) -> None:
    """Judge every weight, by what the merged layer makes of the unit vectors."""
    from harness import oracle, tolerance

    merged = _merged(trial)
    if merged is None:
        return
    model, factors = merged
    base, units, W, rounding = _weights(trial, factors)
    W += oracle.delta(base.proj, factors["proj"])
    budget = tolerance.requantised(W).T.to(rounding.device) + rounding
    truth = trial.truth(base, factors, units)
    trial.close(trial.call(model, units), truth, budget, "merged weight, by unit vectors")


@spec(
    "quantized/unmerge-error-bounded",
    claim="Unmerging from a 4-bit base MUST give W again within what rounding to four bits twice takes, "
    "or raise; and the factors act as before.",
    why="A base that keeps an update, or loses one, after an evaluation is trained on as another base.",
    source=(QLORA, "BUGS 38; P5", "https://github.com/huggingface/peft/pull/3166"),
    needs=("quantized/merge-error-bounded", "merge/restores-base"),
    features=("quantized_base", "merge", "unmerge"),
    cases=(Case(specimen="nf4"),),
    more_cases=(Case(specimen="nf4", dtype="bfloat16"), Case(specimen="nf4", r=13, alpha=2.0)),
)
def unmerge_error_bounded(trial: Trial) -> None:
    """Judge every weight after a cycle, with the factors silent and with them."""
    from harness import oracle, tolerance

    merged = _merged(trial)
    if merged is None:
        return
    model, factors = merged
    adapter: Any = trial.adapter
    try:
        adapter.unmerge(model)
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"unmerging from four bits raises {type(error).__name__}")
        return
    base, units, W, rounding = _weights(trial, factors)
    into = tolerance.requantised(W + oracle.delta(base.proj, factors["proj"]))
    out = tolerance.requantised(W.abs() + into)  # what is rounded again is off by that already
    budget = (into + out).T.to(rounding.device) + 2 * rounding
    truth = trial.truth(base, factors, units)
    trial.close(trial.call(model, units), truth, budget, "weight after a cycle, by unit vectors")
    one_layer.silence(trial, model)
    plain = trial.truth(base, {}, units)
    trial.close(trial.call(model, units), plain, budget, "base's weight after a cycle")


def _merged(trial: Trial) -> tuple[nn.Module, Snapshot] | None:
    """An adapted model, merged, and its factors; None, and noted, where that is refused."""
    model = trial.inject()
    factors = trial.randomize(model, effect=2.0)
    adapter: Any = trial.adapter
    try:
        adapter.merge(model)
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"merging into four bits raises {type(error).__name__}")
        return None
    return model, factors


def _weights(trial: Trial, factors: Snapshot) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The base, its unit vectors, its dequantised W in float64, and an output's own rounding."""
    import torch

    from harness import oracle

    base: Any = trial.base()
    units = torch.eye(base.proj.in_features, dtype=trial.dtype, device=trial.case.device)
    W = oracle.weight_of(base.proj).detach().double().cpu()
    return base, units, W, trial.budget(base, factors, units)


def _weight(base: Any) -> Any:
    weight: Tensor = base.proj.weight
    return weight
