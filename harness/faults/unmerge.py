"""Adapters that do not come back from a merge, or change what is not theirs on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.quantized import with_weight
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted, Whole
from harness.faults.merge import InPlace, with_layer
from harness.faults.record import fault

if TYPE_CHECKING:
    from harness.adapter import Adapter

RESTORES = "merge/restores-base"


class Subtracts(Adapted):
    """Unmerges by taking ΔW out again, as the factors have it now."""

    def taken_out(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        """W less ΔW, rounded once."""
        return self.merge_weight(weight, -delta, rows)

    def unmerge(self) -> None:
        """The base with W - ΔW."""
        if self.kept:
            weight: Any = self.base.weight
            with torch.no_grad():
                for branch in self.branches:
                    weight = self.taken_out(weight, branch.delta(self.base), branch.rows)
            before: Any = self.kept.pop()
            self.base = with_weight(before, weight, getattr(before, "bias", None))


class Unscaled(Subtracts):
    def taken_out(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        return super().taken_out(weight, delta / self.branches[0].scaling, rows)


@fault(
    sin="Unmerging takes out B·A without its scaling.",
    killed_by=RESTORES,
    replays=("21", "38"),
    varies="alpha is not r",
)
def unmerges_without_scaling() -> Adapter:
    return with_layer(Unscaled)


class EqualParts(Subtracts):
    def taken_out(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        if rows is not None:
            part = len(weight) // 3
            start = rows.start // part * part
            rows = slice(start, start + len(delta))
        return super().taken_out(weight, delta, rows)


@fault(
    sin="Unmerging takes a part out at a third or two of the rows, as if q, k and v were equal.",
    killed_by=RESTORES,
    replays=("7", "8"),
    varies="a grouped-query projection",
)
def unmerges_parts_as_if_they_were_equal() -> Adapter:
    return with_layer(EqualParts)


class Flagged(Adapted):
    def unmerge(self) -> None:
        if any(bool(branch.lora_A.any() and branch.lora_B.any()) for branch in self.branches):
            super().unmerge()


@fault(
    sin="A layer is flagged as merged although nothing was folded, and never unflagged.",
    killed_by=RESTORES,
    replays=("9",),
    varies="an adapter that is still zero",
)
def stays_merged_where_nothing_was_folded() -> Adapter:
    return with_layer(Flagged)


class RoundsFactors(Adapted):
    def unmerge(self) -> None:
        with torch.no_grad():
            for factor in self.adapters.parameters() if self.kept else ():
                factor.copy_(factor.to(self.base.weight.dtype))  # type: ignore[arg-type]
        super().unmerge()


@fault(
    sin="Factors go through the base's dtype on their way out of a merge.",
    killed_by=RESTORES,
    varies="factors held in more bits than the base",
)
def unmerging_rounds_the_factors() -> Adapter:
    return with_layer(RoundsFactors)


class Once(Adapted):
    """Keeps the ΔW of its first merge."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.first: list[nn.Module] = []  # in a list: not a child

    def merged(self) -> nn.Module:
        """The base with the W + ΔW of the first time."""
        self.first = self.first or [super().merged()]
        return self.first[0]


@fault(
    sin="W + ΔW is computed once and kept: a second merge folds in the factors of the first.",
    killed_by=RESTORES,
    varies="factors that changed between two merges",
)
def merges_what_it_merged_before() -> Adapter:
    return with_layer(Once)


class Truncates(Subtracts):
    times = 0

    def taken_out(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        whole = super().taken_out(weight, delta, rows)
        self.times += 1
        if self.times > 1 and rows is None:
            whole = torch.nextafter(whole, torch.zeros_like(whole))
        return whole


@fault(
    sin="From the second time on, unmerging cuts the last bits off instead of rounding.",
    killed_by="merge/no-drift",
    varies="many cycles",
)
def truncates_when_unmerging() -> Adapter:
    return with_layer(Truncates)


class CastOnceMore(Subtracts):
    def taken_out(self, weight: Tensor, delta: Tensor, rows: slice | None) -> Tensor:
        return super().taken_out(weight, delta.to(weight.dtype).to(delta.dtype), rows)


@fault(
    sin="Unmerging rounds ΔW to the base's dtype and merging does not: each cycle leaves the rest.",
    killed_by="merge/no-drift-in-half-precision",
    replays=("38",),
    varies="half precision, and many cycles",
)
def unmerges_a_rounded_update() -> Adapter:
    return with_layer(CastOnceMore)


class MergesAgain(Reference):
    def merge(self, model: nn.Module) -> None:
        merged = {layer: layer.merged() for layer in self.layers(model).values() if layer.branches}
        for layer, module in merged.items():
            layer.kept, layer.base = layer.kept or [layer.base], module


@fault(
    sin="Merging what is merged adds ΔW again.",
    killed_by="merge/idempotent",
    replays=("1",),
    varies="a second merge",
)
def merges_twice() -> Adapter:
    return MergesAgain()


class ShiftsNorms(Reference):
    def merge(self, model: nn.Module) -> None:
        super().merge(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(1)


@fault(
    sin="Each merge adds one to the weights of the norms.",
    killed_by="merge/only-targets-change",
    replays=("27",),
    varies="a model with norms",
)
def each_merge_shifts_the_norms() -> Adapter:
    return ShiftsNorms()


class KnownOnes(Reference):
    def merge(self, model: nn.Module) -> None:
        super().merge(model)
        for path, layer in self.layers(model).items():
            if layer.kept and not path.endswith("proj"):
                layer.base = layer.kept[0]


@fault(
    sin="Only layers of a known kind are merged; the others lose their adapter.",
    killed_by="merge/only-targets-change",
    replays=("22",),
    varies="targets of several kinds",
)
def merges_only_layers_it_knows() -> Adapter:
    return KnownOnes()


@fault(
    sin="Merging writes into the weight that a tied module shares.",
    killed_by="merge/tied-weights",
    replays=("14",),
    varies="tied embeddings",
)
def merges_into_the_shared_tensor() -> Adapter:
    return with_layer(InPlace)


class OncePerName(Reference):
    def merge(self, model: nn.Module) -> None:
        fresh = [layer for layer in self.layers(model).values() if not layer.kept]
        super().merge(model)
        named = [module for _, module in model.named_modules(remove_duplicate=False)]
        for layer in fresh:
            for _ in range(named.count(layer) - 1):
                layer.base = layer.merged()


@fault(
    sin="A layer that two names reach is merged once for each.",
    killed_by="merge/shared-module",
    varies="a module used twice",
)
def merges_once_per_name() -> Adapter:
    return OncePerName()


class DropsBias(Adapted):
    def merge_bias(
        self, weight: Tensor, bias: Tensor | None, delta: Tensor | None, rows: slice | None
    ) -> Tensor | None:
        return bias if bias is None else super().merge_bias(weight, bias, delta, rows)


@fault(
    sin="The trained bias on B is dropped where the base has none.",
    killed_by="merge/bias-scaled",
    replays=("17",),
    varies="lora_bias on a base without biases",
)
def drops_the_bias_of_a_bare_layer() -> Adapter:
    return with_layer(DropsBias)


class UnscaledBias(Adapted):
    def merge_bias(
        self, weight: Tensor, bias: Tensor | None, delta: Tensor | None, rows: slice | None
    ) -> Tensor | None:
        plain = None if delta is None else delta / self.branches[0].scaling
        return super().merge_bias(weight, bias, plain, rows)


@fault(
    sin="The trained bias on B is merged without its scaling.",
    killed_by="merge/bias-scaled",
    replays=("17", "21"),
    varies="lora_bias, alpha is not r",
)
def merges_the_bias_unscaled() -> Adapter:
    return with_layer(UnscaledBias)


class ChecksLate(Reference):
    def merge(self, model: nn.Module) -> None:
        for layer in self.layers(model).values():
            if layer.branches and not layer.kept:
                layer.merge(layer.merged())


@fault(
    sin="Each layer is checked when its turn comes: a bad one leaves those before it merged.",
    killed_by="merge/refuses-nan",
    replays=("37",),
    varies="a NaN in the last of several layers",
)
def checks_for_nan_after_merging_others() -> Adapter:
    return ChecksLate()


class DropsWhole(Reference):
    def merge(self, model: nn.Module) -> None:
        super().merge(model)
        for module in model.modules():
            if isinstance(module, Whole):
                module.enabled = False


@fault(
    sin="A merged model has the base's modules in the place of those trained whole.",
    killed_by="merge/keeps-saved-modules",
    replays=("29",),
    varies="modules_to_save",
)
def drops_saved_modules_when_merging() -> Adapter:
    return DropsWhole()


class ForgetsWhenDecoding(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        one_token = x.dim() == 3 and x.shape[1] == 1
        for branch in self.branches if self.kept and one_token else ():
            y = self.add(y, branch(self.base, x), branch.rows)
        return y


@fault(
    sin="The fast path for one token adds the branch although it is merged.",
    killed_by="merge/same-generation",
    replays=("26",),
    varies="decoding with a cache",
)
def decoding_forgets_that_it_is_merged() -> Adapter:
    return with_layer(ForgetsWhenDecoding)


class StaysMerged(Adapted):
    @property
    def original(self) -> Any:
        return self.base


@fault(
    sin="Disabling switches the branch off, and what is merged into the weight stays in it.",
    killed_by="merge/disabled-while-merged",
    replays=("26", "42"),
    varies="an adapter that is merged when it is disabled",
)
def disabling_leaves_the_update_merged() -> Adapter:
    return with_layer(StaysMerged)
