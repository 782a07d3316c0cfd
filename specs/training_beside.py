"""What trains beside the factors: the base's biases, and modules that are trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.failure import fail
from harness.spec import spec
from harness.specs.training_updates import RATE, step

if TYPE_CHECKING:
    from torch import Tensor

    from harness.oracle import Snapshot
    from harness.trial import Trial


@spec(
    "training/update-beside-factors",
    claim="One SGD step MUST change the biases that `bias` asks for, and the modules to save, as the "
    "gradient says.",
    why="A backward pass written by hand, or a loss that reads a head past its graph, gives them none: "
    "they are trainable, and saved, and stay what they were.",
    source=(
        "BUGS 43, 109",
        "https://github.com/huggingface/trl/issues/5977",
        "https://github.com/microsoft/LoRA/pull/183",
    ),
    needs=(
        "training/update-equivalence",
        "trainable/bias-modes",
        "trainable/beside-factors",
        "forward/sees-factors-now",
    ),
    cases=(
        *(Case(specimen=s, way="lora_only") for s in ("linear", "fused", "conv2d")),
        Case(specimen="headless", way="all"),
        Case(specimen="headless", way="modules_to_save"),
    ),
    more_cases=(Case(specimen="tiny", way="modules_to_save"),),
)
def update_beside_factors(trial: Trial) -> None:
    """Judge outputs after a step, which tell of a tensor wherever it is kept."""
    import torch

    from harness import storage, tolerance

    way = trial.case.way
    if not trial.claims(way):
        trial.notes.append(f"{way} is not claimed")
        return
    given, other = trial.inputs(), trial.inputs(1)
    settings, names = _asked(trial)
    model = trial.adapted(config=trial.config(**settings))
    ours = storage.elements(storage.handles(trial.factors(model)))
    if all(storage.covered(p, ours) for p in model.parameters() if p.requires_grad):
        trial.notes.append(f"nothing but factors trains under {way}, as trainable/ tells")
        return
    before = trial.snapshot(model)
    step(model, given, "")
    trial.unmerged(model)

    coarse = max(trial.dtype, trial.factor_dtype, key=tolerance.unit_roundoff)
    truth = _stepped(trial, before, names, torch.float64)
    budget = tolerance.model(_stepped(trial, before, names, coarse).double() - truth, truth, coarse)
    found = trial.call(model, other)
    stayed = trial.truth(trial.base(), trial.snapshot(model), other)
    if tolerance.margin(stayed, truth, budget)[0].used <= 2:
        trial.notes.append(f"vacuous at {trial.case}: a step is lost in the factors' rounding")
        return
    if tolerance.margin(found, stayed, budget)[0].used <= 1:
        fail(
            "no-effect",
            expected=f"a step to change {', '.join(names)}",
            actual="outputs as if they had stayed what they were",
            where=names[0],
        )
    trial.close(found, truth, budget, f"outputs after a step that changes {', '.join(names)}, too")


def _asked(trial: Trial) -> tuple[dict[str, Any], list[str]]:
    """The settings of the case, and the parameters of the base that train under them."""
    from harness import specimen

    way = trial.case.way
    base = specimen.pristine(trial.case)
    if way == "modules_to_save":
        saved = "my_lm_head" if trial.case.specimen == "headless" else "lm_head"
        inside = base.get_submodule(saved)
        return {way: (saved,)}, [f"{saved}.{name}" for name, _ in inside.named_parameters()]
    config = trial.config(bias=way)
    adapted = config.targets(base)
    biases = [name for name, _ in base.named_parameters() if name.endswith("bias")]
    return {"bias": way}, [
        name for name in biases if way == "all" or name.removesuffix(".bias") in adapted
    ]


def _stepped(trial: Trial, factors: Snapshot, names: list[str], dtype: Any) -> Tensor:
    """Outputs of the equation on other inputs, after a step of the factors and of `names`."""
    import torch

    from harness import memo, specimen
    from harness.descent import Equation

    base, given, other = specimen.pristine(trial.case), trial.inputs(), trial.inputs(1)

    def stepped() -> Tensor:
        equation = Equation(base, factors, dtype, besides=names)
        equation.descend(given, lr=RATE)
        with torch.no_grad():
            return equation(other)

    kind = ("beside", trial.case.specimen, *names)
    return memo.kept(stepped, *kind, base, factors, given, other, dtype)
