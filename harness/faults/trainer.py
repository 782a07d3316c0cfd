"""Adapters that train rightly by hand, and wrongly under a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import after_injection, findable, wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from harness.adapter import Adapter
    from harness.adapters.reference import Reference


def with_forward(wrap: Callable[[Any, Any, Any], Any]) -> Reference:
    """A reference whose adapted Phi-3 is called through `wrap(adapter, model, forward)`."""

    def act(adapter: Any, model: Any) -> None:
        if hasattr(model, "config"):
            model.forward = wrap(adapter, model, model.forward)

    return after_injection(act)


@fault(
    sin="The model takes the number of labels in the whole batch, and drops it.",
    killed_by="training/trainer-update",
    replays=("114",),
    varies="accumulation by the Trainer",
)
def drops_the_number_of_labels() -> Adapter:
    def wrap(adapter: Any, model: Any, forward: Any) -> Any:  # noqa: ARG001
        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("num_items_in_batch", None)
            return forward(*args, **kwargs)

        return called

    return with_forward(wrap)


@fault(
    sin="The model says that it takes no number of labels: updates are means of means.",
    killed_by="training/trainer-update",
    replays=("116",),
    varies="uneven label counts",
)
def takes_no_number_of_labels() -> Adapter:
    def act(adapter: Any, model: Any) -> None:  # noqa: ARG001
        if hasattr(model, "config"):
            model.accepts_loss_kwargs = False

    return after_injection(act)


@fault(
    sin="Factors lie in a module called after a norm's bias, which the Trainer does not decay.",
    killed_by="training/trainer-decays-every-factor",
    replays=("111",),
    varies="the Trainer's own optimizer",
)
def factors_are_named_after_a_bias() -> Adapter:
    class Renamed(Adapted):
        def __init__(self, base: nn.Module) -> None:
            super().__init__(base)
            self.lora_bias_norm = self._modules.pop("adapters")

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__("lora_bias_norm" if name == "adapters" else name)

    return wrong(layer=findable(Renamed))


@fault(
    sin="Under checkpoints and with a mask, as trainers call it, the body's output has no graph.",
    killed_by="training/sft-trainer-checkpointing",
    replays=("102",),
    varies="SFTTrainer with gradient checkpointing",
)
def masked_checkpoints_lose_the_graph() -> Adapter:
    def act(adapter: Any, model: Any) -> None:  # noqa: ARG001
        if not hasattr(model, "config"):
            return
        forward = model.model.forward

        def called(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if model.is_gradient_checkpointing and kwargs.get("attention_mask") is not None:
                out.last_hidden_state = out.last_hidden_state.detach()
            return out

        model.model.forward = called

    return after_injection(act)
