"""What trains under each setting, what an optimizer holds, and in which dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.trainable import nothing_else_trains, same

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.trial import Trial

DTYPES = ("float32", "bfloat16", "float16", "float64")


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
    extra = nothing_else_trains(model, factors, wanted)

    with torch.no_grad():
        for k, parameter in enumerate(extra):
            parameter.copy_(torch.linspace(-2.0 - k, 3.0 + k, parameter.numel()))
    held = trial.adapter.state_dict(model)
    state = {key: t for key, t in held.items() if isinstance(t, torch.Tensor)}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for parameter in extra:
        if not any(_holds(saved, parameter) for saved in state.values()):
            fail(
                "names",
                expected=f"under bias={mode!r}, all {len(extra)} trained biases in the checkpoint",
                actual=f"{names[parameter]} is not, as it now is",
                where=names[parameter],
            )
    frozen = [n for n in biases if n not in wanted]
    saved_too = [n for n in frozen if any(same(t, biases[n]) for t in state.values())]
    if saved_too:
        fail(
            "names",
            expected=f"under bias={mode!r}, no frozen bias in the checkpoint",
            actual=f"{len(saved_too)} of the base's are",
            where=saved_too[0],
        )


def _holds(saved: Tensor, parameter: Tensor) -> bool:
    """Whether an entry of a checkpoint is a parameter, or has its numbers in a row among others."""
    n = parameter.numel()
    if saved.numel() <= n or saved.dtype != parameter.dtype:
        matched: bool = same(saved, parameter)
        return matched
    runs = saved.detach().flatten().unfold(0, n, 1)  # (numbers - n + 1, n)
    found: Tensor = (runs == parameter.detach().flatten()).all(1).any()
    return bool(found)


@spec(
    "trainable/optimizer-holds-only-lora",
    claim="AdamW over the trainable parameters of the returned model MUST hold exactly the factors, "
    "and one step of it move all of them and nothing else.",
    why="An optimizer that holds parameters which the model no longer uses trains nothing; weight "
    "decay on a base parameter shrinks it without any gradient.",
    source=("BUGS P-5, P-6",),
    needs=("forward/base-unchanged", "trainable/only-lora", "forward/gradients", "forward/phi3"),
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
    # The contract leaves dtypes to the implementation, so that it is no MUST.
    claim="All factors SHOULD be of one floating dtype, the base's or at least float32's width, and "
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


def _tensors(base: nn.Module) -> list[tuple[str, Tensor]]:
    return [*base.named_parameters(), *base.named_buffers()]
