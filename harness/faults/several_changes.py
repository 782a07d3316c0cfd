"""Adapters that forget what was deleted, merged or combined."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import layer, wrong

if TYPE_CHECKING:
    from torch import nn

    from harness.adapter import Adapter

COMBINATION = "several/combination"


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
    sin="Deleting takes every adapter whose name begins alike.",
    killed_by="several/delete",
    varies="names that begin alike",
)
def deleting_takes_names_that_begin_alike() -> Adapter:
    def delete(self: Any, model: nn.Module, name: str) -> None:
        self.require_adapter(model, name)
        for other in [one for one in self.state(model).configs if one.startswith(name)]:
            Reference.delete(self, model, other)

    return wrong(delete=delete)


@fault(
    sin="After deleting one adapter the first acts, whichever did.",
    killed_by="several/delete",
    varies="deleting one of three while another than the first acts",
)
def deleting_activates_the_first() -> Adapter:
    def delete(self: Any, model: nn.Module, name: str) -> None:
        Reference.delete(self, model, name)
        self.activate(model, next(iter(self.state(model).configs)))

    return wrong(delete=delete)


@fault(
    sin="Which adapter acts is known by its number: deleting an earlier one makes it the next.",
    killed_by="several/delete",
    varies="deleting one that was added before the one that acts",
)
def deleting_shifts_what_acts() -> Adapter:
    def delete(self: Any, model: nn.Module, name: str) -> None:
        number = list(self.state(model).configs).index(self.state(model).active)
        Reference.delete(self, model, name)
        left = list(self.state(model).configs)
        self.activate(model, left[min(number, len(left) - 1)])

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
    sin="Adding an adapter while one is merged forgets that it is: its update acts twice.",
    killed_by="several/while-merged",
    varies="adding while merged",
)
def adding_forgets_what_is_merged() -> Adapter:
    def add(self: Any, model: nn.Module, name: str, config: Any, *, trainable: bool = True) -> None:
        for adapted in self.layers(model).values():
            adapted.kept = []
        Reference.add(self, model, name, config, trainable=trainable)

    return wrong(add=add)


MERGES = "several/merges-the-active"


@fault(
    sin="`merge` folds the first adapter, whichever acts.",
    killed_by=MERGES,
    varies="merging while a second adapter acts",
)
def merges_the_first_adapter() -> Adapter:
    def merge(self: Any, model: nn.Module) -> None:
        active = self.state(model).active
        self.activate(model, "default")
        Reference.merge(self, model)
        self.state(model).active = active

    return wrong(merge=merge)


@fault(
    sin="`unmerge` takes the first adapter's update out of the weights, whichever was merged.",
    killed_by=MERGES,
    varies="unmerging while a second adapter acts",
)
def unmerges_the_first_adapter() -> Adapter:
    def unmerge(self: Any) -> None:
        was_merged = bool(self.kept)
        Adapted.unmerge(self)
        if was_merged and self.active != "default":
            for one, other in zip(self.branches, self.of("default"), strict=True):
                rows = one.rows or slice(None)
                change = one.delta(self.base) - other.delta(self.base)
                self.base.weight.data[rows] += change.to(self.base.weight.dtype)

    return wrong(layer=layer(unmerge=unmerge))


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
    sin="A combination adapts the modules of its first adapter only.",
    killed_by=COMBINATION,
    varies="adapters of other targets",
)
def combination_keeps_the_first_ones_modules() -> Adapter:
    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        Reference.combine(self, model, names, weights, new_name)
        for adapted in self.layers(model).values():
            if not adapted.of(names[0]) and adapted.of(new_name):
                del adapted.adapters[new_name]

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


@fault(
    sin="A combination of one adapter, at weight one, is that adapter under another name.",
    killed_by="several/combination-leaves-its-sources",
    varies="a combination of one, that is written to",
)
def combination_of_one_is_its_source() -> Adapter:
    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        Reference.combine(self, model, names, weights, new_name)
        if weights == [1.0]:
            for adapted in self.layers(model).values():
                for new, old in zip(adapted.of(new_name), adapted.of(names[0]), strict=True):
                    new.lora_A, new.lora_B, new.scaling = old.lora_A, old.lora_B, old.scaling

    return wrong(combine=combine)


def combining_sets_trainable(which: slice, *, trainable: bool) -> Adapter:
    """A reference whose `combine` enters this trainability for those of its sources."""

    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        Reference.combine(self, model, names, weights, new_name)
        self.state(model).trainable.update(dict.fromkeys(names[which], trainable))

    return wrong(combine=combine)


@fault(
    sin="Combining freezes its sources but the first for good.",
    killed_by="several/combination-leaves-its-sources",
    varies="activating a later source after combining",
)
def combining_freezes_later_sources() -> Adapter:
    return combining_sets_trainable(slice(1, None), trainable=False)


@fault(
    sin="Combining frees its sources, frozen ones too.",
    killed_by="several/combination-leaves-its-sources",
    varies="a frozen source",
)
def combining_frees_frozen_sources() -> Adapter:
    return combining_sets_trainable(slice(None), trainable=True)


@fault(
    sin="Combining with an unknown name raises, and leaves a combination of those that are known.",
    killed_by="several/unknown-name-is-loud",
    varies="activating a combination that was refused",
)
def refused_combination_is_left_behind() -> Adapter:
    def combine(self: Any, model: Any, names: Any, weights: Any, new_name: str) -> None:
        known = {
            n: w for n, w in zip(names, weights, strict=True) if n in self.state(model).configs
        }
        Reference.combine(self, model, list(known), list(known.values()), new_name)
        for name in names:
            self.require_adapter(model, name)

    return wrong(combine=combine)
