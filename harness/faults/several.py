"""Adapters that mix up or leak when there is more than one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from harness.adapter import load_exactly
from harness.adapters import settings
from harness.adapters.equation import dropout_of
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.targeting import those_there
from harness.faults.wrong import layer, wrong

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from harness.adapter import Adapter

SETTINGS = "several/other-settings"
ISOLATION = "several/isolation"


def added_by(**seams: Any) -> Adapter:
    """A reference whose adapters after the first are added by one with these members."""
    adder = wrong(**seams)
    adapter: Adapter = wrong(add=lambda _, *args, **settings: adder.add(*args, **settings))
    return adapter


def adding(act: Callable[[Any, nn.Module, str], object]) -> Adapter:
    """A reference that does `act(adapter, model, name)` once an adapter is added."""

    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        act(self, model, name)

    return wrong(add=add)


@fault(
    sin="Activating writes the name down, and the layers go on with the old one.",
    killed_by="several/switch",
    replays=("97",),
    varies="a second adapter",
)
def activates_in_name_only() -> Adapter:
    def activate(self: Any, model: nn.Module, name: str) -> None:
        self.require_adapter(model, name)
        self.set_trainability(model)

    return wrong(activate=activate)


@fault(
    sin="Adding an adapter leaves the first acting, whichever did.",
    killed_by="several/switch",
    varies="adding while a second adapter acts",
)
def adding_activates_the_first() -> Adapter:
    def first(self: Any, model: nn.Module, name: str) -> None:  # noqa: ARG001
        for wrapper in self.wrappers(model):
            wrapper.active = "default"

    return adding(first)


@fault(
    sin="A second adapter does not find the modules that the first has wrapped.",
    killed_by=SETTINGS,
    replays=("85",),
    varies="targets in common",
)
def second_adapter_misses_what_is_wrapped() -> Adapter:
    def targets(self: Any, model: Any, config: Any) -> dict[str, nn.Module]:
        first = self.state(model).configs.get("default")
        taken = first.targets(model) if first and first.r != config.r else {}
        found: dict[str, nn.Module] = config.targets(model)
        return {path: module for path, module in found.items() if path not in taken}

    return added_by(targets=targets)


@fault(
    sin="A second adapter's names match anywhere in a path, inside the first's layers too.",
    killed_by=SETTINGS,
    replays=("81",),
    varies="names that contain each other, in the second adapter",
)
def second_adapter_matches_by_substring() -> Adapter:
    def targets(self: Any, model: Any, config: Any) -> dict[str, nn.Module]:
        if isinstance(config.target_modules, str):
            return config.targets(model)  # type: ignore[no-any-return]
        adaptable: tuple[type[nn.Module], ...] = tuple(self.branches)
        return {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, adaptable) and any(name in path for name in config.target_modules)
        }

    return added_by(targets=targets)


@fault(
    sin="A second adapter's rank and alpha are ignored: it is made with the first's.",
    killed_by=SETTINGS,
    replays=("104",),
    varies="another rank and alpha",
)
def second_adapter_takes_the_first_settings() -> Adapter:
    def attach(self: Any, model: Any, name: str, config: Any, *, trainable: bool) -> None:
        first = self.state(model).configs["default"]
        own = dataclasses.replace(config, r=first.r, lora_alpha=first.lora_alpha)
        Reference.attach(self, model, name, own, trainable=trainable)
        self.state(model).configs[name] = config

    return added_by(attach=attach)


@fault(
    sin="A second adapter's use_rslora is ignored: it is scaled by alpha/r.",
    killed_by=SETTINGS,
    varies="rsLoRA in the second adapter",
)
def second_adapter_ignores_rslora() -> Adapter:
    def make_branches(self: Any, path: str, base: Any, adapter: str, config: Any) -> Any:
        own = dataclasses.replace(config, use_rslora=False)
        return Reference.make_branches(self, path, base, adapter, own)

    return added_by(make_branches=make_branches)


@fault(
    sin="A second adapter's names that match nothing are passed over without a word.",
    killed_by="several/added-names-are-loud",
    replays=("77",),
    varies="a misspelt target of the second adapter",
)
def second_adapter_passes_by_unmatched_names() -> Adapter:
    return added_by(unmatched=those_there)


@fault(
    sin="A second adapter that matches nothing at all is added without a word.",
    killed_by="several/added-names-are-loud",
    replays=("77",),
    varies="no target of the second adapter in the model",
)
def second_adapter_may_adapt_nothing() -> Adapter:
    def unmatched(self: Any, model: Any, config: Any, error: ValueError) -> dict[str, nn.Module]:
        if len(config.target_modules) > 1:
            return Reference.unmatched(self, model, config, error)  # some of them may be there
        return {}

    return added_by(unmatched=unmatched)


@fault(
    sin="Adding an adapter makes all others trainable, frozen or not.",
    killed_by=ISOLATION,
    replays=("89",),
    varies="a frozen adapter",
)
def adding_frees_every_adapter() -> Adapter:
    def free(self: Any, model: nn.Module, name: str) -> None:
        trains = self.state(model).trainable
        trains.update({other: True for other in trains if other != name})

    return adding(free)


@fault(
    sin="Adding an adapter sets whatever is called LoRA free, until the next activation.",
    killed_by=ISOLATION,
    replays=("89",),
    varies="a frozen or inactive adapter beside the one that is added",
)
def adding_frees_all_until_activation() -> Adapter:
    def free(self: Any, model: nn.Module, name: str) -> None:  # noqa: ARG001
        for adapted in self.layers(model).values():
            adapted.adapters.requires_grad_(True)

    return adding(free)


@fault(
    sin="Loading writes the checkpoint into every adapter.",
    killed_by=ISOLATION,
    varies="loading with several adapters",
)
def loads_into_every_adapter() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        active = self.state(model).active
        for name in self.state(model).configs:
            self.activate(model, name)
            Reference.load_state_dict(self, model, state)
        self.activate(model, active)

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="The checkpoint is always that of the first adapter.",
    killed_by=ISOLATION,
    varies="another active adapter",
)
def saves_and_loads_the_first() -> Adapter:
    def first(self: Any, model: nn.Module, act: Any) -> Any:
        active = self.state(model).active
        self.activate(model, "default")
        try:
            return act()
        finally:
            self.activate(model, active)

    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        state: dict[str, Tensor] = first(self, model, lambda: Reference.state_dict(self, model))
        return state

    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        first(self, model, lambda: load_exactly(Reference.state_dict(self, model), state))

    return wrong(state_dict=state_dict, load_state_dict=load_state_dict)


@fault(
    sin="The checkpoint of one adapter holds the factors of every other, and loading writes them.",
    killed_by=ISOLATION,
    varies="another adapter that was trained between saving and loading",
)
def checkpoint_holds_every_adapter() -> Adapter:
    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        others = {
            f"{path}.{key}": tensor.detach()
            for path, adapted in self.layers(model).items()
            for key, tensor in adapted.adapters.named_parameters()
            if not key.startswith(f"{adapted.active}.")
        }
        return Reference.state_dict(self, model) | others

    def save(self: Any, model: nn.Module, directory: Path) -> None:
        settings.write(directory, self.config(model), Reference.state_dict(self, model))

    return wrong(state_dict=state_dict, save=save)


@fault(
    sin="Inactive adapters get gradients of zero, so that weight decay shrinks them.",
    killed_by=ISOLATION,
    replays=("P-5",),
    varies="AdamW with weight decay",
)
def inactive_adapters_decay() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = Adapted.forward(self, x)
        for name in self.adapters if self.training else ():
            if name != self.active:
                for parameter in self.adapters[name].parameters():
                    y = y + 0 * parameter.requires_grad_(True).sum()
        return y

    return wrong(layer=layer(forward=forward))


@fault(
    sin="An adapter that is added is trainable before it acts.",
    killed_by="several/only-the-active-trains",
    replays=("89",),
    varies="an adapter that is not activated",
)
def added_adapter_trains_at_once() -> Adapter:
    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        for adapted in self.layers(model).values():
            for branch in adapted.of(name):
                branch.requires_grad_(trainable)

    return wrong(add=add)


@fault(
    sin="A name that is not there is ignored.",
    killed_by="several/unknown-name-is-loud",
    replays=("123",),
    varies="a misspelt name",
)
def unknown_names_are_ignored() -> Adapter:
    def activate(self: Any, model: nn.Module, name: str) -> None:
        if name in self.state(model).configs or name == "second":
            Reference.activate(self, model, name)

    return wrong(activate=activate)


@fault(
    sin="Adding an adapter gives its dropout to all others.",
    killed_by="several/dropout-of-its-own",
    varies="a second adapter with another dropout",
)
def adding_gives_all_its_dropout() -> Adapter:
    def give(self: Any, model: nn.Module, name: str) -> None:
        p = self.state(model).configs[name].lora_dropout
        for adapted in self.layers(model).values():
            for branches in adapted.adapters.values():
                for branch in branches:
                    branch.dropout = dropout_of(p)

    return adding(give)


@fault(
    sin="A second adapter's dropout starts in train mode, whatever mode the model is in.",
    killed_by="several/add-keeps-the-mode",
    replays=("119",),
    varies="adding to a model in eval mode",
)
def added_dropout_acts_in_eval() -> Adapter:
    def start(self: Any, model: nn.Module, name: str) -> None:
        for adapted in self.layers(model).values():
            for branch in adapted.of(name):
                branch.train()

    return adding(start)


@fault(
    sin="Adding an adapter puts the model into eval mode.",
    killed_by="several/add-keeps-the-mode",
    varies="adding to a model in train mode",
)
def adding_ends_train_mode() -> Adapter:
    return adding(lambda self, model, name: model.eval())  # noqa: ARG005
