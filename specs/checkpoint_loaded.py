"""What `load` gives is an adapter like any other, of what was saved last, and of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.checkpoint import kept, same_factors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from harness.oracle import Snapshot
    from harness.trial import Trial

DESIGN = "DESIGN.md, load: factors, scaling and settings restored"


@spec(
    "checkpoint/load-reads-what-is-there",
    claim="`load` MUST give what was saved last, in tensors that no other load shares.",
    why="A cache by path serves yesterday's adapter, and two models loaded from one file train each other.",
    source=(
        DESIGN,
        "https://github.com/vllm-project/vllm/issues/30931",
        "https://github.com/vllm-project/vllm/issues/42125",
    ),
    features=("save",),
    needs=("checkpoint/save-restores-settings",),
    cases=(Case(), Case(specimen="headed", way="fewer")),
)
def load_reads_what_is_there(trial: Trial) -> None:
    """Save, load, save other values over it, load twice, and write to one of the two.

    Or another adapter's, of fewer layers: what the first one wrote of the others is not to act.
    """
    adapter: Any = trial.adapter
    fewer = trial.case.way == "fewer"
    more = {"target_modules": ("head_proj", "my_lm_head")} if fewer else {}
    model, folder = trial.adapted(config=trial.config(**more)), trial.folder()
    adapter.save(model, folder)
    adapter.load(trial.base(), folder)
    if fewer:
        model = trial.adapted()
    factors = trial.randomize(model, seed=1)
    try:
        adapter.save(model, folder)
    except Exception as error:  # noqa: BLE001  # refusing to write over is loud
        trial.notes.append(f"saving over an older one is refused: {type(error).__name__}")
        folder = trial.folder()
        adapter.save(model, folder)
    first, second = (adapter.load(trial.base(), folder) for _ in range(2))
    trial.unmerged(first)
    same_factors(trial, first, factors, "factors, saved over older ones and loaded")
    trial.randomize(second, seed=2)

    same_factors(trial, first, factors, "factors, while those of another load are written to")


@spec(
    "checkpoint/loaded-is-an-adapter",
    claim="An adapter that was loaded MUST save, merge, be disabled, and stand beside another, frozen or not, as one that "
    "was injected does.",
    why="Who resumes or serves works with loaded adapters alone; a `load` that leaves a scaling, a flag or "
    "a list of its layers behind is seen only in what is done next.",
    source=(
        DESIGN,
        "BUGS 57, P-7",
        "https://github.com/huggingface/peft/issues/3487",
        "https://github.com/huggingface/peft/issues/3580",
    ),
    features=("save",),
    needs=(
        "checkpoint/load-reads-what-is-there",
        "merge/restores-base",
        "several/disabled-equals-base",
        "several/isolation",
        "checkpoint/load-trainability",
    ),
    cases=(
        *(
            Case(specimen=specimen, way=way)
            for specimen in ("linear", "conv2d")
            for way in ("save", "merge", "disable", "multi_adapter")
        ),
        Case(way="frozen"),
        Case(way="trainable"),
    ),
)
def loaded_is_an_adapter(trial: Trial) -> None:
    """Load, give the factors other values, do it, and compare outputs with the equation."""
    way, adapter = trial.case.way, trial.adapter
    keeps = way in {"frozen", "trainable"}
    if not trial.claims(asks := "multi_adapter" if keeps else way):
        trial.notes.append(f"{asks} is not claimed")
        return
    if keeps:
        _keeps_its_trainability(trial)
        return
    base, x, folder = trial.base(), trial.inputs(), trial.folder()
    adapter.save(trial.adapted(), folder)  # type: ignore[attr-defined]  # the feature brings it
    served = way in {"merge", "disable"}
    model = adapter.load(trial.base(), folder, trainable=not served)  # type: ignore[attr-defined]  # likewise
    trial.unmerged(model)
    factors = trial.randomize(model, seed=1)
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    trial.close(trial.call(model, x), truth, budget, "output of a loaded adapter")
    {
        "save": _saves,
        "merge": _merges,
        "disable": _is_disabled,
        "multi_adapter": _stands_beside,
    }[way](trial, model, factors)
    if way != "save":
        trial.close(
            trial.call(model, x), truth, 2 * budget, f"output of a loaded adapter after {way}"
        )


def _saves(trial: Trial, model: nn.Module, factors: Snapshot) -> None:
    """Its checkpoint is what it now holds, and so is what it is saved as."""
    adapter: Any = trial.adapter
    other, folder = trial.inject(seed=1), trial.folder()
    adapter.load_state_dict(other, kept(trial, model))
    same_factors(trial, other, factors, "factors, from a loaded adapter's checkpoint")
    adapter.save(model, folder)
    again = adapter.load(trial.base(), folder)
    trial.unmerged(again)
    same_factors(trial, again, factors, "factors, loaded, saved and loaded again")
    x = trial.inputs()
    truth, budget = trial.truth(trial.base(), factors, x), trial.budget(trial.base(), factors, x)
    trial.close(trial.call(again, x), truth, budget, "output, loaded, saved and loaded again")


def _merges(trial: Trial, model: nn.Module, factors: Snapshot) -> None:
    """What it merges is W + ΔW, seen with the factors gone, where unmerging is not claimed too."""
    adapter: Any = trial.adapter
    base, x = trial.base(), trial.inputs()
    truth, budget = trial.truth(base, factors, x), 2 * trial.budget(base, factors, x)
    adapter.merge(model)
    trial.close(trial.call(model, x), truth, budget, "merged output of a loaded adapter")
    if not trial.claims("unmerge"):
        return
    one_layer.gives_back_the_base(trial, model, budget, "base's output, unmerged")
    trial.randomize(model, seed=1)


def _is_disabled(trial: Trial, model: nn.Module, factors: Snapshot) -> None:
    """Inside, the base's outputs."""
    base, x = trial.base(), trial.inputs()
    with trial.adapter.disable(model):  # type: ignore[attr-defined]  # claimed
        found = trial.call(model, x)
    budget = trial.budget(base, factors, x)
    trial.close(found, trial.truth(base, {}, x), budget, "output of a loaded adapter, disabled")


def _stands_beside(trial: Trial, model: nn.Module, factors: Snapshot) -> None:  # noqa: ARG001
    """Another is added and acts, and then it again."""
    adapter: Any = trial.adapter
    base, x = trial.base(), trial.inputs()
    adapter.add(model, "second", trial.config(r=trial.case.r + 1))
    adapter.activate(model, "second")
    trial.unmerged(model)
    second = trial.randomize(model, seed=2)
    truth, budget = trial.truth(base, second, x), trial.budget(base, second, x)
    trial.close(trial.call(model, x), truth, budget, "output of one added to a loaded adapter")
    adapter.activate(model, "default")
    trial.unmerged(model)


def _keeps_its_trainability(trial: Trial) -> None:
    """As it was asked for, while another is added, acts and gives way to it again."""
    adapter: Any = trial.adapter
    asked, folder = trial.case.way == "trainable", trial.folder()
    adapter.save(trial.adapted(), folder)
    model = adapter.load(trial.base(), folder, trainable=asked)
    adapter.add(model, "second", trial.config(), trainable=not asked)
    _trains(trial, model, asked, "once another is added")
    adapter.activate(model, "second")
    adapter.activate(model, "default")
    _trains(trial, model, asked, "activated again after another")


def _trains(trial: Trial, model: nn.Module, asked: bool, when: str) -> None:  # what is asked
    from harness import storage

    trained = storage.elements(p for p in model.parameters() if p.requires_grad)
    for name, parts in trial.factors(model).items():
        for tensor in storage.handles({name: parts}):
            if bool(storage.covered(tensor, trained)) is not asked:
                fail(
                    "state",
                    expected=f"an adapter loaded with trainable={asked} to be so {when}",
                    actual=f"its factors {'need no' if asked else 'need'} gradients",
                    where=name,
                )


@spec(
    "checkpoint/load-of-less-is-loud",
    # The contract says of `load_state_dict` that it raises, and of `load` nothing.
    claim="`load` SHOULD raise or warn where the file that `save` wrote lacks a tensor, or has them under "
    "other names.",
    why="A file that was cut short, or converted by somebody, gives an adapter that is in part untrained, "
    "and nothing tells.",
    source=(
        "BUGS 48, 49",
        "https://github.com/huggingface/peft/pull/2084",
        "https://github.com/huggingface/peft/pull/2118",
    ),
    features=("save",),
    needs=(
        "checkpoint/save-restores-settings",
        "checkpoint/misfit-is-loud",
        "checkpoint/save-restores-biases",
    ),
    cases=(Case(way="missing"), Case(way="renamed")),
)
def load_of_less_is_loud(trial: Trial) -> None:
    """Take one tensor out of what was saved, or give all another prefix, and load it."""
    whole, less = trial.folder(), trial.folder()
    adapter: Any = trial.adapter
    model = trial.adapted()
    adapter.save(model, whole)
    adapter.save(model, less)
    if not any(_tamper(path, trial.case.way) for path in sorted(less.rglob("*"))):
        trial.notes.append("vacuous: no file of tensors is found in what `save` writes")
        return
    trial.loud(
        lambda: adapter.load(trial.base(), less),
        expected="an error or a warning, as "
        + (
            "one tensor is missing in the file"
            if trial.case.way == "missing"
            else "the file's tensors are called otherwise"
        ),
        usual=lambda: adapter.load(trial.base(), whole),
    )


def _tamper(path: Path, way: str) -> bool:
    """Write a file of tensors again with one less, or with all renamed; whether it is such a file."""
    import pickle

    import torch
    from safetensors.torch import load_file, save_file

    if path.suffix == ".safetensors":
        held: Any = load_file(path)
    elif path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        try:
            held = torch.load(path, weights_only=True)
        except pickle.UnpicklingError:  # objects of its own: checkpoint/save-is-safe tells of that
            return False
    else:
        return False
    names = [k for k, t in held.items() if isinstance(t, torch.Tensor) and t.numel() > 1]
    if not names:
        return False
    if way == "missing":
        del held[min(names)]
    else:
        held = {f"another.{key}" if key in names else key: held[key] for key in held}
    if path.suffix == ".safetensors":
        save_file(held, path, {"format": "pt"})
    else:
        torch.save(held, path)
    return True
