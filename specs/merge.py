"""What merging folds into the base, and what unmerging takes out again.

    merge      W ← W + ΔW, rounded once to the dtype of W
    unmerge    W ← W again, within the roundings of going in and coming out

Where the weight lies is the implementation's affair: it is read off by `harness.one_layer`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.trial import Trial

PAPER = "LoRA, section 4.1: no added latency when merged, https://arxiv.org/abs/2106.09685"
CYCLES = 50

EACH_LAYER = (
    Case(specimen="bare"),
    Case(specimen="bare", dtype="bfloat16"),
    Case(specimen="bare", dtype="float16"),
    Case(specimen="embedding"),
    Case(specimen="embedding", shape=(6, 6)),
    Case(specimen="embedding", dtype="bfloat16"),
    Case(specimen="conv2d"),
    Case(specimen="conv2d", dtype="bfloat16"),
    Case(specimen="grouped"),
    Case(specimen="fused"),
    Case(specimen="fused", dtype="bfloat16"),
)


def _or_raises(act: Callable[[], object]) -> None:
    """Asked for what is done already: nothing happens, or an exception."""
    with contextlib.suppress(Exception):
        act()


@spec(
    "merge/same-output",
    claim="Merged outputs MUST equal x·(W + scaling·B·A)ᵀ + bias within the rounding of the dtypes, and "
    "no longer come by way of B and A.",
    why="A merged model is what gets deployed: a wrong merge serves another model than was trained.",
    source=(
        PAPER,
        "BUGS 2, 3, 5, 7, 11, 19, 21, 22, 25, 26, 31, 32",
        "https://github.com/microsoft/LoRA/pull/107",
    ),
    features=("merge",),
    needs=("forward/equals-oracle",),
    tier="smoke",
    cases=(
        Case(),
        Case(dtype="bfloat16"),
        Case(dtype="float16"),
        Case(dtype="float64", r=13),
        *(Case(specimen=s, way="rslora") for s in ("linear", "embedding", "conv2d", "fused")),
        Case(way="in-train", dropout=0.5),
        Case(way="frozen"),
        *(case for case in EACH_LAYER if case.specimen != "bare"),
    ),
)
def same_output(trial: Trial) -> None:
    """Merge random factors, in train mode with dropout too, and compare the outputs with the equation.

    That they are folded tells the gradient, which is none, or zero: a branch that goes on has one.
    """
    import torch

    from harness import storage

    base, given = trial.base(), trial.inputs()
    rslora = trial.case.way == "rslora" and trial.claims("rslora")
    dropout = trial.case.dropout if trial.claims("dropout") else 0.0
    model = trial.adapted(config=trial.config(use_rslora=rslora, lora_dropout=dropout))
    if trial.case.way == "frozen":  # as an adapter that is served
        model.requires_grad_(False)
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    plain = trial.truth(base, {}, given)
    if bool(((truth - plain).abs() <= budget).all()):
        trial.notes.append("vacuous: rounding is as large as the adapter's effect")
    if trial.case.way == "in-train":
        model.train()
    ours = storage.trained(model, trial.factors(model))
    with torch.no_grad():  # nor may a weight that is made now lead back to them
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    if trial.case.way == "in-train" and not getattr(trial.adapter, "eval_merges", False):
        # What is folded has no branch to drop out of; a merge that did nothing still has.
        trial.close(trial.call(model, given), truth, budget, "merged output in train mode")
        model.eval()

    trial.close(trial.call(model, given), truth, budget, "merged output")
    with torch.enable_grad():
        y = model(given)
    ours = [p for p in ours if p.requires_grad and y.requires_grad]
    found = torch.autograd.grad(y.sum(), ours, allow_unused=True) if ours else ()
    if any(gradient is not None and gradient.any() for gradient in found):
        fail(
            "state",
            expected="merged outputs that are the base's own, with the update in its weights",
            actual="they have a gradient that leads back to the factors: the branch acts",
        )


@spec(
    "merge/weight-equals-oracle",
    claim="A merged weight MUST be W + scaling·B·A in the base's dtype, as near as one rounding allows.",
    why="A merge that rounds twice, or loses what is small, is not seen in one output, but is deployed.",
    source=(
        PAPER,
        "BUGS 6, 8, 12, P-16",
        "https://github.com/huggingface/peft/issues/1388",
    ),
    features=("merge",),
    needs=("merge/same-output",),
    cases=(
        *EACH_LAYER,
        Case(specimen="fused-all"),
        Case(specimen="fused-unequal"),
        Case(specimen="bare", way="autocast"),
        Case(specimen="bare", dtype="bfloat16", way="faint"),
        Case(specimen="bare", dtype="float16", way="faint"),
    ),
)
def weight_equals_oracle(trial: Trial) -> None:
    """Merge, then read the weight entry by entry; `faint` factors are lost in half precision."""
    import torch

    from harness import tolerance

    base = one_layer.unbiased(trial)
    model = one_layer.adapted(trial)
    if model is None:
        return
    # Small updates show what is lost of the update, and what autocast takes from W.
    effect = {"faint": 3e-3, "autocast": 3e-2}.get(trial.case.way, 0.5)
    factors = trial.randomize(model, effect=effect)
    delta, magnitude = one_layer.delta(base, factors)
    autocast = trial.case.way == "autocast"
    # Under autocast ΔW may be computed in half precision; W itself may not.
    coarse = torch.bfloat16 if autocast else trial.factor_dtype
    budget = tolerance.weights(
        one_layer.weight_of(base) + delta,
        magnitude,
        r=one_layer.rank(factors),
        dtype=trial.dtype,
        factor_dtype=coarse,
    )
    lost = float(budget.norm() / delta.norm())
    if lost > 1:
        trial.notes.append(
            f"vacuous at {trial.case}: one rounding may take {lost:.1f} of the adapter's effect"
        )
    try:
        with torch.autocast(trial.case.device.split(":")[0], torch.bfloat16, enabled=autocast):
            trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    except Exception as error:
        if not autocast:
            raise
        trial.notes.append(f"a merge under autocast is refused: {type(error).__name__}")
        return

    one_layer.check_weight(
        trial,
        model,
        base,
        W=one_layer.weight_of(base) + delta,
        budget=budget,
        what="merged weight",
        merged=True,
    )


@spec(
    "merge/overflow-on-the-way",
    # The factors' dtype is the implementation's own, and with it what overflows: no MUST.
    claim="Where an adapter answers in float16 and W + ΔW fits it, a merge SHOULD give that or raise, though "
    "B·A or scaling·B alone does not fit.",
    why="An infinity on the way stays one: the base is destroyed, though the adapter answered well.",
    source=(
        "https://github.com/huggingface/peft/pull/1001",
        "https://github.com/arcee-ai/mergekit/pull/704",
    ),
    features=("merge",),
    needs=("merge/weight-equals-oracle",),
    cases=(
        Case(specimen="bare", dtype="float16", alpha=3e-4),
        Case(specimen="bare", dtype="float16", alpha=12288.0),
    ),
)
def overflow_on_the_way(trial: Trial) -> None:
    """Large factors under a small scaling, or a small A under a large one; then read the weight."""
    import torch

    from harness import tolerance

    base = one_layer.unbiased(trial)
    model = trial.inject(one_layer.unbiased(trial))
    a, b = (2.0**9, 2.0**9) if trial.case.alpha < 1 else (2.0**-14, 2.0**7)
    with torch.no_grad():
        for f in trial.factors(model)["proj"]:
            for factor, size in ((f.A, a), (f.B, b)):
                drawn = torch.linspace(0.75, 1.5, factor.numel(), dtype=torch.float64)
                factor.copy_(size * drawn.view(factor.shape))
    factors = trial.snapshot(model)
    delta, magnitude = one_layer.delta(base, factors)
    W = one_layer.weight_of(base) + delta
    if not trial.call(model, one_layer.basis(trial)).isfinite().all():
        trial.notes.append(f"vacuous at {trial.case}: the branch overflows, merged or not")
        return
    try:
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"refused: {type(error).__name__}")
        return

    budget = tolerance.weights(
        W, magnitude, r=trial.case.r, dtype=trial.dtype, factor_dtype=trial.factor_dtype
    )
    one_layer.check_weight(
        trial, model, base, W=W, budget=budget, what="merged weight", merged=True
    )


@spec(
    "merge/restores-base",
    claim="Merging and unmerging MUST give back the base within rounding, the factors bit for bit, and an "
    "adapter that acts.",
    why="Who merges to evaluate and unmerges to train on would train on another base each time, or lose "
    "what half precision cannot hold of the factors.",
    source=(
        "BUGS 9, 38, 42; P5",
        "https://github.com/huggingface/peft/pull/3166",
        "https://github.com/microsoft/LoRA/issues/96",
    ),
    features=("merge", "unmerge"),
    needs=("merge/same-output", "forward/embedding", "forward/sees-factors-now"),
    cases=(
        Case(),
        *EACH_LAYER,
        Case(specimen="fused-unequal"),
        Case(specimen="bare", r=1),
        Case(specimen="bare", way="untrained"),
        Case(specimen="bare", way="frozen"),
    ),
)
def restores_base(trial: Trial) -> None:
    """One cycle, with random factors or a fresh adapter's; then look at the factors and the base."""
    base = one_layer.unbiased(trial)
    model = one_layer.adapted(trial)
    if model is None:
        return
    if trial.case.way == "frozen":  # as an adapter that is served
        model.requires_grad_(False)
    factors = trial.snapshot(model) if trial.case.way == "untrained" else trial.randomize(model)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # the feature brings it

    budget = one_layer.restored(trial, base, factors)
    for after, before in zip(trial.snapshot(model)["proj"], factors["proj"], strict=True):
        trial.same_bits(after.A, before.A, "A after unmerging")
        trial.same_bits(after.B, before.B, "B after unmerging")
    one_layer.silence(trial, model)
    one_layer.check_weight(
        trial,
        model,
        base,
        W=one_layer.weight_of(base),
        budget=budget,
        what="base weight after unmerging",
    )
    written = trial.randomize(model, seed=1)
    one_layer.acts(
        trial, model, base, factors=written, restored=budget, what="output of the unmerged adapter"
    )
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    one_layer.acts(
        trial,
        model,
        base,
        factors=written,
        restored=budget,
        what="output of the adapter merged again",
    )


@spec(
    "merge/no-drift",
    claim="Fifty cycles of merging and unmerging MUST leave the base within the rounding of a few.",
    why="Evaluation every few hundred steps merges and unmerges: what drifts ends as another base.",
    source=(
        "BUGS section 6.3; P5",
        "https://github.com/huggingface/trl/issues/6688",
        "Reiser and Knuth, 1975: (((x + y) - y) + y) - y = (x + y) - y, rounded to nearest even",
    ),
    features=("merge", "unmerge"),
    needs=("merge/restores-base",),
    cases=(Case(specimen="bare"), Case(specimen="embedding")),
)
def no_drift(trial: Trial) -> None:
    """Fifty cycles with the same random factors."""
    _cycle(trial)


@spec(
    "merge/no-drift-in-half-precision",
    claim="In half precision too, fifty cycles of merging and unmerging SHOULD leave the base within "
    "the rounding of a few.",
    why="Where ΔW is held wider than the base, adding it and taking it out round differently each "
    "time and the base wanders; rounding ΔW to the base's dtype first, or keeping a copy, ends that.",
    source=(
        "BUGS 38; P5",
        "https://github.com/huggingface/peft/pull/3166",
        "Reiser and Knuth, 1975, for which x and y are of one format",
    ),
    features=("merge", "unmerge"),
    needs=("merge/no-drift",),
    # How far an element wanders is chance: among this many, some always goes far.
    cases=tuple(
        Case(specimen="bare", shape=(40, 33), dtype=dtype) for dtype in ("bfloat16", "float16")
    ),
)
def no_drift_in_half_precision(trial: Trial) -> None:
    """The same on a base of fewer bits than the factors may have."""
    _cycle(trial)


def _cycle(trial: Trial) -> None:
    """Merge and unmerge `CYCLES` times; the base is as after one, give or take a rounding."""
    base = one_layer.unbiased(trial)
    model = trial.inject(one_layer.unbiased(trial))
    factors = trial.randomize(model)
    for _ in range(CYCLES):
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
        trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # the feature brings it

    budget = one_layer.restored(trial, base, factors, CYCLES)
    one_layer.silence(trial, model)
    one_layer.check_weight(
        trial,
        model,
        base,
        W=one_layer.weight_of(base),
        budget=budget,
        what=f"base weight after {CYCLES} cycles",
    )


@spec(
    "merge/idempotent",
    claim="Merging what is merged, or unmerging what is not, MUST change nothing or raise.",
    why="Evaluation code merges, export code merges: the second one would add ΔW again.",
    source=("BUGS 1", "https://github.com/huggingface/peft/pull/1355"),
    features=("merge",),
    needs=("merge/same-output", "merge/restores-base"),
    cases=(
        *(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
        Case(way="lora_bias"),
    ),
)
def idempotent(trial: Trial) -> None:
    """Merge twice; where it is claimed, unmerge before that and twice after."""
    way = trial.case.way
    if way and not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    base, given = trial.base(), trial.inputs()
    model = trial.adapted(config=trial.config(lora_bias=bool(way)))
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    merge: Any = trial.adapter.merge  # type: ignore[attr-defined]  # the feature brings it
    if trial.claims("unmerge"):
        unmerge: Any = trial.adapter.unmerge  # type: ignore[attr-defined]  # claimed
        _or_raises(lambda: unmerge(model))
        trial.close(trial.call(model, given), truth, budget, "output after unmerging unmerged")
    merge(model)
    _or_raises(lambda: merge(model))
    trial.close(trial.call(model, given), truth, budget, "output after merging twice")
    if trial.claims("unmerge"):
        unmerge(model)
        _or_raises(lambda: unmerge(model))
        restored = one_layer.restored(trial, base, factors)
        written = trial.randomize(model, seed=1)
        one_layer.acts(
            trial,
            model,
            base,
            factors=written,
            restored=restored,
            what="output after unmerging twice",
        )
