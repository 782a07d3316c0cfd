"""What an adapted layer computes in training: dropout on the branch, and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial

PAPER = "LoRA, section 4.1, https://arxiv.org/abs/2106.09685"
ORACLE = "forward/equals-oracle"
CALLS = 200
"""How often dropout is watched: enough for chance to tell 0.3 from 0.4."""
DRAWS = 150
"""How often a branch is added up: enough for chance to tell half of it from all."""
DEVIATIONS = 7
"""Of a mean: for Student's t at `DRAWS`, one element in 10¹⁰ goes beyond."""


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
        *(Case(specimen=s, dropout=0.5) for s in ("conv2d", "fused-all")),
    ),
)
def dropout_on_in_train(trial: Trial) -> None:
    """Judge each input of the branch of a layer whose factors let it through, call by call."""
    if trial.case.specimen == "linear":
        drops_each_input(trial, trial.inject())
    else:
        drops(trial)


def drops(trial: Trial) -> None:
    """The base's path as it is, outputs that differ from call to call, and their mean unbiased."""
    base, x = trial.base(), trial.inputs().abs()
    model = trial.inject()
    expected, budget = trial.truth(base, {}, x), trial.budget(base, trial.snapshot(model), x)
    model.train()
    trial.close(trial.call(model, x), expected, budget, "the base's path, in train mode")
    trial.randomize(model)
    first, second = trial.call(model, x), trial.call(model, x)
    for f in trial.factors(model)["proj"]:
        rows = slice(None) if f.rows is None else f.rows
        if first[..., rows].equal(second[..., rows]):
            fail(
                "no-effect",
                expected=f"two calls in train mode that differ, at dropout {trial.case.dropout:g}",
                actual="the same outputs, bit for bit",
                where="" if f.rows is None else f"rows {f.rows}",
            )
    _unbiased(trial, base, model, x)


@spec(
    "forward/gradients",
    claim="The gradients of the input and of each factor MUST be those of the equation; the input, and the "
    "gradient that comes back, MUST stay as they were.",
    why="A branch that is right forward and wrong backward trains towards something else; a backward pass "
    "that reuses its arguments' memory does so to the layer beside it.",
    source=(
        PAPER,
        "BUGS 101, 118",
    ),
    needs=(
        ORACLE,
        "trainable/only-lora",
        "forward/fused-parts",
        "forward/conv2d",
        "forward/embedding",
    ),
    cases=(
        Case(),
        Case(r=1),
        Case(specimen="bare", r=13),
        *(Case(dtype=d) for d in ("bfloat16", "float16", "float64")),
        *(Case(specimen=s) for s in ("embedding", "conv2d", "grouped", "fused", "fused-all")),
        Case(specimen="fused-unequal"),
    ),
)
def gradients(trial: Trial) -> None:
    """Judge against float64, without the padding index."""
    if trial.case.specimen == "fused-unequal":
        try:
            trial.inject()
        except (NotImplementedError, ValueError) as refusal:  # as forward/fused-parts has it
            trial.notes.append(f"parts of unequal size are refused: {refusal}")
            return
    gradients_right(trial, trial.base())


@spec(
    "forward/backward-hooks",
    claim="The gradients MUST be right where the base's layer, or every module of the adapted model, "
    "has a backward hook, too.",
    why="Profilers, loggers of gradients and DeepSpeed hook layers; what a hook answers with is a view, "
    "and adding the branch to it in place raises, or loses the hook's gradient.",
    source=(
        "BUGS 10",
        "https://github.com/huggingface/peft/pull/1372",
        "https://github.com/Lightning-AI/litgpt/pull/413",
    ),
    needs=("forward/gradients",),
    cases=(
        Case(),
        Case(specimen="fused"),
        Case(way="injected"),
        Case(specimen="fused", way="injected"),
    ),
)
def backward_hooks(trial: Trial) -> None:
    """Judge against float64, with hooks that do nothing, from before injection or after it."""
    base = trial.base()
    if trial.case.way == "injected":
        gradients_right(trial, base, hooked=True)
        return
    base.get_submodule("proj").register_full_backward_hook(lambda *_: None)
    gradients_right(trial, base)


@spec(
    "forward/any-batch-gradients",
    claim="The gradients MUST be right for inputs of every number of leading dimensions, and whatever the "
    "strides of the input and of the gradient that comes back.",
    why="A backward pass written by hand is tried on (batch, tokens, features), contiguous; a head or a "
    "router calls with two dimensions, and a transpose after the layer sends strides back.",
    source=(
        "BUGS 118",
        "https://docs.pytorch.org/docs/stable/notes/extending.html",
    ),
    needs=("forward/gradients", "forward/any-batch"),
    cases=(
        *(Case(way=form) for form in ("vector", "matrix", "one", "four", "expanded")),
        *(Case(specimen=s, way="strides-back") for s in ("linear", "fused")),
        *(Case(specimen="fused", way=form) for form in ("matrix", "four")),
        Case(specimen="conv2d", way="channels-last"),
        Case(specimen="conv2d", way="strides-back"),
    ),
)
def any_batch_gradients(trial: Trial) -> None:
    """Judge against float64."""
    gradients_right(trial, trial.base())


def gradients_right(trial: Trial, base: nn.Module, *, hooked: bool = False) -> None:
    """The gradients of the adapted base, in eval and in train mode, are those of the equation."""
    from harness import oracle, specimen, storage, tolerance
    from harness.specs.forward import formed

    x = formed(trial.inputs(), trial.case.way)
    if not x.is_floating_point():
        x = x.masked_fill(x == 1, 0)
    model = trial.adapted(base)
    for module in model.modules() if hooked else ():
        module.register_full_backward_hook(lambda *_: None)
    for train in (False, True):
        if train:
            model.train()
        model.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_(x.is_floating_point())
        y = specimen.call(model, given)
        c = _cotangent(y)
        specimen.call(model, trial.inputs(1))  # another call, before this one's backward pass
        if trial.case.way == "strides-back":
            c = c.mT.contiguous().mT
        passed = c.clone()
        y.backward(passed)  # type: ignore[no-untyped-call]
        trial.same_bits(given, x, "the input after the backward pass")
        trial.same_bits(passed, c, "the gradient that came back, after the backward pass")

        factors = trial.snapshot(model)
        truth_x, truths = oracle.gradients(trial.base(), factors, x, c)
        absolute = x.abs() if x.is_floating_point() else x
        M_x, Ms = oracle.gradients(*oracle.positive(trial.base(), factors), absolute, c.abs())
        found = [storage.gradient(model, h) for h in storage.handles(trial.factors(model))]
        names = [f"{'AB'[k % 2]} of part {k // 2}" for k in range(len(found))]
        if truth_x is not None and M_x is not None:
            found, truths, Ms = [given.grad, *found], [truth_x, *truths], [M_x, *Ms]
            names = ["the input", *names]
        for actual, truth, M, what in zip(found, truths, Ms, names, strict=True):
            if actual is None:
                fail("no-effect", expected=f"a gradient of {what}", actual="there is none")
            budget = tolerance.gradients(
                M,
                n=y.numel() + x.numel() + trial.case.r,
                dtype=trial.dtype,
                factor_dtype=trial.factor_dtype,
            )
            trial.close(actual, truth, budget, f"the gradient of {what}")
        if truth_x is not None and M_x is not None:
            _frozen(trial, model, x, c, truth=truth_x, M=M_x)


def _frozen(
    trial: Trial, model: nn.Module, x: Tensor, c: Tensor, *, truth: Tensor, M: Tensor
) -> None:
    """The gradient of the input is the same where nothing trains: other layers may lie before."""
    from harness import specimen, tolerance

    trains = [p for p in model.parameters() if p.requires_grad]
    for parameter in trains:
        parameter.requires_grad_(False)
    given = x.clone().requires_grad_()
    y = specimen.call(model, given)
    if y.requires_grad:
        y.backward(c)  # type: ignore[no-untyped-call]
    for parameter in trains:
        parameter.requires_grad_(True)
    if given.grad is None:
        fail("no-effect", expected="a gradient of the input, all frozen", actual="there is none")
    budget = tolerance.gradients(
        M,
        n=y.numel() + x.numel() + trial.case.r,
        dtype=trial.dtype,
        factor_dtype=trial.factor_dtype,
    )
    trial.close(given.grad, truth, budget, "the gradient of the input, all frozen")


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
    c = _cotangent(y)
    y.backward(c)  # type: ignore[no-untyped-call]
    variables = [x, *storage.handles(trial.factors(model))]
    found = [x.grad, *(storage.gradient(model, handle) for handle in variables[1:])]
    rounding = _outputs_rounding(trial, model, x, c)
    for k, (variable, gradient) in enumerate(zip(variables, found, strict=True)):
        what = "the input" if not k else f"{'AB'[(k - 1) % 2]} of part {(k - 1) // 2}"
        if gradient is None:
            fail("no-effect", expected=f"a gradient of {what}", actual="there is none")
        h = _cotangent(variable)
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
    """Every input of the branch is 0 or x/(1 - p), in the right proportion, and drawn afresh."""
    import torch

    from harness import tolerance

    base, p = trial.base(), trial.case.dropout
    i, o = trial.case.shape
    x = trial.inputs()[:1, 0]  # (1, i): one row, as a mask may be one for a whole batch
    (f,) = trial.factors(model)["proj"]
    with torch.no_grad():
        f.A.copy_(torch.eye(i))
        f.B.copy_(torch.eye(o, i))
    factors = trial.snapshot(model)
    budget = trial.budget(base, factors, x / (1 - p))
    plain = trial.call(base.double(), x.double())
    kept = trial.truth(base, factors, x / (1 - p)) - trial.call(base, (x / (1 - p)).double())
    model.train()
    y = torch.cat([trial.call(model, x).double() for _ in range(CALLS)])  # (calls, o)
    mask = (y - plain - kept).abs() < (y - plain).abs()  # nearer to kept than to 0
    outputs = plain + mask * kept
    trial.close(y, outputs, budget.expand_as(y), "base + scaling·B·A·(0 or x/(1 - p))")
    drawn = mask[:, :i]
    zeroed = 1 - float(drawn.double().mean())
    by_chance = (p**2 + (1 - p) ** 2) ** i
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
            )


def _unbiased(trial: Trial, base: nn.Module, model: nn.Module, x: Tensor) -> None:
    """The mean of many outputs in train mode is the output without dropout, as near as chance allows.

    Chance is told by the outputs' own spread: a mask may be one for a whole batch, or one a number.
    """
    import torch

    with torch.no_grad():
        for f in (f for parts in trial.factors(model).values() for f in parts):
            f.A.copy_(f.A.abs())
            f.B.copy_(f.B.abs())
    factors, p = trial.snapshot(model), trial.case.dropout
    truth = trial.truth(base, factors, x)
    drawn = torch.stack([trial.call(model, x).double() for _ in range(DRAWS)])
    budget = trial.budget(base, factors, x / (1 - p))
    allowed = DEVIATIONS * drawn.std(0) / DRAWS**0.5 + budget
    trial.close(drawn.mean(0), truth, allowed, f"mean output of {DRAWS} calls in train mode")


def _outputs_rounding(trial: Trial, model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """The rounding of Σ c·y, the kept inputs of the branch being 1/(1 - p) times as large."""
    from harness import oracle, tolerance

    absolute = x.detach().double().abs() / (1 - trial.case.dropout)
    M = trial.call(oracle.magnitude(trial.base(), trial.snapshot(model)), absolute)
    terms = c.numel() + x.numel() + trial.case.r
    budget = tolerance.gradients(M, n=terms, dtype=trial.dtype, factor_dtype=trial.factor_dtype)
    return (c.double().abs() * budget).sum()


def _cotangent(like: Tensor) -> Tensor:
    """Seeded numbers in the shape and dtype of a tensor."""
    import torch

    g = torch.Generator().manual_seed(4_000 + like.numel())
    drawn = torch.randn(like.shape, generator=g, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)
