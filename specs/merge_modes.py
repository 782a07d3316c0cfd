"""What a merged model is beside its outputs: as frozen as it was, the same in train mode, fit to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import one_layer
from harness.case import Case
from harness.failure import Broken, fail
from harness.spec import spec
from harness.specs.forward_training import gradients_of

if TYPE_CHECKING:
    from torch import nn

    from harness.trial import Trial


@spec(
    "merge/base-stays-frozen",
    # The contract says what trains after injection, and of merging nothing.
    claim="Nothing of the base SHOULD train after merging that did not before.",
    why="Who merges to evaluate and goes on, or hands the merged model to a trainer, trains and keeps "
    "gradients of the whole base.",
    source=(
        "DESIGN: trainable are exactly the factors",
        "https://github.com/THUDM/SwissArmyTransformer/blob/main/sat/model/finetune/lora2.py",
        "https://github.com/cloneofsimo/lora/blob/master/lora_diffusion/lora.py",
    ),
    features=("merge",),
    needs=("merge/same-output", "trainable/only-lora"),
    cases=tuple(Case(specimen=s, r=1) for s in ("linear", "embedding", "conv2d", "fused")),
)
def base_stays_frozen(trial: Trial) -> None:
    """Judge at a rank at which a layer's weight has more elements than its factors, by their number.

    The merged weight may be another tensor under another name, and the factors may be gone.
    """
    from harness import storage

    model = trial.adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    before, ours = sum(p.numel() for p in trained), storage.elements(trained)
    trial.adapter.merge(model)  # type: ignore[attr-defined]  # the feature brings it

    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    freed = [name for name, p in now.items() if storage.covered(p, ours) != p.numel()]
    after = sum(p.numel() for p in now.values())
    if freed and after > before:
        fail(
            "state",
            expected=f"at most the {before} elements that trained before merging",
            actual=f"{after} train, those of {', '.join(freed[:3])} among them",
            where=freed[0],
        )


@spec(
    "merge/train-mode",
    claim="A merged model MUST give the same outputs once it is put in train mode: what is merged is "
    "added once, and dropout acts on the branch alone.",
    why="A merged model that is trained further would drop inputs of the pretrained weights, or add "
    "its update twice, in train mode only: no evaluation shows it.",
    source=(
        "DESIGN: lora_dropout on the branch alone, in train mode",
        "BUGS P-11",
    ),
    features=("merge",),
    needs=("merge/same-output", "forward/dropout-on-in-train"),
    cases=(
        *(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
        Case(dropout=0.5),
        Case(specimen="conv2d", dropout=0.5),
        Case(specimen="fused", dropout=0.5),
    ),
)
def train_mode(trial: Trial) -> None:
    """Judge the outputs in train mode: of factors that matter, and of dropout with a ΔW of zero.

    Then the answer is the same where `train()` takes the update out again, as loralib's does.
    """
    drops = bool(trial.case.dropout)
    if drops and not trial.claims("dropout"):
        trial.notes.append("dropout is not claimed")
        return
    base, given = trial.base(), trial.inputs()
    model: nn.Module = trial.inject() if drops else trial.adapted()
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)
    adapter: Any = trial.adapter
    adapter.merge(model)
    model.train()

    trial.close(trial.call(model, given), truth, budget, "merged output, in train mode")


@spec(
    "merge/gradients-after-a-cycle",
    claim="Merged and unmerged again, a model MUST give the gradients of the equation.",
    why="Merging to evaluate, in the middle of a run, is what unmerging is for: what trains on from there "
    "must be what was trained, and no output tells.",
    source=("DESIGN: unmerge takes it out again", "BUGS 41, P20"),
    features=("merge", "unmerge"),
    needs=("merge/restores-base", "forward/gradients"),
    cases=tuple(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
)
def gradients_after_a_cycle(trial: Trial) -> None:
    """Judge against float64."""
    model = trial.adapted()
    adapter: Any = trial.adapter
    adapter.merge(model)
    adapter.unmerge(model)
    trial.unmerged(model)
    gradients_of(trial, model)


@spec(
    "merge/any-strides",
    claim="A merge into a weight whose numbers do not lie in a row, as a convolution's in channels_last, MUST "
    "be what it is into one whose do, or raise.",
    why="`reshape` gives a copy of such a weight: what is added to that is lost, without a word.",
    source=(
        "DESIGN: merge folds ΔW into the base weights",
        "https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html",
    ),
    features=("merge",),
    needs=("merge/same-output", "merge/restores-base"),
    cases=tuple(Case(specimen=s) for s in ("linear", "embedding", "conv2d", "fused")),
)
def any_strides(trial: Trial) -> None:
    """Judge the merged outputs and, where it is claimed, the base's once it is unmerged."""
    base, given, used = trial.base(), trial.inputs(), trial.base()
    _turn(used.get_submodule("proj"))
    adapter: Any = trial.adapter
    try:
        model = trial.adapted(used)
        factors = trial.snapshot(model)
        adapter.merge(model)
    except Broken:
        raise
    except Exception as refusal:  # noqa: BLE001  # nothing is wrong in silence
        trial.notes.append(f"refused at {trial.case}: {type(refusal).__name__}")
        return
    truth, budget = trial.truth(base, factors, given), trial.budget(base, factors, given)

    trial.close(trial.call(model, given), truth, budget, "merged output")
    if trial.claims("unmerge"):
        one_layer.gives_back_the_base(trial, model, 2 * budget, "base's output, unmerged")


def _turn(layer: Any) -> None:
    """The layer's weight in other strides: channels_last, or column by column."""
    import torch

    W = layer.weight.detach()
    layer.weight.data = (
        W.to(memory_format=torch.channels_last)
        if W.dim() == 4
        else W.mT.contiguous().mT  # (o, i, kh, kw)
    )
