"""One implementation's fine-tuning, step by step: base, injection, training, proofs.

    base ── inject ── SFTTrainer ── adapter.pt, adapter.safetensors ── proofs
                          │                        │
                   log, checkpoints        harness.reload, a fresh process

`harness.run` drives these steps and writes the report.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import recipe as recipes
from harness import run_folder
from harness.console import note
from harness.errors import UsageError, first_line
from harness.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from harness.adapter import Adapter, LoraConfig
    from harness.chat import Exchange
    from harness.proof import Proof
    from harness.recipe import Recipe

PROBED, PROBED_TOKENS = 4, 64
"""How much text the logits are compared on: conversations, and tokens of each."""

SAME = "the data is one conversation, which is trained on as well: give more, or a directory of two files"
"""Why an evaluation loss cannot be judged."""


class Run:
    """What one run holds while it lasts."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Load the base and put LoRA in. Raises UsageError on what does not fit."""
        import torch

        from harness import base, chat, checkpoint, folded, injection, proof, registry, window

        self.request = request
        self.here = Path.cwd()  # an implementation may change directory
        self.recipe: Recipe = recipes.restored(request["recipe"])
        self.folder = RunFolder(path=Path(request["folder"]))
        self.adapter: Adapter = registry.resolve(request["adapter"])
        settings = self.recipe.model
        self.device = base.device(settings)
        injection.check_claims(self.adapter, self.recipe)
        base.hold_to(request["budget"], self.device)
        self.seed = int(self.recipe.training_config["seed"])
        torch.manual_seed(self.seed)
        self.base = base.load(settings)
        self.quantized = bool(settings["load_in_4bit"])
        self.tokenizer = chat.tokenizer(settings["name"])
        chat.check_vocabulary(self.tokenizer, self.base.config.vocab_size)
        self.train, self.eval, said = chat.splits(self.recipe.data["name"])
        self.alike = self.train is self.eval
        self.lengths = window.lengths(self.train, self.tokenizer)
        if size := self.recipe.training_config.get("max_length"):
            window.check(self.lengths, size)
        self.config: LoraConfig
        self.config, self.notes = injection.fitted(
            self.base, self.recipe.lora_config(), partial=bool(request["partial"])
        )
        self.notes += [*request.get("notes", ()), *said]
        if self.quantized and self.device == "cpu":
            self.notes.append(base.KEPT_UNPACKED)
        if settings["gradient_checkpointing"]:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self.marks = checkpoint.digests(self.base.state_dict())
        self.expected = proof.expected_counts(self.base, self.config)
        self.whole = proof.whole_counts(self.base, self.config)
        self.shells = folded.shells(self.base, self.config)
        self.model: nn.Module = self.base
        self.injecting = False
        self.steps = 0
        self.moved = True  # whether any step had a learning rate
        self.logged: Callable[[], None] = lambda: None
        self.history: list[dict[str, Any]] = []

    def inject(self) -> None:
        """LoRA into the base, by the implementation, from the run's seed."""
        import torch

        from harness import injection

        torch.manual_seed(self.seed)
        self.injecting = True
        self.model = self.adapter.inject(self.base, self.config)
        injection.hold(self.model, self.adapter)
        if self.request["start"]:
            with contextlib.chdir(self.here):
                injection.load(self.adapter, self.model, Path(self.request["start"]))

    def fit(self) -> list[Proof]:
        """Train with SFTTrainer; write the adapter; prove what the trainer alone can show."""
        from harness import checkpoint, injection, losses, proof
        from harness.trainer import own_forwards

        with own_forwards(self.model):
            trainer, before, after = self._train()
        checkpoint.write(self.adapter.state_dict(self.model), self.folder.path)
        self.history = list(trainer.state.log_history)
        self.steps = trainer.state.global_step
        injection.evaluating(self.model, self.adapter)
        went_down = losses.loss_went_down(losses.curve(self.history, "loss"), self._reach())
        return [
            proof.only_lora_trains(
                self.model, self.adapter, self.config, self.expected, self.whole
            ),
            proof.optimizer_holds(self.model, trainer.optimizer),
            proof.checkpoint_is_whole(self.model, self.marks, self.folder.path, moved=self.moved),
            went_down,
            losses.eval_loss_went_down(
                before,
                after,
                SAME if self.alike else "" if self.moved else proof.STILL,
                learned=went_down.outcome != "failed",
            ),
            proof.base_unchanged(self.marks, self.model),
        ]

    def curves(self) -> dict[str, Any]:
        """The losses so far, for the report."""
        from harness.losses import curve

        kinds = ("loss", "eval_loss", "learning_rate")
        return {"steps": self.steps} | {kind: curve(self.history, kind) for kind in kinds}

    def _note(self, *notes: str) -> None:
        """Note what is known only now, when the others have been told."""
        self.notes += notes
        note(*notes)

    def _heard(self, state: Any) -> None:
        """Keep up with the trainer: called whenever it logs."""
        self.steps, self.history = state.global_step, list(state.log_history)
        self.logged()

    def _reach(self) -> float:
        """How far the run's steps can lower the loss; not known of another optimizer than Adam."""
        from harness import losses

        if "adam" not in str(self.recipe.training_config.get("optim", "adamw_torch")):
            return math.inf
        return losses.reach(self.history, sum(self.expected.values()))

    def _train(self) -> tuple[Any, float | None, float | None]:
        """The trainer, done, and the evaluation loss before and after, where the recipe evaluates."""
        from harness import checkpoint, losses

        last = self._last()
        before = after = None
        trainer = self._trainer(append=last is not None)
        evaluates = self.recipe.training_config.get("do_eval", True)
        self._heed_window(trainer, evaluates=evaluates)
        if evaluates:
            before = _eval_loss(trainer) if last is None else self._first_eval()
        with checkpoint.told(self.folder.path):
            try:
                if last is not None and 0 < trainer.args.max_steps <= _step(last):
                    trainer.stand(last)
                else:
                    trainer.train(resume_from_checkpoint=str(last) if last else None)
            except KeyboardInterrupt:
                self.steps = trainer.state.global_step
                if self.steps:
                    trainer._save_checkpoint(trainer.model, None)  # noqa: SLF001  # its own way
                raise
        rates = [rate for _, rate in losses.curve(trainer.state.log_history, "learning_rate")]
        self.moved = any((self.log.rate, *rates)) or (last is not None and not rates)
        if evaluates:
            told = dict(losses.curve(trainer.state.log_history, "eval_loss"))
            last_step = trainer.state.global_step
            after = told[last_step] if last_step in told else _eval_loss(trainer)
        return trainer, before, after

    def _heed_window(self, trainer: Any, *, evaluates: bool) -> None:
        """Note what the window cuts. Raises UsageError where that leaves nothing to learn from."""
        from harness import window

        rows = len(trainer.train_dataset)
        self._note(*window.told(self.lengths, rows, window.of(trainer.args), "train"))
        if evaluates:
            rows, lengths = len(trainer.eval_dataset), window.lengths(self.eval, self.tokenizer)
            same = window.of(trainer.args, evaluating=True)
            self._note(*window.told(lengths, rows, same, "evaluate"))

    def _last(self) -> Path | None:
        """The checkpoint to go on from. Raises UsageError on one that is damaged."""
        from harness import checkpoint

        if not self.request["resume"]:
            return None
        last = self.folder.last_checkpoint()
        if last is None:
            self._note("--resume: the run has no checkpoint yet: it starts over")
            return None
        checkpoint.check_whole(last)
        self.folder.rewind(_step(last))
        return last

    def _first_eval(self) -> float | None:
        """The loss before training, from the log of the run that is gone on with."""
        entries = self.folder.entries()
        found = (e["eval_loss"] for e in entries if "eval_loss" in e and e["step"] == 0)
        return next(map(float, found), None)

    def _trainer(self, *, append: bool) -> Any:
        """TRL's trainer on the injected model, with the harness's log.

        Raises UsageError on settings that the trainer refuses, and where what they name is missing.
        """
        import peft
        from transformers import PreTrainedModel
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        from harness.trainer import AdapterTrainer, Log, settings

        config, notes = settings(self.recipe, self.folder.checkpoints, device=self.device)
        self._note(*notes)
        known = isinstance(self.model, PreTrainedModel | peft.PeftModel)
        kwargs = config.gradient_checkpointing_kwargs or {}
        if config.gradient_checkpointing and kwargs.get("use_reentrant", False):
            # Reentrant checkpointing drops gradients where a segment's inputs need none.
            self.base.enable_input_require_grads()
        self.log = Log(
            self.folder.log,
            append=append,
            heard=self._heard,
            started=lambda: run_folder.forget(self.folder),
        )
        try:
            trainer = AdapterTrainer(
                adapter=self.adapter,
                injected=self.model,
                # A wrapper promises nothing but to be called like the base; the base it has in it is
                # what the trainer knows how to handle.
                model=self.model if known else self.base,
                args=config,
                train_dataset=self.train,
                eval_dataset=self.eval,
                processing_class=self.tokenizer,
                callbacks=[self.log],
            )
            trainer.check_settings()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UsageError(f"training_config: {first_line(error)}") from error
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask of one batch of evaluation text, and the trained model's logits on it."""
        from safetensors.torch import save_file

        from harness import reload

        self.tokenizer.padding_side = "right"
        texts = [
            self.tokenizer.apply_chat_template(self.eval[k]["messages"], tokenize=False)
            for k in range(min(PROBED, len(self.eval)))
        ]
        batch = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=PROBED_TOKENS,
            add_special_tokens=False,
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = reload.probe(self.model, ids, mask).cpu()
        save_file({"ids": ids, "mask": mask, "logits": logits}, self.folder.path / reload.PROBE)
        return ids, mask, logits

    def exchanges(self, count: int) -> list[Exchange]:
        """Greedy replies to the first conversations of the evaluation split."""
        from harness import chat

        asked, _ = chat.prompts(self.eval.select(range(min(count, len(self.eval)))))
        return chat.exchanges(
            self.model, self.tokenizer, asked, int(self.recipe.data["max_new_tokens"])
        )

    def answers(self) -> dict[str, Any]:
        """What the model answers now: to the sample prompt, and how often word for word as expected."""
        from harness import chat

        data = self.recipe.data
        rows = self.eval.select(range(min(int(data["match_examples"]), len(self.eval))))
        asked, expected = chat.prompts(rows)
        said = chat.replies(self.model, self.tokenizer, asked, int(data["max_new_tokens"]))
        prompt = data.get("prompt") or asked[0][-1]["content"]
        first = chat.reply(self.model, self.tokenizer, prompt, int(data["max_new_tokens"]))
        return {
            "prompt": prompt,
            "reply": first if data.get("prompt") else said[0],
            "expected": None if data.get("prompt") else expected[0],
            "asked": len(rows),
            "matched": round(chat.exact_match(said, expected) * len(rows)),
        }

    def free(self) -> None:
        """Give the card's memory back; the model is gone after this."""
        import gc

        import torch

        del self.model, self.base
        gc.collect()
        torch.cuda.empty_cache()


def _eval_loss(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_loss"])


def _step(folder: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])
