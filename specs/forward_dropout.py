"""Dropout of an adapted layer: on the branch alone, as often as was asked, and off in eval mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.forward_training import ORACLE, cotangent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial

CALLS = 200
"""How often dropout is watched: enough for chance to tell 0.3 from 0.4."""


@spec(
    "forward/dropout-off-in-eval",
    claim="In eval mode dropout MUST be off, also after train mode.",
    why="An evaluation that draws at random is neither the model nor repeatable.",
    source=("BUGS 54, 119", "https://github.com/huggingface/transformers/issues/34469"),
    needs=(ORACLE, "forward/fused-parts", "forward/conv2d"),
    features=("dropout",),
    cases=tuple(Case(specimen=s, dropout=0.5) for s in ("linear", "conv2d", "fused", "stack")),
)
def dropout_off_in_eval(trial: Trial) -> None:
    """Judge the outputs in eval mode, at first and after train mode."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    model.eval()
    trial.close(trial.call(model, x), truth, budget, "output in eval mode")
    model.train()
    trial.call(model, x)
    model.eval()
    trial.close(trial.call(model, x), truth, budget, "output in eval mode after train mode")


@spec(
    "forward/dropout-on-in-train",
    claim="In train mode dropout MUST zero inputs of the branch with the probability asked for, "
    "divide the others by 1 - p, draw afresh in each call, and leave the base's path alone.",
    why="A setting that is taken and never applied is a run that cannot be reproduced elsewhere; on "
    "the base's path dropout harms the pretrained model.",
    source=(
        "BUGS 44, 55, 117, P-11, P-12",
        "https://github.com/meta-pytorch/torchtune/issues/995",
        "https://github.com/huggingface/peft/pull/591",
    ),
    needs=("forward/sees-factors-now", "forward/fused-parts", "forward/conv2d"),
    features=("dropout",),
    cases=(
        Case(shape=(16, 20), r=16, dropout=0.3),
        Case(shape=(16, 20), r=16, dropout=0.75),
        *(Case(specimen=s, dropout=0.3) for s in ("conv2d", "fused-all")),
    ),
)
def dropout_on_in_train(trial: Trial) -> None:
    """Judge each input of the branch of a layer whose factors let it through, call by call."""
    drops_each_input(trial, trial.inject())


@spec(
    "forward/dropout-gradients",
    claim="Under dropout the gradients MUST be those of the function drawn: the same mask backward as "
    "forward.",
    why="A backward pass that forgets the mask trains the inputs that were dropped.",
    source=(
        "BUGS 118",
        "https://github.com/foundation-model-stack/fms-acceleration/issues/97",
    ),
    needs=("forward/dropout-on-in-train", "forward/gradients"),
    features=("dropout",),
    cases=tuple(Case(specimen=s, dropout=0.4) for s in ("linear", "conv2d", "fused")),
)
def dropout_gradients(trial: Trial) -> None:
    """Judge by differences, which are exact: for one mask the output is affine in each variable."""
    import torch

    from harness import specimen, storage

    model, x = trial.adapted(), trial.inputs().requires_grad_()
    model.train()

    def call() -> Tensor:
        torch.manual_seed(9)
        return specimen.call(model, x)

    y = call()
    if not call().equal(y):
        trial.notes.append("vacuous: dropout does not follow torch's seed")
        return
    c = cotangent(y)
    y.backward(c)  # type: ignore[no-untyped-call]
    variables = [x, *storage.handles(trial.factors(model))]
    found = [x.grad, *(storage.gradient(model, handle) for handle in variables[1:])]
    rounding = _outputs_rounding(trial, model, x, c)
    for k, (variable, gradient) in enumerate(zip(variables, found, strict=True)):
        what = "the input" if not k else f"{'AB'[(k - 1) % 2]} of part {(k - 1) // 2}"
        if gradient is None:
            fail("no-effect", expected=f"a gradient of {what}", actual="there is none")
        h = cotangent(variable)
        with torch.no_grad():
            kept = variable.detach().clone()
            variable.copy_(kept + h)
            step = ((call() - y).double() * c.double()).sum()
            # Two outputs, and a gradient along h, which is within one variable's way of both.
            allowed = 3 * (rounding + _outputs_rounding(trial, model, x, c))
            variable.copy_(kept)
        slope = (gradient.double() * h.double()).sum()
        trial.close(slope, step, allowed, f"the gradient of {what} along a direction")


def drops_each_input(trial: Trial, model: nn.Module) -> None:
    """The base's path drops nothing; every input of the branch is 0 or x/(1 - p), as often as asked."""
    import torch

    from harness import one_layer

    base, p, x = trial.base(), trial.case.dropout, trial.inputs()[:1]
    one_layer.silence(trial, model)
    model.train()
    plain, budget = trial.truth(base, {}, x), trial.budget(base, trial.snapshot(model), x)
    trial.close(trial.call(model, x), plain, budget, "the base's path, in train mode,")
    x, places = _let_through(trial, model)
    factors = trial.snapshot(model)
    wide = x / (1 - p)
    budget = trial.budget(base, factors, wide)
    plain = trial.truth(base, {}, x)  # (1, …)
    kept = trial.truth(base, factors, wide) - trial.truth(base, {}, wide)
    y = torch.cat([trial.call(model, x).double() for _ in range(CALLS)])  # (calls, …)
    mask = (y - plain).abs() > kept.abs() / 8  # true or not, what is kept is no smaller
    for where, seen in places.items():
        shown = y.flatten(1)[:, seen]
        if (shown == shown[0]).all():
            fail(
                "no-effect",
                expected=f"calls in train mode that differ, at dropout {p:g}",
                actual=f"the same outputs, bit for bit, in {CALLS} calls",
                where=where,
            )
        _drawn_right(trial, mask.flatten(1)[:, seen], where)
    trial.close(y, plain + mask * kept, budget.expand_as(y), "base + scaling·B·A·(0 or x/(1 - p))")


def _let_through(trial: Trial, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the factors values by which a batch of one shows each mask.

    Of a linear layer each output of the first token shows one input. Of a convolution, whose factors lie
    in a layout of its own, some output shows the one pixel that each channel has; by way of one rank, so
    that a mask on what A gives shows as one on the pixels does.

    Returns:
        The batch, and where in its outputs, flattened, the masks are seen: by the rows of each part.
    """
    import torch

    from harness import oracle

    base, x = trial.base(), trial.inputs()[:1]
    parts = trial.factors(model)["proj"]
    with torch.no_grad():
        for f in parts:
            A, B = torch.eye(*f.A.shape), torch.eye(*f.B.shape)
            if x.dim() != 3:
                A, B = torch.zeros(f.A.shape), torch.zeros(f.B.shape)
                A[0] = B[:, 0] = 1
            f.A.copy_(A)
            f.B.copy_(B)
    if x.dim() == 3:
        rows = torch.arange(trial.truth(base, {}, x).shape[-1])
        return x, {
            "" if f.rows is None else f"rows {f.rows}": rows[
                slice(None) if f.rows is None else f.rows
            ][: min(f.A.shape)]
            for f in parts
        }
    factors = trial.snapshot(model)
    images = _one_pixel_a_channel(x, kernel=oracle.weight_of(base.get_submodule("proj")).shape[-1])
    moved = [trial.truth(base, factors, one) - trial.truth(base, {}, one) for one in images]
    return torch.stack(images).sum(0), {"": torch.stack([m.abs().argmax() for m in moved])}


def _one_pixel_a_channel(like: Tensor, kernel: int) -> list[Tensor]:
    """Images (1, c, h, w) of one pixel in one channel each: no place of a kernel sees two of them."""
    import torch

    images = []
    for c in range(min(like.shape[1], -(-like.shape[3] // kernel))):
        image = torch.zeros_like(like)
        image[0, c, 3, kernel * c] = 1
        images.append(image)
    return images


def _drawn_right(trial: Trial, drawn: Tensor, where: str) -> None:
    """Masks `(calls, inputs)`, True where an input was kept, are as often and as unlike as p says."""
    from harness import tolerance

    p = trial.case.dropout
    zeroed = 1 - float(drawn.double().mean())
    whole, none = drawn.all(1), ~drawn.any(1)
    if bool((whole | none).all() and whole.any() and none.any()):
        drawn = drawn[:, :1]  # a token's inputs go together, which is as unbiased
    by_chance = (p**2 + (1 - p) ** 2) ** drawn.shape[1]
    # Pairs that share a call are not independent: every second pair, and then the others.
    again = [
        (drawn[k + 1 :: 2] == drawn[k:-1:2]).all(1).double()  # (pairs,)
        for k in (0, 1)
    ]
    for what, found, expected, draws in (
        ("the share of zeroed inputs", zeroed, p, drawn.numel()),
        *(
            (
                "the share of calls with the mask of the call before",
                float(m.mean()),
                by_chance,
                len(m),
            )
            for m in again
        ),
    ):
        off, allowed = abs(found - expected), tolerance.chance(draws, 1.0)
        trial.margins.append(tolerance.Margin(off / allowed, off, allowed))
        if off > allowed:
            fail(
                "value",
                expected=f"{what} near {expected:.4g}",
                actual=f"{found:.4g} in {CALLS} calls",
                measured=off,
                allowed=allowed,
                where=where,
            )


def _outputs_rounding(trial: Trial, model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """The rounding of Σ c·y, the kept inputs of the branch being 1/(1 - p) times as large."""
    from harness import oracle, tolerance

    absolute = x.detach().double().abs() / (1 - trial.case.dropout)
    M = trial.call(oracle.magnitude(trial.base(), trial.snapshot(model)), absolute)
    terms = c.numel() + x.numel() + trial.case.r
    budget = tolerance.gradients(M, n=terms, dtype=trial.dtype, factor_dtype=trial.factor_dtype)
    return (c.double().abs() * budget).sum()
