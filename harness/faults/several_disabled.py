"""Adapters whose base, or whose modules trained whole, are not what they should be."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.adapters.reference import Reference
from harness.adapters.wrapped import Whole
from harness.faults.record import fault
from harness.faults.wrong import named, wrong

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from harness.adapter import Adapter


@fault(
    sin="`disable` reaches the first layer alone.",
    killed_by="several/disabled-equals-base",
    varies="more than one layer",
)
def disables_the_first_layer_only() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        first = self.wrappers(model)[0]
        first.enabled = False
        try:
            yield
        finally:
            first.enabled = True

    return wrong(disable=disable)


@fault(
    sin="`disable` left by Ctrl-C stays disabled: only what is an Exception is caught.",
    killed_by="several/disabled-equals-base",
    varies="leaving by a KeyboardInterrupt",
)
def an_interrupt_leaves_it_disabled() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        before = [(wrapper, wrapper.enabled) for wrapper in self.wrappers(model)]
        for wrapper, _ in before:
            wrapper.enabled = False
        error = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # raised again below
            error = caught
        for wrapper, enabled in before:
            wrapper.enabled = enabled
        if error:
            raise error

    return wrong(disable=disable)


@fault(
    sin="After an adapter is activated inside `disable`, none acts on leaving.",
    killed_by="several/disabled-whatever-is-done",
    varies="the outputs after activating inside `disable`",
)
def activating_inside_disable_ends_all() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        before = self.state(model).active
        with Reference.disable(self, model):
            yield
        if self.state(model).active != before:
            for wrapper in self.wrappers(model):
                wrapper.enabled = False

    return wrong(disable=disable)


@fault(
    sin="On leaving `disable` the first adapter acts, whichever did before.",
    killed_by="several/disabled-keeps-the-active",
    varies="disabling while a second adapter acts",
)
def leaving_disable_activates_the_first() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        try:
            with Reference.disable(self, model):
                yield
        finally:
            if "second" in self.state(model).configs:
                self.activate(model, "default")

    return wrong(disable=disable)


@fault(
    sin="`disable` reaches the layers that were adapted first; those of a later adapter act on.",
    killed_by="several/disabled-keeps-the-active",
    varies="a second adapter of other targets",
)
def disable_leaves_later_layers_on() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        with Reference.disable(self, model):
            for adapted in self.layers(model).values():
                adapted.enabled = not adapted.of("default")
            yield

    return wrong(disable=disable)


@fault(
    sin="Leaving a `disable` switches the adapter on, whether it was on or not.",
    killed_by="several/disabled-nested",
    varies="a `disable` inside another",
)
def leaving_the_inner_disable_enables() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        try:
            with Reference.disable(self, model):
                yield
        finally:
            for wrapper in self.wrappers(model):
                wrapper.enabled = True

    return wrong(disable=disable)


@fault(
    sin="Leaving `disable` sets the gradients to None.",
    killed_by="several/disabled-in-training",
    varies="gradients that were there before",
)
def leaving_disable_drops_the_gradients() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        with Reference.disable(self, model):
            yield
        model.zero_grad()

    return wrong(disable=disable)


@fault(
    sin="`disable` freezes what trains, and on leaving frees the factors alone.",
    killed_by="several/disabled-in-training",
    varies="modules_to_save or biases that train",
)
def leaving_disable_frees_the_factors_alone() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        trained = [p for p in self.trained(model).values() if p.requires_grad]
        factors = {id(tensor) for tensor in self.factor_tensors(model).values()}
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with Reference.disable(self, model):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(id(parameter) in factors)

    return wrong(disable=disable)


@fault(
    sin="Inside `disable`, modules that were trained whole go on acting.",
    killed_by="several/disabled-leaves-saved-modules-out",
    replays=("95",),
    varies="modules_to_save",
)
def disable_leaves_saved_modules_on() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        with Reference.disable(self, model):
            for wrapper in self.wrappers(model):
                wrapper.enabled = isinstance(wrapper, Whole)
            yield

    return wrong(disable=disable)


@fault(
    sin="Activating an adapter without saved modules of its own raises.",
    killed_by="several/switch-saved-modules",
    replays=("96",),
    varies="modules_to_save of one adapter only",
)
def switching_needs_saved_modules() -> Adapter:
    def activate(self: Any, model: nn.Module, name: str) -> None:
        for wrapper in self.wrappers(model):
            if isinstance(wrapper, Whole):
                wrapper.adapters[name]  # raises KeyError
        Reference.activate(self, model, name)

    return wrong(activate=activate)


class DisablesSilently(Reference):
    """By a name of its own: a fresh process is asked, too."""

    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context = super().disable(model)
            context.__enter__()
        try:
            yield
        finally:
            context.__exit__(None, None, None)


@fault(
    sin="Inside `disable` trained biases act, and nothing is said.",
    killed_by="several/disabled-tells-of-biases",
    replays=("129",),
    varies="bias other than none",
)
def disable_keeps_biases_silently() -> Adapter:
    return DisablesSilently()


@fault(
    sin="Adapters with the same modules to save share one copy.",
    killed_by="several/saved-modules-of-their-own",
    varies="modules_to_save of two adapters",
)
def adapters_share_their_saved_modules() -> Adapter:
    def copy_for(self: Any, adapter: str) -> None:
        Whole.copy_for(self, adapter)
        self.adapters[adapter] = next(iter(self.adapters.values()))

    return wrong(whole=named(Whole, {"copy_for": copy_for}))
