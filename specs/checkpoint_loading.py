"""What loading a checkpoint does to a live model: in which state, in which dtype, and when it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import GUIDE, kept, same_factors, tensors

if TYPE_CHECKING:
    from torch import nn

    from harness.trial import Trial


@spec(
    "checkpoint/dtype-kept",
    claim="A checkpoint MUST hold no narrower dtype than the factors' own, and loading MUST leave the live "
    "dtype.",
    why="Factors that come back in half precision lose the small updates of what is trained next.",
    source=(
        "BUGS 67, 68; P13",
        "https://github.com/huggingface/peft/issues/2421",
    ),
    needs=("checkpoint/round-trip-bits",),
    cases=(
        Case(),
        *(Case(specimen=s, dtype="bfloat16") for s in ("linear", "embedding", "conv2d")),
    ),
)
def dtype_kept(trial: Trial) -> None:
    """Load the checkpoint as it is, and cast: the live dtype and its values are what counts."""
    import torch

    from harness import storage

    model = trial.adapted()
    state = kept(trial, model)
    own = {t.dtype for t in storage.handles(trial.factors(model))}
    for key, value in tensors(state).items():
        narrower = all(torch.promote_types(value.dtype, dtype) != value.dtype for dtype in own)
        if narrower and value.is_floating_point():  # whole numbers are an implementation's own
            fail("dtype", expected=f"{own}", actual=f"{key} is {value.dtype}", where=key)
    before = {name: p.dtype for name, p in model.named_parameters()}
    half = torch.bfloat16 if torch.float32 in own else torch.float32
    # A checkpoint in another dtype is right or raises.
    for cast in (None, half):
        given = {
            k: v.to(cast) if cast and isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in state.items()
        }
        try:
            trial.adapter.load_state_dict(model, given)
        except Exception:
            if cast is None:
                raise
            return
        for name, p in model.named_parameters():
            if p.dtype != before.get(name):
                fail(
                    "dtype",
                    expected=f"{before.get(name)}, as before loading {cast or 'the same dtype'}",
                    actual=str(p.dtype),
                    where=name,
                )
        other = trial.inject(seed=1)
        trial.adapter.load_state_dict(other, given)
        for key, value in tensors(kept(trial, other)).items():
            trial.same_bits(value, given[key].to(value.dtype), f"{key} after loading")


@spec(
    "checkpoint/two-stage-load",
    claim="A base's weights, then a checkpoint, MUST give the saved outputs, in either mode; or raise.",
    why="Loading while merged leaves the old update in W, and unmerging then takes out the new one.",
    source=(
        GUIDE,
        "BUGS 46, P-7",
        "https://github.com/microsoft/LoRA/issues/61",
    ),
    needs=(
        "checkpoint/round-trip-bits",
        "initialization/base-in-place",
        "merge/same-output",
        "merge/restores-base",
    ),
    cases=(
        Case(way="train"),
        Case(way="eval"),
        *(Case(specimen=s, way="merged") for s in ("linear", "embedding", "conv2d")),
        Case(specimen="embedding", way="eval"),
        Case(specimen="fused", way="eval"),
        Case(way="after-cycle"),
        Case(way="adapter-first"),
    ),
)
def two_stage_load(trial: Trial) -> None:
    """Load into a fresh model with other factors in one state, then look in every state.

    Adapter first, the base's weights come last, into the tensors that the base had before injection.
    """
    import torch

    base, given, way = trial.base(), trial.inputs(), trial.case.way
    asks = {"merged": "merge", "after-cycle": "unmerge"}.get(way, "")
    if asks and not trial.claims(asks):
        trial.notes.append(f"{asks} is not claimed")
        return
    source = trial.adapted()
    factors, state = trial.snapshot(source), kept(trial, source)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    unlike = trial.base() if way != "adapter-first" else _other_base(trial)
    held = dict(unlike.named_parameters())
    model = trial.inject(unlike, seed=1)
    old = trial.randomize(model, seed=1)
    # The old update may have been rounded into W and out of it again, at its own magnitude.
    budget = budget + trial.budget(base, old, given)
    _enter(trial, model, way)
    try:
        trial.adapter.load_state_dict(model, state)
    except Exception:
        if not _is_merged(trial, way):
            raise
        truth = trial.truth(base, old, given)  # refused: the old adapter still acts, and rightly
    if way == "adapter-first":
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(base.get_parameter(name))
    trial.close(trial.call(model, given), truth, budget, f"output after loading, {way}")
    _leave(trial, model, way)
    trial.close(trial.call(model, given), truth, budget, f"output after loading, then left {way}")
    still = way == "merged" and not trial.claims("unmerge")
    if trial.claims("merge") and not still:
        trial.adapter.merge(model)  # type: ignore[attr-defined]  # claimed
        trial.close(trial.call(model, given), truth, budget, "output after loading and merging")


def _other_base(trial: Trial) -> nn.Module:
    from harness import specimen

    return specimen.build(trial.case.with_(seed=trial.case.seed + 1))


def _is_merged(trial: Trial, way: str) -> bool:
    return way == "merged" or (way == "eval" and bool(getattr(trial.adapter, "eval_merges", False)))


def _enter(trial: Trial, model: nn.Module, way: str) -> None:
    adapter: Any = trial.adapter
    if way == "adapter-first":
        return
    if way in {"train", "eval"}:
        model.train(way == "train")
        return
    adapter.merge(model)
    if way == "after-cycle":
        adapter.unmerge(model)


def _leave(trial: Trial, model: nn.Module, way: str) -> None:
    if way == "merged":
        if not trial.claims("unmerge"):
            return
        one_layer.unmerge(trial, model)
    trial.unmerged(model)


@spec(
    "checkpoint/base-keys-kept",
    claim="The base's own checkpoint, loaded with strict=False, SHOULD reach every adapted weight.",
    why="That is the first stage of the guide's load; renamed keys leave the base random, in silence.",
    source=(
        GUIDE,
        "BUGS 45, 65",
        "https://github.com/microsoft/LoRA/pull/183",
        "https://github.com/Lightning-AI/litgpt/issues/434",
    ),
    needs=("checkpoint/two-stage-load",),
    cases=(Case(), Case(specimen="conv2d"), Case(specimen="embedding")),
)
def base_keys_kept(trial: Trial) -> None:
    """Adapt a base with other weights, load the right ones by their names, and compare outputs."""
    base, given = trial.base(), trial.inputs()
    model = trial.adapted(_other_base(trial))
    factors = trial.snapshot(model)
    result = model.load_state_dict(base.state_dict(), strict=False)
    if result.unexpected_keys:
        fail(
            "silent",
            expected="the adapted model takes the base's keys",
            actual=f"strict=False skips {', '.join(result.unexpected_keys[:3])}",
            where=result.unexpected_keys[0],
        )
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    trial.close(trial.call(model, given), truth, budget, "output after loading the base last")


@spec(
    "checkpoint/misfit-is-loud",
    claim="Loading a checkpoint that does not fit MUST raise: prefix, missing, extra, rank or shape; "
    "missing too are biases and modules that train.",
    why="A silent misfit evaluates the untrained adapter, and nobody can tell from its outputs.",
    source=(
        "BUGS 48, 49, P-10",
        "https://github.com/huggingface/peft/pull/2084",
        "https://github.com/huggingface/peft/pull/2118",
        "https://github.com/huggingface/diffusers/issues/10187",
    ),
    needs=("checkpoint/round-trip-bits",),
    cases=(
        *(
            Case(way=way)
            for way in ("prefix", "missing", "extra", "rank", "shape", "row", "turned", "empty")
        ),
        *(Case(specimen=s, way="shape") for s in ("embedding", "conv2d")),
        Case(specimen="stack", way="modules_to_save"),
        Case(way="lora_only"),
        Case(specimen="normed", way="all"),
    ),
    more_cases=(Case(way="lora_bias"),),
)
def misfit_is_loud(trial: Trial) -> None:
    """Load eight kinds of misfits, and a checkpoint that lacks a whole module, or trained biases."""
    settings: dict[str, dict[str, Any]] = {
        "modules_to_save": {"modules_to_save": ("lm_head",)},
        "lora_only": {"bias": "lora_only"},
        "all": {"bias": "all"},
        "lora_bias": {"lora_bias": True},
    }
    if trial.case.way in settings:
        _lacks_what_is_due_to(trial, settings[trial.case.way])
        return
    model = trial.adapted()
    _refused(trial, model, _misfit(trial, kept(trial, model)))


def _lacks_what_is_due_to(trial: Trial, setting: dict[str, Any]) -> None:
    """Leave out all that the checkpoint has by virtue of a setting."""
    name = trial.case.way
    if not trial.claims(name):
        trial.notes.append(f"{name} is not claimed")
        return
    model = trial.adapted(config=trial.config(**setting))
    without, state = kept(trial, trial.inject()), kept(trial, model)
    fewer = {key: value for key, value in state.items() if key in without}
    if fewer.keys() == state.keys():
        trial.notes.append(f"vacuous: {name} adds no key to the checkpoint")
        return
    _refused(trial, model, fewer)


def _refused(trial: Trial, model: nn.Module, state: dict[str, Any]) -> None:
    try:
        trial.adapter.load_state_dict(model, state)
    except Exception:  # noqa: BLE001  # that is what is asked
        return
    fail(
        "silent",
        expected=f"loading a checkpoint that does not fit ({trial.case.way}) raises",
        actual="nothing was raised",
    )


def _misfit(trial: Trial, state: dict[str, Any]) -> dict[str, Any]:
    import torch

    way, first = trial.case.way, min(tensors(state))
    if way == "prefix":
        # Not `module.`, which wrappers write and a loader may take off.
        return {f"another.{key}": value for key, value in state.items()}
    if way == "missing":
        return {key: value for key, value in state.items() if key != first}
    if way == "extra":
        return {**state, f"left_over.{first}": state[first]}
    if way == "shape":
        return {**state, first: torch.cat([state[first], state[first][..., :1]], dim=-1)}
    if way == "row":  # a shape that copying would stretch
        tall = [k for k, t in tensors(state).items() if t.dim() and t.shape[0] > 1]
        return {**state, **{key: state[key][:1] for key in tall[:1]}} if tall else {}
    if way == "turned":  # as many numbers, in another shape
        turned = [k for k, t in tensors(state).items() if t.dim() == 2 and t.shape != t.T.shape]
        return {**state, **{key: state[key].T.contiguous() for key in turned[:1]}} if turned else {}
    if way == "empty":
        return {}
    wider: dict[str, Any] = kept(trial, trial.inject(config=trial.config(r=trial.case.r + 1)))
    return wider


@spec(
    "checkpoint/misfit-changes-nothing",
    claim="A checkpoint that is refused SHOULD leave every factor as it was.",
    why="Who catches the error and goes on would go on with half of another adapter.",
    source=("BUGS P-10; P19", GUIDE),
    needs=("checkpoint/misfit-is-loud",),
    cases=tuple(Case(specimen="stack", way=way) for way in ("extra", "shape")),
)
def misfit_changes_nothing(trial: Trial) -> None:
    """Offer another adapter's checkpoint with one entry wrong, and compare the factors' bits."""
    state = _misfit(trial, kept(trial, trial.adapted()))
    model = trial.inject()
    factors = trial.randomize(model, seed=1)
    try:
        trial.adapter.load_state_dict(model, state)
    except Exception:  # noqa: BLE001  # the spec this one needs asks for that
        same_factors(trial, model, factors, "factors after a refused checkpoint")
