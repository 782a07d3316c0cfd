"""What is written to disk, and what `load` makes of it in the process that wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import GUIDE, disturb, kept, same_factors
from harness.specs.forward_dropout import drops_each_input

if TYPE_CHECKING:
    from pathlib import Path

    from harness.trial import Trial


@spec(
    "checkpoint/safe-file",
    claim="A checkpoint MUST be readable without running code: by weights_only=True or safetensors.",
    why="An adapter is a file from a stranger; one that needs pickle may do anything when opened.",
    source=(
        GUIDE,
        "torch.load, weights_only, https://docs.pytorch.org/docs/stable/notes/serialization.html",
    ),
    needs=("checkpoint/complete",),
    cases=(Case(), Case(specimen="fused"), Case(dtype="bfloat16")),
)
def safe_file(trial: Trial) -> None:
    """Write the checkpoint as the guide does, and read it safely."""
    import torch
    from safetensors.torch import save_file

    folder, model = trial.folder(), trial.adapted()
    state = kept(trial, model)
    torch.save(state, folder / "adapter.pt")
    problem = _unreadable(folder / "adapter.pt")
    if problem:
        try:
            save_file(state, folder / "adapter.safetensors")
        except Exception as error:  # noqa: BLE001  # whatever it is, the file cannot be written
            fail(
                "value",
                expected="torch.load(weights_only=True) or safetensors reads the checkpoint",
                actual=f"{problem}; safetensors: {type(error).__name__}: {error}"[:300],
            )


@spec(
    "checkpoint/save-is-safe",
    # The format of `save` is the implementation's own, so that it is no MUST.
    claim="What `save` writes SHOULD be readable without running code.",
    why="An adapter is a file from a stranger; one that needs pickle may do anything when opened.",
    source=(
        "torch.load, weights_only, https://docs.pytorch.org/docs/stable/notes/serialization.html",
        "https://github.com/huggingface/safetensors",
    ),
    features=("save",),
    needs=("checkpoint/safe-file",),
    cases=(Case(),),
    more_cases=(Case(specimen="fused"), Case(dtype="bfloat16")),
)
def save_is_safe(trial: Trial) -> None:
    """Read every file that `save` wrote safely."""
    folder = trial.folder()
    trial.adapter.save(trial.adapted(), folder)  # type: ignore[attr-defined]  # the feature brings it
    for path in sorted(folder.rglob("*")):
        problem = _unreadable(path)
        if problem:
            fail("value", expected="`save` writes safe files", actual=problem, where=path.name)


def _unreadable(path: Path) -> str:
    """Why a file cannot be read without running code; empty where it can, or is no tensor file."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            load_file(path)
        elif path.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}:
            torch.load(path, weights_only=True)
    except Exception as error:  # noqa: BLE001  # whatever it is, the file cannot be read
        return f"{path.name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return ""


# -- save and load ---------------------------------------------------------------------------------


@spec(
    "checkpoint/save-restores-settings",
    claim="`load` into a bare base MUST give back factors, scaling and settings as they were saved.",
    why="An adapter that is reloaded under another scaling, or without its dropout, is another adapter.",
    source=(
        "BUGS 19, 23, 73",
        "https://github.com/vllm-project/vllm/issues/10798",
        "https://github.com/kohya-ss/sd-scripts/issues/2204",
    ),
    features=("save",),
    needs=(
        "initialization/factors-not-shared",
        "checkpoint/round-trip-bits",
        "checkpoint/many-layers",
        "forward/dropout-on-in-train",
    ),
    cases=(
        Case(),
        Case(alpha=2.5),
        *(Case(specimen=s, way="rslora") for s in ("linear", "embedding", "conv2d", "fused")),
        Case(shape=(16, 20), r=16, way="dropout", dropout=0.75),
        *(Case(specimen=s, way="dropout", dropout=0.75) for s in ("conv2d", "fused")),
        Case(dtype="bfloat16"),
        *(Case(specimen=s, way="lora_bias") for s in ("linear", "conv2d", "fused")),
        Case(specimen="embedding"),
        Case(specimen="conv2d"),
        Case(specimen="fused"),
        Case(specimen="nf4"),
        Case(specimen="stack", way="modules_to_save"),
        Case(specimen="stack", way="one-layer"),
        Case(specimen="headed", way="all-linear"),
        Case(way="another-base"),
    ),
)
def save_restores_settings(trial: Trial) -> None:
    """Save one adapter, load it into another copy of the base, or into another base."""
    from harness import specimen

    way = trial.case.way
    if way not in {"", "another-base", "one-layer", "all-linear"} and not trial.claims(way):
        return
    changes: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "lora_bias": {"lora_bias": True},
        "one-layer": {"target_modules": ("layers.1.v_proj",)},
        "all-linear": {"target_modules": "all-linear"},
        "modules_to_save": {"modules_to_save": ("foo",), "target_modules": ("v_proj",)},
    }
    given, folder = trial.inputs(), trial.folder()
    try:
        model = trial.inject(config=trial.config(**changes.get(way, {})))
    except (TypeError, ValueError) as refusal:
        if trial.case.alpha.is_integer():
            raise
        trial.notes.append(f"an alpha that is no whole number is refused: {refusal}"[:200])
        return
    if way == "modules_to_save":
        disturb(model, seed=1)
    factors = trial.randomize(model)
    want = trial.call(model, given)
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it
    base = specimen.build(trial.case.with_(seed=trial.case.seed + (way == "another-base")))
    if way == "another-base":
        truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    loaded = trial.adapter.load(base, folder, trainable=way == "dropout")  # type: ignore[attr-defined]  # likewise
    trial.unmerged(loaded)

    same_factors(trial, loaded, factors, "factors after save and load")
    if way == "dropout":
        drops_each_input(trial, loaded)
        return
    if way == "another-base":
        trial.close(trial.call(loaded, given), truth, budget, "output on another base")
        return
    trial.same_bits(trial.call(loaded, given), want, "output after save and load")


@spec(
    "checkpoint/save-same-merged-or-not",
    claim="What `save` writes while merged MUST load as the adapter that was merged; or `save` raises.",
    why="An adapter saved during evaluation, merged, would add its update twice when it is loaded.",
    source=("BUGS P-7", "https://github.com/huggingface/peft/issues/2105"),
    features=("merge", "save"),
    needs=("checkpoint/save-restores-settings", "checkpoint/same-merged-or-not"),
    cases=tuple(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
)
def save_same_merged_or_not(trial: Trial) -> None:
    """Merge, save, load into a bare base, and compare outputs with the equation."""
    base, given, folder = trial.base(), trial.inputs(), trial.folder()
    model = trial.adapted()
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it
    try:
        trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # likewise
    except Exception as error:  # noqa: BLE001  # refusing is right
        trial.notes.append(f"`save` while merged is refused: {type(error).__name__}")
        return
    loaded = trial.adapter.load(trial.base(), folder)  # type: ignore[attr-defined]  # likewise
    trial.unmerged(loaded)
    trial.close(trial.call(loaded, given), truth, budget, "output after save while merged and load")


@spec(
    "checkpoint/load-trainability",
    claim="`load` MUST give an adapter that trains exactly if asked to, and a base that never does.",
    why="A resumed run that trains nothing looks like one that has converged.",
    source=(
        "BUGS 54, 56, 58, 142",
        "https://github.com/huggingface/transformers/issues/34469",
        "https://github.com/huggingface/transformers/issues/24463",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings",),
    cases=tuple(
        Case(specimen=s, way=way)
        for s in ("linear", "embedding", "conv2d", "fused")
        for way in ("frozen", "trainable")
    ),
)
def load_trainability(trial: Trial) -> None:
    """Compare what requires a gradient after `load` with what does after `inject`."""
    folder, model = trial.folder(), trial.adapted()
    asked = trial.case.way == "trainable"
    wanted = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad and asked)
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it
    loaded = trial.adapter.load(trial.base(), folder, trainable=asked)  # type: ignore[attr-defined]  # likewise

    trains = {name: tuple(p.shape) for name, p in loaded.named_parameters() if p.requires_grad}
    if sorted(trains.values()) != wanted:
        fail(
            "state",
            expected=f"{len(wanted)} trainable parameters after load(trainable={asked})",
            actual=f"{len(trains)}: {', '.join(sorted(trains)[:3]) or 'none'}",
        )
    loaded.eval()
    loaded.train()
    after = {name for name, p in loaded.named_parameters() if p.requires_grad}
    if after != trains.keys():
        fail(
            "state",
            expected=f"the same parameters to train after eval() and train(), {len(trains)}",
            actual=f"{len(after)} do",
            where=min(after ^ trains.keys()),
        )


@spec(
    "checkpoint/load-keeps-mode",
    claim="`load` MUST leave train or eval mode as the base had it, in every module of it, and an adapter "
    "that drops in train mode alone.",
    why="Dropout that is on in inference, or off in training, is an error without a message.",
    source=(
        "BUGS 54, 55, 119",
        "https://github.com/huggingface/transformers/issues/34469",
        "https://github.com/huggingface/peft/pull/591",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings", "forward/dropout-off-in-eval"),
    cases=tuple(
        Case(specimen="stack", way=f"{mode}, {kind}")
        for mode in ("train", "eval")
        for kind in ("frozen", "trainable")
    ),
)
def load_keeps_mode(trial: Trial) -> None:
    """Load into a base in each mode, to train and not; look at its modules, and whether two calls agree."""
    mode, kind = trial.case.way.split(", ")
    folder, base = trial.folder(), trial.base().train(mode == "train")
    dropout = 0.5 if trial.claims("dropout") else 0.0
    # Of what comes with the adapter its outputs tell: a module that holds factors has no mode.
    there = list(base.named_modules())
    saved = trial.adapted(config=trial.config(lora_dropout=dropout))
    trial.adapter.save(saved, folder)  # type: ignore[attr-defined]  # the feature brings it
    loaded = trial.adapter.load(base, folder, trainable=kind == "trainable")  # type: ignore[attr-defined]  # likewise

    in_use = set(loaded.modules())
    wrong = [
        name
        for name, m in (*there, ("the model itself", loaded))
        if m in in_use and m.training != (mode == "train")
    ]
    if wrong:
        fail(
            "state",
            expected=f"a base in {mode} mode stays in it",
            actual=f"{len(wrong)} modules are in the other",
            where=wrong[0] or "the model itself",
        )
    drops = mode == "train" and kind == "trainable"
    merges = mode == "eval" and getattr(trial.adapter, "eval_merges", False)
    if not dropout or merges or (mode == "train" and not drops):
        return
    x = trial.inputs()
    if trial.call(loaded, x).equal(trial.call(loaded, x)) is drops:
        fail(
            "state",
            expected=f"an adapter loaded in {mode} mode {'to drop' if drops else 'not to drop'}",
            actual=f"two calls {'agree, bit for bit' if drops else 'differ'}",
        )
