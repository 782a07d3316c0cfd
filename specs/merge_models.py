"""What merging does in a model: to the other tensors, to shared weights, to biases, when it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.several_disabled import Interrupted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial

STEPS = 5
"""Tokens generated: enough that a wrong token is followed by others."""


@spec(
    "merge/only-targets-change",
    claim="Merging and unmerging MUST leave every other tensor of the base bit for bit as it was.",
    why="A merge with side effects ruins norms, biases or neighbours, a little more each time.",
    source=("BUGS 27", "https://github.com/unslothai/unsloth/issues/219"),
    features=("merge",),
    needs=("merge/same-output", "merge/restores-base"),
    # In bfloat16 twelve layers' rounding is as large as a layer's update.
    cases=(Case(specimen="stack"),),
    more_cases=(Case(specimen="stack", dtype="float16"),),
)
def only_targets_change(trial: Trial) -> None:
    """Hold on to the base's tensors, merge, and judge those by bits and the model by its outputs."""
    base, given = trial.base(), trial.inputs()
    used, kept = trial.base(), _tensors(base)
    held = _tensors(used)
    model = trial.adapted(used)
    factors = trial.snapshot(model)
    others = held.keys() - {f"{name}.weight" for name in factors}
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    for verb in ("merge", "unmerge") if trial.claims("unmerge") else ("merge",):
        getattr(trial.adapter, verb)(model)
        trial.close(trial.call(model, given), truth, budget, f"output after {verb}")
        for name in sorted(others):
            trial.same_bits(held[name], kept[name], f"{name} after {verb}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@spec(
    "merge/keeps-saved-modules",
    claim="Merging, and unmerging, MUST keep the modules that were trained whole.",
    why="A merged model with the base's old head answers as if the head had never been trained.",
    source=(
        "BUGS 29",
        "https://github.com/unslothai/unsloth/issues/3454",
        "https://github.com/huggingface/peft/issues/322",
    ),
    features=("merge", "modules_to_save"),
    needs=("merge/only-targets-change", "checkpoint/every-layer"),
    cases=(Case(specimen="stack"),),
)
def keeps_saved_modules(trial: Trial) -> None:
    """Train `foobar` whole beside an adapter, and compare the outputs before and after."""
    import torch

    given = trial.inputs()
    model = trial.inject(config=trial.config(modules_to_save=("foobar",)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    factors = trial.randomize(model)
    before = trial.call(model, given)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it

    budget = 2 * trial.budget(trial.base(), factors, given)
    trial.close(trial.call(model, given), before, budget, "merged output, as unmerged")
    if trial.claims("unmerge"):
        trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # claimed
        trial.close(trial.call(model, given), before, budget, "output, merged and unmerged again")


@spec(
    "merge/tied-weights",
    claim="Merging into a weight that two modules share MUST change the adapted one alone, or raise.",
    why="With tied embeddings a head that was adapted would change what every token looks like.",
    source=("BUGS 14", "https://github.com/huggingface/peft/issues/2018"),
    features=("merge", "tied_embeddings"),
    needs=("merge/same-output",),
    cases=tuple(Case(specimen="tied", way=way) for way in ("", "embedding", "both")),
)
def tied_weights(trial: Trial) -> None:
    """Adapt one end of a tied pair, merge, and compare the outputs of the whole."""
    names = {"": ("lm_head",), "embedding": ("embed_tokens",)}.get(
        trial.case.way, ("embed_tokens", "lm_head")
    )
    if trial.case.way and not trial.claims("embedding"):
        trial.notes.append("the tied embedding is not adapted: embedding is not claimed")
        return
    base, given = trial.base(), trial.inputs()
    model = trial.adapted(config=trial.config(target_modules=names))
    factors = trial.snapshot(model)
    try:
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"refused: {type(error).__name__}")
        return

    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    trial.close(trial.call(model, given), truth, budget, f"merged output, {names[0]} adapted")


@spec(
    "merge/shared-module",
    claim="Merging a module reached under two names MUST fold ΔW in once.",
    why="A merge that walks over names adds ΔW once for each, and every use of the layer is wrong.",
    source=(
        "DESIGN: A module reached under two names is one module, known by the first",
        "https://github.com/vllm-project/vllm/issues/39815",
    ),
    features=("merge",),
    needs=("merge/same-output", "merge/restores-base", "targeting/shared-module"),
    cases=(Case(specimen="shared"),),
)
def shared_module(trial: Trial) -> None:
    """Merge into a layer that is used twice; unmerged, where that is claimed, it is as before."""
    base, given = trial.base(), trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    before = trial.call(model, given)
    budget = trial.budget(base, factors, given)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    trial.close(
        trial.call(model, given), trial.truth(base, factors, given), budget, "merged output"
    )
    if trial.claims("unmerge"):
        trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # claimed
        trial.close(trial.call(model, given), before, 2 * budget, "output after unmerging")


@spec(
    "merge/bias-scaled",
    claim="Merging MUST add scaling·bias to the base's bias; where there is none, make one or raise.",
    why="A trained bias on B that a merge drops or does not scale shifts every output.",
    source=("BUGS 17", "https://github.com/huggingface/peft/issues/2725"),
    features=("merge", "lora_bias"),
    needs=("merge/same-output", "merge/restores-base", "forward/lora-bias"),
    cases=(
        Case(),
        Case(specimen="bare"),
        Case(dtype="bfloat16"),
        Case(specimen="conv2d"),
        Case(specimen="fused"),
    ),
)
def bias_scaled(trial: Trial) -> None:
    """Merge factors with a bias; zeros as inputs show the merged bias alone."""
    import torch

    base, given = trial.base(), trial.inputs()
    model = trial.adapted(config=trial.config(lora_bias=True))
    factors = trial.snapshot(model)
    if all(f.bias is None for parts in factors.values() for f in parts):
        fail(
            "names",
            expected="under lora_bias, factors have a bias",
            actual="none has",
            where="proj",
        )
    try:
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    except Exception as error:
        if trial.case.specimen != "bare":
            raise
        trial.notes.append(f"refused where there is no bias: {type(error).__name__}")
        return
    for x, what in ((torch.zeros_like(given), "merged bias"), (given, "merged output")):
        truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
        trial.close(trial.call(model, x), truth, budget, what)
    if trial.claims("unmerge"):
        trial.adapter.unmerge(model)  # type: ignore[attr-defined]  # claimed
        trial.close(trial.call(model, x), truth, budget, "output after unmerging")


@spec(
    "merge/refuses-nan",
    claim="A merge that would write NaN SHOULD raise, and leave the base as it was.",
    why="A diverged adapter folded into the base destroys it; one bad layer is found too late.",
    source=("BUGS 37", "https://github.com/huggingface/peft/pull/3411"),
    features=("merge",),
    needs=("merge/weight-equals-oracle",),
    cases=(
        *(Case(specimen=s) for s in ("stack", "embedding", "conv2d")),
        Case(way="lora_bias"),
    ),
)
def refuses_nan(trial: Trial) -> None:
    """Put one NaN into the last adapted module, or its bias, try to merge, repair it, and compare bits."""
    import torch

    given, biased = trial.inputs(), trial.case.way == "lora_bias"
    if biased and not trial.claims("lora_bias"):
        trial.notes.append("lora_bias is not claimed")
        return
    model = trial.adapted(config=trial.config(lora_bias=biased))
    before = trial.call(model, given)
    with torch.no_grad():
        f = next(reversed(trial.factors(model).values()))[-1]
        (f.A[0] if f.bias is None else f.bias)[0] = float("nan")
    try:
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    except Exception:  # noqa: BLE001  # that is what is asked
        trial.randomize(model)
        after = trial.call(model, given)
        trial.same_bits(after, before, "output after a refused merge, the factor repaired")
        return
    fail(
        "silent",
        expected="merging a factor with a NaN raises",
        actual="nothing was raised, and the base holds NaN",
    )


@spec(
    "merge/same-generation",
    claim="Merged and unmerged, a model MUST generate the same tokens, with its cache.",
    why="Decoding takes other paths than training, one token at a time: a merge must hold there.",
    source=(
        "BUGS 26; P4",
        "https://github.com/EricLBuehler/candle-lora/pull/26",
    ),
    features=("merge",),
    needs=("merge/same-output", "merge/only-targets-change"),
    cases=(Case(specimen="tiny"),),
)
def same_generation(trial: Trial) -> None:
    """Generate greedily; a differing token is a failure unless the two best were as good as equal."""
    given = trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    tokens, logits = _greedy(model, given["input_ids"])
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    merged, _ = _greedy(model, given["input_ids"])

    if merged.equal(tokens):
        return
    b, t = (int(i) for i in (merged != tokens).nonzero()[0])
    gap = float(logits[b, t, tokens[b, t]] - logits[b, t, merged[b, t]])
    allowed = 2 * float(trial.budget(trial.base(), factors, given))
    if gap > allowed:
        fail(
            "value",
            expected=f"token {int(tokens[b, t])}, as unmerged",
            actual=f"token {int(merged[b, t])}",
            measured=gap,
            allowed=allowed,
            where=f"text {b}, generated token {t}; measured is the gap of their logits",
        )
    trial.notes.append(f"generation differs at token {t}, where two tokens are as good as equal")


def _greedy(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens chosen (b, STEPS) and the logits they were chosen from (b, STEPS, vocabulary)."""
    import torch

    tokens, logits = [], []
    cache: Any = None
    with torch.no_grad():
        for _ in range(STEPS):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
            tokens.append(ids)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)


@spec(
    "merge/disabled-while-merged",
    claim="Disabling a merged adapter MUST give the base's outputs, and then, left by an exception too, its own; or "
    "raise.",
    why="A reference model taken from a merged policy would be the policy itself.",
    source=("DESIGN.md: what is done while merged is right or raises", "BUGS 26, 42"),
    features=("merge", "disable"),
    needs=("merge/only-targets-change", "several/disabled-equals-base"),
    cases=(
        *(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused", "stack")),
        *(Case(way=way) for way in ("lora_bias", "exception")),
    ),
)
def disabled_while_merged(trial: Trial) -> None:
    """Merge, disable, and compare the outputs inside and after, and once it is unmerged."""
    biased = trial.case.way == "lora_bias"
    if biased and not trial.claims("lora_bias"):
        trial.notes.append("lora_bias is not claimed")
        return
    adapter: Any = trial.adapter
    base, given = trial.base(), trial.inputs()
    model = trial.adapted(config=trial.config(lora_bias=biased))
    factors = trial.snapshot(model)
    # The update may have been rounded into W and out of it again, at its own magnitude.
    budget = 2 * trial.budget(base, factors, given)
    adapter.merge(model)
    found = None
    try:
        with adapter.disable(model):
            found = trial.call(model, given)
            if trial.case.way == "exception":
                raise Interrupted  # noqa: TRY301  # what is judged is how the context leaves
    except Interrupted:
        pass
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"refused: {type(error).__name__}")
        found = None
    if found is not None:
        trial.close(found, trial.truth(base, {}, given), budget, "disabled output while merged")
    left = " by an exception" * (trial.case.way == "exception")
    after = trial.truth(base, factors, given)
    what = f"output after leaving `disable`{left} while merged"
    trial.close(trial.call(model, given), after, budget, what)
    if trial.claims("unmerge"):
        one_layer.unmerge(trial, model)  # leaving may have done it already
        one_layer.silence(trial, model)
        bare = trial.truth(base, {}, given)
        trial.close(trial.call(model, given), bare, budget, "base's output, unmerged after that")
