"""Which modules are adapted."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import Broken, fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from harness.adapter import LoraConfig
    from harness.trial import Trial

STACK_ALL = (
    *(
        f"layers.{k}.{name}"
        for k in range(12)
        for name in ("v_proj", "qkv_proj", "foo", "foobar", "weight_proj", "lora_gate")
    ),
    "groups.0.0",
    "groups.1.0",
)

ASKED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layer": (("proj",), ("proj",)),
    "": (
        ("v_proj", "foo"),
        tuple(f"layers.{k}.{name}" for k in range(12) for name in ("v_proj", "foo")),
    ),
    "paths": (("layers.1.v_proj", "groups.1.0"), ("layers.1.v_proj", "groups.1.0")),
    "tails": (("1.foo", "0.0"), ("layers.1.foo", "groups.0.0")),
    "overlapping": (
        ("foo", "layers.1.foo"),
        tuple(f"layers.{k}.foo" for k in range(12)),
    ),
    "flattened": (("a.b_c", "a_b.c"), ("a.b_c", "a_b.c")),
    "traps": (
        ("foobar", "weight_proj"),
        tuple(f"layers.{k}.{name}" for k in range(12) for name in ("foobar", "weight_proj")),
    ),
}
"""For each way, the names asked for in the stack, and the modules they mean."""


@spec(
    "targeting/exact-coverage",
    claim="Exactly the modules whose dotted name is, or ends in a dot and, a name asked for MUST be "
    "adapted, in every layer.",
    why="A model adapted elsewhere, or in fewer layers than asked, trains without an error and "
    "learns less than it should.",
    source=(
        "BUGS 76, 80, 86",
        "https://github.com/huggingface/peft/issues/2027",
        "DESIGN: A name means every module whose dotted name equals it or ends in a dot and it",
    ),
    tier="smoke",
    cases=(Case(), Case(specimen="stack")),
)
def exact_coverage(trial: Trial) -> None:
    """Judge the names under which factors are reported."""
    _meant_alone(trial)


@spec(
    "targeting/dotted-names",
    claim="A target name with dots, or one within another's, MUST mean the modules whose dotted name is, "
    "or ends in a dot and, that name; a module that two names mean is adapted once.",
    why="Layer 1 is not layer 11, and one layer is adapted alone by its path.",
    source=(
        "BUGS 76, 80, 86",
        "https://github.com/huggingface/peft/issues/2027",
        "DESIGN: A name means every module whose dotted name equals it or ends in a dot and it",
    ),
    needs=("targeting/exact-coverage",),
    tier="smoke",
    cases=(
        *(Case(specimen="stack", way=way) for way in ("paths", "tails", "traps", "overlapping")),
        Case(specimen="underscored", way="flattened"),
    ),
)
def dotted_names(trial: Trial) -> None:
    """Judge the names under which factors are reported."""
    _meant_alone(trial)


def _meant_alone(trial: Trial) -> None:
    """What is adapted is what the names mean."""
    way = trial.case.way
    names, meant = ASKED["layer" if trial.case.specimen == "linear" else way]
    try:
        model = trial.inject(config=trial.config(target_modules=names))
    except Exception as refusal:
        if way != "flattened":
            raise
        trial.notes.append(f"names that differ in . and _ alone are refused: {refusal}"[:200])
        return

    _same_names(trial.factors(model), meant, f"target_modules {names}")
    if trial.case.way == "overlapping":
        alone = trial.inject(config=trial.config(target_modules=names[:1]))
        once, found = (
            sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (alone, model)
        )
        if found != once:
            fail(
                "count",
                expected=f"target_modules {names} trains what {names[:1]} does, {once} parameters",
                actual=f"{found} parameters train",
            )


@spec(
    "targeting/unmatched-name-is-loud",
    claim="A target name that matches no module, or none that can be adapted, MUST raise or warn, also "
    "where others match.",
    why="Two of the documented Phi-3 samples name projections that Phi-3 does not have: they adapt "
    "a fraction of what they say, and nothing tells.",
    source=("BUGS 77, 86, 123", "https://github.com/huggingface/peft/issues/3658"),
    needs=("targeting/exact-coverage",),
    cases=(
        Case(specimen="stack", way="none-matches"),
        Case(specimen="stack", way="one-of-two"),
        Case(specimen="stack", way="end-of-a-name"),
        Case(specimen="stack", way="another-kind"),
        Case(specimen="conv2d", way="no-linear"),
        Case(specimen="tiny", way="llama-names"),
    ),
)
def unmatched_name_is_loud(trial: Trial) -> None:
    """Judge what is heard when a name means nothing, beyond what is heard at every injection."""
    way = trial.case.way
    if way == "no-linear":
        everything = trial.config(target_modules="all-linear")
        trial.loud(
            lambda: trial.adapter.inject(trial.base(), everything),
            expected='an error or a warning, as "all-linear" finds no nn.Linear in the model',
        )
        return
    there, absent = {
        "none-matches": ((), ("absent_proj",)),
        # A name of its own: who warns once of each has said that of the other.
        "one-of-two": (("foo",), ("lacking_proj",)),
        "end-of-a-name": (("foo",), ("bar",)),
        "another-kind": (("foo",), ("norm",)),
        "llama-names": (
            ("o_proj", "down_proj"),
            ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        ),
    }[way]
    fitting = trial.config(target_modules=there) if there else trial.config()
    config = trial.config(target_modules=(*there, *absent))

    trial.loud(
        lambda: trial.adapter.inject(trial.base(), config),
        expected=f"an error or a warning, as {', '.join(absent)} "
        + (
            "is no layer of a kind that LoRA adapts"
            if way == "another-kind"
            else "are not in the model"
        ),
        usual=lambda: trial.adapter.inject(trial.base(), fitting),
    )


@spec(
    "targeting/all-linear-leaves-the-head",
    claim='"all-linear" MUST adapt every nn.Linear, subclasses too or it raises, but the output head.',
    why="An adapted head changes what the count, the memory and the checkpoint are said to be; a "
    "layer left out learns nothing.",
    source=(
        "BUGS 80",
        "https://github.com/huggingface/peft/issues/2027",
        "https://github.com/huggingface/peft/pull/2267",
    ),
    needs=("targeting/exact-coverage",),
    cases=(
        Case(specimen="stack"),
        Case(specimen="stack", way="subclass"),
        Case(specimen="tied"),
        Case(specimen="headless"),
        Case(specimen="headed"),
        Case(specimen="tiny"),
    ),
)
def all_linear_leaves_the_head(trial: Trial) -> None:
    """Judge the modules adapted under "all-linear", the head being a method's answer or a name."""
    base = trial.base()
    if trial.case.way == "subclass":
        _make_subclass(base)
    meant = {
        "stack": STACK_ALL,
        "tied": ("mix", "back"),
        "headless": ("head_proj", "my_lm_head", "embed_out"),
        "headed": ("head_proj", "my_lm_head"),
        "tiny": tuple(
            f"model.layers.{k}.{name}"
            for k in range(12)
            for name in (
                "self_attn.qkv_proj",
                "self_attn.o_proj",
                "mlp.gate_up_proj",
                "mlp.down_proj",
            )
        ),
    }.get(trial.case.specimen) or tuple(_linears_but_the_head(base))
    try:
        model = trial.inject(base, trial.config(target_modules="all-linear", enable_lora=None))
    except (NotImplementedError, TypeError, ValueError) as refusal:
        if trial.case.way != "subclass":  # what it computes is not known: refusing it is loud
            raise
        trial.notes.append(f"a subclass of nn.Linear is refused: {type(refusal).__name__}")
        return

    _same_names(trial.factors(model), meant, '"all-linear"')


@spec(
    "targeting/second-injection-is-loud-or-equal",
    # The contract says nothing of a second injection, so that it is no MUST.
    claim="Injecting into a model that is adapted already SHOULD raise, warn, or give what one "
    "injection with the new settings gives.",
    why="A resumed run that wraps twice trains a fresh adapter, keeps an old one, or adapts the "
    "adapter itself.",
    source=(
        "BUGS 57, 71, 79",
        "https://github.com/huggingface/peft/issues/2295",
        "https://github.com/huggingface/peft/pull/2391",
    ),
    needs=("targeting/exact-coverage", "trainable/only-lora", "forward/equals-oracle"),
    cases=(Case(), Case(specimen="tied", way="all-linear")),
)
def second_injection_is_loud_or_equal(trial: Trial) -> None:
    """Judge a second injection at another rank: heard, or as good as the first would have been."""
    from harness import storage

    names = "all-linear" if trial.case.way else "proj"
    meant = ("mix", "back") if trial.case.way else ("proj",)
    first = trial.config(target_modules=names if trial.case.way else (names,), enable_lora=None)
    second = _at_rank(first, first.r + 2)
    model = trial.inject(config=first)
    made: list[nn.Module] = []
    try:
        trial.loud(
            lambda: made.append(trial.adapter.inject(model, second)),
            expected="noise",
            usual=lambda: trial.adapter.inject(trial.base(), second),
        )
    except Broken:
        model = made[0]
    else:
        return

    trial.unmerged(model)
    trial.randomize(model)
    found = trial.factors(model)
    _same_names(found, meant, "the second injection")
    ranks = {f.A.shape[0] for parts in found.values() for f in parts}
    if ranks != {second.r}:
        fail(
            "count",
            expected=f"factors of rank {second.r}, as the second injection asks, or an error",
            actual=f"rank {sorted(ranks)}, in silence",
        )
    trains = storage.elements(p for p in model.parameters() if p.requires_grad)
    factors = storage.count(storage.elements(storage.handles(found)))
    if storage.count(trains) != factors:
        fail(
            "count",
            expected=f"{factors} elements train: those of the second adapter",
            actual=f"{storage.count(trains)} do, in silence",
        )
    base, x, values = trial.base(), trial.inputs(), trial.snapshot(model)
    budget = trial.budget(base, values, x)
    trial.close(trial.call(model, x), trial.truth(base, values, x), budget, "output")


@spec(
    "targeting/arguments-unchanged",
    claim="Injecting, adding and loading MUST leave the configuration and the checkpoint given to them "
    "as they were.",
    why="A configuration is used for more than one model, and a checkpoint for more than one load.",
    source=("BUGS 36", "https://github.com/huggingface/peft/issues/654"),
    needs=("targeting/exact-coverage",),
    cases=(Case(), Case(specimen="fused"), Case(specimen="stack"), Case(way="add")),
)
def arguments_unchanged(trial: Trial) -> None:
    """Judge the arguments after the calls."""
    import torch

    given = trial.config()
    kept = copy.deepcopy(given)
    if trial.case.way == "add":
        if not trial.claims("multi_adapter"):
            trial.notes.append("multi_adapter is not claimed")
            return
        # Other settings than the first adapter's, which must not find their way into it.
        given, kept = (trial.config(r=5, lora_alpha=2.0) for _ in range(2))
        model = trial.inject()
        trial.adapter.add(model, "second", given)  # type: ignore[attr-defined]  # the feature brings it
    else:
        model = trial.inject(config=given)
    if given != kept:
        fail("state", expected=f"the configuration as it was, {kept}", actual=f"{given}")

    # A checkpoint may hold scalars, which nobody can write into.
    state = {
        key: t.detach().clone() if isinstance(t, torch.Tensor) else t
        for key, t in trial.adapter.state_dict(model).items()
    }
    passed = dict(state)
    bits = {key: copy.deepcopy(t) for key, t in state.items()}
    trial.adapter.load_state_dict(model, passed)
    if passed.keys() != bits.keys() or any(passed[key] is not state[key] for key in bits):
        fail(
            "state",
            expected=f"a checkpoint of {len(bits)} keys as it was given",
            actual=f"{len(passed)} keys after the load",
            where=next(iter(sorted(passed.keys() ^ bits.keys())), ""),
        )
    for key, tensor in bits.items():
        if isinstance(tensor, torch.Tensor):
            trial.same_bits(passed[key], tensor, f"the checkpoint's {key}")


@spec(
    "targeting/shared-module",
    claim="A module reached under two names MUST be adapted as one, wherever it is used, and be known "
    "by its first name.",
    why="Where only one of its uses is adapted, training and merging are of different models.",
    source=(
        "DESIGN: A module reached under two names is one module, known by the first",
        "https://github.com/vllm-project/vllm/issues/39815",
    ),
    needs=("targeting/exact-coverage", "forward/equals-oracle"),
    cases=(Case(specimen="shared", way="first"), Case(specimen="shared", way="second")),
)
def shared_module(trial: Trial) -> None:
    """Judge the names and the outputs of a model that uses one layer twice."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted(config=trial.config(target_modules=(trial.case.way,)))

    _same_names(trial.factors(model), ("first",), f"target_modules ({trial.case.way!r},)")
    factors = trial.snapshot(model)
    budget = trial.budget(base, factors, x)
    trial.close(trial.call(model, x), trial.truth(base, factors, x), budget, "output")


def _same_names(found: Iterable[str], meant: Iterable[str], asked: str) -> None:
    """The modules adapted are those meant, or `Broken`."""
    extra, missing = sorted(set(found) - set(meant)), sorted(set(meant) - set(found))
    if not extra and not missing:
        return
    told = [
        f"{len(names)} {word}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for names, word in ((missing, "not adapted"), (extra, "adapted too"))
        if names
    ]
    fail(
        "names",
        expected=f"{asked} adapts exactly {len(set(meant))} modules",
        actual="; ".join(told),
        where=(missing + extra)[0],
    )


def _linears_but_the_head(base: nn.Module) -> list[str]:
    """By DESIGN's sentence, for a model that is not known here."""
    from torch import nn

    get = getattr(base, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def _make_subclass(base: nn.Module) -> None:
    """Make one layer of the stack a subclass of nn.Linear that computes the same."""
    from torch import nn

    class Projection(nn.Linear):
        """An nn.Linear by another name."""

    old = base.get_submodule("layers.3.foo")
    new = Projection(old.in_features, old.out_features)  # type: ignore[arg-type]  # an nn.Linear's
    new.load_state_dict(old.state_dict())
    base.get_submodule("layers.3").foo = new


def _at_rank(config: LoraConfig, r: int) -> LoraConfig:
    from dataclasses import replace

    return replace(config, r=r)
