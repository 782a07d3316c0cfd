"""What an adapted layer computes in training: gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import LoraConfig
    from harness.trial import Trial

PAPER = "LoRA, section 4.1, https://arxiv.org/abs/2106.09685"
ORACLE = "forward/equals-oracle"


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
        *(Case(specimen=s, dtype="bfloat16") for s in ("embedding", "conv2d", "fused")),
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
    "forward/gradients-under-settings",
    claim="Under rsLoRA, and with a bias on B, the gradients MUST be those of the equation, that of the bias too.",
    why="A backward pass written by hand has a scaling and a bias of its own: one that goes by alpha/r learns √r "
    "times too slowly, and a bias without a gradient is trainable in name.",
    source=(PAPER, "https://arxiv.org/abs/2312.03732", "BUGS 19, 112"),
    needs=("forward/gradients", "forward/rslora", "forward/lora-bias"),
    cases=(
        *(Case(specimen=s, way="rslora") for s in ("linear", "embedding", "conv2d", "fused")),
        *(Case(specimen=s, way="lora_bias") for s in ("linear", "conv2d", "fused")),
    ),
)
def gradients_under_settings(trial: Trial) -> None:
    """Judge against float64, without the padding index."""
    way = trial.case.way
    if not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    settings: dict[str, Any] = {"use_rslora" if way == "rslora" else way: True}
    gradients_right(trial, trial.base(), trial.config(**settings))


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


def gradients_right(
    trial: Trial, base: nn.Module, config: LoraConfig | None = None, *, hooked: bool = False
) -> None:
    """The gradients of the adapted base, in eval and in train mode, are those of the equation."""
    model = trial.adapted(base, config)
    for module in model.modules() if hooked else ():
        module.register_full_backward_hook(lambda *_: None)
    gradients_of(trial, model)


def gradients_of(trial: Trial, model: nn.Module) -> None:
    """The gradients of an adapted model, in its mode and in train mode, are those of the equation."""
    from harness import descent, oracle, specimen, storage, tolerance
    from harness.specs.forward import formed

    x = formed(trial.inputs(), trial.case.way)
    if not x.is_floating_point():
        x = x.masked_fill(x == 1, 0)
    for train in (False, True):
        if train:
            model.train()
        model.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_(x.is_floating_point())
        y = specimen.call(model, given)
        c = cotangent(y)
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
        names = [name for name, _ in descent.pairs(factors)]
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


def cotangent(like: Tensor) -> Tensor:
    """Seeded numbers in the shape and dtype of a tensor."""
    import torch

    g = torch.Generator().manual_seed(4_000 + like.numel())
    drawn = torch.randn(like.shape, generator=g, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)
