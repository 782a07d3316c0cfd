"""Adapters in a model: put there, found there again, and what of the model they train.

    inject ── attach ── targets, branches ──▶ wrappers in the place of the base's modules
    state, layers, wrappers, config        ◀── the model
    set_trainability                       ──▶ exactly what `trained` names

Each step is a method itself, so that an implementation with one sin is this one with one step
replaced: see `harness.faults`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from harness.adapter import LoraConfig, matches
from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.wrapped import Adapted, Whole, bare, swap, walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass
class State:
    """What a model with adapters remembers: kept on the model, so that a copy has its own."""

    active: str = "default"
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)


class Attachment:
    """The half of the reference that changes a model's modules, and knows them again."""

    layer: type[Adapted] = Adapted
    whole: type[Whole] = Whole
    branches: ClassVar[Mapping[type[nn.Module], type[Branch]]] = {
        nn.Linear: Branch,
        nn.Embedding: EmbeddingBranch,
        nn.Conv2d: ConvBranch,
    }

    # -- injection -------------------------------------------------------------------------------

    def inject(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        """Adapt the modules named; the same model, in its own mode; ValueError if already adapted."""
        if hasattr(model, "_lora"):
            return self.inject_again(model, config)
        model._lora = State()  # type: ignore[assignment]  # noqa: SLF001
        try:
            self.attach(model, "default", config, trainable=True)
        except BaseException:
            del model._lora  # noqa: SLF001
            raise
        self.set_trainability(model)
        self.checkpoint_inputs(model)
        return model

    def inject_again(self, model: nn.Module, config: LoraConfig) -> nn.Module:  # noqa: ARG002
        """ValueError: the first adapter would be lost, or two would act as one."""
        raise ValueError("the model is adapted already: `add` adds another adapter")

    def attach(self, model: nn.Module, name: str, config: LoraConfig, *, trainable: bool) -> None:
        """Give the modules that `config` names an adapter called `name`; nothing if that raises."""
        with bare(model):
            targets = self.targets(model, config)
            whole = self.whole_modules(model, config, targets)
            made = {
                path: self.make_branches(path, module, name, config)
                for path, module in targets.items()
            }
        for path, layer in self.wrap(model, made, self.layer).items():
            layer.adapters[name] = nn.ModuleList(made[path])
            if not layer.training:
                layer.adapters.eval()
        for wrapper in self.wrap(model, whole, self.whole).values():
            wrapper.copy_for(name)
        self.state(model).configs[name] = config
        self.state(model).trainable[name] = trainable

    def targets(self, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        """The modules to adapt, by path; ValueError on a name without a module."""
        if isinstance(config.target_modules, str):
            return self.all_linear(model, config)
        try:
            return config.targets(model)
        except ValueError as error:
            return self.unmatched(model, config, error)

    def all_linear(self, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
        """Every `nn.Linear` but the output head; ValueError where there is none."""
        return config.targets(model)

    def unmatched(
        self,
        model: nn.Module,  # noqa: ARG002
        config: LoraConfig,  # noqa: ARG002
        error: ValueError,
    ) -> dict[str, nn.Module]:
        """Raise the error: what was asked for is not there."""
        raise error

    def whole_modules(
        self, model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module]
    ) -> list[str]:
        """Paths of `modules_to_save`; ValueError on a name without a module, or on an overlap."""
        found = []
        for name in config.modules_to_save:
            paths = [path for path, _ in model.named_modules() if matches(path, name)]
            if not paths:
                raise ValueError(f"modules_to_save: {name} matches no module")
            found += paths
        for path in found:
            for target in targets:
                if f"{target}.".startswith(f"{path}.") or f"{path}.".startswith(f"{target}."):
                    raise ValueError(f"{path} is in modules_to_save, and {target} is adapted")
        return list(dict.fromkeys(found))

    def make_branches(
        self, path: str, base: nn.Module, adapter: str, config: LoraConfig
    ) -> list[Branch]:
        """One branch for each part of a layer; ValueError on a layer that has no such equation."""
        kind = next(
            (kind for base_kind, kind in self.branches.items() if isinstance(base, base_kind)), None
        )
        if kind is None:
            known = ", ".join(base_kind.__name__ for base_kind in self.branches)
            raise ValueError(f"{path} is a {type(base).__name__}; what can be adapted is {known}")
        parts = config.parts(path)
        rows = [None] if parts is None else self.rows_of(base, parts)
        branches = [kind(base, config, part) for part in rows]
        for part, branch in enumerate(branches):
            branch.initialize(self.generator(f"{adapter}/{path}/{part}"))
        return branches

    def rows_of(self, base: nn.Module, parts: list[slice]) -> list[slice]:  # noqa: ARG002
        """The rows of a fused layer that get a branch each: those of the wanted parts."""
        return parts

    def generator(self, key: str) -> torch.Generator:
        """Draws for one branch: by torch's seed and the branch's name; torch's own state stays."""
        return torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(key.encode()))

    def wrap(self, model: nn.Module, paths: Iterable[str], kind: type[Any]) -> dict[str, Any]:
        """The wrappers at these paths, put there where there are none."""
        modules = {path: model.get_submodule(path) for path in paths}
        new = {path: kind(m) for path, m in modules.items() if not isinstance(m, kind)}
        for wrapped in new.values():
            wrapped.active = self.state(model).active
        self.put(model, new)
        return modules | new

    def put(self, model: nn.Module, wrapped: Mapping[str, Any]) -> None:
        """Put wrappers in their bases' places, under every name those have."""
        swap(model, {model.get_submodule(path): new for path, new in wrapped.items()})

    def checkpoint_inputs(self, model: Any) -> None:
        """Let reentrant checkpoints see an input that needs a gradient, whenever they are enabled."""
        if hasattr(model, "is_gradient_checkpointing"):
            hook = partial(_need_gradient, model)
            model.get_input_embeddings().register_forward_hook(hook)

    # -- what trains -----------------------------------------------------------------------------

    def set_trainability(self, model: nn.Module) -> None:
        """Freeze everything, then free what the active adapter trains."""
        self.freeze(model)
        if self.state(model).trainable[self.state(model).active]:
            for tensor in self.trained(model).values():
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(True)

    def freeze(self, model: nn.Module) -> None:
        """Nothing trains."""
        for _, module in walk(model):
            for parameter in module._parameters.values():  # noqa: SLF001  # each where it lies
                if parameter is not None:
                    parameter.requires_grad_(False)

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        """The active adapter's live tensors, by their names in a checkpoint."""
        return self.factor_tensors(model) | self.biases(model) | self.whole_tensors(model)

    def factor_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """`path.lora_A`, or `path.lora_A.0` and on for parts."""
        return {
            self.key(path, kind, branch): tensor
            for path, layer in self.layers(model).items()
            for number, branch in enumerate(layer.branches)
            for kind, tensor in branch.named_parameters(prefix=str(number) if branch.rows else "")
        }

    def key(self, path: str, kind: str, branch: Branch) -> str:  # noqa: ARG002
        """The name of a factor in a checkpoint."""
        return f"{path}.{kind}"

    def biases(self, model: nn.Module) -> dict[str, Tensor]:
        """The base's biases that train, by their names in the base."""
        mode = self.config(model).bias
        if mode == "none":
            return {}
        layers = self.layers(model)
        ours = {module for wrapper in self.wrappers(model) for module in wrapper.modules()}
        bases = {path: module for path, module in model.named_modules() if module not in ours}
        bases |= {path: layer.original for path, layer in layers.items()}
        return {
            f"{path}.bias".removeprefix("."): module.bias
            for path, module in bases.items()
            if isinstance(getattr(module, "bias", None), nn.Parameter)
            and (mode == "all" or (mode == "lora_only" and path in layers))
        }

    def whole_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the active copies, by their names in the base."""
        if not self.config(model).modules_to_save:
            return {}
        return {
            f"{path}.{key}": tensor
            for path, module in model.named_modules()
            if isinstance(module, Whole) and module.active in module.adapters
            for key, tensor in module.adapters[module.active].state_dict(keep_vars=True).items()
        }

    # -- what is found again ---------------------------------------------------------------------

    def layers(self, model: nn.Module) -> dict[str, Adapted]:
        """The adapted layers, by path."""
        return {path: m for path, m in walk(model, stop=Adapted) if isinstance(m, Adapted)}

    def wrappers(self, model: nn.Module) -> list[Adapted | Whole]:
        """Everything that stands in a base module's place."""
        return [module for _, module in walk(model) if isinstance(module, Adapted | Whole)]

    def state(self, model: nn.Module) -> State:
        """What the model remembers; ValueError where it has no adapter."""
        if not hasattr(model, "_lora"):
            raise ValueError("the model has no adapter: `inject` first")
        return model._lora  # type: ignore[return-value]  # noqa: SLF001

    def config(self, model: nn.Module) -> LoraConfig:
        """The active adapter's."""
        state = self.state(model)
        return state.configs[state.active]


def _need_gradient(model: Any, module: nn.Module, args: object, output: Tensor) -> None:  # noqa: ARG001
    """The hook: a frozen embedding's output needs a gradient when it goes into a checkpoint."""
    if model.is_gradient_checkpointing and module.training and not output.requires_grad:
        output.requires_grad_(True)
