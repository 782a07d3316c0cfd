"""Adapters that compute something else than the equation, for one input, layer or setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.adapters.equation import Branch, ConvBranch, EmbeddingBranch
from harness.adapters.reference import Reference
from harness.faults.record import fault
from harness.faults.wrong import after_injection, answering, branches, named, wrong

if TYPE_CHECKING:
    from harness.adapter import Adapter, LoraConfig

ORACLE = "forward/equals-oracle"
SCALING = "forward/scaling"
RSLORA = "forward/rslora"


@fault(
    sin="The branch is scaled by alpha, not by alpha/r.",
    killed_by=ORACLE,
    replays=("20",),
    varies="a rank above 1",
)
def scales_by_alpha() -> Adapter:
    """The scaling reported is the right one."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        return y * len(self.lora_A)

    return wrong(branches=branches(forward=forward))


@fault(
    sin="The branch's input is cast to the dtype of a quantised store.",
    killed_by=ORACLE,
    replays=("125",),
    varies="inputs that are not whole numbers",
)
def casts_its_input_to_whole_numbers() -> Adapter:
    """As to a weight's uint8."""

    def drop(self: Any, x: Tensor) -> Tensor:
        return Branch.drop(self, x.to(torch.int8))

    kinds = branches(drop=drop)
    return wrong(branches={**kinds, nn.Embedding: EmbeddingBranch})


@fault(
    sin="The bias on B is added without its scaling.",
    killed_by="forward/lora-bias",
    replays=("17",),
    varies="lora_bias, and alpha that is not r",
)
def adds_its_bias_unscaled() -> Adapter:
    """Merging scales it."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        bias = self.lora_bias
        return y if bias is None else y + (1 - self.scaling) * bias

    return wrong(branches={**branches(forward=forward), nn.Embedding: EmbeddingBranch})


@fault(
    sin="The bias on B is added without its scaling in the parts of a fused projection.",
    killed_by="forward/lora-bias",
    replays=("17",),
    varies="lora_bias on a fused projection",
)
def adds_a_parts_bias_unscaled() -> Adapter:
    """A whole layer's is scaled."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        bias = self.lora_bias
        return y if bias is None or not self.rows else y + (1 - self.scaling) * bias

    own = named(Branch, {"forward": forward})
    return wrong(branches={**Reference.branches, nn.Linear: own})


@fault(
    sin="A convolution's bias on B is made, and never added.",
    killed_by="forward/lora-bias",
    varies="lora_bias on a convolution",
)
def drops_a_convolutions_bias() -> Adapter:
    """Its 1 × 1 convolution has none."""

    def up(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = ConvBranch.up(self, base, x)
        return y if self.lora_bias is None else y - self.lora_bias[:, None, None]

    return wrong(branches=branches(ConvBranch, up=up))


@fault(
    sin="The branch stops after the first 64 positions.",
    killed_by="forward/any-batch",
    varies="an input with more than 64 positions",
)
def stops_after_64_positions() -> Adapter:
    """As a kernel whose grid was sized for a short context."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        if y.dim() == 3:  # (b, t, o)
            y = torch.cat([y[:, :64], torch.zeros_like(y[:, 64:])], 1)
        return y

    return wrong(branches={**branches(forward=forward), nn.Embedding: EmbeddingBranch})


@fault(
    sin="The branch acts on the last position alone.",
    killed_by=ORACLE,
    varies="inputs with more than one position",
)
def acts_on_the_last_position() -> Adapter:
    """A decoding step's shape, for every shape."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        y: Tensor = Branch.forward(self, base, x)
        if y.dim() == 3 and y.shape[1] > 1:
            y = torch.cat([torch.zeros_like(y[:, :-1]), y[:, -1:]], 1)
        return y

    own = named(Branch, {"forward": forward})
    return wrong(branches={**Reference.branches, nn.Linear: own})


@fault(
    sin="Inputs that are not contiguous are read as if they were.",
    killed_by="forward/any-batch",
    varies="an input that is a view",
)
def reads_a_view_as_its_storage() -> Adapter:
    """What a kernel without strides does."""

    def drop(self: Any, x: Tensor) -> Tensor:
        room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        if room >= x.numel() and x.dim():
            x = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
        return Branch.drop(self, x)

    own = named(Branch, {"drop": drop})
    return wrong(branches={**Reference.branches, nn.Linear: own})


@fault(
    sin="The input is scaled in place after it was used.",
    killed_by="forward/input-unchanged",
    replays=("10",),
    varies="an input that is looked at again",
)
def writes_into_its_input() -> Adapter:
    """The next reader of the tensor finds other numbers."""

    def act(_: Any, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point() and not torch.is_grad_enabled():
            x.mul_(1.01)
        return y

    return answering(act)


@fault(
    sin="The first update computed in eval mode is kept for all later calls.",
    killed_by="forward/sees-factors-now",
    replays=("64",),
    varies="factors that change between two calls",
)
def keeps_an_old_update() -> Adapter:
    """B·A in a cache that nothing empties."""

    def forward(self: Any, base: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return Branch.forward(self, base, x)
        if not hasattr(self, "cached"):
            self.cached = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        held = self.lora_A.data, self.lora_B.data
        self.lora_A.data, self.lora_B.data = self.cached
        y = Branch.forward(self, base, x)
        self.lora_A.data, self.lora_B.data = held
        return y

    own = named(Branch, {"forward": forward})
    return wrong(branches={**Reference.branches, nn.Linear: own})


def _scaled(scale: Any) -> Adapter:
    """A reference whose branches are scaled by `scale(config)`, and say so."""
    adapter: Adapter = wrong(branches=branches(scale=lambda _, config: scale(config)))
    return adapter


@fault(
    sin="The scaling is alpha.",
    killed_by=SCALING,
    replays=("20", "23"),
    varies="a rank above 1",
)
def takes_alpha_for_the_scaling() -> Adapter:
    """Reported as it is used."""
    return _scaled(lambda c: c.lora_alpha / (c.r**0.5 if c.use_rslora else 1))


@fault(
    sin="The scaling is alpha/√r with rsLoRA off.",
    killed_by=SCALING,
    replays=("P-2",),
    varies="a rank above 1",
)
def divides_by_the_root_of_r() -> Adapter:
    """RsLoRA for all."""
    return _scaled(lambda c: c.lora_alpha / c.r**0.5)


@fault(
    sin="The first configuration's scaling is used for every model.",
    killed_by=SCALING,
    replays=("112",),
    varies="a second configuration in one process",
)
def keeps_the_first_scaling() -> Adapter:
    """One global number."""
    kept: list[float] = []

    def scale(config: LoraConfig) -> float:
        kept.append(config.scaling)
        return kept[0]

    return _scaled(scale)


def _scaled_for(kind: type[Branch], scale: Any, *, parts: bool = False) -> Adapter:
    """A reference whose branches of exactly a kind, or of parts alone, have another scaling."""

    def own(self: Any, config: LoraConfig) -> float:
        other: float = config.scaling if parts and self.rows is None else scale(config)
        return other

    made = {b: named(k, {"scale": own}) for b, k in Reference.branches.items() if k is kind}
    adapter: Adapter = wrong(branches={**Reference.branches, **made})
    return adapter


@fault(
    sin="A convolution's scaling is alpha/(3·r), its kernel being 3 wide.",
    killed_by=SCALING,
    varies="a convolution",
)
def divides_by_the_side_of_the_kernel() -> Adapter:
    """By the rank that the factors have where they are r times as large as the kernel's side."""
    return _scaled_for(ConvBranch, lambda c: c.scaling / 3)


@fault(
    sin="The scaling of each part of a fused projection is divided by three.",
    killed_by=SCALING,
    replays=("23",),
    varies="a fused projection",
)
def divides_by_the_number_of_parts() -> Adapter:
    """Three adapters of rank r made one of rank 3·r, with the alpha of one."""
    return _scaled_for(Branch, lambda c: c.scaling / 3, parts=True)


@fault(
    sin="use_rslora is ignored for embeddings.",
    killed_by=RSLORA,
    replays=("19",),
    varies="rsLoRA on an embedding",
)
def ignores_rslora_for_embeddings() -> Adapter:
    """Each kind of layer has code of its own for it."""
    return _scaled_for(EmbeddingBranch, lambda c: c.lora_alpha / c.r)


@fault(
    sin="use_rslora is ignored for convolutions.",
    killed_by=RSLORA,
    replays=("19",),
    varies="rsLoRA on a convolution",
)
def ignores_rslora_for_convolutions() -> Adapter:
    """The same there."""
    return _scaled_for(ConvBranch, lambda c: c.lora_alpha / c.r)


@fault(
    sin="use_rslora is ignored for the parts of a fused projection.",
    killed_by=RSLORA,
    replays=("19",),
    varies="rsLoRA on a fused projection",
)
def ignores_rslora_for_parts() -> Adapter:
    """And there."""
    return _scaled_for(Branch, lambda c: c.lora_alpha / c.r, parts=True)


@fault(
    sin="use_rslora is taken and ignored.",
    killed_by=RSLORA,
    replays=("19",),
    varies="rsLoRA",
)
def ignores_rslora() -> Adapter:
    """As consumers of such checkpoints do."""
    return _scaled(lambda c: c.lora_alpha / c.r)


@fault(
    sin="Layers whose parent is of a class that is not on a list are passed by.",
    killed_by="forward/phi3",
    replays=("22", "109"),
    varies="a whole model",
)
def passes_by_unknown_parents() -> Adapter:
    """The factors are there, the call does not reach them."""

    def act(adapter: Any, model: nn.Module) -> None:
        for path, adapted in adapter.layers(model).items():
            parent = model.get_submodule(path.rpartition(".")[0])
            adapted.enabled = type(parent).__name__ != "Phi3MLP"

    return after_injection(act)


@fault(
    sin="Arguments that the wrapper does not know are swallowed.",
    killed_by="forward/called-like-the-base",
    varies="a call with more than ids",
)
def swallows_arguments() -> Adapter:
    """The hidden states asked for never come."""
    return after_injection(
        lambda _, model: model.register_forward_pre_hook(_without_states, with_kwargs=True)
    )


def _without_states(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """At the top of the module, where pickle finds it."""
    return args, {name: v for name, v in kwargs.items() if name != "output_hidden_states"}
