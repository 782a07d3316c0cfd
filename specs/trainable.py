"""What trains after injection: exactly the factors, and what was asked for beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from harness.adapter import Factors
    from harness.trial import Trial

GUIDE = "lora.mark_only_lora_as_trainable, https://github.com/microsoft/LoRA"
DTYPES = ("float32", "bfloat16", "float16", "float64")


@spec(
    "trainable/only-lora",
    claim="Exactly the factors MUST be trainable after injection, with the modules to save and the "
    "biases on B that were asked for, whatever their names.",
    why="A base that trains costs the memory LoRA saves, and drifts; a factor that does not is lost.",
    source=(GUIDE, "BUGS 58, 105, 130, P-6", "https://github.com/huggingface/trl/pull/3926"),
    needs=("targeting/exact-coverage",),
    cases=(
        Case(),
        Case(dtype="bfloat16"),
        Case(specimen="embedding"),
        Case(specimen="conv2d"),
        Case(specimen="fused"),
        Case(way="lora_bias"),
        Case(specimen="tiny"),
        Case(specimen="tiny", way="modules_to_save"),
    ),
)
def only_lora(trial: Trial) -> None:
    """Judge by storage and element, not by name."""
    base, way = trial.base(), trial.case.way
    if way and not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    wanted: dict[str, Tensor] = {}
    config = trial.config()
    if way == "lora_bias":
        config = trial.config(lora_bias=True)
    elif way == "modules_to_save":
        config = trial.config(modules_to_save=("lm_head",))
        head = base.get_submodule("lm_head")
        wanted = {f"lm_head.{name}": p.detach().clone() for name, p in head.named_parameters()}
    model = trial.inject(base, config)
    factors = trial.factors(model)
    if way == "lora_bias" and any(f.bias is None for parts in factors.values() for f in parts):
        fail("names", expected="a trained bias on B under lora_bias", actual="Factors without one")

    _factors_train(model, factors)
    _nothing_else_trains(model, factors, wanted)


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

    _nothing_else_trains(model, factors, {})


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

    from harness import storage

    base = trial.base()
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


@spec(
    "trainable/bias-modes",
    claim="Under bias none, lora_only and all, exactly no bias, those of adapted modules, and all of "
    "the model's biases MUST train, and be in the checkpoint.",
    why="A bias that trains and is not saved makes a reloaded model another one.",
    source=(
        "BUGS 43, 44, P-19",
        "https://github.com/huggingface/peft/issues/3306",
        "https://github.com/microsoft/LoRA/pull/183",
    ),
    needs=("trainable/only-lora",),
    cases=(
        *(Case(specimen="shared", way=mode) for mode in ("none", "lora_only", "all")),
        *(Case(specimen="conv2d", way=mode) for mode in ("none", "lora_only", "all")),
    ),
)
def bias_modes(trial: Trial) -> None:
    """Judge what trains, by its values, and what is saved of it once it has other values."""
    import torch

    mode = trial.case.way
    if not trial.claims(mode):
        trial.notes.append(f"bias={mode!r} is not claimed")
        return
    base = trial.base()
    target = "back" if trial.case.specimen == "shared" else "proj"
    biases = {n: p.detach().clone() for n, p in base.named_parameters() if n.endswith("bias")}
    wanted = {n: p for n, p in biases.items() if mode == "all" or n == f"{target}.bias"}
    wanted = {} if mode == "none" else wanted
    model = trial.inject(base, trial.config(target_modules=(target,), bias=mode))
    factors = trial.factors(model)
    extra = _nothing_else_trains(model, factors, wanted)

    with torch.no_grad():
        for k, parameter in enumerate(extra):
            parameter.copy_(torch.linspace(-2.0 - k, 3.0 + k, parameter.numel()))
    state = trial.adapter.state_dict(model)
    for parameter in extra:
        if not any(_same(saved, parameter) for saved in state.values()):
            fail(
                "names",
                expected=f"under bias={mode!r}, all {len(extra)} trained biases in the checkpoint",
                actual=f"one of shape {tuple(parameter.shape)} is not, as it now is",
            )
    frozen = [n for n in biases if n not in wanted]
    saved_too = [n for n in frozen if any(_same(t, biases[n]) for t in state.values())]
    if saved_too:
        fail(
            "names",
            expected=f"under bias={mode!r}, no frozen bias in the checkpoint",
            actual=f"{len(saved_too)} of the base's are",
            where=saved_too[0],
        )


@spec(
    "trainable/optimizer-holds-only-lora",
    claim="AdamW over the trainable parameters of the returned model MUST hold exactly the factors, "
    "and one step of it move all of them and nothing else.",
    why="An optimizer that holds parameters which the model no longer uses trains nothing; weight "
    "decay on a base parameter shrinks it without any gradient.",
    source=("BUGS P-5, P-6",),
    needs=("trainable/only-lora", "forward/gradients"),
    cases=(Case(), Case(specimen="tied"), Case(specimen="tiny")),
)
def optimizer_holds_only_lora(trial: Trial) -> None:
    """Judge an optimizer made at once, as a script makes it, after one step in train mode."""
    import torch

    from harness import specimen, storage

    base = trial.base()
    held = {name: (t, t.detach().clone()) for name, t in _tensors(base)}
    names = ("mix",) if trial.case.specimen == "tied" else None
    model = trial.adapted(base, trial.config(**({"target_modules": names} if names else {})))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model.train()
    before = [t.detach().clone() for t in storage.handles(trial.factors(model))]
    specimen.loss(model, trial.inputs()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()

    factors = trial.factors(model)
    live, moved = storage.handles(factors), storage.elements(trained)
    for old, new in zip(before, live, strict=True):
        if storage.covered(new, moved) != new.numel():
            fail(
                "state",
                expected="the optimizer's parameters are the model's after train() and a step",
                actual="a factor is not among them any more",
            )
        still = int((old == new).sum())
        if still:
            fail(
                "no-effect",
                expected="each element of each factor moves in a step with weight decay",
                actual=f"{still} of {new.numel()} did not",
            )
    for name, (tensor, bits) in held.items():
        trial.same_bits(tensor, bits, f"{name} of the base after a step")


@spec(
    "trainable/dtype-stated",
    claim="All factors MUST be of one floating dtype, the base's or at least float32's width, and "
    "keep it through train mode, a backward pass and eval mode.",
    why="Factors cast to half precision on the way lose every update below half a unit in the last "
    "place, and the loss still goes down for a while.",
    source=(
        "BUGS 107, 108",
        "https://github.com/huggingface/trl/pull/1644",
        "https://github.com/huggingface/peft/pull/1706",
    ),
    needs=("trainable/only-lora", "forward/gradients"),
    cases=tuple(Case(dtype=dtype) for dtype in DTYPES),
)
def dtype_stated(trial: Trial) -> None:
    """Judge the dtypes of the handles, before and after."""
    import torch

    from harness import specimen, storage

    model = trial.inject()

    def stated() -> set[torch.dtype]:
        return {t.dtype for t in storage.handles(trial.factors(model))}

    first = stated()
    fits = {trial.dtype} | {d for d in (torch.float32, torch.float64) if d in first}
    if len(first) != 1 or not first <= fits:
        fail(
            "dtype",
            expected=f"one dtype for all factors, {trial.dtype} or float32 or wider",
            actual=", ".join(sorted(map(str, first))),
        )
    model.train()
    specimen.loss(model, trial.inputs()).backward()  # type: ignore[no-untyped-call]
    trained = stated()
    trial.unmerged(model)
    for when, now in (("in train mode", trained), ("after it", stated())):
        if now != first:
            fail(
                "dtype",
                expected=f"factors of {', '.join(map(str, first))} {when}, as before",
                actual=", ".join(sorted(map(str, now))),
            )


def _factors_train(model: nn.Module, factors: Mapping[str, Iterable[Factors]]) -> None:
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


def _nothing_else_trains(
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
    left = dict(wanted)
    for name, parameter in extra:
        same = next((n for n, value in left.items() if _same(value, parameter)), None)
        if same is None:
            fail(
                "names",
                expected=f"nothing trains but the factors{_and(wanted)}",
                actual=f"{len(extra)} parameters more do",
                where=name,
            )
        del left[same]
    if left:
        fail(
            "names",
            expected=f"beside the factors{_and(wanted)} train{'s' if len(wanted) == 1 else ''}",
            actual=f"{len(left)} of them {'does' if len(left) == 1 else 'do'} not",
            where=next(iter(left)),
        )
    return [parameter for _, parameter in extra]


def _and(wanted: Mapping[str, Tensor]) -> str:
    return f" and {', '.join(wanted)}" if wanted else ""


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and the same bits."""
    import torch

    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())


def _tensors(base: nn.Module) -> list[tuple[str, Tensor]]:
    return [*base.named_parameters(), *base.named_buffers()]
