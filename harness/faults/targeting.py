"""Adapters that adapt other modules than were asked for, or say nothing where they should."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.adapter import LoraConfig, load_exactly, matches
from harness.adapters.reference import Reference
from harness.faults.record import fault
from harness.faults.wrong import layer, wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.adapter import Adapter

COVERAGE = "targeting/exact-coverage"
DOTTED = "targeting/dotted-names"
TWICE = "targeting/second-injection-is-loud-or-equal"


def _matching(fits: Callable[[str, str], bool]) -> Adapter:
    """A reference whose names mean the modules that `fits` says."""

    def targets(self: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        if isinstance(config.target_modules, str):
            return Reference.targets(self, model, config)
        config.targets(model)  # loud, as it should be
        names = config.target_modules
        return {
            path: module
            for path, module in model.named_modules(remove_duplicate=False)
            if not any(module.children()) and any(fits(path, name) for name in names)
        }

    adapter: Adapter = wrong(targets=targets)
    return adapter


@fault(
    sin="A name means every module whose name ends in it, dot or no dot.",
    killed_by=COVERAGE,
    replays=("76",),
    varies="a name that is the end of another",
)
def matches_ends_of_names() -> Adapter:
    """`v_proj` takes `qkv_proj` too, `1.foo` the 11th layer's."""
    return _matching(lambda name, target: name.endswith(target))


@fault(
    sin="Of a name with dots the last part alone is looked at.",
    killed_by=DOTTED,
    varies="a name that is a path",
)
def matches_last_parts_alone() -> Adapter:
    """`layers.1.v_proj` takes the `v_proj` of every layer."""
    return _matching(lambda name, target: name.rpartition(".")[2] == target.rpartition(".")[2])


@fault(
    sin="A name means every module in whose last part it occurs.",
    killed_by=COVERAGE,
    varies="a name that begins another",
)
def matches_inside_names() -> Adapter:
    """`foo` takes `foobar` too."""
    return _matching(
        lambda name, target: matches(name, target) or target in name.rpartition(".")[2]
    )


@fault(
    sin="Modules are kept by the last part of their names, so that each layer replaces the one before.",
    killed_by=COVERAGE,
    replays=("80",),
    varies="more than one layer",
)
def adapts_the_last_layer_alone() -> Adapter:
    """The last module of each name."""

    def targets(self: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        last = {name.rpartition(".")[2]: name for name in Reference.targets(self, model, config)}
        return {name: model.get_submodule(name) for name in last.values()}

    return wrong(targets=targets)


@fault(
    sin="Modules in a list within a list are not found.",
    killed_by=DOTTED,
    varies="nested ModuleLists",
)
def skips_nested_lists() -> Adapter:
    """Names with two numbers in a row are passed over."""

    def targets(self: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        def nested(name: str) -> bool:
            parts = name.split(".")
            return any(a.isdigit() and b.isdigit() for a, b in pairwise(parts))

        found = Reference.targets(self, model, config)
        return {name: module for name, module in found.items() if not nested(name)}

    return wrong(targets=targets)


@fault(
    sin="A missing comma joins two of the names, and what they meant is left out.",
    killed_by=COVERAGE,
    replays=("86",),
    varies="more than one name",
)
def joins_two_names() -> Adapter:
    """`"v_proj" "foo"` is one name that nothing has; the first alone is looked for."""

    def targets(self: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        found = Reference.targets(self, model, config)
        names = config.target_modules
        if isinstance(names, str) or len(names) < 2:
            return found
        return {n: m for n, m in found.items() if not matches(n, names[-1])}

    return wrong(targets=targets)


def those_there(
    _: Any, model: nn.Module, config: LoraConfig, error: ValueError
) -> dict[str, nn.Module]:
    """The modules of those of the names that match any; the error where none does."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    there = [t for t in config.target_modules if any(matches(path, t) for path in paths)]
    if not there:
        raise error
    return replace(config, target_modules=tuple(there)).targets(model)


@fault(
    sin="Names that match nothing are passed over where others match.",
    killed_by="targeting/unmatched-name-is-loud",
    replays=("77",),
    varies="a name that matches nothing beside one that does",
)
def ignores_unmatched_names() -> Adapter:
    """Llama's names on Phi-3 adapt `o_proj` and `down_proj`, in silence."""
    return wrong(unmatched=those_there)


@fault(
    sin="Every injection warns of the same, and names that match nothing are passed over.",
    killed_by="targeting/unmatched-name-is-loud",
    replays=("77",),
    varies="a name that matches nothing, and a warning that has nothing to do with it",
)
def warns_of_something_else() -> Adapter:
    """As a library that tells at each call how many modules it found."""
    silent = ignores_unmatched_names()

    def targets(_: Any, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = silent.targets(model, config)  # type: ignore[attr-defined]
        warnings.warn(f"{len(found)} modules are adapted", stacklevel=2)
        return found

    return wrong(targets=targets)


@fault(
    sin="The error for a name that matches nothing is made and not raised.",
    killed_by="targeting/unmatched-name-is-loud",
    replays=("123",),
    varies="names of which none matches",
)
def makes_an_error_and_does_not_raise_it() -> Adapter:
    """Nothing is adapted, and nothing said."""

    def unmatched(*_: Any) -> dict[str, nn.Module]:
        ValueError("no module to adapt")  # noqa: PLW0133  # the sin
        return {}

    return wrong(unmatched=unmatched)


@fault(
    sin="Injecting into an adapted model returns it as it is.",
    killed_by=TWICE,
    replays=("57", "71"),
    varies="a second injection at another rank",
)
def keeps_the_old_adapter() -> Adapter:
    """The second configuration is dropped in silence."""
    return wrong(inject_again=lambda self, model, config: model)  # noqa: ARG005


@fault(
    sin="A second injection adapts what the first one put there.",
    killed_by=TWICE,
    replays=("79",),
    varies="a second injection",
)
def adapts_its_own_layers() -> Adapter:
    """An adapted layer within an adapted layer."""

    def inject_again(self: Any, model: Any, config: LoraConfig) -> Any:
        for path, outer in self.layers(model).items():
            inner = layer()(outer.base)
            made = self.make_branches(path, outer.base, "default", config)
            inner.adapters["default"] = nn.ModuleList(made)
            outer.base = inner
        return model

    return wrong(inject_again=inject_again)


@fault(
    sin="Injection writes the names it found into the configuration it was given.",
    killed_by="targeting/arguments-unchanged",
    replays=("36",),
    varies="one configuration for two models",
)
def writes_into_the_configuration() -> Adapter:
    """The next model is searched for the first one's paths."""

    def inject(self: Any, model: Any, config: LoraConfig) -> Any:
        model = Reference.inject(self, model, config)
        object.__setattr__(config, "target_modules", tuple(self.layers(model)))
        return model

    return wrong(inject=inject)


@fault(
    sin="Adding an adapter writes the first one's rank into the configuration it was given.",
    killed_by="targeting/arguments-unchanged",
    replays=("36",),
    varies="the configuration of a second adapter",
)
def adding_writes_into_the_configuration() -> Adapter:
    """What is added is right; the next model that is given this configuration is not."""

    def add(
        self: Any, model: Any, name: str, config: LoraConfig, *, trainable: bool = True
    ) -> None:
        Reference.add(self, model, name, config, trainable=trainable)
        object.__setattr__(config, "r", self.state(model).configs["default"].r)

    return wrong(add=add)


@fault(
    sin="Loading replaces the tensors of the checkpoint it was given.",
    killed_by="targeting/arguments-unchanged",
    varies="one checkpoint for two loads",
)
def writes_into_the_checkpoint() -> Adapter:
    """Every value is put back as a copy."""

    def load_state_dict(self: Any, model: Any, state: dict[str, Any]) -> None:
        self.require_unmerged(model, "load")
        load_exactly(self.state_dict(model), state)
        state.update({key: tensor.clone() for key, tensor in state.items()})

    return wrong(load_state_dict=load_state_dict)


@fault(
    sin="A module that two names reach is adapted under the first alone.",
    killed_by="targeting/shared-module",
    varies="a module used twice",
)
def adapts_one_of_two_uses() -> Adapter:
    """The other name still leads to the bare layer."""

    def put(self: Any, model: Any, wrapped: Any) -> None:  # noqa: ARG001
        for path, wrapper in wrapped.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, wrapper)

    return wrong(put=put)
