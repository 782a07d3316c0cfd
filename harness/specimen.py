"""Specimens: the bases a spec is judged on, each with traps for what real implementations got wrong.

Single layers are made for the spec: never square unless being square is the trap, never alpha == r.
Whole models are Phi-3. The same case gives the same weights and inputs in every process.

    linear          one nn.Linear with a bias                         shape (in, out)
    bare            one nn.Linear without one                         shape (in, out)
    embedding       one nn.Embedding with a padding index             shape (num, dim)
    conv2d          one nn.Conv2d with stride and padding             shape (in, out, kh, kw)
    dilated         the same, with dilation                           shape (in, out, kh, kw)
    same            the same, padded by that name, in steps of one    shape (in, out, kh, kw)
    circular        the same, padded by what lies across              shape (in, out, kh, kw)
    reflect         the same, padded by what the edge mirrors         shape (in, out, kh, kw)
    grouped         one nn.Conv2d of two groups                       shape (in, out, kh, kw)
    fused           one fused projection, k left out, of equal rows   shape (in, rows of a part)
    fused-all       the same, with all of q, k and v adapted          shape (in, rows of a part)
    fused-unequal   without k, grouped-query: 2u, u, u rows           shape (in, u)
    stack           12 layers with trap names in nested ModuleLists   shape (width, inner)
    tied            an embedding and a head that share one weight     shape (num, dim)
    shared          one nn.Linear reached under two names             shape (in, out)
    headless        layers called like an output head, and no head    shape (in, out)
    headed          the same, with a head of another name             shape (in, out)
    normed          a layer, a batch norm and a head without a bias   shape (in, out)
    underscored     two nn.Linear, `a.b_c` and `a_b.c`                shape (in, out)
    nf4             one bitsandbytes Linear4bit, blocks of 64         shape (in, out)
    tiny, tiny-gqa  Phi-3, and any other model by name: harness.phi3
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from harness.case import CONVOLUTIONS, LAYER_OF
from harness.clone import Mould
from harness.failure import NotRun
from harness.specimen_models import MODELS, One

if TYPE_CHECKING:
    from torch import Tensor

    from harness.adapter import Parts
    from harness.case import Case

SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (11, 7),
    "bare": (11, 7),
    "embedding": (13, 5),
    **dict.fromkeys(("conv2d", "dilated", "same", "circular", "reflect"), (3, 4, 3, 3)),
    "grouped": (4, 6, 3, 3),
    "fused": (10, 4),
    "fused-all": (10, 4),
    "fused-unequal": (10, 3),
    "stack": (6, 9),
    "tied": (13, 5),
    "shared": (11, 7),
    "headless": (11, 7),
    "headed": (11, 7),
    "normed": (11, 7),
    "underscored": (11, 7),
    "nf4": (128, 64),
}

KEPT = 128
"""How many bases are held to be copied: more than a run of the core specs asks for."""

PHI3_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def shape_of(case: Case) -> tuple[int, ...]:
    """The case's sizes, or its specimen's own."""
    return case.shape or SHAPES.get(case.specimen, ())


def is_linear(case: Case) -> bool:
    """Whether the base is one linear operation, whose outputs have an elementwise budget."""
    return case.specimen in {*LAYER_OF, "linear", "bare"}


def targets(case: Case) -> tuple[str, ...] | str:
    """The names adapted unless a spec asks otherwise."""
    if case.specimen == "stack":
        return ("v_proj", "foo")
    if case.specimen == "tied":
        return ("lm_head",)
    if case.specimen == "shared":
        return ("first",)
    if case.specimen in {"headless", "headed"}:
        return ("head_proj",)
    if case.specimen == "underscored":
        return ("a.b_c", "a_b.c")
    return ("proj",) if case.specimen in SHAPES else PHI3_TARGETS


def parts(case: Case) -> dict[str, Parts] | None:
    """For a fused projection, its parts: with k left out, so that a gap must be kept, or all."""
    if LAYER_OF.get(case.specimen) != "fused_linear":
        return None
    part = shape_of(case)[1]
    q = 2 * part if case.specimen == "fused-unequal" else part
    return {"proj": ((q, True), (part, case.specimen == "fused-all"), (part, True))}


def reduction(case: Case) -> int:
    """n: how many products one output of a linear specimen adds up, the rank's included."""
    sizes = shape_of(case)
    if case.specimen == "embedding":
        return 1 + case.r
    if case.specimen in CONVOLUTIONS:
        # The implementation's own r' is at most r times the kernel's longer side.
        return sizes[0] * sizes[2] * sizes[3] + case.r * max(sizes[2:])
    return sizes[0] + case.r


def build(case: Case) -> nn.Module:
    """The base of a case: fresh, in its dtype, on its device; the same bits each time."""
    return _mould(case.specimen, shape_of(case), case.dtype, case.device, case.seed).copy()  # type: ignore[no-any-return]


def pristine(case: Case) -> nn.Module:
    """The base that `build` copies: to look at, never to change or to give away."""
    made: nn.Module = _pristine(case.specimen, shape_of(case), case.dtype, case.device, case.seed)
    return made


def modules(case: Case) -> dict[str, nn.Module]:
    """The modules of `pristine`, by their dotted names."""
    return _modules(case.specimen, shape_of(case), case.dtype, case.device, case.seed)


@lru_cache(maxsize=KEPT)
def _modules(
    specimen: str, shape: tuple[int, ...], dtype: str, device: str, seed: int
) -> dict[str, nn.Module]:
    return dict(_pristine(specimen, shape, dtype, device, seed).named_modules())


@lru_cache(maxsize=KEPT)
def _mould(specimen: str, shape: tuple[int, ...], dtype: str, device: str, seed: int) -> Mould:
    return Mould(_pristine(specimen, shape, dtype, device, seed))


@lru_cache(maxsize=KEPT)
def _pristine(
    specimen: str, shape: tuple[int, ...], dtype: str, device: str, seed: int
) -> nn.Module:
    if specimen not in SHAPES:
        from harness import phi3

        loaded: nn.Module = phi3.load(specimen, dtype=dtype, device=device, seed=seed)
        return loaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000 + seed)
        model = _make(specimen, shape)
    # A Linear4bit is quantised as it is moved, from the dtype that it is to give back.
    return model.to(dtype=getattr(torch, dtype)).to(device)


def _make(specimen: str, shape: tuple[int, ...]) -> nn.Module:
    if specimen in MODELS:
        return MODELS[specimen](*shape)
    if specimen in CONVOLUTIONS:
        i, o, kh, kw = shape
        own: dict[str, dict[str, Any]] = {
            "dilated": {"dilation": (1, 2)},
            "same": {"stride": 1, "padding": "same"},
            "circular": {"padding_mode": "circular"},
            "reflect": {"padding_mode": "reflect"},
            "grouped": {"groups": 2},
        }
        given = {"stride": (2, 1), "padding": (1, 2), **own.get(specimen, {})}
        return One(nn.Conv2d(i, o, (kh, kw), **given))
    if specimen == "embedding":
        num, dim = shape
        layer = nn.Embedding(num, dim, padding_idx=1)
        with torch.no_grad():
            # A base's padding row need not be zero: pretrained ones rarely are.
            layer.weight[1].normal_()
        return One(layer)
    if specimen == "nf4":
        return _in_four_bits(nn.Linear(shape[0], shape[1]))
    i, o = shape
    rows = {"fused": 3 * o, "fused-all": 3 * o, "fused-unequal": 4 * o}.get(specimen, o)
    return One(nn.Linear(i, rows, bias=specimen != "bare"))


def _in_four_bits(layer: nn.Linear) -> nn.Module:
    """The layer as bitsandbytes holds it in NF4, in a model marked the way transformers marks them."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise NotRun(f"bitsandbytes cannot be imported: {error}") from error
    made = Linear4bit(layer.in_features, layer.out_features, compress_statistics=False)
    made.weight = Params4bit(
        layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    made.bias = layer.bias
    model: Any = One(made)
    model.is_loaded_in_4bit = True
    return model  # type: ignore[no-any-return]


def inputs(case: Case, seed: int = 0) -> Any:
    """The inputs of one call: a tensor, or for a Phi-3 `{"input_ids": (b=2, t=9)}`."""
    g = torch.Generator().manual_seed(2_000 + 97 * case.seed + seed)
    shape = shape_of(case)
    if case.specimen not in SHAPES:
        model: Any = pristine(case)
        vocab = model.config.vocab_size
        ids = torch.randint(0, int(vocab), (2, 9), generator=g)  # (b, t)
        return {"input_ids": ids.to(case.device)}
    if case.specimen in {"embedding", "tied"}:
        ids = torch.randint(0, shape[0], (3, 5), generator=g)
        ids[0, 0] = 1  # the padding index is always asked for
        return ids.to(case.device)
    if case.specimen in CONVOLUTIONS:
        x = torch.randn(2, shape[0], 7, 8, generator=g, dtype=torch.float64)
    else:
        x = torch.randn(3, 4, shape[0], generator=g, dtype=torch.float64)  # (b, t, i)
    return x.to(device=case.device, dtype=getattr(torch, case.dtype))


def call(model: nn.Module, given: Any) -> Tensor:
    """The outputs: a Phi-3's logits `(b, t, vocabulary)`, a layer's own otherwise."""
    if isinstance(given, dict):
        logits: Tensor = model(**given).logits
        return logits
    out: Tensor = model(given)
    return out


def loss(model: nn.Module, given: Any) -> Tensor:
    """A scalar to train on: next-token cross-entropy for a Phi-3, distance to fixed targets otherwise."""
    out = call(model, given)
    if isinstance(given, dict):
        shifted = out[:, :-1].flatten(0, 1).float()  # (b·(t-1), vocabulary)
        return functional.cross_entropy(shifted, given["input_ids"][:, 1:].flatten())
    goal = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return ((out - goal) ** 2).mean()
