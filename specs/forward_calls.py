"""What calling an adapted model does to it, and that it goes by the dtypes of the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from harness.trial import Trial


@spec(
    "forward/base-unchanged",
    claim="A call MUST leave the base's weights as they were, bit for bit, in eval and in train mode, "
    "with and without gradient.",
    why="A call that adds ΔW to W and takes it out again rounds twice: the base drifts with every batch, "
    "and a backward pass sees a weight that is not the one the call used.",
    source=(
        "DESIGN: base weights untouched",
        "https://github.com/Baijiong-Lin/LoRA-Torch",
    ),
    needs=("forward/equals-oracle", "forward/sees-factors-now"),
    cases=tuple(Case(specimen=name) for name in ("bare", "embedding", "conv2d", "fused")),
)
def base_unchanged(trial: Trial) -> None:
    """Judge every entry of the weight in effect, read off outputs with ΔW = 0, before and after."""
    from harness import specimen

    # Where eval mode merges, the base in it is W + ΔW.
    modes = (True,) if getattr(trial.adapter, "eval_merges", False) else (False, True)
    given, shown = trial.inputs(), one_layer.basis(trial)
    model = trial.inject(one_layer.unbiased(trial))
    one_layer.silence(trial, model)
    before = trial.call(model, shown)
    trial.randomize(model)
    for train in modes:
        model.train(train)
        trial.call(model, given)
        specimen.call(model, given)
    trial.unmerged(model)
    one_layer.silence(trial, model)

    after = trial.call(model, shown)
    trial.same_bits(after, before, f"the base's weight after {2 * len(modes)} calls")


@spec(
    "forward/after-a-cast",
    claim="An adapted model that is cast to another dtype SHOULD answer in that dtype, and as the "
    "equation does.",
    why="Models are adapted in one dtype and trained or served in another: one that remembers the "
    "first dtype raises, or rounds to it in silence.",
    source=(
        "DESIGN: handles are good until the next call that casts",
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
    ),
    needs=("forward/equals-oracle", "forward/output-dtype", "forward/sees-factors-now"),
    cases=(
        *(Case(dtype=dtype) for dtype in ("float64", "bfloat16")),
        *(Case(specimen=s, dtype="bfloat16") for s in ("conv2d", "fused")),
    ),
)
def after_a_cast(trial: Trial) -> None:
    """Inject and call in float32, cast, then give the factors values and compare."""
    from harness import specimen

    if not trial.claims("float32"):
        trial.notes.append("float32 is not claimed")
        return
    given = trial.inputs()
    model = trial.inject(specimen.build(trial.case.with_(dtype="float32")))
    trial.call(model, given.float())
    model = model.to(trial.dtype)
    factors = trial.randomize(model)
    found = trial.call(model, given)
    if found.dtype != trial.dtype:
        fail("dtype", expected=f"output of {trial.dtype} after the cast", actual=str(found.dtype))

    base = trial.base()
    budget = trial.budget(base, factors, given)
    trial.close(found, trial.truth(base, factors, given), budget, "output after the cast")
