"""What an adapter checkpoint holds, and that a second model gets all of it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import LoraConfig
    from harness.oracle import Snapshot
    from harness.trial import Trial

GUIDE = "Fine-tune Phi-3 with LoRA, the guide: save with lora_state_dict, load in two stages"

KINDS = (
    Case(),
    Case(dtype="bfloat16"),
    Case(dtype="float16"),
    Case(specimen="embedding"),
    Case(specimen="conv2d"),
    Case(specimen="fused"),
)


# -- what the judges share -------------------------------------------------------------------------


def kept(trial: Trial, model: nn.Module) -> dict[str, Any]:
    """The checkpoint, copied: the contract lets it alias live tensors."""
    import torch

    state = trial.adapter.state_dict(model)
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def same_factors(trial: Trial, model: nn.Module, want: Snapshot, what: str) -> None:
    """Every factor of every module as wanted, bit for bit, and every scaling within its rounding."""
    from harness import tolerance

    found = trial.snapshot(model)
    if found.keys() != want.keys():
        differing = sorted(found.keys() ^ want.keys())
        fail(
            "names", expected=f"{what} of {len(want)} modules", actual=f"differs in {differing[:3]}"
        )
    for name, parts in want.items():
        for k, (f, w) in enumerate(zip(found[name], parts, strict=True)):
            for kind in ("A", "B", "bias"):
                one, other = getattr(f, kind), getattr(w, kind)
                if other is not None:
                    trial.same_bits(one, other, f"{what}: {kind} of {name}, part {k}")
            # A number that a checkpoint may hold as a float32.
            if abs(f.scaling - w.scaling) > tolerance.setting(w.scaling):
                fail(
                    "value",
                    expected=f"{what}: scaling {w.scaling:g}",
                    actual=f"{f.scaling:g}",
                    where=name,
                )


def restores(trial: Trial, config: LoraConfig | None = None, *, strided: bool = False) -> None:
    """A checkpoint of one model, loaded into a second, gives its factors, bit for bit, by name."""
    import torch

    given = trial.inputs()
    source = trial.adapted(config=config)
    factors, want, state = trial.snapshot(source), trial.call(source, given), kept(trial, source)
    if strided:
        state |= {key: torch.stack((t, t), -1)[..., 0] for key, t in tensors(state).items()}
    other = trial.inject(config=config, seed=1)
    trial.randomize(other, seed=1)
    trial.adapter.load_state_dict(other, state)
    for value in tensors(
        state
    ).values():  # it was copied: what becomes of it is nothing to the model
        value.zero_()

    what = "loaded factors" + ", of a checkpoint of strided views" * strided
    same_factors(trial, other, factors, what)
    trial.same_bits(trial.call(other, given), want, "output after loading")


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The entries that hold numbers: scalars, such as alpha, are an implementation's own affair."""
    import torch

    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() != 1}


def disturb(model: nn.Module, *, seed: int, all_of_it: bool = False, gates: bool = False) -> None:
    """Other values in all that trains, or in every parameter.

    Not in the base's `lora_gate`, unless that is asked for: where it trains by its name,
    trainable/names-decide-nothing says so.
    """
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            trained = parameter.requires_grad and (gates or not name.endswith("lora_gate.weight"))
            if (all_of_it or trained) and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=g).to(parameter))


# -- what it holds ---------------------------------------------------------------------------------


@spec(
    "checkpoint/only-lora",
    claim="The checkpoint MUST hold no tensor of the frozen base, nor drag its storage along.",
    why="A checkpoint of megabytes that carries gigabytes, or a stale base that overwrites another.",
    source=(
        GUIDE,
        "BUGS 59, 60, P-17",
        "https://github.com/unslothai/unsloth-zoo/issues/692",
        "https://github.com/huggingface/peft/pull/1147",
    ),
    needs=(
        "quantized/forward-equals-dequantised-oracle",
        "forward/equals-oracle",
    ),
    cases=tuple(Case(specimen=s) for s in ("stack", "embedding", "conv2d", "normed", "nf4")),
)
def only_lora(trial: Trial) -> None:
    """Compare every entry with every tensor of a base in which none is constant."""
    base = trial.base()
    disturb(base, seed=5, all_of_it=True)
    frozen = {name: held.clone() for name, held in base.state_dict().items()}
    model = trial.adapted(base)
    state = tensors(trial.adapter.state_dict(model))
    for key, value in state.items():
        for name, p in frozen.items():
            if p.numel() == value.numel() and p.flatten().equal(value.detach().flatten().to(p)):
                fail(
                    "names",
                    expected="no entry of the checkpoint is a tensor of the frozen base",
                    actual=f"{key!r} is the base's {name}",
                    where=key,
                )
    saved = _storage_bytes(state.values())
    live = _storage_bytes(
        t for parts in trial.factors(model).values() for f in parts for t in (f.A, f.B)
    )
    own = sum(value.numel() * value.element_size() for value in state.values())
    if saved > max(live, own):
        fail(
            "count",
            expected=f"storages of at most {max(live, own)} bytes, as the factors'",
            actual=f"{saved} bytes: torch.save writes whole storages",
        )


def _storage_bytes(found: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


@spec(
    "checkpoint/complete",
    claim="Loading a model's own checkpoint MUST undo every change to what it trains.",
    why="What is trained and not saved is lost, and noticed when the training machine is gone.",
    source=(
        GUIDE,
        "BUGS 29, 47, 61, 62, 67, P-8",
        "https://github.com/huggingface/peft/issues/286",
        "https://github.com/pytorch/torchtune/issues/1764",
    ),
    needs=("forward/base-unchanged", "forward/equals-oracle", "forward/sees-factors-now"),
    tier="smoke",
    cases=(
        *KINDS,
        *(Case(specimen=s, way="lora_bias") for s in ("linear", "conv2d", "fused")),
    ),
)
def complete(trial: Trial) -> None:
    """Save, disturb everything that is trainable, load, and compare factors and outputs."""
    if trial.case.way and not trial.claims(trial.case.way):
        trial.notes.append(f"{trial.case.way} is not claimed")
        return
    _undoes(trial, trial.config(lora_bias=trial.case.way == "lora_bias"))


@spec(
    "checkpoint/every-layer",
    claim="Loading a model's own checkpoint MUST undo every change in every layer, and in the modules "
    "that are trained whole.",
    why="What is saved of the last layer alone, or without the head, passes on a model of one layer.",
    source=(GUIDE, "BUGS 29, 62, P-8", "https://github.com/pytorch/torchtune/issues/1764"),
    needs=("checkpoint/complete",),
    cases=(
        Case(specimen="stack", way="two-layers"),
        Case(specimen="stack", way="modules_to_save"),
    ),
)
def every_layer(trial: Trial) -> None:
    """As above, on a model of many layers of which two are adapted."""
    targets = ("layers.3.v_proj", "layers.7.v_proj")
    whole: tuple[str, ...] = ()
    if trial.case.way == "modules_to_save":
        if not trial.claims("modules_to_save"):
            trial.notes.append("modules_to_save is not claimed")
            return
        whole = ("lm_head", "layers.5.norm")
    _undoes(trial, trial.config(target_modules=targets, modules_to_save=whole))


def _undoes(trial: Trial, config: LoraConfig) -> None:
    """What is saved, loaded again, undoes what was done to all that trains."""
    import torch

    given = trial.inputs()
    model = trial.inject(config=config)
    disturb(model, seed=1)
    factors = trial.randomize(model)
    want, state = trial.call(model, given), kept(trial, model)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and not value.numel():
            fail("count", expected="no empty entry", actual=f"{key!r} has no element", where=key)
    disturb(model, seed=2)
    trial.randomize(model, seed=1)
    if trial.call(model, given).equal(want):
        fail("no-effect", expected="disturbed factors change the output", actual="nothing changes")
    # Entries go by their names: no file format promises an order.
    trial.adapter.load_state_dict(model, dict(reversed(state.items())))

    same_factors(trial, model, factors, "factors after loading")
    trial.same_bits(trial.call(model, given), want, "output after loading")


@spec(
    "checkpoint/round-trip-bits",
    claim="A checkpoint loaded into a second model MUST give the same factors, bit for bit, whatever its "
    "tensors' strides; and loaded where it is live, MUST change nothing.",
    why="Saving is not training: what was evaluated must be what is deployed.",
    source=("BUGS 64, 66; P3", "https://github.com/pytorch/torchtune/issues/907"),
    needs=(
        "quantized/forward-equals-dequantised-oracle",
        "checkpoint/complete",
    ),
    cases=(
        *KINDS,
        Case(shape=(5, 5), r=5),
        Case(way="strided"),
        Case(way="live"),
        Case(specimen="nf4"),
    ),
)
def round_trip_bits(trial: Trial) -> None:
    """Two models in one process, of which the second starts from other factors; or one by itself."""
    if trial.case.way != "live":
        restores(trial, strided=trial.case.way == "strided")
        return
    model = trial.adapted()
    factors = trial.snapshot(model)
    trial.adapter.load_state_dict(model, dict(trial.adapter.state_dict(model)))

    same_factors(trial, model, factors, "factors after loading the model's own live tensors")


@spec(
    "checkpoint/same-merged-or-not",
    claim="The checkpoint of a merged model MUST be that of the unmerged one, bit for bit, or raise.",
    why="A checkpoint saved during evaluation, merged, would add its update twice when it is loaded.",
    source=("BUGS P-7", "https://github.com/huggingface/peft/issues/2105"),
    features=("merge",),
    needs=("checkpoint/complete", "merge/same-output"),
    cases=(
        *(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
        Case(dtype="bfloat16"),
    ),
)
def same_merged_or_not(trial: Trial) -> None:
    """Save before and while merged, which must not keep it from being unmerged."""
    model = trial.adapted()
    want, factors = tensors(kept(trial, model)), trial.snapshot(model)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    try:
        found = tensors(kept(trial, model))
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"saving while merged is refused: {type(error).__name__}")
        return
    if found.keys() != want.keys():
        differing = sorted(found.keys() ^ want.keys())
        fail("names", expected="the same keys merged or not", actual=f"{differing[:3]} differ")
    for key, value in want.items():
        trial.same_bits(found[key], value, f"{key} while merged")
    if trial.claims("unmerge"):
        budget = 2 * trial.budget(trial.base(), factors, trial.inputs())
        what = "base's output, saved while merged and unmerged"
        one_layer.gives_back_the_base(trial, model, budget, what)


@spec(
    "checkpoint/many-layers",
    claim="With twelve layers, each MUST get its own factors back: 10 is not before 2.",
    why="Keys in the order of their text put layer 10 in the place of layer 2, in shapes that fit.",
    source=("BUGS P-9", "BUGS section 6.1: never fewer than 12 layers"),
    needs=("checkpoint/round-trip-bits", "checkpoint/every-layer"),
    cases=(Case(specimen="stack"),),
)
def many_layers(trial: Trial) -> None:
    """Twelve layers with factors of their own, from one model into another."""
    restores(trial)
