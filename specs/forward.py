"""What an adapted model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.spec import spec

if TYPE_CHECKING:
    from harness.trial import Trial

PAPER = "LoRA, section 4.1, https://arxiv.org/abs/2106.09685"


@spec(
    "forward/equals-oracle",
    claim="The output of an adapted layer MUST equal x·(W + scaling·B·A)ᵀ + bias within rounding.",
    why="Everything else rests on it: a wrong branch trains, saves and merges the wrong thing.",
    source=(PAPER, "BUGS 6, 8, 20, 26"),
    tier="smoke",
    cases=(
        Case(),
        Case(specimen="bare", r=13),
        Case(dtype="bfloat16"),
        Case(dtype="float16"),
        Case(dtype="float64"),
    ),
)
def equals_oracle(trial: Trial) -> None:
    """Judge one layer with random factors on random inputs."""
    base, x = trial.base(), trial.inputs()
    model = trial.adapted()
    factors = trial.snapshot(model)
    truth, budget = trial.truth(base, factors, x), trial.budget(base, factors, x)

    trial.close(trial.call(model, x), truth, budget, "output")
