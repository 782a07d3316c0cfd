"""The trainers that users run, on an injected Phi-3: their own updates, against ones computed by hand.

What is judged is the implementation together with the transformers and TRL that are installed, from
transformers 4.41 and TRL 0.9 on: arguments that a release does not have are left out.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.errors import first_line
from harness.failure import NotRun, fail
from harness.spec import spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from harness.trial import Trial

ACCUMULATED = 4
"""Micro-batches to one update, of one sample each."""


@spec(
    "training/trainer-update",
    claim="One update of transformers' Trainer over accumulated micro-batches MUST be that of the whole "
    "batch, with one mean over all its labels.",
    why="4.48.0 updates four times as far; up to 4.45.2, and where a wrapper hides the number of labels "
    "from the model, short replies weigh more than long ones. The logged loss shows neither.",
    source=(
        "BUGS 114, 116, section 6.5",
        "https://github.com/huggingface/transformers/pull/35651",
        "https://github.com/huggingface/transformers/pull/34191",
        "https://github.com/huggingface/transformers/issues/35438",
    ),
    needs=("training/update-equivalence", "trainable/optimizer-holds-only-lora"),
    cases=(Case(specimen="tiny"),),
    more_cases=(Case(specimen="tiny-gqa"),),
)
def trainer_update(trial: Trial) -> None:
    """Judge the change of every factor under SGD without clipping; rows have 8, 6, 4 and 2 labels."""
    import torch

    from harness import descent, memo, specimen, tolerance

    ids, labels = _batch(trial)
    model = trial.adapted()
    before = trial.snapshot(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with _quietly():
        Trainer, TrainingArguments = _transformers()

        def train() -> None:
            Trainer(
                model=model,
                args=TrainingArguments(**_arguments(trial, TrainingArguments)),
                train_dataset=_rows(ids, labels),
                optimizers=(optimizer, constant),
            ).train()

        if not _takes(trial, model, train):
            return
    after = trial.snapshot(model)

    def whole(given: Any, dtype: torch.dtype) -> Any:
        base = specimen.pristine(trial.case)

        def descend() -> Any:
            equation = descent.Equation(base, before, dtype)
            return equation.descend(given, lr=1.0, loss=lambda out: _mean(out, labels)).factors[-1]

        asked = ("trainer", trial.case.specimen, base, before, given, labels, dtype)
        return memo.kept(descend, *asked)

    truth, rough = whole({"input_ids": ids}, torch.float64), whole({"input_ids": ids}, trial.dtype)
    for name, (start, end, goal, stray) in descent.pairs(before, after, truth, rough):
        budget = tolerance.updates(
            stray - goal, goal - start, end, dtype=trial.dtype, factor_dtype=trial.factor_dtype
        )
        trial.close(end - start, goal - start, budget, f"the Trainer's change of {name}")


@spec(
    "training/trainer-decays-every-factor",
    claim="The optimizer that transformers' Trainer makes SHOULD hold every factor, in the group that "
    "decays.",
    why="The Trainer picks what decays by name: a factor called after a bias or a norm is left out, "
    "and the weight decay of the recipe does nothing.",
    source=("BUGS 111", "https://github.com/axolotl-ai-cloud/axolotl/issues/4010"),
    needs=("training/trainer-update",),
    cases=(Case(specimen="tiny"),),
)
def trainer_decays_every_factor(trial: Trial) -> None:
    """Judge the parameter groups of the Trainer's own AdamW."""
    from harness import storage

    model = trial.inject()
    with _quietly():
        Trainer, TrainingArguments = _transformers()
        settings = _arguments(trial, TrainingArguments)
        args = TrainingArguments(**{**settings, "weight_decay": 0.1})
        made: list[Any] = []
        if not _takes(
            trial, model, lambda: made.append(Trainer(model=model, args=args).create_optimizer())
        ):
            return
    (optimizer,) = made
    decaying = storage.elements(
        p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    )
    for name, parts in trial.factors(model).items():
        for f in parts:
            for kind, factor in (("A", f.A), ("B", f.B)):
                if storage.covered(factor, decaying) != factor.numel():
                    fail(
                        "names",
                        expected="every factor in the optimizer's group with weight decay",
                        actual="one is not",
                        where=f"{kind} of {name}",
                    )


@spec(
    "training/sft-trainer-checkpointing",
    claim="TRL's SFTTrainer with gradient checkpointing MUST give every factor a gradient.",
    why="It is the documented way to train; TRL 0.15.2 to 0.19.1 let the inputs of the checkpoints go "
    "without one when the model came injected, and nothing was trained.",
    source=("BUGS 102, 100", "https://github.com/huggingface/trl/issues/3785"),
    needs=("training/trainer-update",),
    features=("gradient_checkpointing",),
    cases=(Case(specimen="tiny"),),
)
def sft_trainer_checkpointing(trial: Trial) -> None:
    """Judge that one step of SGD moves every factor."""
    import torch

    from harness import descent

    with _quietly():
        trl = _trl()
        ids, labels = _batch(trial)
        model = trial.adapted()
        if not hasattr(model, "gradient_checkpointing_enable") or not hasattr(model, "config"):
            trial.notes.append("the returned model has no gradient_checkpointing_enable and config")
            return
        before = trial.snapshot(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        settings = _arguments(trial, trl.SFTConfig)
        settings |= _known(
            trl.SFTConfig,
            gradient_accumulation_steps=1,
            gradient_checkpointing=True,
            max_length=64,
            max_seq_length=64,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        from datasets import Dataset

        rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})

        def train() -> None:
            trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(**settings),
                train_dataset=rows,
                data_collator=_stacked,
                optimizers=(optimizer, constant),
                **_known(trl.SFTTrainer.__init__, processing_class=_tokens(), tokenizer=_tokens()),
            ).train()

        if not _takes(trial, model, train):
            return

    for name, (start, end) in descent.pairs(before, trial.snapshot(model)):
        if torch.equal(start, end):
            fail("no-effect", expected="a step to move every factor", actual="none", where=name)


def _takes(trial: Trial, model: nn.Module, act: Callable[[], object]) -> bool:
    """Let a trainer act; False, and noted, where it raises on a wrapper of the implementation's own.

    Such a wrapper promises to be called like the base, and no more. Trainers go by more: they write to its
    `config`, and take its `base_model` to be one without a head. Nothing is wrong in silence.
    """
    from transformers import PreTrainedModel

    try:
        act()
    except Exception as error:
        if isinstance(model, PreTrainedModel) or type(model).__module__.startswith("peft."):
            raise
        trial.notes.append(f"the trainer refuses the returned model: {first_line(error)}"[:200])
        return False
    return True


def _transformers() -> tuple[Any, Any]:
    """`Trainer` and `TrainingArguments`; `NotRun` where what is installed does not go together."""
    try:
        import datasets  # noqa: F401  # the Trainer imports it where it is installed
        from transformers import Trainer, TrainingArguments
    except (ImportError, RuntimeError) as error:
        raise NotRun(f"transformers' Trainer cannot be imported: {first_line(error)}") from error
    return Trainer, TrainingArguments


def _trl() -> Any:
    """TRL, likewise."""
    try:
        import trl
        from trl import SFTConfig, SFTTrainer  # noqa: F401  # both are made when first asked for
    except (ImportError, RuntimeError) as error:
        raise NotRun(f"TRL cannot be imported: {first_line(error)}") from error
    return trl


def _batch(trial: Trial) -> tuple[Tensor, Tensor]:
    """Token ids `(b=4, t=9)` and labels: the prompt's share is left out, more in each row."""
    import torch

    one, other = (trial.inputs(seed=k)["input_ids"] for k in (0, 1))
    ids = torch.cat([one, other])[:ACCUMULATED]
    labels = ids.clone()
    for row in range(ACCUMULATED):
        labels[row, : 1 + 2 * row] = -100
    return ids, labels


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, one mean over all labels of the batch."""
    from torch.nn import functional

    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _rows(ids: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    import torch

    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def _arguments(trial: Trial, kind: Any) -> dict[str, Any]:
    """One update of `ACCUMULATED` micro-batches, plain SGD's way: no clipping, no saving, no logging."""
    return _known(
        kind,
        output_dir=str(trial.folder()),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=trial.case.device == "cpu",
        bf16=False,
        seed=0,
    )


def _known(target: Any, **given: Any) -> dict[str, Any]:
    """Those of the arguments that the installed release takes."""
    import inspect

    taken = inspect.signature(target).parameters
    return {name: value for name, value in given.items() if name in taken}


def _tokens() -> Any:
    """A tokenizer to hand over: the rows are tokenised already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<unk>")),  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what trainers print and log; what they raise is raised."""
    import logging

    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
