"""Several adapters on one base, each with settings, dropout and saved modules of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.forward_layers import same_parts
from harness.specs.forward_training import gradients_of
from harness.specs.several import DESIGN, activate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.adapter import LoraConfig
    from harness.trial import Trial

FIRST = "`save` writes the first adapter, while the second acts"


@spec(
    "several/other-settings",
    claim="A second adapter with another rank, alpha and targets MUST act by its own settings.",
    why="Adapters are trained apart, each with settings of its own.",
    source=(
        DESIGN,
        "BUGS 35, 81, 85, 104",
        "https://github.com/huggingface/peft/pull/1111",
        "https://github.com/huggingface/peft/pull/2539",
    ),
    needs=("several/switch", "targeting/exact-coverage", "forward/scaling"),
    features=("multi_adapter",),
    cases=(
        Case(specimen="stack", way="names"),
        Case(specimen="stack", way="all-linear"),
        Case(specimen="stack", way="fewer"),
        *(Case(way=way) for way in ("rslora", "lora_bias", "lora_bias-first")),
        Case(specimen="fused", way="parts"),
    ),
    more_cases=(Case(specimen="tiny", way="all-linear"),),
)
def other_settings(trial: Trial) -> None:
    """Judge which modules the second adapts, its scaling, and its outputs."""
    from harness import tolerance

    setting, _, first = trial.case.way.partition("-")
    if setting in {"rslora", "lora_bias"} and not trial.claims(setting):
        trial.notes.append(f"{setting} is not claimed")
        return
    base, x = trial.base(), trial.inputs()
    second = _second_config(trial)
    model = trial.adapted(base, trial.config(lora_bias=first == "first"))
    alone = trial.call(model, x)
    adapter: Any = trial.adapter
    try:
        adapter.add(model, "second", second)
    except (NotImplementedError, ValueError) as refusal:  # loud, and claimed nowhere
        if trial.case.way != "parts":
            raise
        trial.notes.append(f"another cut of a fused layer is refused: {refusal}"[:200])
        return
    activate(trial, model, "second")
    factors = trial.randomize(model, seed=1)
    base = trial.base()
    wanted = set(second.targets(base))
    if set(factors) != wanted:
        missing, extra = sorted(wanted - set(factors)), sorted(set(factors) - wanted)
        fail(
            "names",
            expected=f"the second adapter on its own {len(wanted)} targets",
            actual=f"missing {missing[:3]}, extra {extra[:3]}",
        )
    for name, parts in factors.items():
        for f in parts:
            allowed = tolerance.setting(second.scaling)
            trial.close(number(f.scaling), number(second.scaling), allowed, f"scaling of {name}")
            if len(f.A) != second.r:
                fail("count", expected=f"rank {second.r}", actual=f"{len(f.A)}", where=name)
    if trial.case.way == "parts":
        same_parts(factors, second, base)
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)
    trial.close(trial.call(model, x), truth, budget, "output of the second adapter")
    activate(trial, model, "default")

    trial.same_bits(trial.call(model, x), alone, "outputs after the first is activated again")


def _second_config(trial: Trial) -> LoraConfig:
    from harness import specimen

    way = trial.case.way
    if way == "parts":
        rows = specimen.shape_of(trial.case)[1]
        cut = ((rows, False), (rows, True), (rows, True))
        return trial.config(r=5, lora_alpha=2.0, enable_lora={"proj": cut})
    if specimen.is_linear(trial.case):
        settings = {"use_rslora": way == "rslora", "lora_bias": way == "lora_bias"}
        return trial.config(r=5, lora_alpha=2.0, **settings)
    targets: Any = {
        "names": ("foo", "foobar", "weight_proj"),
        "all-linear": "all-linear",
        "fewer": ("v_proj",),
    }[way]
    return trial.config(r=5, lora_alpha=2.0, target_modules=targets)


def number(value: float) -> Tensor:
    """A number as a tensor, to compare it as one."""
    import torch

    return torch.tensor(value, dtype=torch.float64)


@spec(
    "several/gradients-of-the-active",
    claim="While a second adapter acts, its gradients MUST be those of the equation by its own settings.",
    why="A backward pass that goes by the first adapter's scaling trains the second at another rate, and no "
    "output shows it.",
    source=(DESIGN, "BUGS 112"),
    needs=("several/other-settings", "forward/gradients"),
    features=("multi_adapter",),
    cases=tuple(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
)
def gradients_of_the_active(trial: Trial) -> None:
    """Judge against float64."""
    model = trial.adapted()
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config(lora_alpha=3 * trial.case.alpha))
    activate(trial, model, "second")
    trial.randomize(model, seed=1)
    gradients_of(trial, model)


@spec(
    "several/dropout-of-its-own",
    claim="Each adapter MUST drop by the lora_dropout that it was made with, whatever is added beside it.",
    why="A run that goes on with another's dropout is regularised as nobody asked, and shows no sign of "
    "it in eval mode.",
    source=(DESIGN, "BUGS 117", "https://github.com/meta-pytorch/torchtune/issues/995"),
    needs=("several/switch", "forward/dropout-on-in-train", "forward/dropout-off-in-eval"),
    features=("multi_adapter", "dropout"),
    cases=(
        Case(way="first-drops", dropout=0.5),
        *(Case(specimen=s, way="second-drops", dropout=0.5) for s in ("linear", "conv2d", "fused")),
    ),
)
def dropout_of_its_own(trial: Trial) -> None:
    """One adapter drops and the other does not: judge both in train mode, before and after the other."""
    p = trial.case.dropout
    first, second = (p, 0.0) if trial.case.way == "first-drops" else (0.0, p)
    model = trial.adapted(config=trial.config(lora_dropout=first))
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config(lora_dropout=second))
    _drops(trial, model, first, "the first, after a second is added")
    activate(trial, model, "second")
    trial.randomize(model, seed=1)
    _drops(trial, model, second, "the second")
    activate(trial, model, "default")
    _drops(trial, model, first, "the first, activated again")


def _drops(trial: Trial, model: nn.Module, p: float, which: str) -> None:
    """Without dropout two calls in train mode agree; with it, on many inputs, they cannot."""
    x = trial.inputs()
    model.train()
    one, other = trial.call(model, x), trial.call(model, x)
    trial.unmerged(model)
    if one.equal(other) is bool(p):
        fail(
            "state",
            expected=f"{which} to drop by its own lora_dropout, {p:g}",
            actual=f"two calls in train mode {'agree, bit for bit' if p else 'differ'}",
        )


@spec(
    "several/add-keeps-the-mode",
    claim="Adding and activating an adapter SHOULD leave every module in its mode, and the new adapter "
    "SHOULD drop in train mode alone.",
    why="A server that adds an adapter to a model in eval mode answers at random until somebody calls "
    "`eval()` once more.",
    source=("BUGS 119", "https://github.com/huggingface/peft/issues/3753"),
    needs=("several/dropout-of-its-own",),
    features=("multi_adapter", "dropout"),
    cases=(Case(way="eval", dropout=0.5), Case(way="train", dropout=0.5)),
)
def add_keeps_the_mode(trial: Trial) -> None:
    """Judge the modes of what was there, and whether two calls with the second adapter agree."""
    x, trains = trial.inputs(), trial.case.way == "train"
    if not trains and getattr(trial.adapter, "eval_merges", False):
        trial.notes.append("vacuous: in eval mode it is merged")
        return
    model = trial.adapted()
    model.train(trains)
    # Of what comes with the new adapter its outputs tell: a module that holds factors has no mode.
    there = list(model.named_modules())
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config())
    adapter.activate(model, "second")
    for name, module in there:
        if module.training is not trains:
            fail(
                "state",
                expected=f"{name or 'the model'} in {trial.case.way} mode, as before",
                actual=f"in {'train' if module.training else 'eval'} mode",
            )
    trial.randomize(model, seed=1)
    one, other = trial.call(model, x), trial.call(model, x)
    if one.equal(other) is trains:
        fail(
            "state",
            expected=f"a second adapter, added in {trial.case.way} mode, "
            f"{'to drop' if trains else 'not to drop'}",
            actual=f"two calls {'agree, bit for bit' if trains else 'differ'}",
        )


@spec(
    "several/added-names-are-loud",
    claim="A target name of an added adapter that matches no module SHOULD raise or warn, also where others "
    "match; and an adapter that is refused SHOULD leave nothing of its name.",
    why="A second adapter that adapts a fraction of what it says is trained and served as the whole.",
    source=(
        "BUGS 77, 86",
        "https://github.com/huggingface/peft/issues/3693",
        "https://github.com/huggingface/peft/issues/798",
    ),
    needs=("several/other-settings", "targeting/unmatched-name-is-loud"),
    features=("multi_adapter",),
    cases=(
        Case(specimen="stack", way="none-matches"),
        Case(specimen="stack", way="one-of-two"),
        Case(way="refused"),
    ),
)
def added_names_are_loud(trial: Trial) -> None:
    """Judge what is heard when a name of the second adapter means nothing."""
    # Names of their own: who warns once of each has said it of those that other specs ask for.
    if trial.case.way == "refused":
        _refused_add(trial)
        return
    names = ("unknown_proj",) if trial.case.way == "none-matches" else ("foo", "wanting_proj")
    model = trial.adapted()
    adapter: Any = trial.adapter

    trial.loud(
        lambda: adapter.add(model, "second", trial.config(target_modules=names)),
        expected=f"an error or a warning, as not all of {', '.join(names)} are in the model",
        usual=lambda: adapter.add(trial.adapted(), "second", trial.config()),
    )


def _refused_add(trial: Trial) -> None:
    """An adapter whose targets are not there is not added, and its name means nothing."""
    x, model = trial.inputs(), trial.adapted()
    adapter: Any = trial.adapter
    before = trial.call(model, x)
    try:
        adapter.add(model, "second", trial.config(target_modules=("absent_proj",)))
    except Exception:  # noqa: BLE001  # any exception is loud
        trial.unmerged(model)
        trial.same_bits(trial.call(model, x), before, "outputs after an add that was refused")
    else:
        trial.notes.append("vacuous: an adapter whose targets are not there is added")
        return
    try:
        adapter.activate(model, "second")
    except Exception:  # noqa: BLE001  # any exception is loud
        return
    fail(
        "silent",
        expected="activating an adapter that was refused to raise",
        actual="nothing was raised",
    )


@spec(
    "several/saves-one-adapter",
    claim="While a second adapter acts, `save` MUST write one adapter whole, its values with its own "
    "settings.",
    why="Values of one under the alpha of another load without a word, as an adapter that nobody trained.",
    source=(DESIGN, "DESIGN.md, save: factors, scaling and settings restored"),
    needs=("several/other-settings", "checkpoint/save-restores-settings"),
    features=("multi_adapter", "save"),
    cases=(
        Case(),
        Case(way="rank"),
        Case(way="rslora"),
        Case(specimen="headless", way="targets"),
        Case(way="first-drops", dropout=0.5),
        Case(way="second-drops", dropout=0.5),
    ),
)
def saves_one_adapter(trial: Trial) -> None:
    """Load what was saved into a bare base: it is one of the two adapters, in all it does."""
    asks = {"rslora": "rslora", "first-drops": "dropout", "second-drops": "dropout"}
    feature = asks.get(trial.case.way, "save")
    if not trial.claims(feature):
        trial.notes.append(f"{feature} is not claimed")
    elif feature == "dropout":
        _saves_its_dropout(trial)
    else:
        _saves_its_outputs(trial)


def _saves_its_outputs(trial: Trial) -> None:
    x, folder = trial.inputs(), trial.folder()
    model = trial.adapted()
    first = trial.call(model, x)
    adapter: Any = trial.adapter
    others: dict[str, dict[str, Any]] = {
        "": {"lora_alpha": 3 * trial.case.alpha},
        "rank": {"lora_alpha": 3 * trial.case.alpha, "r": trial.case.r + 2},
        "rslora": {"use_rslora": True},
        "targets": {"target_modules": ("embed_out",)},
    }
    adapter.add(model, "second", trial.config(**others[trial.case.way]))
    activate(trial, model, "second")
    trial.randomize(model, seed=1)
    second = trial.call(model, x)
    adapter.save(model, folder)
    loaded = adapter.load(trial.base(), folder)
    trial.unmerged(loaded)
    found = trial.call(loaded, x)
    if found.equal(first):  # that the one which acts is meant is said of state_dict, not of save
        trial.notes.append(FIRST)
        return

    trial.same_bits(found, second, "outputs of the adapter that acted, saved and loaded")


def _saves_its_dropout(trial: Trial) -> None:
    """One adapter drops and the other does not: what is loaded does as the one whose values it has."""
    from harness import descent

    folder, p = trial.folder(), trial.case.dropout
    first, second = (p, 0.0) if trial.case.way == "first-drops" else (0.0, p)
    model = trial.adapted(config=trial.config(lora_dropout=first))
    values = trial.snapshot(model)
    adapter: Any = trial.adapter
    adapter.add(model, "second", trial.config(lora_dropout=second))
    activate(trial, model, "second")
    trial.randomize(model, seed=1)
    adapter.save(model, folder)
    loaded = adapter.load(trial.base(), folder, trainable=True)
    found = descent.pairs(trial.snapshot(loaded), values)
    is_first = all(one.equal(other) for _, (one, other) in found)
    if is_first:
        trial.notes.append(FIRST)

    _drops(trial, loaded, first if is_first else second, "the adapter that was saved, once loaded,")
