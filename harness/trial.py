"""A trial: one adapter at one case, and what a spec may do with it.

    base ── inject ── randomize ── call ── close(truth, budget)

A judge speaks to the implementation through this object alone, so that every spec seeds, sets modes
and reads factors in the same way.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import memo, oracle, seeding, specimen, tolerance
from harness.adapter import Adapter, Factors, LoraConfig
from harness.failure import Broken, Refused, fail
from harness.loudness import warned

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from harness.case import Case
    from harness.descent import Track
    from harness.oracle import Snapshot


@dataclass(slots=True)
class Trial:
    """One adapter on trial at one case.

    Attributes:
        adapter: the implementation.
        case: the point.
        margins: how much of each budget was used, in the order of the comparisons.
        notes: what is worth telling although nothing fails, such as a case that is vacuous.
    """

    adapter: Adapter
    case: Case
    margins: list[tolerance.Margin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _folders: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _factor_dtype: torch.dtype | None = None

    # -- the parts ---------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        return dtype

    def claims(self, feature: str) -> bool:
        """Whether a feature, a layer kind, a dtype or a bias mode is claimed."""
        c = self.adapter.capabilities
        return feature in c.features | c.layers | c.dtypes | c.bias

    def base(self) -> nn.Module:
        """The base, fresh: the same bits each time."""
        return specimen.build(self.case)

    def config(self, **changes: Any) -> LoraConfig:
        """The case's configuration; `changes` are fields of `LoraConfig`."""
        settings: dict[str, Any] = {
            "r": self.case.r,
            "lora_alpha": self.case.alpha,
            "target_modules": specimen.targets(self.case),
            "lora_dropout": self.case.dropout,
            "enable_lora": specimen.parts(self.case),
        }
        return LoraConfig(**{**settings, **changes})

    def inputs(self, seed: int = 0) -> Any:
        """The inputs of one call; another seed gives others."""
        return specimen.inputs(self.case, seed)

    def folder(self) -> Path:
        """An empty folder that is gone when the case is judged."""
        return Path(
            self._folders.enter_context(tempfile.TemporaryDirectory(prefix="lora-harness-"))
        )

    def close_folders(self) -> None:
        """Remove what `folder` made."""
        self._folders.close()

    # -- the implementation ------------------------------------------------------------------------

    def inject(
        self, base: nn.Module | None = None, config: LoraConfig | None = None, *, seed: int = 0
    ) -> nn.Module:
        """LoRA on a base, seeded, in the unmerged state without dropout where there is one."""
        base = self.base() if base is None else base
        config = config or self.config()
        seeding.seed_all(3_000 + self.case.seed + seed)
        try:
            model = self.adapter.inject(base, config)
        except Exception as error:
            # A rank that adds nothing may be refused; what it must not be is cut down in silence.
            if config.r > (width := self._width(config)):
                raise Refused(f"r={config.r} above a width of {width} is refused") from error
            raise
        if not isinstance(model, torch.nn.Module):
            fail(
                "names",
                expected="inject returns the model to use, an nn.Module",
                actual=f"it returns {type(model).__name__}",
            )
        self.unmerged(model)
        return model

    def _width(self, config: LoraConfig) -> float:
        """The rank above which an update has no more: the narrowest side of what is adapted."""
        try:
            adapted: Any = config.targets(specimen.pristine(self.case))
        except Exception:  # noqa: BLE001  # names that match nothing: the implementation is to tell
            return math.inf
        rows = [
            float(part.stop - part.start) for name in adapted for part in config.parts(name) or ()
        ]
        return min(*rows, *(float(min(m.weight.shape[:2])) for m in adapted.values()), math.inf)

    def adapted(self, base: nn.Module | None = None, config: LoraConfig | None = None) -> nn.Module:
        """LoRA on a base with factors that matter: neither A nor B is zero."""
        model = self.inject(base, config)
        self.randomize(model)
        return model

    def unmerged(self, model: nn.Module) -> None:
        """Eval mode; train mode where `eval()` merges or, in four bits on a CPU, rounds to bfloat16."""
        merges = bool(getattr(self.adapter, "eval_merges", False))
        model.train(merges or self.case.specimen == "nf4")

    def factors(self, model: nn.Module) -> dict[str, list[Factors]]:
        """The live factors, checked: known modules, whole, of shapes that fit."""
        found = self.adapter.factors(model)
        modules = specimen.modules(self.case)
        if not isinstance(found, dict) or not found:
            fail("names", expected="factors for every adapted module", actual=repr(found)[:80])
        for name, parts in found.items():
            if name not in modules:
                fail(
                    "names",
                    expected="factors by each module's dotted name in the base",
                    actual=f"{name!r} is no module of the base",
                )
            if not parts:
                fail("names", expected="Factors of each adapted part", actual="none", where=name)
            for f in parts:
                oracle.check_shape(name, modules[name], f)
        self._factor_dtype = self._factor_dtype or _coarsest(found)
        return found

    def snapshot(self, model: nn.Module) -> Snapshot:
        """What the live factors hold now, in float64, kept."""
        return oracle.snapshot(self.factors(model))

    def randomize(self, model: nn.Module, *, seed: int = 0, effect: float = 0.5) -> Snapshot:
        """Give all factors seeded values, the same for every implementation; returns them.

        ΔW's entries are about `effect` times as large as a freshly made weight's: large enough
        that a fault shows, small enough that a model stays a model. Raises `Broken` where what was
        written is not there when it is read again.
        """
        for name, parts in self.factors(model).items():
            for k, f in enumerate(parts):
                drawn = f"{name}/{k}/{seed}" + (f"/{self.case.seed}" if self.case.seed else "")
                (r, i), o = f.A.shape, f.B.shape[0]
                a, b, bias = seeding.normal(drawn, r, i, o)
                with torch.no_grad():
                    f.A.copy_(a / i**0.25)
                    f.B.copy_(effect * b / (i**0.25 * r**0.5 * max(abs(f.scaling), 1e-3)))
                    if f.bias is not None:
                        f.bias.copy_(bias)
        written = self.snapshot(model)
        for name, parts in written.items():
            for f in parts:
                if not f.B.any() or not f.A.any():
                    fail(
                        "no-effect",
                        expected="factors are handles on live tensors: what is written stays",
                        actual="A or B is zero again when factors are read a second time",
                        where=name,
                    )
        return written

    def call(self, model: nn.Module, given: Any) -> Tensor:
        """Outputs without gradient, cloned."""
        with torch.no_grad():
            return specimen.call(model, given).clone()

    # -- the truth ---------------------------------------------------------------------------------

    def truth(self, base: nn.Module, factors: Snapshot, given: Any) -> Tensor:
        """Float64 outputs of the base with W + ΔW in the place of W."""
        return memo.kept(
            lambda: self.call(oracle.merged(base, factors), _cast(given, torch.float64)),
            *("truth", self.case.specimen, base, factors, given),
        )

    def budget(
        self,
        base: nn.Module,
        factors: Snapshot,
        given: Any,
        *,
        coarse: torch.dtype | None = None,
    ) -> Tensor:
        """The error that rounding allows on those outputs, by the coarsest dtype in play, or `coarse`."""
        coarse = coarse or self.factor_dtype
        return memo.kept(
            lambda: self._budget(base, factors, given, coarse),
            *("budget", self.case.specimen, self.case.r, coarse, base, factors, given),
        )

    def _budget(
        self, base: nn.Module, factors: Snapshot, given: Any, coarse: torch.dtype
    ) -> Tensor:
        if specimen.is_linear(self.case):
            absolute = given.double().abs() if given.is_floating_point() else given
            M = self.call(oracle.magnitude(base, factors), absolute)
            return tolerance.outputs(
                M, n=specimen.reduction(self.case), dtype=self.dtype, factor_dtype=coarse
            )
        truth = self.truth(base, factors, given)
        dtype = max(self.dtype, coarse, key=tolerance.unit_roundoff)
        # The truth is float64 itself: what float64 rounds is told by float32, to scale.
        seen = torch.float32 if dtype == torch.float64 else dtype
        rounded = self.call(oracle.merged(base, factors, seen), _cast(given, seen))
        scale = tolerance.unit_roundoff(dtype) / tolerance.unit_roundoff(seen)
        return tolerance.model((rounded.double() - truth) * scale, truth, dtype)

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the implementation's factors at this case, as they were first seen."""
        if self._factor_dtype is None:
            self.factors(self.inject())
        assert self._factor_dtype is not None
        return self._factor_dtype

    def descent(
        self, factors: Snapshot, given: Any, *, lr: float, dtype: torch.dtype, steps: int = 1
    ) -> Track:
        """Where SGD steps of the equation on the case's base go, evaluated in a dtype."""
        from harness import descent

        base = specimen.pristine(self.case)
        return memo.kept(
            lambda: descent.Equation(base, factors, dtype).descend(given, lr=lr, steps=steps),
            *("descent", self.case.specimen, base, factors, given, lr, dtype, steps),
        )

    # -- the judgement -----------------------------------------------------------------------------

    def close(self, actual: Tensor, truth: Tensor, budget: Tensor | float, what: str) -> None:
        """Every element within its budget, or `Broken`; the margin is kept either way."""
        if tuple(actual.shape) != tuple(truth.shape):
            fail(
                "value",
                expected=f"{what} of shape {tuple(truth.shape)}",
                actual=f"shape {tuple(actual.shape)}",
            )
        used, where = tolerance.margin(actual, truth, budget)
        self.margins.append(used)
        if not used.used <= 1:
            raise Broken(
                "value",
                expected=f"{what} within {used.allowed:.3g} of {float(truth[where]):.6g}",
                actual=f"{float(actual[where]):.6g}",
                measured=used.measured,
                allowed=used.allowed,
                where=f"element {list(where)} of {list(truth.shape)}",
                observed=actual.detach(),
                truth=truth.detach(),
            )

    def same_bits(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Bit for bit the same, or `Broken`."""
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            fail(
                "dtype" if actual.dtype != expected.dtype else "value",
                expected=f"{what}: {expected.dtype} {tuple(expected.shape)}",
                actual=f"{actual.dtype} {tuple(actual.shape)}",
            )
        a, e = actual.detach().cpu(), expected.detach().cpu()
        differs = (a != e) & ~(a.isnan() & e.isnan()) if a.is_floating_point() else a != e
        self.margins.append(tolerance.Margin(0.0, 0.0, 0.0))
        if differs.any():
            error = (a.double() - e.double()).abs()
            raise Broken(
                "value",
                expected=f"{what}, bit for bit",
                actual=f"{int(differs.sum())} of {a.numel()} elements differ",
                measured=float(error.max()),
                allowed=0.0,
                where=f"element {[int(k) for k in torch.unravel_index(error.argmax(), error.shape)]}"
                if error.dim()
                else "",
                observed=a,
                truth=e,
            )

    def loud(
        self, act: Callable[[], object], *, expected: str, usual: Callable[[], object] | None = None
    ) -> None:
        """`act` raises or warns, or `Broken` of kind silent.

        What `usual`, a call with nothing to be loud about, warns of too is no warning; numbers in
        the words aside.
        """
        always = warned(usual)[0] if usual else set()
        said, raised = warned(act)
        if not raised and not said - always:
            besides = f" but {min(said)!r}, as always" if said else ""
            fail("silent", expected=expected, actual=f"nothing was raised or warned{besides}")


def _coarsest(found: dict[str, list[Factors]]) -> torch.dtype:
    """Of the factors' dtypes the one that rounds most."""
    dtypes = {t.dtype for parts in found.values() for f in parts for t in (f.A, f.B)}
    return max(dtypes, key=tolerance.unit_roundoff)


def _cast(given: Any, dtype: torch.dtype) -> Any:
    """Inputs in another dtype; token indices stay."""
    if isinstance(given, dict) or not given.is_floating_point():
        return given
    return given.to(dtype)
