"""The phases of an adapter's life, each counted alone.

    injection ─ training-forward ─ evaluation-forward ─ training-step ─ save ─ load ─ merge ─ merged-forward

What is lazy (caches, imports, what torch keeps of each operation that a ledger sees) is warmed in a
life before, whose counters nobody is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from harness.measure.counters import Counters, counting, counting_calls

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from harness.adapter import Adapter, LoraConfig
    from harness.measure.ledger import Kind, Ledger

Phase = Literal[
    "injection",
    "training-forward",
    "evaluation-forward",
    "training-step",
    "save",
    "load",
    "merge",
    "merged-forward",
]
PHASES: tuple[Phase, ...] = get_args(Phase)

Batch = dict[str, "Tensor"]
Work = Callable[["Ledger | None"], Any]
"""What a phase does; it tells a ledger, where there is one, what is what."""


class Meter(Protocol):
    """Runs a phase's work on a model, measures what it likes, and returns what the work returns."""

    def __call__(self, phase: Phase, model: nn.Module, work: Work, /) -> Any:
        """Run it."""


def batch_of(model: nn.Module, *, batch: int, sequence: int, seed: int = 0) -> Batch:
    """Random tokens that are their own labels, `(b, t)`, on the model's device."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, sequence), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over what trains, its state in place as from the second step on.

    `foreach` on every device, as torch itself chooses on a GPU.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)  # the weight decay of a step that is none
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def training_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    ledger: Ledger | None = None,
) -> Tensor:
    """Forward, backward, optimizer step; tells a ledger which is which. Returns the loss."""
    if ledger is not None:
        ledger.opening(_state(optimizer), "optimizer")
        ledger.stage("forward")
    out = model(**batch)
    loss: Tensor = out.loss
    if ledger is not None:
        ledger.label([out.logits], "logits")
        ledger.stage("backward", backward=True)
    del out  # a trainer keeps the loss alone
    loss.backward()  # type: ignore[no-untyped-call]
    if ledger is not None:
        ledger.label((p.grad for p in model.parameters() if p.grad is not None), "gradients")
        ledger.stage("optimizer step")
    optimizer.step()
    if ledger is not None:
        ledger.label(_state(optimizer), "optimizer")
    optimizer.zero_grad(set_to_none=True)
    return loss


def count_step(
    model: nn.Module, batch: Mapping[str, Any], *, adapter: Adapter | None = None
) -> Counters:
    """Counters of one training step in its steady state."""
    optimizer = optimizer_of(model)
    model.train()
    with counting(model, adapter=adapter, logits_width=vocabulary_of(model)) as count:
        training_step(model, batch, optimizer, count.ledger)
    return count.result()


def settle_torch() -> None:
    """Let torch patch its optimizers now, as it does for good once anything in a process is compiled.

    Importing PEFT compiles something; a count of Python calls would hang on whether it was.
    """
    with suppress(RuntimeError):  # an old torch that knows no compiler for this Python
        torch.compile(lambda: None, backend="eager")


def count_phases(
    adapter: Adapter,
    build: Callable[[], nn.Module],
    config: LoraConfig,
    *,
    batch: int = 1,
    sequence: int = 16,
) -> dict[Phase, Counters]:
    """Counters of every phase that the adapter claims.

    Args:
        adapter: the implementation.
        build: a fresh base, a causal language model, each time; under fake tensors, a fake one.
        config: what to adapt.
        batch: sequences of a batch.
        sequence: tokens of a sequence.
    """
    found: dict[Phase, Counters] = {}
    settle_torch()

    def counted(phase: Phase, model: nn.Module, work: Work) -> Any:
        found[phase], out = count(phase, model, work)
        return out

    for _ in ("to warm what is lazy", "to be told"):
        base = build()
        live(adapter, base, config, batch_of(base, batch=batch, sequence=sequence), counted)
    return found


def count(
    phase: Phase, model: nn.Module, work: Work, *, trained: Kind = "adapters"
) -> tuple[Counters, Any]:
    """One phase's counters, and what its work returns."""
    if phase == "injection":
        trained = "base weights"  # what trains before it is the base
    with (
        counting(model, logits_width=vocabulary_of(model), trained=trained) as counters,
        counting_calls() as calls,
    ):
        out = work(counters.ledger)
    counters.calls = calls.count
    return counters.result(), out


def live(adapter: Any, base: nn.Module, config: LoraConfig, given: Batch, meter: Meter) -> None:
    """One life of an adapter on a bare base, each phase by `meter(phase, model, work)`."""
    torch.manual_seed(0)
    asked = {"input_ids": given["input_ids"]}
    features = adapter.capabilities.features
    merges_in_eval = bool(getattr(adapter, "eval_merges", False))

    def inject(ledger: Ledger | None) -> nn.Module:
        made: nn.Module = adapter.inject(base, config)
        if ledger is not None:
            ledger.label((p for p in made.parameters() if p.requires_grad), "adapters")
        return made

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            base(**asked)  # what a model makes on its first call is not the adapter's cost
        model = meter("injection", base, inject)
        train(model, given, meter, merges_in_eval=merges_in_eval)
        state = meter("save", model, lambda _: adapter.state_dict(model))
        state = {key: value.clone() for key, value in state.items() if hasattr(value, "clone")}
        meter("load", model, lambda _: adapter.load_state_dict(model, state))
        if "merge" not in features:
            return
        if not merges_in_eval:
            model.eval()
        try:
            meter("merge", model, lambda _: adapter.merge(model))
        except DataDependentOutputException:
            return  # a merge that looks at its values, before it writes them, cannot do so on shapes
        evaluate(model, given, meter, phase="merged-forward")


def train(model: nn.Module, given: Batch, meter: Meter, *, merges_in_eval: bool = False) -> None:
    """The phases of a model that trains, with LoRA or in full; left in train mode."""
    model.train()
    model(**given)
    meter("training-forward", model, lambda _: model(**given))
    if not merges_in_eval:
        model.eval()
    evaluate(model, given, meter)
    model.train()
    optimizer = optimizer_of(model)

    def step(ledger: Ledger | None) -> None:
        training_step(model, given, optimizer, ledger)

    meter("training-step", model, step)


def evaluate(
    model: nn.Module, given: Batch, meter: Meter, *, phase: Phase = "evaluation-forward"
) -> None:
    """A forward that keeps no graph, in the mode that the model is in."""

    def forward(_: Ledger | None) -> None:
        with torch.no_grad():
            model(input_ids=given["input_ids"])

    forward(None)
    meter(phase, model, forward)


def count_base_forward(model: nn.Module, *, batch: int = 1, sequence: int = 16) -> Counters:
    """Counters of the bare base's evaluation forward, to hold a merged one against."""
    asked = {"input_ids": batch_of(model, batch=batch, sequence=sequence)["input_ids"]}
    model.eval()
    with torch.no_grad():
        model(**asked)
        with counting(model, logits_width=vocabulary_of(model)) as count:
            model(**asked)
    return count.result()


def checkpoint_bytes(state: Mapping[str, object]) -> int:
    """Bytes of a checkpoint's tensors, as a file holds them: numbers times their size, no header."""
    return sum(
        value.numel() * value.element_size()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def vocabulary_of(model: nn.Module) -> int | None:
    """The logits' width, unless another tensor of the model is as wide."""
    config = getattr(model, "config", None)
    width = getattr(config, "vocab_size", None)
    if width is None or width in {m.out_features for m in _inner(model)}:
        return None
    return int(width)


def _inner(model: nn.Module) -> list[torch.nn.Linear]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
