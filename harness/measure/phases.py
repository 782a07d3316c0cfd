"""The phases of an adapter's life, each counted alone.

    injection ─ training-forward ─ evaluation-forward ─ training-step ─ save ─ load ─ merge ─ merged-forward

A life is lived twice on two fresh bases: once under the ledger, once under the count of Python calls,
since a dispatch mode makes calls of its own. What is lazy (caches, imports) is warmed before.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from harness.measure.counters import Counters, counting, counting_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from harness.adapter import Adapter, LoraConfig
    from harness.measure.ledger import Ledger

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


def count_phases(
    adapter: Adapter,
    build: Callable[[], nn.Module],
    config: LoraConfig,
    *,
    batch: int = 1,
    sequence: int = 16,
    calls: bool = True,
) -> dict[Phase, Counters]:
    """Counters of every phase that the adapter claims.

    Args:
        adapter: the implementation.
        build: a fresh base, a causal language model, each time; under fake tensors, a fake one.
        config: what to adapt.
        batch: sequences of a batch.
        sequence: tokens of a sequence.
        calls: count Python calls too; meaningless under fake tensors, which make their own.
    """
    found: dict[Phase, Counters] = {}

    @contextmanager
    def counted(phase: Phase, model: nn.Module) -> Iterator[Ledger | None]:
        known = adapter if phase != "injection" else None
        with counting(model, adapter=known, logits_width=vocabulary_of(model)) as count:
            yield count.ledger
        found[phase] = count.result()

    _live(adapter, build(), config, batch=batch, sequence=sequence, meter=counted)
    if calls:

        @contextmanager
        def called(phase: Phase, model: nn.Module) -> Iterator[Ledger | None]:  # noqa: ARG001
            with counting_calls() as count:
                yield None
            found[phase] = replace(found[phase], python_calls=count.count)

        _live(adapter, build(), config, batch=batch, sequence=sequence, meter=called)
    return found


def _live(
    adapter: Any,
    base: nn.Module,
    config: LoraConfig,
    *,
    batch: int,
    sequence: int,
    meter: Callable[[Phase, nn.Module], AbstractContextManager[Ledger | None]],
) -> None:
    """One life, each phase inside `meter(phase, model)`."""
    torch.manual_seed(0)
    given = batch_of(base, batch=batch, sequence=sequence)
    asked = {"input_ids": given["input_ids"]}
    features = adapter.capabilities.features
    merges_in_eval = bool(getattr(adapter, "eval_merges", False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            base(**asked)  # what a model makes on its first call is not the adapter's cost
        with meter("injection", base):
            model = adapter.inject(base, config)
        model.train()
        model(**given)
        with meter("training-forward", model):
            out = model(**given)
        del out
        if not merges_in_eval:
            model.eval()
        with torch.no_grad():
            model(**asked)
            with meter("evaluation-forward", model):
                model(**asked)
        model.train()
        optimizer = optimizer_of(model)
        with meter("training-step", model) as ledger:
            training_step(model, given, optimizer, ledger)
        del optimizer
        with meter("save", model):
            state = adapter.state_dict(model)
        state = {key: value.clone() for key, value in state.items() if hasattr(value, "clone")}
        with meter("load", model):
            adapter.load_state_dict(model, state)
        if "merge" not in features:
            return
        if not merges_in_eval:
            model.eval()
        try:
            with meter("merge", model):
                adapter.merge(model)
        except DataDependentOutputException:
            return  # a merge that looks at its values, before it writes them, cannot do so on shapes
        with torch.no_grad():
            model(**asked)
            with meter("merged-forward", model):
                model(**asked)


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
