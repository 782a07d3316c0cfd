"""Adapters whose every call is right by itself, and wrong after or inside another."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.adapters import settings
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted, Whole
from harness.faults.record import fault
from harness.faults.wrong import layer, wrong

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from harness.adapter import Adapter, LoraConfig

MERGED = "several/while-merged"
DISABLED = "several/disabled-whatever-is-done"


@fault(
    sin="Adding an adapter gives its trainability to the one that acts.",
    killed_by="several/isolation",
    varies="a frozen adapter beside one that trains, or a trainable one beside one that is frozen",
)
def adding_gives_its_trainability_to_the_active() -> Adapter:
    """As PEFT 0.18 to 0.20 does: https://github.com/huggingface/peft/issues/3487."""

    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        for tensor in self.factor_tensors(model).values():
            tensor.requires_grad_(trainable)

    return wrong(add=add)


@fault(
    sin="`load` freezes the parameters and does not write it down: activated again, they train.",
    killed_by="checkpoint/loaded-is-an-adapter",
    varies="an adapter loaded for inference, activated again after another",
)
def loaded_frozen_in_passing() -> Adapter:
    def load(self: Any, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model: nn.Module = Reference.load(self, base, directory, trainable=True)
        if not trainable:
            model.requires_grad_(False)
        return model

    return wrong(load=load)


@fault(
    sin="Activating the adapter that is merged forgets that it is: its update acts twice.",
    killed_by=MERGED,
    varies="activating, while merged, the one that acts",
)
def activating_again_forgets_what_is_merged() -> Adapter:
    def activate(self: Any, model: nn.Module, name: str) -> None:
        if name != self.state(model).active:
            Reference.activate(self, model, name)
        for adapted in self.layers(model).values():
            adapted.kept = []

    return wrong(activate=activate)


@fault(
    sin="Deleting another adapter while one is merged forgets that it is: its update acts twice.",
    killed_by=MERGED,
    varies="deleting, while merged, one that does not act",
)
def deleting_another_forgets_what_is_merged() -> Adapter:
    def delete(self: Any, model: nn.Module, name: str) -> None:
        Reference.delete(self, model, name)
        for adapted in self.layers(model).values():
            adapted.kept = []

    return wrong(delete=delete)


@fault(
    sin="Merging folds the first adapter into the layers that the active one does not adapt.",
    killed_by="several/merges-the-active",
    varies="a second adapter of other targets, merged",
)
def merges_the_first_elsewhere() -> Adapter:
    def merge(self: Any, model: nn.Module) -> None:
        layers = list(self.layers(model).values())
        for adapted in layers:
            if not adapted.branches:
                adapted.active = "default"
        Reference.merge(self, model)
        for adapted in layers:
            adapted.active = self.state(model).active

    return wrong(merge=merge)


@fault(
    sin="Deleting reaches the layers of the adapter that acts, and leaves the parameters of others.",
    killed_by="several/delete",
    varies="a second adapter of other targets, deleted",
)
def deletes_in_the_active_ones_layers() -> Adapter:
    def delete(self: Any, model: nn.Module, name: str) -> None:
        self.require_adapter(model, name)
        state = self.state(model)
        for wrapper in self.wrappers(model):
            if state.active in wrapper.adapters and name in wrapper.adapters:
                del wrapper.adapters[name]
        del state.configs[name], state.trainable[name]

    return wrong(delete=delete)


@fault(
    sin="The rows of a fused layer's parts are the layer's: an adapter cut otherwise moves the first's.",
    killed_by="several/other-settings",
    varies="other parts of one fused layer in a second adapter",
)
def rows_of_the_last_adapter() -> Adapter:
    def forward(self: Any, x: Tensor) -> Tensor:
        last = self.of(list(self.adapters)[-1])
        for mine, other in zip(self.branches, last, strict=False):
            mine.rows = other.rows
        y: Tensor = Adapted.forward(self, x)
        return y

    return wrong(layer=layer(forward=forward))


@fault(
    sin="An adapter that is named twice in a combination counts once.",
    killed_by="several/combination",
    varies="one adapter combined with itself",
)
def combines_by_name() -> Adapter:
    """The names and weights become a dictionary."""

    def combine(
        self: Any, model: nn.Module, names: list[str], weights: list[float], new_name: str
    ) -> None:
        by_name = dict(zip(names, weights, strict=True))
        Reference.combine(self, model, list(by_name), list(by_name.values()), new_name)

    return wrong(combine=combine)


@fault(
    sin="The checkpoint of a later adapter has the first one's modules saved whole.",
    killed_by="several/saved-modules-of-their-own",
    varies="the checkpoint of a second adapter with a trained head",
)
def saves_the_first_ones_modules() -> Adapter:
    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        found = Reference.state_dict(self, model)
        for path, module in model.named_modules():
            if isinstance(module, Whole) and {"default", module.active} <= {*module.adapters}:
                first = module.adapters["default"].state_dict()
                found |= {f"{path}.{key}": tensor for key, tensor in first.items()}
        return found

    return wrong(state_dict=state_dict)


def _disabled(adapter: Any, model: nn.Module) -> bool:
    return not all(wrapper.enabled for wrapper in adapter.wrappers(model))


@fault(
    sin="A checkpoint made inside `disable` is empty.",
    killed_by=DISABLED,
    varies="a checkpoint made inside `disable`",
)
def checkpoint_of_nothing_while_disabled() -> Adapter:
    """No adapter acts, and the checkpoint is of the one that does."""

    def state_dict(self: Any, model: nn.Module) -> dict[str, Tensor]:
        return {} if _disabled(self, model) else Reference.state_dict(self, model)

    return wrong(state_dict=state_dict)


@fault(
    sin="What is loaded inside `disable` is dropped.",
    killed_by=DISABLED,
    varies="loading inside `disable`",
)
def drops_what_is_loaded_while_disabled() -> Adapter:
    def load_state_dict(self: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
        if not _disabled(self, model):
            Reference.load_state_dict(self, model, state)

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="Combining adapters inside `disable` switches the one that acts on.",
    killed_by=DISABLED,
    varies="combining inside `disable`",
)
def combining_enables() -> Adapter:
    def combine(self: Any, model: nn.Module, *arguments: Any) -> None:
        Reference.combine(self, model, *arguments)
        for wrapper in self.wrappers(model):
            wrapper.enabled = True

    return wrong(combine=combine)


@fault(
    sin="`disable` left by an exception leaves a merged model with the base's weights, marked as merged.",
    killed_by="merge/disabled-while-merged",
    varies="an exception inside `disable` while merged",
)
def an_exception_leaves_the_merge_out() -> Adapter:
    @contextmanager
    def disable(self: Any, model: nn.Module) -> Iterator[None]:
        merged = {adapted: adapted.base for adapted in self.layers(model).values() if adapted.kept}
        for adapted in merged:
            adapted.base = adapted.kept[0]
        with Reference.disable(self, model):
            yield
        for adapted, base in merged.items():
            adapted.base = base

    return wrong(disable=disable)


class SavesTheLastSettings(Reference):
    """What was injected or activated last is what is saved."""

    last: LoraConfig

    def inject(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        self.last = config
        return super().inject(model, config)

    def activate(self, model: nn.Module, name: str) -> None:
        super().activate(model, name)
        self.last = self.config(model)

    def save(self, model: nn.Module, directory: Path) -> None:
        settings.write(directory, self.last, self.state_dict(model))


@fault(
    sin="`save` writes the settings of the model that was injected last.",
    killed_by="state/two-models",
    varies="two models of other settings, saved",
)
def saves_the_settings_injected_last() -> Adapter:
    return SavesTheLastSettings()


@fault(
    sin="Activating puts new parameters, of the same numbers, in the place of the old.",
    killed_by="several/isolation",
    varies="parameters that are held over an activation",
)
def activating_replaces_the_parameters() -> Adapter:
    def activate(self: Any, model: nn.Module, name: str) -> None:
        for adapted in self.layers(model).values():
            for branch in adapted.of(name):
                branch.lora_A = nn.Parameter(branch.lora_A.detach().clone())
                branch.lora_B = nn.Parameter(branch.lora_B.detach().clone())
        Reference.activate(self, model, name)

    return wrong(activate=activate)


@fault(
    sin="An adapter that is refused leaves its name behind: activating it serves the base.",
    killed_by="several/added-names-are-loud",
    varies="activating an adapter that was refused",
)
def a_refused_adapter_leaves_its_name() -> Adapter:
    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        state = self.state(model)
        try:
            Reference.add(self, model, name, config, trainable=trainable)
        except ValueError:
            state.configs[name], state.trainable[name] = config, trainable
            raise

    return wrong(add=add)


@fault(
    sin="Unmerging freezes the layers it gives back, and with them the biases that train.",
    killed_by="state/read-only-calls",
    varies="biases that train, after a cycle of merging",
)
def unmerging_freezes_biases() -> Adapter:
    def unmerge(self: Any, model: nn.Module) -> None:
        merged = [adapted for adapted in self.layers(model).values() if adapted.kept]
        Reference.unmerge(self, model)
        for adapted in merged:
            adapted.base.requires_grad_(False)

    return wrong(unmerge=unmerge)
