"""Recipes: the model, the data, `training_config` and `peft_config` of one fine-tuning run.

A recipe is a TOML file of four tables, shipped in `harness/recipes/` or the user's own:

    [model]            which base, and how it is loaded
    [data]             which conversations, and what is asked of the model before and after
    [training_config]  keys of TRL's `SFTConfig` (and so of transformers' `TrainingArguments`)
    [peft_config]      keys of PEFT's `LoraConfig`

Nothing heavy is imported here: a recipe is read, checked and listed without torch.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.adapter import LoraConfig
from harness.errors import UsageError
from harness.settings import (
    ATTENTION,
    BOOLEAN,
    CHECKPOINTING,
    DEFAULTS,
    DTYPES,
    KEYS,
    NAMES_LIST,
    NUMBER,
    RENAMED,
    SECTIONS,
    TABLE,
    WHOLE,
    WORD,
    Section,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ("quick", "model-card", "fine-training-script", "lora-notebook", "qlora-notebook")
"""The shipped recipes; the first is the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One fine-tuning run's settings, checked; see the module for the four tables.

    `notes` says what was read under another name than it was written.
    """

    name: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    training_config: Mapping[str, Any]
    peft_config: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain tables, ready for JSON."""
        return {"name": self.name} | {name: dict(getattr(self, name)) for name in SECTIONS}

    def lora_config(self) -> LoraConfig:
        """`peft_config` as the harness's `LoraConfig`. Raises UsageError on a value out of range."""
        given = dict(self.peft_config)
        given.pop("task_type")
        names = given["target_modules"]
        given["target_modules"] = names if names == "all-linear" else tuple(_listed(names))
        given["modules_to_save"] = tuple(given["modules_to_save"])
        if "enable_lora" in given:
            given["enable_lora"] = _parts(given["enable_lora"])
        try:
            return LoraConfig(**given)
        except (TypeError, ValueError) as error:
            raise UsageError(f"peft_config.{error}") from error


def _parts(table: Mapping[str, Any]) -> dict[str, tuple[tuple[int, bool], ...]]:
    """`enable_lora` as the config has it. Raises UsageError on what is not pairs."""
    try:
        found = {
            name: tuple((rows, wanted) for rows, wanted in parts) for name, parts in table.items()
        }
    except (TypeError, ValueError):
        found = {"": ((None, None),)}
    pairs = [pair for parts in found.values() for pair in parts]
    if not all(_is(WHOLE, rows) and rows > 0 and _is(BOOLEAN, on) for rows, on in pairs):
        raise UsageError(
            "peft_config.enable_lora: must give each module its parts as pairs of rows and whether to "
            "adapt them, say {qkv_proj = [[64, true], [64, false], [64, true]]}"
        )
    return found


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or in that TOML file, with `section.key=value` overrides applied.

    Raises UsageError on an unknown recipe, an unreadable file, an unknown section or key (naming
    the nearest known one), and on a value of the wrong kind or out of range.
    """
    tables = _read(name_or_path)
    notes: list[str] = []
    merged: dict[Section, dict[str, Any]] = {name: dict(DEFAULTS[name]) for name in SECTIONS}
    for title, table in tables.items():
        section = _section(title, name_or_path)
        if not isinstance(table, Mapping):
            raise UsageError(f"recipe {name_or_path}: {title} must be a table, written [{title}]")
        for key, value in table.items():
            merged[section][_key(section, key, notes)] = value
    notes += _overridden(merged, overrides)
    _check(merged)
    model = merged["model"]["name"]
    if name_or_path == NAMES[0] and model not in {"tiny", "tiny-gqa"}:
        training = merged["training_config"]
        notes.append(
            f"recipe {NAMES[0]}: is made for tiny, and its learning rate is {training['learning_rate']:g}, "
            f"its window {training['max_length']} tokens here; --recipe model-card is Phi-3's"
        )
    name = name_or_path if name_or_path in NAMES else Path(name_or_path).stem
    recipe = _made(name, merged, tuple(dict.fromkeys(notes)))
    recipe.lora_config()
    return recipe


def restored(tables: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `as_dict` was taken of, with overrides. Raises UsageError where it is not one."""
    merged: dict[Section, dict[str, Any]] = {
        name: dict(DEFAULTS[name] | tables.get(name, {})) for name in SECTIONS
    }
    notes = _overridden(merged, overrides)
    _check(merged)
    return _made(str(tables.get("name", "")), merged, tuple(notes))


def _made(name: str, tables: dict[Section, dict[str, Any]], notes: tuple[str, ...] = ()) -> Recipe:
    return Recipe(
        name=name,
        model=tables["model"],
        data=tables["data"],
        training_config=tables["training_config"],
        peft_config=tables["peft_config"],
        notes=notes,
    )


def _read(name_or_path: str) -> dict[str, Any]:
    """The tables of a shipped recipe or of the user's own TOML file."""
    path = Path(name_or_path)
    try:
        there = path.is_file()
    except OSError as error:  # a name that no disk takes
        raise UsageError(
            f"recipe {name_or_path[:60]}…: {error.strerror}; shipped are {', '.join(NAMES)}"
        ) from error
    if name_or_path in NAMES:
        text = files("harness.recipes").joinpath(f"{name_or_path}.toml").read_text("utf-8")
    elif path.suffix == ".toml" or there:
        try:
            text = path.read_text("utf-8-sig")
        except FileNotFoundError:
            raise UsageError(
                f"recipe {path}: no such file; shipped are {', '.join(NAMES)}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {path}: cannot be read as UTF-8 text ({error})") from error
    else:
        raise UsageError(
            f"recipe {name_or_path!r}: unknown{_nearest(name_or_path, NAMES)}; "
            f"shipped are {', '.join(NAMES)}, or give the path of a .toml file"
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name_or_path}: not valid TOML: {error}") from error


def _section(title: str, source: str) -> Section:
    """The section of that title. Raises UsageError on one that nobody knows."""
    for section in SECTIONS:
        if title == section:
            return section
    raise UsageError(
        f"{source}: unknown section {title!r}{_nearest(title, SECTIONS)}; "
        f"known are {', '.join(SECTIONS)}"
    )


def _key(section: Section, key: str, notes: list[str]) -> str:
    """A key under today's name. Raises UsageError on one that nobody knows."""
    if new := RENAMED.get((section, key)):
        notes.append(f"{section}.{key} is read as {section}.{new}, its name today")
        return new
    if key in KEYS[section]:
        return key
    elsewhere = [other for other in SECTIONS if key in KEYS[other]]
    hint = _nearest(key, KEYS[section]) or (
        f"; it belongs to [{elsewhere[0]}]" if elsewhere else ""
    )
    raise UsageError(
        f"{section}.{key}: unknown key{hint or '; known are ' + ', '.join(KEYS[section])}"
    )


def _overridden(merged: dict[Section, dict[str, Any]], overrides: Sequence[str]) -> list[str]:
    """Put the values of `section.key=value` in their places; returns notes on the names."""
    notes: list[str] = []
    for override in overrides:
        section, key, value = _override(override, notes)
        merged[section][key] = value
    return notes


def _override(text: str, notes: list[str]) -> tuple[Section, str, Any]:
    """`section.key=value` taken apart; a value that is not TOML is a plain word."""
    path, equals, value = text.partition("=")
    title, dot, key = path.strip().partition(".")
    if not equals or not dot:
        raise UsageError(
            f"--set {text}: must be section.key=value, say training_config.learning_rate=1e-4"
        )
    section = _section(title, f"--set {text}")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return section, _key(section, key, notes), parsed


def _check(merged: dict[Section, dict[str, Any]]) -> None:
    """Raise UsageError on a value of the wrong kind, and on a key without which nothing runs."""
    for section in SECTIONS:
        for key, value in merged[section].items():
            kinds = KEYS[section][key]
            if not any(_is(kind, value) for kind in kinds):
                raise UsageError(f"{section}.{key}: must be {' or '.join(kinds)}, not {value!r}")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in merged["peft_config"]:
            raise UsageError(f"peft_config.{key}: missing; a LoRA run needs it")
    _one_of("model.dtype", merged["model"]["dtype"], DTYPES)
    _one_of(
        "model.bnb_4bit_compute_dtype",
        merged["model"].get("bnb_4bit_compute_dtype", "float32"),
        DTYPES,
    )
    _one_of(
        "model.bnb_4bit_quant_type",
        merged["model"].get("bnb_4bit_quant_type", "nf4"),
        ("nf4", "fp4"),
    )
    _one_of("model.attn_implementation", merged["model"]["attn_implementation"], ATTENTION)
    _one_of("peft_config.task_type", merged["peft_config"]["task_type"], ("CAUSAL_LM",))
    training = merged["training_config"]
    for key in ("eval_strategy", "logging_strategy", "save_strategy"):
        known = ("no", "steps", "epoch") + (("best",) if key == "save_strategy" else ())
        _one_of(f"training_config.{key}", training.get(key, "no"), known)
    for key in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "eval_accumulation_steps",
        "pad_to_multiple_of",
    ):
        if training.get(key, 1) < 1:
            raise UsageError(f"training_config.{key}: must be at least 1, not {training[key]}")
    if training.get("dataloader_num_workers", 0) < 0:
        raise UsageError(
            "training_config.dataloader_num_workers: must be at least 0, not "
            f"{training['dataloader_num_workers']}"
        )
    for key in training.get("gradient_checkpointing_kwargs", ()):
        _one_of("training_config.gradient_checkpointing_kwargs", key, CHECKPOINTING)
    if training.get("completion_only_loss"):
        raise UsageError(
            "training_config.completion_only_loss: is for pairs of prompt and completion, and the data "
            "here are messages; training_config.assistant_only_loss leaves the questions out"
        )
    metric = training.get("metric_for_best_model", "loss")
    _one_of("training_config.metric_for_best_model", metric, ("loss", "eval_loss"))
    _check_numbers(merged)
    for key in ("max_new_tokens", "match_examples"):
        if merged["data"][key] < 1:
            raise UsageError(f"data.{key}: must be at least 1, not {merged['data'][key]}")


def _check_numbers(merged: dict[Section, dict[str, Any]]) -> None:
    """Raise UsageError on a number out of range that the libraries meet late, or never."""
    training, model = merged["training_config"], merged["model"]
    above = ["learning_rate"] + ["num_train_epochs"] * (training.get("max_steps", -1) == -1)
    for key in above:
        if not 0 < training.get(key, 1.0) < math.inf:
            raise UsageError(f"training_config.{key}: must be above 0, not {training[key]}")
    if training.get("max_steps", -1) < 1 and training.get("max_steps", -1) != -1:
        raise UsageError(
            f"training_config.max_steps: must be at least 1, or -1 to go by epochs, not {training['max_steps']}"
        )
    for name, value in (
        ("model.seed", model["seed"]),
        ("training_config.seed", training["seed"]),
        ("training_config.data_seed", training.get("data_seed", 0)),
    ):
        if not 0 <= value < 2**32:
            raise UsageError(f"{name}: must be from 0 to 2**32 - 1, not {value}")
    for key, value in training.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"training_config.{key}: must be finite, not {value}")


def _is(kind: str, value: Any) -> bool:
    """Whether a TOML value is of that kind."""
    if kind == WHOLE:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == NAMES_LIST:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, {BOOLEAN: bool, WORD: str, TABLE: Mapping}[kind])


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(
            f"{name}: unknown {value!r}{_nearest(value, known)}; known are {', '.join(known)}"
        )


def _nearest(word: str, known: Any) -> str:
    """`; did you mean …?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _listed(names: str | list[str]) -> list[str]:
    """A single name as a list of one."""
    return [names] if isinstance(names, str) else list(names)
