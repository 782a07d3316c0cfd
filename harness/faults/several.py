"""Adapters that mix up, forget or leak when there is more than one, or none."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.adapter import load_exactly
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted, Whole
from harness.faults.record import fault
from harness.faults.wrong import layer, wrong

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from harness.adapter import Adapter

SETTINGS = "several/other-settings"
ISOLATION = "several/isolation"
COMBINATION = "several/combination"


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

    return wrong(targets=targets)


@fault(
    sin="A second adapter's names match anywhere in a path, inside the first's layers too.",
    killed_by=SETTINGS,
    replays=("81",),
    varies="names that contain each other, in the second adapter",
)
def second_adapter_matches_by_substring() -> Adapter:
    def targets(self: Any, model: Any, config: Any) -> dict[str, nn.Module]:
        if not self.state(model).configs or isinstance(config.target_modules, str):
            return config.targets(model)  # type: ignore[no-any-return]
        adaptable: tuple[type[nn.Module], ...] = tuple(self.branches)
        return {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, adaptable) and any(name in path for name in config.target_modules)
        }

    return wrong(targets=targets)


@fault(
    sin="A second adapter's rank and alpha are ignored: it is made with the first's.",
    killed_by=SETTINGS,
    replays=("104",),
    varies="another rank and alpha",
)
def second_adapter_takes_the_first_settings() -> Adapter:
    def make_branches(self: Any, path: str, base: Any, adapter: str, config: Any) -> Any:
        self.first = config if adapter == "default" else self.first
        return Reference.make_branches(self, path, base, adapter, self.first)

    return wrong(make_branches=make_branches)


@fault(
    sin="Adding an adapter makes all others trainable, frozen or not.",
    killed_by=ISOLATION,
    replays=("89",),
    varies="a frozen adapter",
)
def adding_frees_every_adapter() -> Adapter:
    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        trains = self.state(model).trainable
        trains.update({other: True for other in trains if other != name})

    return wrong(add=add)


@fault(
    sin="Adding an adapter sets whatever is called LoRA free, until the next activation.",
    killed_by=ISOLATION,
    replays=("89",),
    varies="a frozen or inactive adapter beside the one that is added",
)
def adding_frees_all_until_activation() -> Adapter:
    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        for adapted in self.layers(model).values():
            adapted.adapters.requires_grad_(True)

    return wrong(add=add)


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
    sin="Deleting forgets the name and leaves the parameters on the model.",
    killed_by="several/delete",
    replays=("140",),
    varies="parameters after deleting",
)
def deleting_leaves_the_parameters() -> Adapter:
    def delete(self: Any, model: nn.Module, name: str) -> None:
        self.require_adapter(model, name)
        del self.state(model).configs[name], self.state(model).trainable[name]

    return wrong(delete=delete)


@fault(
    sin="Something keeps the modules of a deleted adapter.",
    killed_by="several/deleted-is-freed",
    replays=("140",),
    varies="references after deleting",
)
def deleted_adapters_are_kept() -> Adapter:
    kept: list[Any] = []

    def delete(self: Any, model: nn.Module, name: str) -> None:
        kept.extend(adapted.of(name) for adapted in self.layers(model).values())
        Reference.delete(self, model, name)

    return wrong(delete=delete)


@fault(
    sin="Activating another adapter leaves the merged one's update in the weights.",
    killed_by="several/while-merged",
    replays=("42",),
    varies="activating while merged",
)
def activating_leaves_what_is_merged() -> Adapter:
    def require_unmerged(self: Any, model: nn.Module, verb: str) -> None:
        if verb != "activate":
            Reference.require_unmerged(self, model, verb)

    return wrong(require_unmerged=require_unmerged)


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


@fault(
    sin="Inside `disable` trained biases act, and nothing is said.",
    killed_by="several/disabled-tells-of-biases",
    replays=("129",),
    varies="bias other than none",
)
def disable_keeps_biases_silently() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        context = Reference.disable(self, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context.__enter__()
        try:
            yield
        finally:
            context.__exit__(None, None, None)

    return wrong(disable=disable)


def combining(change: Any) -> Adapter:
    """A reference whose `combine` is given `change(names, weights)`."""

    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        names, weights = change(names, weights)
        Reference.combine(self, model, names, weights, new_name)

    return wrong(combine=combine)


@fault(
    sin="The weights of a combination are computed and thrown away.",
    killed_by=COMBINATION,
    replays=("33",),
    varies="weights other than one",
)
def combination_discards_the_weights() -> Adapter:
    return combining(lambda names, weights: (names, [1.0 for _ in weights]))


@fault(
    sin="A combination holds its last adapter only.",
    killed_by=COMBINATION,
    replays=("P-18",),
    varies="two adapters",
)
def combination_keeps_the_last_only() -> Adapter:
    return combining(lambda names, weights: (names[-1:], weights[-1:]))


@fault(
    sin="A negative weight counts as a positive one.",
    killed_by=COMBINATION,
    varies="negative weights",
)
def combination_loses_the_sign() -> Adapter:
    return combining(lambda names, weights: (names, [abs(weight) for weight in weights]))


@fault(
    sin="A combination has room for one rank: what is beyond is cut off.",
    killed_by=COMBINATION,
    replays=("35",),
    varies="adapters of other ranks",
)
def combination_is_cut_to_one_rank() -> Adapter:
    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        Reference.combine(self, model, names, weights, new_name)
        room = max(self.state(model).configs[name].r for name in names)
        for adapted in self.layers(model).values():
            for branch in adapted.of(new_name):
                branch.lora_A.data[room:] = 0

    return wrong(combine=combine)


@fault(
    sin="Combining writes its own alpha into the settings of its first source.",
    killed_by="several/combination-leaves-its-sources",
    replays=("36",),
    varies="saving a source after it was combined",
)
def combining_writes_into_its_source() -> Adapter:
    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        Reference.combine(self, model, names, weights, new_name)
        configs = self.state(model).configs
        configs[names[0]] = dataclasses.replace(configs[names[0]], lora_alpha=weights[0])

    return wrong(combine=combine)
