"""TRL's `SFTTrainer`, driving an injected model of any implementation.

The training loop is the trainer's own. What differs is what a checkpoint holds (the adapter, through
the implementation's own `state_dict`, where a `PreTrainedModel` would write its whole base: see
`AdapterTrainer`), and how evaluation is entered where `eval()` merges (`harness.injection`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from harness import checkpoint, injection
from harness.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from harness.adapter import Adapter
    from harness.recipe import Recipe

FALLBACKS: dict[str, str] = {"eval_strategy": "evaluation_strategy", "max_length": "max_seq_length"}
"""Today's names with those of older releases, where the installed one has only the older."""


def settings(recipe: Recipe, output: Path, *, device: str) -> tuple[SFTConfig, list[str]]:
    """`training_config` as the installed `SFTConfig`, with notes on what had to be said otherwise.

    Raises UsageError on a key that the installed releases lack and on what they refuse.
    """
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    given, notes = dict(recipe.training_config), []
    wanted = given.pop("output_dir", None)
    if wanted is not None:
        notes.append(f"training_config.output_dir {wanted!r} is recorded; the run lies in {output}")
    if "warmup_ratio" in given and "warmup_steps" in given:
        notes.append(
            f"training_config.warmup_ratio {given.pop('warmup_ratio')} gives way to "
            f"warmup_steps={given['warmup_steps']}"
        )
    if "warmup_ratio" in given and "warmup_ratio" not in known:
        # transformers 5 dropped warmup_ratio: a warmup_steps below 1 is the same fraction.
        given["warmup_steps"] = given.pop("warmup_ratio")
        notes.append(
            f"training_config.warmup_ratio is passed as warmup_steps={given['warmup_steps']}: "
            "this transformers takes a fraction there"
        )
    for name, older in FALLBACKS.items():
        if name in given and name not in known and older in known:
            given[older] = given.pop(name)
            notes.append(f"training_config.{name} is passed as {older}, its name in this release")
    if given.get("do_eval") is False and "eval_strategy" not in given:
        given["eval_strategy"] = "no"
    # Explicit, because TRL's own defaults change between releases.
    given.setdefault("bf16", False)
    given.setdefault("gradient_checkpointing", False)
    given.setdefault("logging_nan_inf_filter", False)  # it tells a loss that is NaN as 0
    given["use_cpu"] = device == "cpu"
    given["output_dir"] = str(output)
    given["disable_tqdm"] = True  # the harness has its own bar
    if unknown := sorted(given.keys() - known):
        raise UsageError(
            f"training_config.{unknown[0]}: the installed trl and transformers have no such setting; "
            "remove it, or install releases that do"
        )
    if device == "cpu" and str(given.get("optim", "")).startswith("paged_"):
        raise UsageError(
            f"training_config.optim: {given['optim']} pages a GPU's memory, and this run is on the CPU; "
            "--set training_config.optim=adamw_torch"
        )
    try:
        return SFTConfig(**given), notes
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f"training_config: {first_line(error)}") from error


class AdapterTrainer(SFTTrainer):  # type: ignore[misc]  # trl is published without types
    """`SFTTrainer` whose checkpoints hold the adapter, and which evaluates unmerged."""

    def __init__(self, *, adapter: Adapter, injected: nn.Module, **given: Any) -> None:
        self.adapter, self.injected = adapter, injected
        super().__init__(**given)

    def check_settings(self) -> None:
        """Make an optimizer and a schedule for nobody: what the settings get wrong is raised here.

        Met in `train`, it would look like the implementation's doing.
        """
        made, given = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if given.keys() & {"params", "model", "optimizer_dict"}:
            return  # one of those that are made for a model
        optimizer = made([torch.nn.Parameter(torch.zeros(1))], **given)
        self.create_scheduler(num_training_steps=max(self.args.max_steps, 1), optimizer=optimizer)
        self.lr_scheduler = None  # `train` makes its own

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        """Write the adapter alone; `state_dict`, the whole model's, is not asked for."""
        del state_dict
        folder = Path(output_dir or self.args.output_dir)
        checkpoint.write(self.adapter.state_dict(self.injected), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """The second stage of the two-stage load, into the live tensors."""
        del model
        injection.load(self.adapter, self.injected, Path(resume_from_checkpoint))

    def stand(self, folder: Path) -> None:
        """Be where a checkpoint was written, with nothing left to train."""
        injection.load(self.adapter, self.injected, folder)
        self.create_optimizer()
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))

    def _load_best_model(self) -> None:
        """The best checkpoint's adapter."""
        injection.load(self.adapter, self.injected, Path(self.state.best_model_checkpoint))


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Inside, a trainer may wrap `forward`; on leaving, every module has its own again.

    Accelerate leaves a model that trained in mixed precision under autocast, with float32 outputs,
    and TRL leaves its fused loss: what is proved is proved on the model as anyone else loads it.
    """
    before = {module: vars(module).get("forward") for module in model.modules()}
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward  # the instance's own, as it was


class Log(TrainerCallback):  # type: ignore[misc]  # transformers is skipped by mypy
    """Every entry of the trainer's log: a line on the console and a line of JSON in the file.

    `started` is called after the first step, `heard` with the trainer's state when it logs; `rate` is
    the highest learning rate of any step.
    """

    def __init__(
        self,
        path: Path,
        *,
        append: bool,
        heard: Callable[[Any], None] = lambda _: None,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.heard, self.started = path, heard, started
        self.told, self.begun, self.rate = -math.inf, False, 0.0
        self.bar: Any = None
        if not append:
            path.write_text("", encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, where someone is looking."""
        del args, control
        from tqdm import tqdm

        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="  training",
            ncols=min(88, shutil.get_terminal_size().columns),
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Note the rate that the step will have: it is logged for some steps only."""
        del args, state, control
        self.rate = max(self.rate, *(float(group["lr"]) for group in optimizer.param_groups))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        del args, control
        if not self.begun:
            self.begun = True
            self.started()
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        del args, state, control
        self.bar.close()
        self.bar = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the entry down, and say it."""
        del args, control
        entry = {"step": state.global_step, **{key: _plain(value) for key, value in logs.items()}}
        with checkpoint.told(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if time.monotonic() - self.told >= 1:  # the whole report is written: not for every step
            self.told = time.monotonic()
            self.heard(state)
        if line := _line(state.global_step, state.max_steps, entry):
            (self.bar.write if self.bar is not None else print)(line)


def _line(step: int, steps: int, entry: Mapping[str, Any]) -> str:
    """One entry in words; nothing for the summary at the end, which the table tells."""
    where = f"  step {step:>{len(str(steps))}}/{steps}" if steps else "  before training"
    if "eval_loss" in entry:
        return f"{where}  eval loss {entry['eval_loss']:.4f}"
    if "loss" not in entry:
        return ""
    parts = [f"loss {entry['loss']:.4f}"]
    if "learning_rate" in entry:
        parts.append(f"learning rate {entry['learning_rate']:.2e}")
    if "grad_norm" in entry:
        parts.append(f"gradient {entry['grad_norm']:.3f}")
    return f"{where}  {'  '.join(parts)}"


def _plain(value: Any) -> Any:
    """A number that JSON has; the trainer hands some over as strings and tensors."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
