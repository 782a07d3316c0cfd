"""That a model is let go of when its user does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.case import Case
from harness.failure import fail
from harness.spec import spec

if TYPE_CHECKING:
    from harness.trial import Trial


@spec(
    "state/freed",
    claim="An adapted model that nobody holds any more SHOULD be freed.",
    why="A cache or a list that holds models keeps every base there ever was: the second one of a "
    "sweep or a notebook does not fit any more.",
    source=(
        "BUGS 64",
        "https://github.com/meta-pytorch/torchtune/pull/907",
    ),
    needs=("forward/equals-oracle", "checkpoint/complete", "initialization/factors-not-shared"),
    cases=(Case(),),
)
def freed(trial: Trial) -> None:
    """Use a model once, let go of it, and ask for its modules and parameters."""
    import gc
    import weakref

    from harness import specimen

    model = trial.adapted()
    specimen.loss(model, trial.inputs()).backward()  # type: ignore[no-untyped-call]
    trial.adapter.state_dict(model)
    things: dict[str, weakref.ref[object]] = {"the model": weakref.ref(model)}
    things |= {name: weakref.ref(p) for name, p in model.named_parameters()}
    del model
    for generation in (0, 1, 2):  # a collection of all there is takes long
        if any(held() is not None for held in things.values()):
            gc.collect(generation)
    left = [name for name, held in things.items() if held() is not None]
    if left:
        fail(
            "state",
            expected="nothing of the model once nobody holds it",
            actual=f"{len(left)} of {len(things)} are held, {', '.join(left[:3])}",
            where=left[0],
        )
