"""What an adapted layer of each kind computes, and in which dtype it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from harness.adapter import Factors, LoraConfig, Parts
    from harness.trial import Trial

ORACLE = "forward/equals-oracle"
LORALIB = "https://github.com/microsoft/LoRA"
UNEQUAL = ("fused-unequal", "tiny-gqa")


@spec(
    "forward/fused-parts",
    claim="In a fused projection exactly the rows of the wanted parts MUST be adapted, each part by "
    "itself, be they equal or grouped-query.",
    why="An update meant for v that lands on k trains and saves without an error.",
    source=(
        "BUGS 5, 6, 7, 8, P-14",
        f"{LORALIB}/pull/107",
        "https://github.com/Lightning-AI/litgpt/issues/891",
        "https://github.com/Lightning-AI/litgpt/pull/377",
        "https://github.com/Lightning-AI/litgpt/issues/1197",
    ),
    needs=(ORACLE, "forward/phi3"),
    features=("fused_linear",),
    cases=(
        Case(specimen="fused"),
        Case(specimen="fused", shape=(12, 4), r=5),
        Case(specimen="fused-all"),
        Case(specimen="fused-unequal"),
        Case(specimen="tiny-gqa"),
    ),
    more_cases=(
        Case(specimen="tiny"),
        Case(specimen="fused", dtype="bfloat16"),
    ),
)
def fused_parts(trial: Trial) -> None:
    """Judge which rows the factors say, and what each part's outputs are."""
    base, x = trial.base(), trial.inputs()
    config = _parted(trial, base)
    try:
        model = trial.inject(trial.base(), config)
    except (NotImplementedError, ValueError) as refusal:  # who cuts the rows equally may say so
        if trial.case.specimen not in UNEQUAL:
            raise
        trial.notes.append(f"parts of unequal size are refused: {refusal}")
        return
    same_parts(trial.factors(model), config, base)
    trial.randomize(model)
    factors = trial.snapshot(model)
    budget = trial.budget(base, factors, x)
    trial.close(trial.call(model, x), trial.truth(base, factors, x), budget, "output")


@spec(
    "forward/embedding",
    claim="An adapted embedding MUST give the rows of W + scaling·(B·A)ᵀ, at the padding index too, "
    "and where the vocabulary is as large as the width.",
    why="BA untransposed has the right shape when both are equal, and then nothing raises.",
    source=("BUGS 3, 4", f"{LORALIB}/commit/a23efe2"),
    needs=(ORACLE,),
    cases=(
        Case(specimen="embedding"),
        Case(specimen="embedding", shape=(7, 7)),
        Case(specimen="embedding", r=15),
        *(Case(specimen="embedding", dtype=d) for d in ("bfloat16", "float16", "float64")),
    ),
)
def embedding(trial: Trial) -> None:
    """Judge every row of a small table, and the indices in other shapes."""
    import torch

    num: Any = trial.base().get_submodule("proj").num_embeddings
    _layer(trial, torch.arange(num, device=trial.case.device))
    _layer(trial, trial.inputs())
    _layer(trial, trial.inputs()[:0])


@spec(
    "forward/conv2d",
    claim="An adapted convolution MUST give what one with W + ΔW gives, with its stride, padding, "
    "dilation and groups.",
    why="A branch that steps over the image otherwise than the base does adds up unlike places, or "
    "raises in the first forward pass.",
    source=(
        "BUGS 32",
        f"{LORALIB}/commit/375704a",
        "https://github.com/huggingface/peft/pull/2403",
    ),
    needs=(ORACLE,),
    cases=(
        Case(specimen="conv2d"),
        Case(specimen="conv2d", shape=(3, 4, 1, 1)),
        Case(specimen="conv2d", r=15),
        Case(specimen="dilated"),
        Case(specimen="same"),
        Case(specimen="grouped"),
        *(Case(specimen="conv2d", dtype=d) for d in ("bfloat16", "float64")),
    ),
)
def conv2d(trial: Trial) -> None:
    """Judge a convolution with another stride and padding along each side."""
    _layer(trial, trial.inputs())


@spec(
    "forward/conv2d-edges",
    claim="An adapted convolution MUST pad as its base does where that is not with zeros, and take a kernel "
    "that is not square and an image without a batch, or raise.",
    why="Zeros where the base goes round or mirrors put a seam into every image, and merged the adapter is "
    "another.",
    source=(
        "DESIGN: the update of one weight; called like the base",
        "https://github.com/huggingface/peft/issues/3697",
        "https://github.com/huggingface/diffusers/issues/5957",
    ),
    needs=("forward/conv2d",),
    cases=(
        Case(specimen="circular"),
        Case(specimen="reflect"),
        Case(specimen="conv2d", shape=(3, 4, 3, 2)),
        Case(specimen="conv2d", way="unbatched"),
    ),
)
def conv2d_edges(trial: Trial) -> None:
    """Judge modes of padding, an oblong kernel and one image; a refusal is as good."""
    x = trial.inputs()
    given = x[0] if trial.case.way == "unbatched" else x
    try:
        trial.call(trial.inject(), given)
    except Exception as refusal:  # noqa: BLE001  # nothing is wrong in silence
        trial.notes.append(f"refused at {trial.case}: {type(refusal).__name__}")
        return
    _layer(trial, given)


@spec(
    "forward/output-dtype",
    claim="The output of an adapted layer MUST have the base's dtype, in eval and in train mode.",
    why="A float32 output in a bfloat16 model doubles the activations, or fails in the next layer.",
    source=(
        "BUGS 126",
        "https://github.com/huggingface/peft/issues/1010",
        "https://github.com/unslothai/unsloth-zoo/pull/564",
    ),
    needs=("targeting/exact-coverage",),
    tier="smoke",
    cases=(
        *(Case(dtype=d) for d in ("float32", "bfloat16", "float16", "float64")),
        *(Case(specimen=s, dtype="bfloat16") for s in ("embedding", "conv2d", "fused")),
        Case(dtype="bfloat16", way="lora_bias"),
    ),
)
def output_dtype(trial: Trial) -> None:
    """Judge the dtype alone."""
    way = trial.case.way
    if way and not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    model, x = trial.inject(config=trial.config(lora_bias=bool(way))), trial.inputs()
    for train in (False, True):
        model.train(train)
        found = trial.call(model, x).dtype
        if found != trial.dtype:
            mode = "train" if train else "eval"
            fail("dtype", expected=f"{trial.dtype} in {mode} mode", actual=f"{found}")


@spec(
    "forward/autocast",
    claim="Under bfloat16 autocast an adapted float32 layer MUST answer within bfloat16's rounding, and "
    "train its factors, whatever was called before.",
    why="Mixed precision is how the documented recipes train.",
    source=("BUGS P-16", "guide, step 7: bfloat16 for mixed precision"),
    needs=(ORACLE, "forward/fused-parts"),
    cases=(Case(), Case(specimen="bare", r=13), Case(specimen="fused"), Case(specimen="conv2d")),
)
def autocast(trial: Trial) -> None:
    """Judge the output, what is left behind, and gradients after a call without."""
    import torch

    from harness import oracle, specimen, tolerance

    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    mixed = torch.autocast(trial.case.device.split(":")[0], dtype=torch.bfloat16)
    with mixed:
        try:
            actual = trial.call(model, x)
        except (NotImplementedError, RuntimeError) as error:  # claimed nowhere: refusing it is loud
            trial.notes.append(f"a call under autocast is refused: {error}")
            return

    M = trial.call(oracle.magnitude(base, factors), x.double().abs())
    budget = tolerance.outputs(M, n=specimen.reduction(trial.case), dtype=torch.bfloat16)
    trial.close(actual, trial.truth(base, factors, x), budget, "output under autocast")
    plain = trial.budget(base, factors, x)
    trial.close(trial.call(model, x), trial.truth(base, factors, x), plain, "output after autocast")
    model.train()
    with mixed:
        loss = specimen.loss(model, x)
    if not loss.requires_grad:
        fail("no-effect", expected="outputs that train the factors", actual="none under autocast")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # mixed precision is claimed nowhere: refusing it is loud
        trial.notes.append(f"training under autocast is refused: {error}")
        return
    _all_have_gradients(trial, model, "under autocast, after a call without gradient")


@spec(
    "forward/autocast-dtype",
    # The contract says nothing of autocast, and what comes next there is cast anyway.
    claim="Under bfloat16 autocast an adapted float32 layer SHOULD answer in the dtype the base has there.",
    why="A branch that is cast to the input's dtype makes every activation after it twice as large.",
    source=("BUGS 126", "https://github.com/huggingface/peft/issues/1010"),
    needs=("forward/autocast",),
    cases=(Case(), Case(specimen="conv2d")),
)
def autocast_dtype(trial: Trial) -> None:
    """Judge the dtype alone."""
    import torch

    base, x, model = trial.base(), trial.inputs(), trial.adapted()
    with torch.autocast(trial.case.device.split(":")[0], dtype=torch.bfloat16):
        expected = trial.call(base, x).dtype
        try:
            found = trial.call(model, x).dtype
        except (NotImplementedError, RuntimeError):  # noted by forward/autocast
            return
    if found != expected:
        fail("dtype", expected=f"{expected}, as the base answers", actual=f"{found}")


@spec(
    "forward/inference-mode-first",
    claim="A model first called in inference mode MUST act there as elsewhere, and train afterwards.",
    why="A tensor made and kept in an inference call cannot be used by autograd: evaluating before "
    "training, as trainers do, then raises. A fast path for inference may leave the adapter out.",
    source=("BUGS 124", "https://github.com/Lightning-AI/litgpt/pull/2225"),
    needs=("forward/gradients",),
    cases=tuple(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
)
def inference_mode_first(trial: Trial) -> None:
    """Judge such a call's outputs, and a backward pass after it."""
    import torch

    from harness import specimen

    base, model, x = trial.base(), trial.adapted(), trial.inputs()
    with torch.inference_mode():
        found = specimen.call(model, x.clone())
    factors = trial.snapshot(model)
    budget = trial.budget(base, factors, x)
    trial.close(found.clone(), trial.truth(base, factors, x), budget, "output in inference mode")
    model.train()
    specimen.loss(model, x).backward()  # type: ignore[no-untyped-call]
    _all_have_gradients(trial, model, "after a first call in inference mode")


def _all_have_gradients(trial: Trial, model: nn.Module, when: str) -> None:
    """A backward pass has reached every factor."""
    from harness import storage

    for handle in storage.handles(trial.factors(model)):
        gradient = storage.gradient(model, handle)
        if gradient is None or not gradient.any():
            fail("no-effect", expected="a gradient in each factor", actual=f"none {when}")


def _layer(trial: Trial, x: Any) -> None:
    """One adapted layer's outputs on `x` are the truth's."""
    base = trial.base()
    model = trial.adapted()
    factors = trial.snapshot(model)
    budget = trial.budget(base, factors, x)
    trial.close(trial.call(model, x), trial.truth(base, factors, x), budget, "output")


def _parted(trial: Trial, base: nn.Module) -> LoraConfig:
    """The case's configuration; on Phi-3, q and v of `qkv_proj` and the second half of the MLP's."""
    if trial.case.specimen.startswith("fused"):
        return trial.config()
    c: Any = base.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    q, kv = c.num_attention_heads * size, c.num_key_value_heads * size
    layouts: dict[str, Parts] = {
        "qkv_proj": ((q, True), (kv, False), (kv, True)),
        "gate_up_proj": ((c.intermediate_size, False), (c.intermediate_size, True)),
    }
    return trial.config(target_modules=tuple(layouts), enable_lora=layouts)


def same_parts(
    factors: Mapping[str, Sequence[Factors]], config: LoraConfig, base: nn.Module
) -> None:
    """The rows that the factors say are those of the wanted parts, or `Broken`."""
    for name, parts in factors.items():
        rows = int(base.get_submodule(name).out_features)  # type: ignore[arg-type]
        meant = [(s.start, s.stop) for s in config.parts(name) or []]
        found = sorted(_span(f.rows, rows) for f in parts)
        if found != meant:
            fail(
                "names",
                expected=f"one pair of factors for each wanted part, rows {meant}",
                actual=f"rows {found}",
                where=name,
            )


def _span(rows: Any, total: int) -> tuple[int, int]:
    """The first row and the one after the last; of none in between, an impossible span."""
    import torch

    seen = torch.arange(total)[slice(None) if rows is None else rows]
    first, last = int(seen.min()), int(seen.max())
    return (first, last + 1) if len(seen) == last + 1 - first else (first, -1)
