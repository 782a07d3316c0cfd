"""Adapters that are right when they are made, and forget something in what is done next."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters import settings
from harness.adapters.equation import Branch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import branches, wrong

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.adapter import Adapter, LoraConfig


class ReadsOnce(Reference):
    _read: dict[str, Any] = {}  # noqa: RUF012  # shared on purpose

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        kept = self._read.setdefault(str(directory), settings.read(directory)[1])
        self.load_state_dict(model, kept)
        return model


@fault(
    sin="What was loaded from a path once is what loading from it gives for ever.",
    killed_by="checkpoint/load-reads-what-is-there",
    varies="an adapter that is saved again under its path",
)
def caches_loads_by_path() -> Adapter:
    return ReadsOnce()


class ServesWhatItLoads(Reference):
    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        model = super().load(base, directory, trainable=trainable)
        for layer in self.layers(model).values():
            layer._loaded = True  # type: ignore[assignment]
        return model

    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        with super().disable(model):
            for layer in self.layers(model).values():
                layer.enabled = hasattr(layer, "_loaded")
            yield


@fault(
    sin="A loaded adapter cannot be disabled.",
    killed_by="checkpoint/loaded-is-an-adapter",
    varies="disabling what was loaded",
)
def loaded_adapters_are_not_disabled() -> Adapter:
    """`load` and `inject` each set a layer up in code of their own."""
    return ServesWhatItLoads()


@fault(
    sin="Activating an adapter inside `disable` enables it.",
    killed_by="several/disabled-whatever-is-done",
    varies="an activation while disabled",
)
def activating_enables() -> Adapter:
    def activate(self: Any, model: nn.Module, name: str) -> None:
        Reference.activate(self, model, name)
        for wrapper in self.wrappers(model):
            wrapper.enabled = True

    return wrong(activate=activate)


@fault(
    sin="The modules that a frozen adapter trained whole go on training.",
    killed_by="several/frozen-is-frozen-whole",
    varies="modules_to_save of a frozen adapter",
)
def frozen_adapters_saved_modules_train() -> Adapter:
    """Freezing goes by the names of factors."""

    def activate(self: Any, model: nn.Module, name: str) -> None:
        Reference.activate(self, model, name)
        for tensor in self.whole_tensors(model).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)

    return wrong(activate=activate)


@fault(
    sin="A combination scales by √r where its sources are rsLoRA's.",
    killed_by="several/combination",
    varies="rsLoRA, combined",
)
def combination_inherits_rslora() -> Adapter:
    """As PEFT 0.21.2 does: the first source's settings are copied."""

    def combine(
        self: Any, model: Any, names: list[str], weights: list[float], new_name: str
    ) -> None:
        Reference.combine(self, model, names, weights, new_name)
        if self.state(model).configs[names[0]].use_rslora:
            for layer in self.layers(model).values():
                for branch in layer.of(new_name):
                    branch.scaling = len(branch.lora_A) ** 0.5

    return wrong(combine=combine)


@fault(
    sin="An adapter under the name of a deleted one has the deleted one's scaling.",
    killed_by="several/delete",
    varies="a name that is used again, with another alpha",
)
def names_keep_their_scaling() -> Adapter:
    """A table by name that `delete` leaves alone."""

    def add(
        self: Any, model: Any, name: str, config: LoraConfig, *, trainable: bool = True
    ) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        known = vars(self.state(model)).setdefault("scalings", {})
        scaling = known.setdefault(name, config.scaling)
        for layer in self.layers(model).values():
            for branch in layer.of(name):
                branch.scaling = scaling

    return wrong(add=add)


@fault(
    sin="Where the factors are frozen the branch is computed without gradient.",
    killed_by="forward/gradients",
    varies="a gradient of the input, nothing of the layer training",
)
def frozen_branch_blocks_the_input_gradient() -> Adapter:
    """What lies before a frozen adapter learns from the base alone."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lora_A.requires_grad):
            return Branch.forward(self, base, x)

    return wrong(branches=branches(forward=forward))


class OneMode(Reference):
    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        mode = model.training
        with super().disable(model):
            yield
        model.train(mode)


@fault(
    sin="Leaving `disable` puts every module into the model's own mode.",
    killed_by="several/disabled-equals-base",
    varies="a norm that is kept in eval mode while the rest trains",
)
def leaving_disable_flattens_modes() -> Adapter:
    return OneMode()


class SavesAnew(Reference):
    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        for layer in self.layers(model).values():
            for branch in layer.branches:
                branch.lora_A = nn.Parameter(branch.lora_A.detach(), branch.lora_A.requires_grad)


@fault(
    sin="Saving puts new parameters, of the same numbers, in the place of the old.",
    killed_by="state/read-only-calls",
    varies="an optimizer that holds the old ones",
)
def saving_makes_new_parameters() -> Adapter:
    """Training goes on, and nothing moves."""
    return SavesAnew()


@fault(
    sin="Modules that are asked for and cannot be adapted are passed over in silence.",
    killed_by="targeting/unmatched-name-is-loud",
    varies="a name that means another kind of module",
)
def skips_what_it_cannot_adapt() -> Adapter:
    def targets(self: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        known = (*self.branches, Adapted)
        found = Reference.targets(self, model, config)
        return {path: module for path, module in found.items() if isinstance(module, known)}

    return wrong(targets=targets)
