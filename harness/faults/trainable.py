"""Adapters that train something else than exactly the factors and what was asked for beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.reference import Reference
from harness.adapters.wrapped import Adapted
from harness.faults.record import fault
from harness.faults.wrong import after_injection, findable, layer, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter, LoraConfig

ONLY = "trainable/only-lora"
BIASES = "trainable/bias-modes"


@fault(
    sin="Everything is frozen, the factors too.",
    killed_by=ONLY,
    replays=("105",),
    varies="nothing",
)
def freezes_its_factors() -> Adapter:
    """Trainability is set once more, by code that knows no adapter."""
    return wrong(set_trainability=lambda self, model: self.freeze(model))


@fault(
    sin="The norms are left as trainable as they were.",
    killed_by=ONLY,
    replays=("P-6",),
    varies="a model with norms",
)
def leaves_the_norms_trainable() -> Adapter:
    """Freezing passes over every parameter with `norm` in its name."""

    def freeze(self: Any, model: nn.Module) -> None:  # noqa: ARG001
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)

    return wrong(freeze=freeze)


@fault(
    sin="Parameters are set free by the beginning of their names.",
    killed_by=ONLY,
    replays=("130",),
    varies="a whole model",
)
def sets_free_by_prefix() -> Adapter:
    """`model.norm` is meant, and every name that begins so is taken."""

    def act(_: Any, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.1"):
                parameter.requires_grad_(True)

    return after_injection(act)


@fault(
    sin="The modules to save are frozen with the base.",
    killed_by="trainable/beside-factors",
    varies="modules_to_save",
)
def freezes_the_saved_modules() -> Adapter:
    """They are copied, and freezing knows only factors."""

    def set_trainability(self: Any, model: nn.Module) -> None:
        Reference.set_trainability(self, model)
        for tensor in self.whole_tensors(model).values():
            tensor.requires_grad_(False)

    return wrong(set_trainability=set_trainability)


@fault(
    sin="A parameter of the base trains by having lora_ in its name.",
    killed_by="trainable/names-decide-nothing",
    replays=("59", "88"),
    varies="a base with lora_ in a name of its own",
)
def marks_by_name() -> Adapter:
    """As loralib does, and PEFT did; its own factors it tells apart."""

    def freeze(self: Any, model: nn.Module) -> None:  # noqa: ARG001
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and ".adapters." not in name)

    return wrong(freeze=freeze)


def _renamed(kind: type[Branch]) -> type[Branch]:
    """A branch whose factors are registered as `down` and `up`."""
    names = {"lora_A": "down", "lora_B": "up"}

    class Renamed(kind):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            for old, new in names.items():
                self._parameters[new] = self._parameters.pop(old)

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(names.get(name, name))

    return findable(Renamed)


@fault(
    sin="The factors are called down and up.",
    killed_by="trainable/name-convention",
    varies="nothing",
)
def calls_its_factors_down_and_up() -> Adapter:
    """Right in everything but the name."""
    kinds = {nn.Linear: Branch, nn.Embedding: EmbeddingBranch, nn.Conv2d: ConvBranch}
    return wrong(branches={base: _renamed(kind) for base, kind in kinds.items()})


@fault(
    sin="A rank above the layer's width is clipped to it, at the same scaling.",
    killed_by="trainable/count",
    replays=("P-13",),
    varies="a rank above the width",
)
def clips_the_rank_to_the_width() -> Adapter:
    """No higher rank could be used, but another count is what was asked for."""

    def make_branches(
        self: Any, path: str, base: Any, adapter: str, config: LoraConfig
    ) -> list[Branch]:
        if hasattr(base, "in_features"):
            r = min(config.r, base.in_features, base.out_features)
            alpha = config.lora_alpha * (r / config.r) ** (0.5 if config.use_rslora else 1)
            config = replace(config, r=r, lora_alpha=alpha)
        return Reference.make_branches(self, path, base, adapter, config)

    return wrong(make_branches=make_branches)


def _biases_under(mode: str, as_if: str) -> Adapter:
    """A reference that takes one bias mode for another."""

    def config(self: Any, model: nn.Module) -> LoraConfig:
        found = Reference.config(self, model)
        return replace(found, bias=as_if) if found.bias == mode else found  # type: ignore[arg-type]

    adapter: Adapter = wrong(config=config)
    return adapter


@fault(
    sin="Under lora_only no bias trains.",
    killed_by=BIASES,
    replays=("43", "44"),
    varies="bias lora_only",
)
def trains_no_bias_under_lora_only() -> Adapter:
    """The wrapped layer's bias has another name than the one looked for."""
    return _biases_under("lora_only", "none")


@fault(
    sin="Under all only the biases of adapted modules train.",
    killed_by=BIASES,
    replays=("P-19",),
    varies="bias all, and a bias that is not an adapted module's",
)
def trains_adapted_biases_alone_under_all() -> Adapter:
    """The two modes do the same."""
    return _biases_under("all", "lora_only")


@fault(
    sin="Trained biases are not in the checkpoint.",
    killed_by=BIASES,
    replays=("43",),
    varies="bias lora_only or all, and saving",
)
def saves_no_bias() -> Adapter:
    """As PEFT from 0.10 to 0.20."""

    def state_dict(self: Any, model: nn.Module) -> dict[str, torch.Tensor]:
        kept = self.factor_tensors(model) | self.whole_tensors(model)
        return {key: tensor.detach() for key, tensor in kept.items()}

    return wrong(state_dict=state_dict)


@fault(
    sin="Going into train mode replaces the parameters.",
    killed_by="trainable/optimizer-holds-only-lora",
    replays=("P-5",),
    varies="an optimizer made before train()",
)
def renews_its_parameters_in_train_mode() -> Adapter:
    """An optimizer made before holds tensors that nothing uses."""

    def train(self: Any, mode: bool = True) -> Any:
        for branch in self.branches if mode and not self.training else ():
            for name, old in list(branch.named_parameters()):
                setattr(branch, name, nn.Parameter(old.detach().clone(), old.requires_grad))
        return Adapted.train(self, mode)

    return wrong(layer=layer(train=train))


@fault(
    sin="The factors are bfloat16, whatever the base is.",
    killed_by="trainable/dtype-stated",
    replays=("107", "108"),
    varies="a base in more than half precision",
)
def keeps_its_factors_in_half_precision() -> Adapter:
    """A trainer that casts what trains."""

    def make_branches(self: Any, *args: Any) -> list[Branch]:
        return [branch.to(torch.bfloat16) for branch in Reference.make_branches(self, *args)]

    return wrong(make_branches=make_branches)
