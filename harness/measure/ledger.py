"""A dispatch mode that writes down every operation, and every storage that comes and goes.

    model, batch ──▶ opening balance ┐
    each operation ──▶ name, FLOPs   ├──▶ timeline of (storage, ± bytes) ──▶ peak, by kind
    each new storage ──▶ + bytes     │
    its finalizer ──▶ − bytes        ┘

Kinds are given to storages, not to moments, so that one may be learned late: that a tensor was kept
by an optimizer is known when the step is over, and holds for the time before. Sizes are the tensors'
own bytes; an allocator rounds each up (to 512 bytes on CUDA, 64 on the CPU) and a kernel may use
scratch memory that no dispatcher sees. Garbage collection is held off inside, since when it strikes
depends on what ran before; what only a collection would free counts as live.

It works the same on real and on fake tensors, where a storage has a size and no memory.
"""

# ruff: noqa: SLF001 - storages and operators have no public identity
from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

Kind = Literal[
    "base weights",
    "adapters",
    "gradients",
    "optimizer",
    "saved activations",
    "logits",
    "other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_aten = torch.ops.aten
# The CPU's fused attention does the products of the CUDA one; torch's registry knows only the latter.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
# A literal (`torch.tensor(3.0)`) comes into being outside the dispatcher and is first seen here.
_BIRTHS = frozenset({_aten.lift_fresh.default})


class _Life(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows its line in the ledger."""

    __slots__ = ("key", "line")

    key: int
    line: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Counts what is dispatched and what lives while it is entered.

    Attributes:
        operations: how often each operator was dispatched, by its full name.
        flops: floating-point operations by operator, from the shapes.
        allocated_bytes: bytes of all storages that came into being inside.
        births: how many storages came into being by dtype and bytes.
    """

    def __init__(self, *, logits_width: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.allocated_bytes = 0
        self.births: Counter[tuple[torch.dtype, int]] = Counter()
        self._logits_width = logits_width
        self._sizes: list[int] = []
        self._kinds: list[Kind] = []
        self._timeline: list[tuple[int, int]] = []  # (line, ± bytes)
        self._opening: dict[int, int] = {}  # line -> bytes
        self._marks: list[tuple[int, str, str]] = []  # (place in the timeline, stage, operation)
        self._lives: dict[int, _Life] = {}
        self._saved: dict[int, int] = {}
        self._packed: dict[int, int] = {}  # line -> bytes it would have, stored in 4 bits
        self._stage = ""
        self._backward = False

    @contextmanager
    def writing(self) -> Iterator[Ledger]:
        """Write down all that is dispatched inside; garbage collection waits until the exit."""
        with uncollected(), torch.autograd.graph.saved_tensors_hooks(self._save, _same), self:
            try:
                yield self
            finally:
                self._lives.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here: torch may leave out the wrapper that says so each time."""
        return False

    # ---- what the measured code tells ------------------------------------------------------------

    def opening(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Storages that live already, and what they are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._lives:
                line = self._enter_line(storage, kind)
                self._opening[line] = self._sizes[line]

    def label(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what live storages are; weights and adapters stay what they are."""
        for tensor in tensors:
            life = self._lives.get(tensor.untyped_storage()._cdata)
            if life is not None and self._kinds[life.line] not in {"base weights", "adapters"}:
                self._kinds[life.line] = kind

    def pack(self, tensors: Iterable[Tensor], packed: Callable[[int], int]) -> None:
        """Name the weights that `peak(packed=True)` takes as stored in `packed(numel)` bytes.

        What is not live here, such as a weight that an adapter has replaced by a copy, is left out.
        """
        for tensor in tensors:
            life = self._lives.get(tensor.untyped_storage()._cdata)
            if life is not None:
                self._packed[life.line] = packed(tensor.numel())

    def stage(self, name: str, *, backward: bool = False) -> None:
        """From here on, operations belong to the stage of that name."""
        self._stage = name
        self._backward = backward

    # ---- what it learns by itself ----------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,  # the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator and write it down."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # autograd asks a fake tensor for its device: no operation
            return getattr(args[0], "fake_device", None) or func(*args, **kwargs)
        packet = func._overloadpacket
        formula = _FLOPS.get(packet)
        if formula is None and _is_composite(func):
            # Only inference mode brings a composite here whole; take it apart as autograd would.
            with self:
                return func.decompose(*args, **kwargs)
        dense = 0
        fresh = func in _BIRTHS
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            life = self._lives.get(storage._cdata)
            if life is None:
                self._seen(storage, tensor, fresh=fresh)
            elif formula is not None and life.line in self._packed:
                dense += self._sizes[life.line]
        self.operations[str(func)] += 1
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops[str(packet)] += formula(*args, **kwargs, out_val=out)
        if dense:
            self._timeline.append((-1, dense))
        at = len(self._timeline)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            life = self._lives.get(storage._cdata)
            if life is None:
                self._seen(storage, tensor, fresh=True)
            elif storage.nbytes() != self._sizes[life.line]:
                self._resized(storage, life.line)
        if len(self._timeline) > at or dense:
            self._marks.append((at, self._stage, str(packet)))
        if dense:
            self._timeline.append((-1, -dense))
        return out

    def _seen(self, storage: torch.UntypedStorage, tensor: Tensor, *, fresh: bool) -> None:
        kind: Kind = "other"
        if fresh:
            if tensor.ndim > 1 and tensor.shape[-1] == self._logits_width:
                kind = "logits"
            elif self._backward and torch.is_grad_enabled():
                kind = "saved activations"  # only recomputation builds a graph inside backward
        line = self._enter_line(storage, kind)
        if fresh:
            self.allocated_bytes += self._sizes[line]
            self.births[tensor.dtype, self._sizes[line]] += 1
            self._timeline.append((line, self._sizes[line]))
        else:
            self._opening[line] = self._sizes[line]

    def _enter_line(self, storage: torch.UntypedStorage, kind: Kind) -> int:
        line, key = len(self._sizes), storage._cdata
        life = _Life(storage, self._gone)
        life.key, life.line = key, line
        self._lives[key] = life
        self._sizes.append(storage.nbytes())
        self._kinds.append(kind)
        return line

    def _gone(self, life: _Life) -> None:
        if self._lives.get(life.key) is life:
            del self._lives[life.key]
            self._timeline.append((life.line, -self._sizes[life.line]))

    def _resized(self, storage: torch.UntypedStorage, line: int) -> None:
        growth = storage.nbytes() - self._sizes[line]
        self._sizes[line] += growth
        self.allocated_bytes += max(growth, 0)
        self._timeline.append((line, growth))

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        life = self._lives.get(storage._cdata)
        if life is not None and self._kinds[life.line] not in {"base weights", "adapters"}:
            self._saved[life.line] = self._sizes[life.line]
            if self._kinds[life.line] == "other":
                self._kinds[life.line] = "saved activations"
        return tensor

    # ---- what comes out --------------------------------------------------------------------------

    @property
    def saved_bytes(self) -> int:
        """Bytes that the graph kept for the backward pass, each storage once, weights left out."""
        return sum(self._saved.values())

    @property
    def growth(self) -> int:
        """Bytes that came and are still there, less those that were there and have gone.

        What a ring of references alone holds is not there: the collector, off meanwhile, would take it.
        """
        gc.collect()
        return sum(delta for line, delta in self._timeline if line >= 0)

    def peak(self, *, packed: bool = False) -> tuple[dict[Kind, int], str, str]:
        """Live bytes by kind at the highest moment, with its stage and operation.

        With `packed`, the weights named to `pack` count in their packed size, and each product with
        one counts a dense copy of it for as long as it runs.
        """
        saving = {line: self._sizes[line] - size for line, size in self._packed.items()}
        live = sum(self._opening.values()) - (sum(saving.values()) if packed else 0)
        highest = live
        place = 0
        for k, (line, delta) in enumerate(self._timeline, start=1):
            if line < 0 and not packed:
                continue
            live += delta
            if live > highest:
                highest, place = live, k
        kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for line, size in self._opening.items():
            kinds[self._kinds[line]] += size
        for line, delta in self._timeline[:place]:
            if line >= 0:
                kinds[self._kinds[line]] += delta
            elif packed:
                kinds["other"] += delta
        if packed:
            kinds["base weights"] -= sum(saving.values())
        stage, operation = "", ""
        for at, mark, name in self._marks:
            if at >= place:
                break
            stage, operation = mark, name
        return kinds, stage, operation


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage now, and not again before the end."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


_composite: dict[Any, bool] = {}


def _is_composite(func: Any) -> bool:
    known = _composite.get(func)
    if known is None:
        known = bool(
            torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
            )
        )
        _composite[func] = known
    return known
