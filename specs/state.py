"""What calls that only read, or that undo themselves, leave behind: nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from harness.trial import Trial

CALLS = ("state_dict", "load", "save", "disable", "exception", "cycle")
STATES = ("training", "evaluation", "inference")
ROUNDS = 3

View = dict[str, tuple[object, ...]]
"""What a snapshot sees of each parameter, buffer and module, by name."""


class _Leave(Exception):  # noqa: N818  # it is the way out, not an error
    """Raised inside `disable`."""


def view(model: nn.Module, *, storage: bool) -> View:
    """Names, kinds, trainability, dtypes, modes and, if asked, where the numbers lie."""
    import torch

    seen: View = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        where = (p.data_ptr(),) if storage else ()
        is_parameter = isinstance(p, torch.nn.Parameter)
        seen[f"parameter {name}"] = (p.requires_grad, p.dtype, tuple(p.shape), is_parameter, *where)
    for name, b in model.named_buffers(remove_duplicate=False):
        seen[f"buffer {name}"] = (b.requires_grad, b.dtype, tuple(b.shape))
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"module {name}"] = ("train" if module.training else "eval",)
    return seen


def keep_norms_in_eval(model: nn.Module) -> None:
    """As fine-tuning may: a norm that is in eval mode, whatever the rest is, and yet trains."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.LayerNorm):
            module.eval()
            module.weight.requires_grad_(True)


def same_view(after: View, before: View, what: str) -> None:
    """The two views are the same, or the first difference."""
    for name in sorted(before.keys() | after.keys()):
        was, found = before.get(name), after.get(name)
        if was != found:
            moved = was is not None and found is not None and was[:4] == found[:4]
            fail(
                "state",
                expected=f"{name} is as it was before {what}: {_told(was)}",
                actual="the same, in another storage" if moved else _told(found),
                where=name,
            )


def _told(seen: tuple[object, ...] | None) -> str:
    if seen is None:
        return "not there"
    if len(seen) == 1:
        return f"in {seen[0]} mode"
    return f"{'trainable' if seen[0] else 'frozen'}, {seen[1]}, {seen[2]}"


def _acts(trial: Trial, model: nn.Module) -> dict[str, Callable[[], object]]:
    """Each call, where it is claimed."""
    adapter: Any = trial.adapter
    state = {
        k: v.clone() if hasattr(v, "clone") else v for k, v in adapter.state_dict(model).items()
    }
    found: dict[str, Callable[[], object]] = {
        "state_dict": lambda: adapter.state_dict(model),
        "load": lambda: adapter.load_state_dict(model, state),
    }

    def disable(error: Exception | None) -> None:
        try:
            with adapter.disable(model):
                trial.call(model, trial.inputs())
                if error:
                    raise error
        except _Leave:
            pass

    def cycle() -> None:
        adapter.merge(model)
        adapter.unmerge(model)

    if trial.claims("save"):
        found["save"] = lambda: adapter.save(model, trial.folder())
    if trial.claims("disable"):
        found["disable"] = lambda: disable(None)
        found["exception"] = lambda: disable(_Leave())
    if trial.claims("unmerge"):
        found["cycle"] = cycle
    return found


@spec(
    "state/read-only-calls",
    claim="Saving, loading, disabling (left by an exception too) and a cycle of merging MUST leave "
    "names, trainability, dtypes and modes as they were.",
    why="An evaluation in the middle of a run must not change what trains after it.",
    source=(
        "BUGS 41, P-20, section 6.6; P20",
        "https://github.com/huggingface/peft/issues/368",
        "https://github.com/huggingface/peft/pull/3038",
    ),
    needs=("training/resume-equals-uninterrupted", "checkpoint/dtype-kept", "merge/restores-base"),
    cases=(
        *(Case(way=way) for way in CALLS),
        Case(specimen="embedding", dtype="bfloat16", way="cycle"),
        Case(specimen="stack", way="disable"),
        *(Case(specimen="nf4", way=way) for way in ("save", "disable")),
        *(Case(specimen="normed", way=way) for way in ("save", "disable", "cycle")),
    ),
)
def read_only_calls(trial: Trial) -> None:
    """Look at everything before and after one call, in training, in evaluation and frozen."""
    from harness import specimen

    way, given = trial.case.way, trial.inputs()
    merges = bool(getattr(trial.adapter, "eval_merges", False))
    for state in STATES:
        # Biases that train are the base's own, and held with it.
        biased = way == "cycle" and trial.case.specimen == "normed" and trial.claims("lora_only")
        model = trial.adapted(config=trial.config(bias="lora_only" if biased else "none"))
        act = _acts(trial, model).get(way)
        if act is None:
            return
        if state == "inference":
            model.requires_grad_(False)
        if not merges:
            model.train(state == "training")
        if state == "training":
            if not (merges and way == "cycle"):  # where modes merge, a cycle is one of modes
                keep_norms_in_eval(model)
            specimen.loss(model, given).backward()  # type: ignore[no-untyped-call]
        held = {n: p for n, p in model.named_parameters() if p.grad is not None}
        # What the first call makes is no trace of the next; nor is a buffer that keeps what is merged.
        want = trial.call(model, given)
        before = view(model, storage=way != "cycle")
        act()
        after = view(model, storage=way != "cycle")
        if way == "cycle":
            after = {k: v for k, v in after.items() if k in before or not k.startswith("buffer ")}

        same_view(after, before, f"{way}, in {state}")
        now = dict(model.named_parameters())
        for name, p in held.items():
            if now.get(name) is not p or p.grad is None:
                fail(
                    "state",
                    expected=f"the parameter that the optimizer holds, with its gradient, after {way}",
                    actual="another parameter"
                    if now.get(name) is not p
                    else "its gradient is gone",
                    where=name,
                )
        if way != "cycle":
            trial.same_bits(trial.call(model, given), want, f"output after {way}, in {state}")


@spec(
    "state/surroundings-left-alone",
    claim="Injecting, calling, saving, loading, disabling and merging SHOULD leave torch's default dtype, "
    "default device, gradient and deterministic mode, precision of products, anomaly detection and number of "
    "threads, and the working folder, as they were.",
    why="What is set for a whole process and not put back changes every model that is made after it.",
    source=("https://docs.pytorch.org/docs/stable/generated/torch.set_default_dtype.html",),
    needs=("state/read-only-calls",),
    cases=(Case(),),
)
def surroundings_left_alone(trial: Trial) -> None:
    """Look around before and after each call."""
    from harness import surroundings

    adapter: Any = trial.adapter
    before = surroundings.look()

    def left_alone(what: str) -> None:
        for name, now in surroundings.put_back(before).items():
            fail(
                "state",
                expected=f"{name} as it was before {what}: {before[name]}",
                actual=str(now),
            )

    model = trial.adapted()
    left_alone("inject")
    acts = {"a call": lambda: trial.call(model, trial.inputs()), **_acts(trial, model)}
    if trial.claims("merge"):
        acts["merge"] = lambda: adapter.merge(model)
    for what, act in acts.items():
        act()
        left_alone(what)


@spec(
    "state/mode-calls-return-self",
    claim="`train()` and `eval()` MUST return the module, for the model and every module in it.",
    why="`model = model.eval()` is how everyone writes it; a None breaks it one level down.",
    source=(
        "BUGS 127",
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
    ),
    needs=("forward/equals-oracle",),
    cases=(Case(), Case(specimen="embedding"), Case(specimen="conv2d"), Case(specimen="fused")),
)
def mode_calls_return_self(trial: Trial) -> None:
    """Call both on each module, from the outside in."""
    model = trial.inject()
    for name, module in list(model.named_modules()):
        for call in ("eval", "train"):
            back = getattr(module, call)()
            if back is not module:
                fail(
                    "state",
                    expected=f"{call}() returns the module itself",
                    actual=f"{type(module).__name__}.{call}() returns {type(back).__name__}",
                    where=name or "the model itself",
                )


@spec(
    "state/deepcopy-and-pickle",
    claim="An adapted model SHOULD be copied and pickled into one that gives the same outputs.",
    why="Averaging weights, keeping the best epoch and sending a model to a worker all do this.",
    source=("BUGS 128", "https://docs.python.org/3/library/pickle.html"),
    needs=("forward/equals-oracle",),
    cases=tuple(
        Case(specimen=specimen, way=way)
        for specimen in ("linear", "embedding", "fused")
        for way in ("deepcopy", "pickle")
    ),
)
def deepcopy_and_pickle(trial: Trial) -> None:
    """Copy, change the original's factors, and compare the copy's outputs."""
    import copy
    import pickle

    given = trial.inputs()
    model = trial.adapted()
    want = trial.call(model, given)
    if trial.case.way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301  # written in the same breath
    trial.randomize(model, seed=1)

    trial.same_bits(trial.call(twin, given), want, "output of the copy, the original changed")


@spec(
    "state/attributes-left-behind",
    claim="Repeating disable, merge and unmerge, or add and delete, MUST NOT pile up anything.",
    why="A hook, an entry or a tensor that stays each time slows a long run down, then ends it.",
    source=("BUGS 140", "https://github.com/huggingface/peft/issues/3376"),
    needs=("forward/equals-oracle",),
    cases=tuple(Case(way=way) for way in ("disable", "cycle", "add-and-delete", "modes")),
)
def attributes_left_behind(trial: Trial) -> None:
    """Count hooks, entries and tensors after the first round and after the third."""
    model = trial.adapted()
    adapter: Any = trial.adapter
    acts = _acts(trial, model)
    if trial.claims("multi_adapter"):

        def add_and_delete() -> None:
            adapter.add(model, "passing", trial.config())
            adapter.delete(model, "passing")

        acts["add-and-delete"] = add_and_delete
    acts["modes"] = lambda: (model.eval(), trial.call(model, trial.inputs()), model.train())
    act = acts.get(trial.case.way)
    if act is None:
        return
    act()
    once = _footprint(model)
    for _ in range(ROUNDS - 1):
        act()
    often = _footprint(model)
    for name in sorted(once.keys() | often.keys()):
        if often.get(name, 0) > once.get(name, 0):
            fail(
                "state",
                expected=f"{once.get(name, 0)} after one round of {trial.case.way}",
                actual=f"{often.get(name, 0)} after {ROUNDS}",
                where=name,
            )


def _footprint(model: nn.Module) -> dict[str, int]:
    """How many things each attribute of each module holds: itself, and what its containers hold."""
    return {
        f"{name}.{key}": _held(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def _held(value: object, depth: int = 3) -> int:
    if not depth or not isinstance(value, (dict, list, tuple, set)):
        return 1
    inside = value.values() if isinstance(value, dict) else value
    return 1 + sum(_held(item, depth - 1) for item in inside)
