"""What trains after injection: exactly the factors, and what was asked for beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.adapter import matches
from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from harness.adapter import Factors
    from harness.trial import Trial

GUIDE = "lora.mark_only_lora_as_trainable, https://github.com/microsoft/LoRA"


@spec(
    "trainable/only-lora",
    claim="Exactly the factors MUST be trainable after injection, whatever their names, and whether or not the "
    "base was frozen before.",
    why="A base that trains costs the memory LoRA saves, and drifts; a factor that does not is lost.",
    source=(GUIDE, "BUGS 58, 105, 130, P-6", "https://github.com/huggingface/trl/pull/3926"),
    needs=("targeting/exact-coverage",),
    cases=(
        Case(),
        Case(way="frozen-base"),
        Case(dtype="bfloat16"),
        Case(specimen="embedding"),
        Case(specimen="conv2d"),
        Case(specimen="fused"),
        Case(specimen="tiny"),
    ),
)
def only_lora(trial: Trial) -> None:
    """Judge by storage and element, not by name."""
    base = trial.base()
    if trial.case.way == "frozen-base":  # as who prepares a model for training in few bits does
        base.requires_grad_(False)
    model = trial.inject(base)
    factors = trial.factors(model)

    factors_train(model, factors)
    nothing_else_trains(model, factors, {})


@spec(
    "trainable/beside-factors",
    claim="Beside the factors, the modules to save and the biases on B that were asked for MUST be "
    "trainable after injection, and no more, whether or not the base was frozen before.",
    why="A head that was asked for and does not train stays what it was, or random; a module that was not "
    "asked for trains because its name ends alike.",
    source=(
        GUIDE,
        "BUGS 29, 109",
        "https://github.com/huggingface/trl/issues/5977",
        "https://github.com/huggingface/peft/issues/1917",
        "https://github.com/unslothai/unsloth/issues/3327",
    ),
    needs=("trainable/only-lora",),
    cases=(
        Case(way="lora_bias"),
        Case(specimen="tiny", way="modules_to_save"),
        Case(specimen="stack", way="names-alike"),
        Case(specimen="normed", way="frozen-base"),
    ),
)
def beside_factors(trial: Trial) -> None:
    """Judge by storage and element, not by name."""
    base, way = trial.base(), trial.case.way
    asks = "lora_bias" if way == "lora_bias" else "modules_to_save"
    if not trial.claims(asks):
        trial.notes.append(f"{asks} is not claimed")
        return
    wanted: dict[str, Tensor] = {}
    if way == "lora_bias":
        config = trial.config(lora_bias=True)
    else:
        # `foo` is in `foobar`, and `qkv_proj` ends in `v_proj`.
        whole = {"names-alike": ("foo", "v_proj"), "frozen-base": ("head",)}.get(way, ("lm_head",))
        aside = {"target_modules": ("weight_proj",)} if way == "names-alike" else {}
        config = trial.config(modules_to_save=whole, **aside)
        wanted = {
            name: p.detach().clone()
            for name, p in base.named_parameters()
            if any(matches(name.rpartition(".")[0], module) for module in whole)
        }
    if way == "frozen-base":
        base.requires_grad_(False)
    model = trial.inject(base, config)
    factors = trial.factors(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_gate.weight"):  # trainable/names-decide-nothing tells of it
            parameter.requires_grad_(False)
    if way == "lora_bias" and any(f.bias is None for parts in factors.values() for f in parts):
        fail("names", expected="a trained bias on B under lora_bias", actual="Factors without one")

    factors_train(model, factors)
    nothing_else_trains(model, factors, wanted)


@spec(
    "trainable/names-decide-nothing",
    claim="A base parameter MUST stay frozen although its module's name contains lora_ or weight.",
    why="Implementations that mark by a substring train, and save, routers and gates of the base.",
    source=(
        "BUGS 59, 88",
        "https://github.com/unslothai/unsloth-zoo/pull/692",
    ),
    needs=("trainable/only-lora",),
    cases=(Case(specimen="stack"),),
)
def names_decide_nothing(trial: Trial) -> None:
    """Judge a model with a `lora_gate` of its own, which is not adapted."""
    model = trial.inject()
    factors = trial.factors(model)

    nothing_else_trains(model, factors, {})


@spec(
    "trainable/name-convention",
    claim="The name of each trainable factor SHOULD contain lora_.",
    why="Scripts, optimizers and savers of loralib and PEFT find factors by that mark.",
    source=(GUIDE, "https://huggingface.co/docs/peft"),
    needs=("trainable/only-lora",),
    cases=(Case(), Case(specimen="embedding"), Case(specimen="conv2d"), Case(specimen="fused")),
)
def name_convention(trial: Trial) -> None:
    """Judge the names under which the returned model registers what trains."""
    model = trial.inject()
    plain = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if plain:
        fail(
            "names",
            expected="lora_ in the name of each factor",
            actual=f"{len(plain)} without it, {', '.join(plain[:3])}",
            where=plain[0],
        )


@spec(
    "trainable/count",
    claim="An adapted layer MUST have r·(in + out) trainable elements, also at a rank above its width.",
    why="Published counts, memory and checkpoint sizes follow from the formula; a rank clipped in "
    "silence is another model than the one asked for.",
    source=("LoRA, section 5.1, https://arxiv.org/abs/2106.09685", "BUGS P-13, P-14"),
    needs=("trainable/only-lora", "initialization/factors-not-shared"),
    cases=(
        Case(),
        Case(r=13),
        Case(specimen="embedding", r=17),
        Case(specimen="stack"),
        Case(specimen="tiny", r=16),
        Case(specimen="tiny-gqa", r=70),
    ),
)
def count(trial: Trial) -> None:
    """Judge the number of elements for each module and in all."""
    from torch import nn

    from harness import specimen, storage

    base = specimen.pristine(trial.case)
    factors = trial.factors(trial.inject())
    r = trial.case.r
    for name, parts in factors.items():
        module = base.get_submodule(name)
        if isinstance(module, nn.Embedding):
            sizes = (module.num_embeddings, module.embedding_dim)
        else:
            sizes = (int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
        found = storage.count(storage.elements(storage.handles({name: parts})))
        if found != r * sum(sizes):
            fail(
                "count",
                expected=f"{r * sum(sizes)} elements, {r}·({sizes[0]} + {sizes[1]})",
                actual=f"{found}",
                where=name,
            )


def factors_train(model: nn.Module, factors: Mapping[str, Iterable[Factors]]) -> None:
    """Every element of every factor is in a parameter of the model that trains."""
    from harness import storage

    trained = storage.elements(p for p in model.parameters() if p.requires_grad)
    for name, parts in factors.items():
        for tensor in storage.handles({name: parts}):
            inside = storage.covered(tensor, trained)
            if inside != tensor.numel():
                fail(
                    "names",
                    expected="each factor in a trainable parameter of the returned model",
                    actual=f"{tensor.numel() - inside} of {tensor.numel()} elements are in none",
                    where=name,
                )


def nothing_else_trains(
    model: nn.Module, factors: Mapping[str, Iterable[Factors]], wanted: Mapping[str, Tensor]
) -> list[Tensor]:
    """What trains beside the factors is what is wanted, told by its values; those parameters."""
    from harness import storage

    ours = storage.elements(storage.handles(factors))
    extra = [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and storage.covered(p, ours) != p.numel()
    ]
    left, strays = dict(wanted), []
    for name, parameter in extra:
        meant = next((n for n, value in left.items() if same(value, parameter)), None)
        if meant is None:
            strays.append(name)
        else:
            del left[meant]
    if strays:
        beside = f" and {_few(wanted)}" if wanted else ""
        fail(
            "names",
            expected=f"nothing trains but the factors{beside}",
            actual=f"{len(strays)} {'parameter' if len(strays) == 1 else 'parameters'} more "
            f"{'does' if len(strays) == 1 else 'do'}",
            where=strays[0],
        )
    if left:
        fail(
            "names",
            expected=f"beside the factors, {_few(wanted)} train{'s' if len(wanted) == 1 else ''}",
            actual=f"{len(left)} of them {'does' if len(left) == 1 else 'do'} not",
            where=next(iter(left)),
        )
    return [parameter for _, parameter in extra]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and the same bits."""
    import torch

    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())


def _few(names: Iterable[str]) -> str:
    """All names, or of many the first three and their number."""
    told = list(names)
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more like them" if told[3:] else "")
