"""Two models in one process: what is done to one is nothing to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.spec import spec

if TYPE_CHECKING:
    from torch import nn

    from harness.trial import Trial


@spec(
    "state/two-models",
    claim="Injecting, merging, disabling and loading one model MUST leave another model in the process as "
    "it was, and act on each by its own settings.",
    why="A server and a comparison of two runs hold several models; what an implementation keeps in a "
    "class or a cache is then the last one's.",
    source=("BUGS 64", "https://github.com/pytorch/torchtune/issues/907"),
    needs=("forward/sees-factors-now", "forward/scaling", "merge/only-targets-change"),
    cases=(Case(), Case(specimen="stack")),
)
def two_models(trial: Trial) -> None:
    """Judge the first against its own outputs, and the second, of another rank and alpha, by the truth."""
    x, adapter = trial.inputs(), trial.adapter
    first = trial.adapted()
    want = trial.call(first, x)
    other = trial.config(r=trial.case.r + 2, lora_alpha=3 * trial.case.alpha)
    second = trial.adapted(config=other)
    trial.same_bits(trial.call(first, x), want, "outputs of the first once the second is injected")
    _acts(trial, second, "the second")
    adapter.load_state_dict(second, dict(adapter.state_dict(trial.adapted(config=other))))
    trial.same_bits(trial.call(first, x), want, "outputs of the first once the second is loaded")
    if trial.claims("disable"):
        more: Any = adapter
        with more.disable(second):
            trial.same_bits(trial.call(first, x), want, "outputs of the first, the second disabled")
    if trial.claims("merge"):
        merging: Any = adapter
        merging.merge(second)
        trial.same_bits(trial.call(first, x), want, "outputs of the first, the second merged")
        merging.merge(first)
        _acts(trial, first, "the first, merged after the second", merged=True)


def _acts(trial: Trial, model: nn.Module, which: str, *, merged: bool = False) -> None:
    """A model's outputs are those of its factors; while merged, of those that it was merged with."""
    base, x = trial.base(), trial.inputs()
    factors = trial.snapshot(model) if not merged else trial.snapshot(trial.adapted())
    budget = trial.budget(base, factors, x)
    trial.close(trial.call(model, x), trial.truth(base, factors, x), budget, f"output of {which}")
