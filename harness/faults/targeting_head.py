"""Adapters to which "all-linear" means other layers than every one but the output head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from harness.adapter import LoraConfig, matches
from harness.faults.record import fault
from harness.faults.wrong import wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.adapter import Adapter

HEAD = "targeting/all-linear-leaves-the-head"


def _all_linear(keep: Callable[[list[tuple[str, nn.Module]], nn.Module], Any]) -> Adapter:
    """A reference to which "all-linear" means what `keep(linears, model)` leaves."""

    def all_linear(self: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:  # noqa: ARG001
        linears: list[tuple[str, nn.Module]] = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        return dict(keep(linears, model))

    adapter: Adapter = wrong(all_linear=all_linear)
    return adapter


@fault(
    sin='"all-linear" takes the output head too.',
    killed_by=HEAD,
    replays=("80",),
    varies='"all-linear"',
)
def adapts_the_head_too() -> Adapter:
    """Every nn.Linear, without exception."""
    return _all_linear(lambda linears, _: linears)


@fault(
    sin='"all-linear" leaves out what has "head" in its name.',
    killed_by=HEAD,
    varies="a layer that is called like a head",
)
def takes_a_name_for_a_head() -> Adapter:
    """A projection between heads is none."""
    return _all_linear(lambda linears, _: [(n, m) for n, m in linears if "head" not in n])


@fault(
    sin='"all-linear" leaves out `lm_head` alone, whatever `get_output_embeddings()` returns.',
    killed_by=HEAD,
    varies="a head of another name",
)
def knows_the_head_by_its_name_alone() -> Adapter:
    """Right for most models."""
    return _all_linear(lambda linears, _: [(n, m) for n, m in linears if not matches(n, "lm_head")])


@fault(
    sin='"all-linear" takes the last nn.Linear for the output head.',
    killed_by=HEAD,
    replays=("80",),
    varies="a model without a head",
)
def takes_the_last_layer_for_a_head() -> Adapter:
    """In a model without one, a layer learns nothing."""

    def keep(linears: list[tuple[str, nn.Module]], model: Any) -> Any:
        get = getattr(model, "get_output_embeddings", None)
        head = get() if get else linears[-1][1]
        return [(name, module) for name, module in linears if module is not head]

    return _all_linear(keep)


@fault(
    sin='"all-linear" passes over subclasses of nn.Linear.',
    killed_by=HEAD,
    varies="a layer that is a subclass",
)
def passes_over_subclasses() -> Adapter:
    """By exact type."""
    return _all_linear(
        lambda linears, _: [
            (n, m) for n, m in linears if type(m) is nn.Linear and not n.endswith("lm_head")
        ]
    )
