"""What an adapted model computes: the equation, on every input, from the factors as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy
    from torch import Tensor

    from harness.trial import Trial

PAPER = "LoRA, section 4.1, https://arxiv.org/abs/2106.09685"
ORACLE = "forward/equals-oracle"
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("embedding", "conv2d", "grouped", "fused")
FORMS = (
    *("vector", "matrix", "token", "one", "four", "long"),
    *("empty", "strided", "expanded", "channels-first"),
)


def cases() -> SearchStrategy[Case]:
    """Shapes, ranks above and below the width, alpha, and dtypes."""
    from hypothesis import strategies as st

    sizes = st.integers(1, 24)
    return st.builds(
        Case,
        specimen=st.sampled_from(("linear", "bare")),
        shape=st.tuples(sizes, sizes),
        dtype=st.sampled_from(DTYPES),
        r=st.integers(1, 30),
        alpha=st.sampled_from((0.25, 1.0, 7.0, 16.0, 64.0)),
        seed=st.integers(0, 3),
    )


@spec(
    "forward/input-unchanged",
    claim="A call MUST leave its input as it was, bit for bit.",
    why="The same tensor goes on to the next layer, over a residual connection: what is written "
    "into it is written into the model.",
    source=("BUGS 10", "https://github.com/huggingface/peft/pull/1372"),
    needs=("targeting/exact-coverage",),
    tier="smoke",
    cases=tuple(
        Case(specimen=name) for name in ("linear", "embedding", "conv2d", "grouped", "fused")
    ),
)
def input_unchanged(trial: Trial) -> None:
    """Judge the input after a call in each mode, without gradient."""
    x = trial.inputs()
    bits = x.clone()
    model = trial.adapted()
    for train in (False, True):
        model.train(train)
        trial.call(model, x)
        trial.same_bits(x, bits, "the input after the call")


@spec(
    "forward/equals-oracle",
    claim="The output of an adapted layer MUST equal x·(W + scaling·B·A)ᵀ + bias within rounding, in eval and "
    "in train mode.",
    why="Everything else rests on it: a wrong branch trains, saves and merges the wrong thing.",
    source=(PAPER, "BUGS 20, 22, 64, 125", "https://github.com/unslothai/unsloth-zoo/pull/482"),
    needs=("targeting/exact-coverage", "initialization/no-op"),
    tier="smoke",
    cases=(
        Case(),
        Case(r=1),
        Case(specimen="bare", r=13),
        Case(dtype="bfloat16"),
        Case(dtype="float16"),
        Case(dtype="float64"),
        Case(specimen="stack"),
        Case(shape=(50, 40), r=45),
        Case(shape=(300, 280), r=140),
    ),
    search=cases,
)
def equals_oracle(trial: Trial) -> None:
    """Judge a layer, or layers in a row, with random factors on random inputs."""
    base, model, x = trial.base(), trial.adapted(), trial.inputs()
    _close(trial, base, model, x)
    merges = getattr(trial.adapter, "eval_merges", False)  # then they were judged in train mode
    if not merges and not trial.case.dropout:
        model.train()
        _close(trial, base, model, x, "output in train mode, without gradient")


@spec(
    "forward/any-batch",
    claim="Inputs of every number of leading dimensions, none and an empty one among them, of any strides "
    "and, as indices, of either width MUST be computed on as the base does.",
    why="A model reshapes, transposes and splits its batches as it likes; what was written for "
    "(batch, tokens, features) fails elsewhere, or answers for another token.",
    source=("https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html#shape",),
    needs=(ORACLE, "forward/fused-parts"),
    cases=(
        *(Case(way=form) for form in FORMS),
        *(Case(specimen="fused", way=form) for form in ("matrix", "token", "four")),
        Case(specimen="conv2d", way="channels-last"),
        Case(specimen="embedding", way="int32"),
    ),
)
def any_batch(trial: Trial) -> None:
    """Judge against the equation."""
    base, x = trial.base(), formed(trial.inputs(), trial.case.way)
    _close(trial, base, trial.adapted(), x)


@spec(
    "forward/sees-factors-now",
    claim="A call MUST use the factors as they are at that moment, whatever was called before.",
    why="A product of the factors that is kept from an earlier call answers for weights that "
    "training, loading or another model has replaced.",
    source=("BUGS 64, 112", "https://github.com/meta-pytorch/torchtune/pull/907"),
    needs=(ORACLE,),
    cases=(Case(), Case(specimen="stack"), *(Case(specimen=name) for name in KINDS)),
)
def sees_factors_now(trial: Trial) -> None:
    """Judge a call after the factors were written to, between calls and between modes."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    trial.call(model, x)
    for seed in (1, 2):
        trial.randomize(model, seed=seed)
        _close(trial, base, model, x)
    model.train()
    trial.call(model, x)
    trial.randomize(model, seed=3)
    trial.unmerged(model)
    _close(trial, base, model, x)


@spec(
    "forward/scaling",
    claim="The scaling of every adapted module MUST be alpha/r of the configuration it was injected "
    "with.",
    why="A scaling off by r is a learning rate off by r, and a checkpoint that others read as "
    "another model.",
    source=(
        PAPER,
        "BUGS 20, 23, 112, P-2",
        "https://github.com/rasbt/LLMs-from-scratch/issues/821",
        "https://github.com/huggingface/peft/pull/3315",
    ),
    needs=(ORACLE,),
    cases=(
        Case(),
        Case(r=5, alpha=2.0),
        *(Case(specimen=name) for name in (*KINDS, "stack")),
    ),
)
def scaling(trial: Trial) -> None:
    """Judge the handles; that the function agrees with them is forward/equals-oracle's."""
    other = trial.config(r=trial.case.r + 4, lora_alpha=trial.case.alpha * 3)
    kept = trial.inject(config=trial.config())
    _scaled(trial, trial.inject(config=other), other.scaling, "of a second model")
    _scaled(trial, kept, trial.config().scaling, "")


@spec(
    "forward/rslora",
    claim="Under rsLoRA the scaling MUST be alpha/√r.",
    why="Consumers that read alpha/r instead shrink the adapter by √r, and nothing tells.",
    source=(
        "https://arxiv.org/abs/2312.03732",
        "BUGS 19",
        "https://github.com/vllm-project/vllm/issues/6909",
    ),
    needs=("forward/scaling",),
    features=("rslora",),
    cases=(
        Case(),
        Case(r=5, alpha=2.0),
        *(Case(specimen=name) for name in (*KINDS, "stack")),
    ),
)
def rslora(trial: Trial) -> None:
    """Judge the handles and the outputs: those of a model without it whose ΔW is the same."""
    config = trial.config(use_rslora=True)
    base, x = trial.base(), trial.inputs()
    model = trial.adapted(config=config)

    _scaled(trial, model, config.scaling, "under rsLoRA")
    # `randomize` divides B by the scaling. Both outputs are rounded, and each model's B.
    plain, budget = trial.adapted(), 3 * trial.budget(base, trial.snapshot(model), x)
    trial.close(trial.call(model, x), trial.call(plain, x), budget, "output, as without rsLoRA")


@spec(
    "forward/lora-bias",
    claim="Under lora_bias the output of the branch MUST hold scaling·bias.",
    why="A bias on B that is added without its scaling is another one once it is merged or served.",
    source=("DESIGN: it adds scaling·bias to the output", "BUGS 17"),
    needs=("forward/scaling", "trainable/only-lora", "forward/fused-parts"),
    features=("lora_bias",),
    cases=(Case(), *(Case(specimen=name) for name in ("bare", "fused", "conv2d"))),
)
def lora_bias(trial: Trial) -> None:
    """Judge the unmerged outputs, of zeros too: they show the bias alone."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted(config=trial.config(lora_bias=True))
    if any(f.bias is None for parts in trial.factors(model).values() for f in parts):
        fail(
            "names", expected="Factors with a bias under lora_bias", actual="without", where="proj"
        )

    _close(trial, base, model, x * 0)
    if trial.case.specimen != "conv2d":  # forward/conv2d's
        _close(trial, base, model, x)


@spec(
    "forward/phi3",
    claim="The logits of a Phi-3 with all its projections adapted MUST equal those with W + ΔW in the "
    "place of each weight, within the model's own rounding.",
    why="What holds for a layer can fail in a model: fast paths pass adapters by, and scalings are "
    "found by the class of a parent.",
    source=(
        "BUGS 22, 109",
        "https://github.com/unslothai/unsloth-zoo/pull/806",
        "https://github.com/huggingface/trl/issues/5977",
    ),
    needs=(ORACLE,),
    cases=(Case(specimen="tiny"), Case(specimen="tiny-gqa")),
    more_cases=(
        Case(specimen="tiny", dtype="bfloat16"),
        Case(specimen="tiny-gqa", dtype="bfloat16"),
    ),
)
def phi3(trial: Trial) -> None:
    """Judge a whole model, equal and grouped-query."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()

    _close(trial, base, model, x)


@spec(
    "forward/called-like-the-base",
    claim="The returned model MUST take the base's arguments and give the base's kind of answer.",
    why="Trainers pass masks and labels by name and read the loss from the answer, packing passes "
    "positions, generation a cache: what a wrapper swallows is lost in silence.",
    source=("DESIGN: Returns the model to use, called like the base", "BUGS 57"),
    needs=("initialization/no-op",),
    cases=(Case(specimen="tiny"),),
)
def called_like_the_base(trial: Trial) -> None:
    """Judge a fresh adapter, whose every answer is the base's, with what trainers and generation pass."""
    import torch

    from harness import oracle, tolerance

    ids = trial.inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}
    base: Any = trial.base().eval()
    wide: Any = oracle.merged(base, {})
    model: Any = trial.inject()

    def close(actual: Any, expected: Tensor, truth: Tensor, what: str) -> None:
        if actual is None:
            fail("names", expected=what, actual="None")
        budget = tolerance.model(expected.double() - truth, truth, trial.dtype)
        trial.close(actual, truth, budget, what)

    with torch.no_grad():
        for more in ({}, {"output_hidden_states": True}):
            expected, truth, actual = (m(**given, **more) for m in (base, wide, model))
            if type(actual).__name__ != type(expected).__name__:
                fail(
                    "names",
                    expected=f"an answer of the base's kind, {type(expected).__name__}",
                    actual=type(actual).__name__,
                )
            close(actual.logits, expected.logits, truth.logits, "logits under an attention mask")
            close(actual.loss, expected.loss, truth.loss, "the loss of the labels passed")
            hidden = len(actual.hidden_states or ()), len(expected.hidden_states or ())
            if hidden[0] != hidden[1]:
                fail("count", expected=f"{hidden[1]} hidden states", actual=f"{hidden[0]}")
        all_three = (base, wide, model)
        expected, truth, actual = (m(ids).logits for m in all_three)
        close(actual, expected, truth, "logits of ids passed by position")
        embedded = base.get_input_embeddings()(ids)
        turned = torch.arange(ids.shape[1], device=ids.device).flip(0).expand_as(ids)
        begun = [
            m(inputs_embeds=x, position_ids=turned, use_cache=True)
            for m, x in zip(all_three, (embedded, embedded.double(), embedded), strict=True)
        ]
        expected, truth, actual = (answer.logits for answer in begun)
        close(actual, expected, truth, "logits of embeddings at the caller's positions")
        if begun[-1].past_key_values is None:
            fail("names", expected="past_key_values under use_cache", actual="none")
        expected, truth, actual = (
            m(input_ids=ids[:, :1], past_key_values=answer.past_key_values).logits
            for m, answer in zip(all_three, begun, strict=True)
        )
        close(actual, expected, truth, "logits of a token after a cache")


def _close(trial: Trial, base: Any, model: Any, x: Any, what: str = "output") -> None:
    """The model's outputs are the truth's, by its factors now."""
    factors = trial.snapshot(model)
    budget = trial.budget(base, factors, x)
    trial.close(trial.call(model, x), trial.truth(base, factors, x), budget, what)


def _scaled(trial: Trial, model: Any, expected: float, which: str) -> None:
    """Every handle's scaling is the one expected, to float64's rounding."""
    from harness import tolerance

    for name, parts in trial.factors(model).items():
        for f in parts:
            off, allowed = abs(float(f.scaling) - expected), tolerance.setting(expected)
            if not off <= allowed:
                fail(
                    "value",
                    expected=f"scaling {expected:.6g} {which}".rstrip(),
                    actual=f"{float(f.scaling):.6g}",
                    measured=off,
                    allowed=allowed,
                    where=name,
                )


def formed(x: Tensor, way: str) -> Tensor:
    """The inputs (b=3, t=4, i) in another form: other ranks, none at all, or not contiguous."""
    if way == "int32":
        return x.int()
    if way == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)  # (b, c, h, w)
    if way == "vector":
        return x[0, 0]  # (i,)
    if way == "matrix":
        return x[0]  # (t, i)
    if way in {"token", "one"}:  # as in decoding, of a batch and of one
        return x[: 1 if way == "one" else None, :1]  # (b, 1, i)
    if way == "four":
        return x[None].expand(2, -1, -1, -1).contiguous()  # (2, b, t, i)
    if way == "long":
        return x[:1].repeat(1, 1100, 1)  # (1, 4400, i): more than a block, or a short context
    if way == "empty":
        return x[:, :0]  # (b, 0, i)
    if way == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if way == "expanded":
        return x[:1, :1].expand(3, 4, -1)
    return x.transpose(0, 2).contiguous().transpose(0, 2) if way == "channels-first" else x
