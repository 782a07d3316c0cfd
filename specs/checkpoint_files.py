"""What is written to disk and read again, by this process and by a fresh one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import GUIDE, disturb, kept, same_factors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness.trial import Trial

NAMES = ("v_proj", "qkv_proj", "foo", "foobar", "weight_proj", "lora_gate")
"""Six names: a set of them keeps its order under another hash seed once in 720 times."""


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
    """Write the checkpoint as the guide does, and as `save` does, and read each safely."""
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
    if trial.claims("save"):
        trial.adapter.save(model, folder / "saved")  # type: ignore[attr-defined]  # claimed
        for path in sorted((folder / "saved").rglob("*")):
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
    ),
    cases=(
        Case(),
        Case(way="rslora"),
        Case(way="dropout", dropout=0.5),
        Case(dtype="bfloat16"),
        Case(way="lora_bias"),
        Case(specimen="embedding"),
        Case(specimen="fused"),
        Case(specimen="stack", way="modules_to_save"),
        Case(way="another-base"),
    ),
)
def save_restores_settings(trial: Trial) -> None:
    """Save one adapter, load it into another copy of the base, or into another base."""
    from harness import specimen

    way = trial.case.way
    if way not in {"", "another-base"} and not trial.claims(way):
        return
    changes: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "lora_bias": {"lora_bias": True},
        "modules_to_save": {"modules_to_save": ("foo",), "target_modules": ("v_proj",)},
    }
    given, folder = trial.inputs(), trial.folder()
    model = trial.inject(config=trial.config(**changes.get(way, {})))
    if way == "modules_to_save":
        disturb(model, seed=1)
    factors = trial.randomize(model)
    want = trial.call(model, given)
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it
    base = specimen.build(trial.case.with_(seed=trial.case.seed + (way == "another-base")))
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    loaded = trial.adapter.load(base, folder, trainable=way == "dropout")  # type: ignore[attr-defined]  # likewise
    trial.unmerged(loaded)

    same_factors(trial, loaded, factors, "factors after save and load")
    if way == "dropout":
        loaded.train()
        if trial.call(loaded, given).equal(trial.call(loaded, given)):
            fail(
                "no-effect",
                expected=f"two calls in train mode that differ, at the dropout of "
                f"{trial.case.dropout:g} that was saved",
                actual="the same outputs, bit for bit",
            )
        return
    if way == "another-base":
        trial.close(trial.call(loaded, given), truth, budget, "output on another base")
        return
    trial.same_bits(trial.call(loaded, given), want, "output after save and load")


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
    cases=(Case(way="frozen"), Case(way="trainable")),
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


@spec(
    "checkpoint/load-keeps-mode",
    claim="`load` MUST leave train or eval mode as the base had it, in every module.",
    why="Dropout that is on in inference, or off in training, is an error without a message.",
    source=(
        "BUGS 54, 55, 119",
        "https://github.com/huggingface/transformers/issues/34469",
        "https://github.com/huggingface/peft/pull/591",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings",),
    cases=tuple(
        Case(specimen="stack", way=f"{mode}, {kind}")
        for mode in ("train", "eval")
        for kind in ("frozen", "trainable")
    ),
)
def load_keeps_mode(trial: Trial) -> None:
    """Load into a base in each mode, to train and not, and look at every module."""
    mode, kind = trial.case.way.split(", ")
    folder, base = trial.folder(), trial.base().train(mode == "train")
    trial.adapter.save(trial.adapted(), folder)  # type: ignore[attr-defined]  # the feature brings it
    loaded = trial.adapter.load(base, folder, trainable=kind == "trainable")  # type: ignore[attr-defined]  # likewise

    wrong = [name for name, m in loaded.named_modules() if m.training != (mode == "train")]
    if wrong:
        fail(
            "state",
            expected=f"a base in {mode} mode stays in it",
            actual=f"{len(wrong)} modules are in the other",
            where=wrong[0] or "the model itself",
        )


# -- a fresh process -------------------------------------------------------------------------------


@spec(
    "checkpoint/fresh-process",
    claim="A checkpoint MUST give the same outputs, bit for bit, in a process that never saw the model.",
    why="Nobody deploys from the process that trained; what lives in memory alone is lost.",
    source=("BUGS section 6.8; P3", GUIDE),
    needs=("checkpoint/two-stage-load", "checkpoint/safe-file"),
    cases=(Case(specimen="bare"),),
    fresh=True,
)
def fresh_process(trial: Trial) -> None:
    """Write the checkpoint, load it in a child, and compare the child's outputs."""
    import torch

    folder, given = trial.folder(), trial.inputs()
    model = trial.adapted()
    torch.save(kept(trial, model), folder / "state.pt")
    want = trial.call(model, given)
    _in_a_fresh_process(trial, folder, _load_and_call)

    found = torch.load(folder / "output.pt", weights_only=True)
    trial.same_bits(found, want, "output of a fresh process")


def _load_and_call(trial: Trial, folder: Path) -> None:
    """In the child."""
    import torch

    model = trial.inject(seed=1)
    state = torch.load(folder / "state.pt", weights_only=False)  # its own file, of a minute ago
    trial.adapter.load_state_dict(model, state)
    torch.save(trial.call(model, trial.inputs()), folder / "output.pt")


@spec(
    "checkpoint/same-bytes-under-another-hash-seed",
    claim="`save` SHOULD write the same bytes for the same adapter, whatever the hash seed.",
    why="Files that differ from run to run defeat checksums, caches and review.",
    source=(
        "BUGS 74: peft's target_modules are a set",
        "https://docs.python.org/3/using/cmdline.html#envvar-PYTHONHASHSEED",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings",),
    cases=(Case(specimen="stack"),),
    fresh=True,
)
def same_bytes_under_another_hash_seed(trial: Trial) -> None:
    """Save the same factors here and in a child under another hash seed."""
    folder = trial.folder()
    _save_many_names(trial, folder / "here")
    _in_a_fresh_process(trial, folder, _save_there)

    here, there = _contents(folder / "here"), _contents(folder / "there")
    differing = sorted(
        name for name in here.keys() | there.keys() if here.get(name) != there.get(name)
    )
    if differing:
        fail(
            "value",
            expected="the same bytes in every file",
            actual=f"{len(differing)} of {len(here)} files differ: {', '.join(differing)}",
            where=differing[0],
        )


def _save_many_names(trial: Trial, folder: Path) -> None:
    model = trial.adapted(config=trial.config(target_modules=NAMES))
    trial.adapter.save(model, folder)  # type: ignore[attr-defined]  # the feature brings it


def _save_there(trial: Trial, folder: Path) -> None:
    """In the child."""
    _save_many_names(trial, folder / "there")


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _in_a_fresh_process(trial: Trial, folder: Path, act: Callable[[Trial, Path], None]) -> None:
    """`act(trial, folder)` in a process that has met no implementation."""
    import pickle

    from harness import fresh
    from harness.failure import NotRun

    try:
        (folder / "adapter.pkl").write_bytes(pickle.dumps(trial.adapter))
    except Exception as error:  # noqa: BLE001  # pickle raises whatever the object does
        raise NotRun(f"the adapter cannot be sent to a fresh process: {error}") from None
    problem = fresh.call(__name__, "child", str(folder), str(trial.case), act.__name__)
    if problem.startswith(_Unreachable.__name__):
        raise NotRun(f"the adapter cannot be had in a fresh process: {problem}")
    if problem:
        fail("raised", expected="it works in a fresh process", actual=problem)


class _Unreachable(Exception):  # noqa: N818  # it says of the adapter where it lies
    """An adapter whose class a fresh process cannot import: one of a script's own, say."""


def child(folder: str, case: str, act: str) -> None:
    """What the fresh process runs: one of this file's functions, on a trial of its own."""
    import pickle
    from pathlib import Path

    import torch

    from harness.trial import Trial

    torch.set_num_threads(1)
    try:
        adapter = pickle.loads((Path(folder) / "adapter.pkl").read_bytes())  # noqa: S301  # written a moment ago
    except (AttributeError, ImportError) as error:
        raise _Unreachable(error) from None
    known = {function.__name__: function for function in (_load_and_call, _save_there)}
    known[act](Trial(adapter, Case.parse(case)), Path(folder))
