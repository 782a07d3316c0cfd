"""Several adapters on one base: which one acts, and what the others keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.oracle import Snapshot
    from harness.trial import Trial

DESIGN = "DESIGN.md, multi_adapter"


@spec(
    "several/switch",
    claim="Adding an adapter MUST change no output, and activating one MUST make that one alone act.",
    why="Serving or training one adapter with another's update in it is wrong without a sign of it.",
    source=(DESIGN, "BUGS 97", "https://github.com/huggingface/peft/pull/2466"),
    needs=(
        "quantized/forward-equals-dequantised-oracle",
        "forward/base-unchanged",
        "forward/equals-oracle",
        "forward/embedding",
        "forward/sees-factors-now",
    ),
    features=("multi_adapter",),
    cases=(
        Case(),
        Case(specimen="fused"),
        Case(specimen="embedding"),
        Case(specimen="conv2d"),
        Case(specimen="stack"),
        Case(dtype="bfloat16"),
        Case(specimen="nf4"),
    ),
    more_cases=(Case(specimen="tiny"), Case(specimen="tiny-gqa")),
)
def switch(trial: Trial) -> None:
    """Judge outputs: the first alone, the second fresh and with factors, a third added, the first again."""
    base, x = trial.base(), trial.inputs()
    model = trial.inject(base)
    # By the adapted layer's own way of adding up, which a fresh adapter shows too.
    bare = trial.call(model, x)
    trial.randomize(model)
    alone = trial.call(model, x)
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    trial.unmerged(model)
    trial.same_bits(trial.call(model, x), alone, "outputs after adding a second adapter")
    activate(trial, model, "second")
    trial.same_bits(trial.call(model, x), bare, "outputs of a fresh second adapter")
    factors = trial.randomize(model, seed=1)
    base = trial.base()
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    acting = trial.call(model, x)
    trial.close(acting, truth, budget, "output of the second adapter")
    adapter.add(model, "third", trial.config())
    trial.unmerged(model)
    what = "outputs of the second, which acts, after adding a third adapter"
    trial.same_bits(trial.call(model, x), acting, what)
    activate(trial, model, "default")

    trial.same_bits(trial.call(model, x), alone, "outputs after the first is activated again")


@spec(
    "several/isolation",
    claim="Training, saving, loading, deleting or adding one adapter MUST leave the others' parameters, values and "
    "trainability as they were.",
    why="An adapter that another's call has frozen, freed or overwritten is lost, and nobody looks there.",
    source=(
        DESIGN,
        "BUGS 89",
        "https://github.com/huggingface/peft/issues/899",
        "https://github.com/huggingface/peft/pull/905",
        "https://github.com/huggingface/peft/issues/3580",
    ),
    needs=(
        "checkpoint/same-frozen-or-not",
        "several/other-settings",
        "training/loss-goes-down",
        "checkpoint/round-trip-bits",
        "checkpoint/safe-file",
        "trainable/optimizer-holds-only-lora",
    ),
    features=("multi_adapter",),
    cases=(
        Case(way="train-free"),
        Case(way="save-free"),
        Case(way="save-frozen"),
        Case(way="load-free"),
        Case(way="load-frozen"),
        Case(specimen="headless", way="load-free"),
        Case(way="delete-free"),
        Case(way="delete-frozen"),
        Case(way="add-free"),
        Case(way="add-frozen"),
    ),
    more_cases=(
        Case(specimen="tiny", way="train-free"),
        Case(specimen="embedding", way="train-free"),
        Case(specimen="fused", way="train-free"),
        Case(specimen="stack", way="load-frozen"),
    ),
)
def isolation(trial: Trial) -> None:
    """Judge three adapters, one of them frozen; the one that something is done to comes first or last."""
    from harness import descent

    act, _, actor = trial.case.way.partition("-")
    order = ("frozen", "free") if actor == "free" else ("free", "frozen")
    # Of three layers the one that something is done to adapts another than the first.
    other: dict[str, Any] = (
        {"target_modules": ("embed_out",)} if trial.case.specimen == "headless" else {}
    )
    model = trial.adapted()
    adapter: Any = trial.adapter
    for seed, name in enumerate(order, start=1):
        config = trial.config(**other if name == actor else {})
        adapter.add(model, name, config, trainable=name != "frozen")
        activate(trial, model, name)
        trial.randomize(model, seed=seed)
    before = {name: look(trial, model, name) for name in ("default", *order)}
    for name, (_, trains) in before.items():
        if trains is (name == "frozen"):
            fail(
                "state",
                expected=f"an adapter added with trainable={name != 'frozen'} to be so when it acts",
                actual=f"its factors {'need' if trains else 'need no'} gradients",
                where=name,
            )
    there = dict(model.named_parameters())
    _do(trial, model, act, actor, before)

    held: set[nn.Parameter] = set()  # of all adapters: one that does not act may be kept elsewhere
    for name, (values, trains) in before.items():
        if act == "delete" and name == actor:
            continue
        now, trains_now = look(trial, model, name)
        held |= set(model.parameters())
        if act == "train" and name == actor:  # what is loaded is its own checkpoint
            continue
        for where, (old, new) in descent.pairs(values, now):
            trial.same_bits(new, old, f"{where} of {name} after {act} of {actor}")
        if trains_now is not trains:
            fail(
                "state",
                expected=f"{name} {'trainable' if trains else 'frozen'}, as before {act} of {actor}",
                actual="trainable" if trains_now else "frozen",
                where=name,
            )
    gone = [name for name, p in there.items() if p not in held and act != "delete"]
    if gone:
        fail(
            "state",
            expected=f"the parameters that an optimizer holds, after {act} of {actor} and each activated",
            actual=f"{len(gone)} of {len(there)} are replaced",
            where=gone[0],
        )


def _do(
    trial: Trial, model: nn.Module, act: str, actor: str, before: dict[str, tuple[Snapshot, bool]]
) -> None:
    """Do something to one adapter; what another holds instead by then is entered in `before`."""
    from harness.specs import checkpoint

    adapter: Any = trial.adapter
    if act == "add":
        there = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
        for new, trains in (("new", actor == "free"), ("newer", actor != "free")):
            adapter.add(model, new, trial.config(), trainable=trains)
            kind = "a trainable one" if trains else "a frozen one"
            for name, parameter, trained in there:
                if parameter.requires_grad is not trained:
                    fail(
                        "state",
                        expected=f"{'trainable' if trained else 'frozen'}, as before adding {kind}",
                        actual="frozen" if trained else "trainable",
                        where=name,
                    )
    elif act == "delete":
        activate(trial, model, "default")
        adapter.delete(model, actor)
    else:
        activate(trial, model, actor)
        if act == "train":
            _train(model, trial.inputs())
        elif act == "load":
            state = checkpoint.kept(trial, model)
            # Another may have been trained since: a checkpoint that holds it too takes that back.
            activate(trial, model, "default")
            before["default"] = (trial.randomize(model, seed=8), before["default"][1])
            activate(trial, model, actor)
            trial.randomize(model, seed=9)
            adapter.load_state_dict(model, state)
        else:
            adapter.state_dict(model)
            if trial.claims("save"):
                adapter.save(model, trial.folder())


def _train(model: nn.Module, given: Any) -> None:
    """Two AdamW steps, with decay, over everything that the model has."""
    import torch

    from harness import specimen

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        specimen.loss(model, given).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@spec(
    "several/only-the-active-trains",
    claim="While one adapter acts, no other's factors SHOULD be trainable.",
    why="An optimizer made of what is trainable would hold, and a strategy that spreads parameters over "
    "devices would wait for, factors that never get a gradient.",
    source=("BUGS 89", "https://github.com/huggingface/peft/issues/899"),
    needs=("trainable/only-lora", "several/switch"),
    features=("multi_adapter",),
    cases=(Case(way="added"), Case(way="activated")),
)
def only_the_active_trains(trial: Trial) -> None:
    """Judge the trainable elements after adding a second adapter, and after activating it."""
    from harness import storage

    model = trial.adapted()
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    if trial.case.way == "activated":
        activate(trial, model, "second")
    ours = storage.elements(storage.handles(trial.factors(model)))

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not storage.covered(parameter, ours):
            fail(
                "state",
                expected="only factors of the adapter that acts to be trainable",
                actual=f"a parameter of {parameter.numel()} elements is trainable too",
                where=name,
            )


@spec(
    "several/unknown-name-is-loud",
    claim="Activating, deleting or combining an adapter that does not exist MUST raise, and change "
    "nothing.",
    why="A misspelt name that is let through serves another adapter, or none.",
    source=(DESIGN, "BUGS P19"),
    needs=("several/switch",),
    features=("multi_adapter",),
    cases=tuple(Case(way=way) for way in ("activate", "delete", "combine")),
)
def unknown_name_is_loud(trial: Trial) -> None:
    """Judge that it raises, that the outputs stay, and that no half of a combination is left."""
    act = trial.case.way
    if act == "combine" and not trial.claims("combine"):
        trial.notes.append("combine is not claimed")
        return
    x = trial.inputs()
    model = trial.adapted()
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    before = trial.call(model, x)
    arguments: tuple[Any, ...] = ("secund",)
    if act == "combine":
        arguments = (["second", "secund"], [0.5, 0.5], "both")
    try:
        getattr(adapter, act)(model, *arguments)
    except Exception:  # noqa: BLE001  # any exception is loud
        trial.unmerged(model)
        trial.same_bits(trial.call(model, x), before, f"outputs after {act} of an unknown name")
    else:
        fail(
            "silent", expected=f"{act} of an unknown adapter to raise", actual="nothing was raised"
        )
    if act != "combine":
        return
    try:
        adapter.activate(model, "both")
    except Exception:  # noqa: BLE001  # any exception is loud
        return
    fail(
        "silent", expected="activating a refused combination to raise", actual="nothing was raised"
    )


def activate(trial: Trial, model: nn.Module, name: str) -> None:
    """Activate, and set the state in which outputs are compared."""
    adapter: Any = trial.adapter
    adapter.activate(model, name)
    trial.unmerged(model)


def same_as_base(trial: Trial, actual: Tensor, bare: Tensor, what: str) -> None:
    """The base's outputs bit for bit, or else those of a fresh adapter.

    Who adds the base's products up in another order does so here too: by how far, initialization/no-op
    judges.
    """
    if actual.dtype == bare.dtype and not actual.equal(bare):
        fresh = trial.call(trial.inject(), trial.inputs())
        bare = fresh if actual.equal(fresh) else bare
    trial.same_bits(actual, bare, what)


def look(trial: Trial, model: nn.Module, name: str) -> tuple[Snapshot, bool]:
    """An adapter's values, and whether its factors train, while it acts."""
    from harness import storage

    activate(trial, model, name)
    factors = trial.factors(model)
    trained = storage.elements(p for p in model.parameters() if p.requires_grad)
    trains = {storage.covered(t, trained) == t.numel() for t in storage.handles(factors)}
    if len(trains) > 1:
        fail(
            "state",
            expected="all factors of an adapter trainable, or none",
            actual="some are",
            where=name,
        )
    return trial.snapshot(model), trains.pop()
