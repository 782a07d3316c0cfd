"""The contract an implementation meets.

    shapes   b batch   t tokens   i in_features   o out_features   r rank

               ┌────────── W  (o, i), frozen ──────────┐
      x (…, i) ┤                                       (+)── y (…, o)
               └── A (r, i) ── B (o, r) ── · scaling ──┘

    y = x Wᵀ + scaling · (x Aᵀ) Bᵀ          ΔW = scaling · B A          scaling = alpha/r  or  alpha/√r

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1;
rsLoRA's alpha/√r: Kalajdzievski, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn

Bias = Literal["none", "all", "lora_only"]
Layer = Literal["linear", "fused_linear", "embedding", "conv2d", "grouped_conv2d"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Feature = Literal[
    "merge",
    "unmerge",
    "dropout",
    "rslora",
    "lora_bias",
    "modules_to_save",
    "disable",
    "multi_adapter",
    "combine",
    "save",
    "gradient_checkpointing",
    "tied_embeddings",
    "quantized_base",
    "compile",
    "ddp",
    "fsdp",
]

Parts = tuple[tuple[int, bool], ...]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how, in the field's own terms.

    Attributes:
        r: rank, at least 1.
        lora_alpha: numerator of the scaling; positive.
        target_modules: names, or `"all-linear"`. A name means every module whose dotted name equals
            it or ends in `"." + name`; `"all-linear"` every `nn.Linear` but the output head.
        lora_dropout: probability of zeroing an input of the branch, in train mode; in [0, 1).
        bias: which of the model's biases train: none, all, or those of adapted modules.
        use_rslora: scaling is alpha/√r.
        lora_bias: a trained bias on `B`.
        enable_lora: for fused projections, by module name: each part's size in rows and whether to
            adapt it, say `{"qkv_proj": ((48, True), (24, False), (24, True))}`.
        modules_to_save: names of modules trained and saved whole.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    lora_dropout: float = 0.0
    bias: Bias = "none"
    use_rslora: bool = False
    lora_bias: bool = False
    enable_lora: Mapping[str, Parts] | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError on a value that means nothing."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a whole number of at least 1, not {self.r!r}")
        if not self.lora_alpha > 0 or math.isinf(self.lora_alpha):
            raise ValueError(f"lora_alpha must be a positive number, not {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}")
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be one of {', '.join(get_args(Bias))}, not {self.bias!r}")
        names = self.target_modules
        if isinstance(names, str) and names != "all-linear":
            raise ValueError(
                f'target_modules must be a tuple of names or "all-linear", not the string {names!r}'
            )
        if not names:
            raise ValueError("target_modules is empty: name at least one module")

    @property
    def scaling(self) -> float:
        """alpha/r, or alpha/√r under rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to adapt, by dotted name, in the model's own order.

        A module reached under two names is one module, known by the first. Raises ValueError on a
        name that matches nothing.
        """
        from torch import nn

        if isinstance(self.target_modules, str):
            head = _output_head(model)
            found: dict[str, nn.Module] = {
                name: module
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and module is not head
            }
            if not found:
                raise ValueError('target_modules: "all-linear" matches no nn.Linear in the model')
            self._check_parts(found)
            return found
        found = {}
        matched: set[str] = set()
        aliases: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            first = aliases.setdefault(id(module), name)
            for target in self.target_modules:
                if matches(name, target):
                    matched.add(target)
                    found[first] = module
        self._check_parts(found)
        missing = [target for target in self.target_modules if target not in matched]
        if missing:
            raise ValueError(
                f"target_modules: {', '.join(missing)} match{'es' if len(missing) == 1 else ''} "
                f"no module of {type(model).__name__}"
            )
        return found

    def _check_parts(self, found: Mapping[str, nn.Module]) -> None:
        for name, module in found.items():
            self.parts(name, rows=getattr(module, "out_features", None))

    def replace(self, model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> None:
        """Put `make(name, module)` in the place of each target, under every name it has.

        Raises ValueError on a name that matches nothing, and where the model itself is the target.
        """
        names = {id(module): name for name, module in self.targets(model).items()}
        if "" in names.values():
            raise ValueError("target_modules: the model itself cannot be replaced, only its parts")
        made: dict[int, nn.Module] = {}
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if id(child) in names:
                    if id(child) not in made:
                        made[id(child)] = make(names[id(child)], child)
                    setattr(parent, child_name, made[id(child)])
            # `named_children` names a child once; a second name for it in one parent comes here.
            for child_name, other in parent._modules.items():  # noqa: SLF001  # no public way
                if other is not None and id(other) in made:
                    parent._modules[child_name] = made[id(other)]  # noqa: SLF001

    def parts(self, name: str, rows: int | None = None) -> list[slice] | None:
        """The row slices of a fused projection's wanted parts; None for one that is not fused.

        Raises ValueError where nothing is wanted or, given the layer's `rows`, where the sizes do
        not add up to them (`targets` and `replace`, which see the layers, always check that).
        """
        layout = self.layout(name)
        if layout is None:
            return None
        stops = list(accumulate(size for size, _ in layout))
        if rows is not None and stops[-1:] != [rows]:
            raise ValueError(
                f"enable_lora: the parts of {name} are {stops[-1] if stops else 0} rows together, "
                f"the layer has {rows}"
            )
        wanted = [
            slice(stop - size, stop)
            for stop, (size, want) in zip(stops, layout, strict=True)
            if want
        ]
        if not wanted:
            raise ValueError(f"enable_lora: {name} has no part that is wanted")
        return wanted

    def layout(self, name: str) -> Parts | None:
        """The parts of the module called `name`: rows and whether wanted; None if it is not fused."""
        for target, layout in (self.enable_lora or {}).items():
            if matches(name, target):
                return layout
        return None


def matches(name: str, target: str) -> bool:
    """Whether a module's dotted name is meant by a target: equal, or ending in "." + target."""
    return name == target or name.endswith("." + target)


def _output_head(model: nn.Module) -> nn.Module | None:
    """What `get_output_embeddings()` returns or, on a model without it, a child named `lm_head`."""
    if callable(get := getattr(model, "get_output_embeddings", None)):
        head: nn.Module | None = get()
        return head
    return next((m for n, m in model.named_modules() if matches(n, "lm_head")), None)


@dataclass(frozen=True, slots=True)
class Factors:
    """Live handles on the update of one weight: `scaling · (B @ A)`, laid out as the weight is.

    Attributes:
        A: `(r, in_features)`; `(r, num_embeddings)` for an embedding; `(r', n)` for a convolution.
        B: `(out_features, r)`, or the part's rows; `(embedding_dim, r)`; `(m, r')`, m·n the weight's size.
        scaling: alpha/r, or alpha/√r under rsLoRA.
        rows: which rows of the weight; None for all.
        bias: under `lora_bias`, the trained bias on `B`, shape `(out,)`.
    """

    A: Tensor
    B: Tensor
    scaling: float
    rows: slice | Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an implementation claims. What it does not claim is not asked of it."""

    layers: frozenset[Layer] = field(default_factory=lambda: frozenset[Layer]({"linear"}))
    dtypes: frozenset[Dtype] = field(default_factory=lambda: frozenset[Dtype]({"float32"}))
    bias: frozenset[Bias] = field(default_factory=lambda: frozenset[Bias]({"none"}))
    features: frozenset[Feature] = frozenset()

    KNOWN: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": get_args(Layer),
        "dtypes": get_args(Dtype),
        "bias": get_args(Bias),
        "features": get_args(Feature),
    }

    def __post_init__(self) -> None:
        """Take any collection of names; raise ValueError on one nobody knows or that needs another."""
        for name, known in self.KNOWN.items():
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"capabilities.{name} must be a set of names, not {given!r}")  # noqa: TRY004
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(
                    f"capabilities.{name}: unknown {', '.join(unknown)}; known are {', '.join(known)}"
                )
            object.__setattr__(self, name, frozenset(given))
        for feature, needed in (("unmerge", "merge"), ("combine", "multi_adapter")):
            if feature in self.features and needed not in self.features:
                raise ValueError(f"capabilities.features: {feature} needs {needed}; claim both")


@runtime_checkable
class Adapter(Protocol):
    """The thin object through which the harness drives one implementation.

    The methods beyond these five members come with the features claimed: see `FEATURE_METHODS`.
    """

    name: str
    version: str
    capabilities: Capabilities

    def inject(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        """LoRA on the modules named; base weights untouched; B·A zero, but not both B and A."""

    def factors(self, model: nn.Module) -> dict[str, list[Factors]]:
        """For every adapted module, by its dotted name in the base, handles on the live tensors."""

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter checkpoint: whole, and nothing of the base."""

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """The second stage of the two-stage load; raises on a checkpoint that does not fit."""


class Merges(Protocol):
    """What `merge`, `unmerge` and `disable` bring."""

    def merge(self, model: nn.Module) -> None:
        """Fold ΔW into the base weights."""

    def unmerge(self, model: nn.Module) -> None:
        """Take it out again."""

    def disable(self, model: nn.Module) -> AbstractContextManager[object]:
        """Inside, the base's outputs; on leaving, by an exception too, everything as it was."""


class Several(Protocol):
    """What `multi_adapter`, `combine` and `save` bring."""

    def add(
        self, model: nn.Module, name: str, config: LoraConfig, *, trainable: bool = True
    ) -> None:
        """Add without activating, changing nothing of the others."""

    def activate(self, model: nn.Module, name: str) -> None:
        """That one alone acts, with the trainability it was added with."""

    def delete(self, model: nn.Module, name: str) -> None:
        """Remove one; an unknown name raises."""

    def combine(
        self, model: nn.Module, names: list[str], weights: list[float], new_name: str
    ) -> None:
        """A new adapter whose ΔW is the weighted sum."""

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the adapter and its settings."""

    def load(self, base: nn.Module, directory: Path, *, trainable: bool = False) -> nn.Module:
        """Into a bare base: factors, scaling and settings restored."""


REQUIRED_METHODS = ("inject", "factors", "state_dict", "load_state_dict")
"""The methods every adapter has."""

FEATURE_METHODS: dict[Feature, tuple[str, ...]] = {
    "merge": ("merge",),
    "unmerge": ("unmerge",),
    "disable": ("disable",),
    "multi_adapter": ("add", "activate", "delete"),
    "combine": ("combine",),
    "save": ("save", "load"),
}
"""The methods a feature brings; `harness.registry.ARGUMENTS` says with which arguments."""


def load_exactly(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy a flat checkpoint into live tensors, or raise ValueError where it does not fit.

    `own` maps each key to its live tensor; `state` holds the checkpoint. A key missing or left
    over, or another shape, raises before anything is written.
    """
    import torch

    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"the checkpoint does not fit: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} left over {extra[:3]}"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise ValueError(
                f"the checkpoint does not fit: {key} is {tuple(state[key].shape)}, "
                f"should be {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
