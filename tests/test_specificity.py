"""The judge is silent on what is right, at points that nobody chose."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from harness import known, registry, worker
from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.case import LAYER_OF, Case
from harness.failure import Broken
from harness.faults.wrong import wrong
from harness.spec import catalogue

if TYPE_CHECKING:
    from harness.adapter import Adapter, Factors, LoraConfig

sys.path.append(str(Path(__file__).parent / "implementations"))
CORRECT = (
    "reference",
    "peft",
    "loralib",
    "transformers",
    "parametrised:adapter",
    "transposed:adapter",
    "hooked:adapter",
)
JUDGED = (
    "trainable/only-lora",
    "initialization/no-op",
    "initialization/base-untouched",
    "forward/equals-oracle",
    "forward/gradients",
    "forward/rslora",
    "merge/same-output",
    "merge/weight-equals-oracle",
    "merge/restores-base",
    "checkpoint/round-trip-bits",
)
"""Cheap ones, which hold at every point."""

LAYERS = ("linear", "bare", "linear", "bare", "embedding", "conv2d", "grouped", "fused")
HALF = ("bfloat16", "float16")


def configurations(number: int, seed: int) -> list[Case]:
    """Points drawn over layers, sizes, ranks, alphas, dropouts, dtypes and seeds."""
    g = random.Random(seed)
    drawn = []
    for _ in range(number):
        specimen = g.choice(LAYERS)
        wide = specimen in {"linear", "bare", "embedding"}
        drawn.append(
            Case(
                specimen=specimen,
                shape=(g.randint(2, 40), g.randint(1, 40)) if wide else (),
                dtype=g.choice(("float32", "float64", *HALF)),
                r=g.randint(1, 24),
                alpha=g.choice((0.5, 1.0, 3.0, 7.0, 16.0, 32.0, 64.0)),
                dropout=g.choice((0.0, 0.05, 0.5)),
                seed=g.randint(0, 10_000),
            )
        )
    return drawn


def failures(adapter: Adapter, cases: list[Case]) -> tuple[int, list[str]]:
    """How many judgements were made, and each that failed without being known."""
    claims = adapter.capabilities
    excused = known.built_in(adapter.name, adapter.version)
    judged, found = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the worker does: theirs are not what is judged
        for case in cases:
            layer = LAYER_OF.get(case.specimen, "linear")
            if layer not in claims.layers or case.dtype not in claims.dtypes:
                continue
            # Where eval mode merges, what is unmerged is in train mode, and drops out.
            still = "dropout" not in claims.features or getattr(adapter, "eval_merges", False)
            if case.dropout and (still or layer == "embedding"):
                case = case.with_(dropout=0.0)  # noqa: PLW2901
            for id_ in JUDGED:
                item = catalogue()[id_]
                if not set(item.features) <= claims.features:
                    continue
                judged += 1
                # Gradients under dropout have a spec of their own, which finds the mask.
                point = case.with_(dropout=0.0) if id_ == "forward/gradients" else case
                broken, _, _ = worker.judge(adapter, item, point)
                if isinstance(broken, Broken):
                    failure = broken.record(case=str(case), reproduce="")
                    if not any(entry.excuses(id_, case, failure) for entry in excused):
                        found.append(f"{adapter.name} {id_} --case '{case}': {broken}")
    return judged, found


@pytest.mark.parametrize("name", CORRECT)
def test_no_random_configuration_of_a_correct_implementation_fails(name: str) -> None:
    """Twenty points, other than those the specs are written for."""
    judged, found = failures(registry.resolve(name), configurations(20, seed=0))

    assert judged > 20
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_two_hundred_random_configurations_do_not_fail(seed: int) -> None:
    """Two hundred points, five times over, on all of the correct implementations."""
    cases = configurations(200, seed=1_000 + seed)

    assert [f for name in CORRECT for f in failures(registry.resolve(name), cases)[1]] == []


class Wrapper(nn.Module):
    """Called like the base; its `config` is LoRA's, which is frozen, and the Trainer writes to it."""

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        self.base, self.config = base, config

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.base(*args, **more)


class Wrapping(Reference):
    """The reference in a wrapper."""

    def inject(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        return Wrapper(super().inject(model, config), config)

    def factors(self, model: Any) -> dict[str, list[Factors]]:
        return super().factors(model.base)


class DropsTokens(Branch):
    """Dropout takes all inputs of a token, or none."""

    def mask(self, x: Tensor, p: float) -> Tensor:
        kept = torch.rand(*x.shape[:-1], 1) >= p if self.training else torch.ones(())
        return x * kept / (1 - p if self.training else 1)


class Answering(Adapted):
    """The branch is cast to its input's dtype, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y.to(x.dtype) if x.is_floating_point() else y

    def merge_weight(self, weight: Tensor, *args: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("merging under autocast")
        return super().merge_weight(weight, *args)


@pytest.mark.parametrize(
    ("spec", "case", "made"),
    [
        ("training/trainer-update", Case(specimen="tiny"), Wrapping),
        (
            "forward/dropout-on-in-train",
            Case(shape=(16, 20), r=16, dropout=0.3),
            lambda: wrong(branches={nn.Linear: DropsTokens}),
        ),
        ("forward/autocast", Case(), lambda: wrong(layer=Answering)),
        (
            "merge/weight-equals-oracle",
            Case(specimen="bare", way="autocast"),
            lambda: wrong(layer=Answering),
        ),
    ],
)
def test_what_the_contract_leaves_free_does_not_fail(spec: str, case: Case, made: Any) -> None:
    """Each is as right as the reference, and does otherwise what DESIGN says nothing of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own
        broken, _, _ = worker.judge(made(), catalogue()[spec], case)

    assert broken is None
