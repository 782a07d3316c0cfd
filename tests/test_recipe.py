"""Recipes: the shipped ones hold the samples' values, and a mistake is named with its remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness import recipe
from harness.errors import UsageError

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("name", recipe.NAMES)
def test_every_shipped_recipe_loads(name):
    """Each shipped recipe passes its own checks and names a LoRA configuration."""
    loaded = recipe.load(name)

    assert loaded.name == name
    assert loaded.lora_config().r == 16
    assert recipe.restored(loaded.as_dict()).as_dict() == loaded.as_dict()


@pytest.mark.parametrize(
    ("name", "section", "values"),
    [
        (
            "model-card",
            "training_config",
            {
                "bf16": True,
                "do_eval": False,
                "learning_rate": 5e-6,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.2,
                "num_train_epochs": 1,
                "max_steps": -1,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
                "seed": 0,
                "logging_steps": 20,
                "logging_strategy": "steps",
                "save_steps": 100,
                "save_total_limit": 1,
                "max_length": 2048,
                "packing": True,
            },
        ),
        (
            "model-card",
            "peft_config",
            {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"},
        ),
        (
            "fine-training-script",
            "training_config",
            {
                "fp16": True,
                "per_device_train_batch_size": 7,
                "gradient_accumulation_steps": 4,
                "learning_rate": 1e-4,
                "num_train_epochs": 3,
                "optim": "paged_adamw_32bit",
                "lr_scheduler_type": "linear",
                "gradient_checkpointing": True,
                "max_length": 128,
            },
        ),
        (
            "lora-notebook",
            "training_config",
            {"learning_rate": 1e-4, "num_train_epochs": 3, "warmup_ratio": 0.1, "seed": 42},
        ),
        ("lora-notebook", "peft_config", {"target_modules": LLAMA}),
        (
            "qlora-notebook",
            "model",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
            },
        ),
        (
            "qlora-notebook",
            "peft_config",
            {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": LLAMA},
        ),
        ("qlora-notebook", "training_config", {"seed": 1234}),
    ],
)
def test_the_samples_have_their_own_values(name, section, values):
    """What FACTS records of a sample is what its recipe says."""
    table = getattr(recipe.load(name), section)

    assert {key: table[key] for key in values} == values


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training_config.learing_rate=1",
            "training_config.learing_rate: unknown key; did you mean learning_rate?",
        ),
        ("training_config.r=4", "training_config.r: unknown key; it belongs to [peft_config]"),
        (
            "trainig_config.seed=1",
            (
                "--set trainig_config.seed=1: unknown section 'trainig_config'; did you mean training_config?; "
                "known are model, data, training_config, peft_config"
            ),
        ),
        ("peft_config.r=0", "peft_config.r must be a whole number of at least 1, not 0"),
        ("peft_config.r=true", "peft_config.r: must be a whole number, not True"),
        (
            "peft_config.lora_dropout=1",
            "peft_config.lora_dropout must be in [0, 1), not 1",
        ),
        (
            "peft_config.task_type=SEQ_CLS",
            "peft_config.task_type: unknown 'SEQ_CLS'; known are CAUSAL_LM",
        ),
        (
            "model.dtype=bf16",
            (
                "model.dtype: unknown 'bf16'; did you mean bfloat16?; known are float32, bfloat16, float16, "
                "float64"
            ),
        ),
        (
            "training_config.learning_rate=-1",
            "training_config.learning_rate: must be above 0, not -1",
        ),
        (
            "training_config.pad_to_multiple_of=0",
            "training_config.pad_to_multiple_of: must be at least 1, not 0",
        ),
        (
            "training_config.eval_accumulation_steps=0",
            "training_config.eval_accumulation_steps: must be at least 1, not 0",
        ),
        (
            "training_config.dataloader_num_workers=-1",
            "training_config.dataloader_num_workers: must be at least 0, not -1",
        ),
        (
            "training_config.gradient_checkpointing_kwargs={reentrant=true}",
            (
                "training_config.gradient_checkpointing_kwargs: unknown 'reentrant'; did you mean "
                "use_reentrant?; known are use_reentrant, preserve_rng_state, determinism_check, debug, "
                "early_stop"
            ),
        ),
        (
            "training_config.completion_only_loss=true",
            (
                "training_config.completion_only_loss: is for pairs of prompt and completion, and the "
                "data here are messages; training_config.assistant_only_loss leaves the questions out"
            ),
        ),
        (
            "training_config.metric_for_best_model=accuracy",
            "training_config.metric_for_best_model: unknown 'accuracy'; known are loss, eval_loss",
        ),
        (
            "seed=1",
            "--set seed=1: must be section.key=value, say training_config.learning_rate=1e-4",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_how_to_mend_it(override, said):
    """A bad override names the key, what is wrong, and the nearest known one."""
    with pytest.raises(UsageError) as error:
        recipe.load("quick", [override])

    assert str(error.value) == said


@pytest.mark.parametrize(
    "part", ['[64, "no"]', "[64, 1]", "[64.5, true]", "[true, true]", "[0, true]"]
)
def test_a_part_is_a_number_of_rows_and_a_yes_or_no(part):
    """`"no"` is a string, which Python would read as a yes."""
    with pytest.raises(UsageError, match="must give each module its parts as pairs of rows"):
        recipe.load("quick", [f"peft_config.enable_lora={{qkv_proj=[{part}]}}"])


def test_an_unknown_recipe_names_the_nearest():
    """A misspelt recipe is met with the shipped ones."""
    with pytest.raises(UsageError) as error:
        recipe.load("qlora-notebok")

    assert str(error.value) == (
        "recipe 'qlora-notebok': unknown; did you mean qlora-notebook?; shipped are quick, model-card, "
        "fine-training-script, lora-notebook, qlora-notebook, or give the path of a .toml file"
    )


def test_a_file_of_the_users_own_is_read_with_defaults(tmp_path):
    """A TOML file needs only what differs from the defaults, and its rank."""
    path = tmp_path / "mine.toml"
    path.write_text(
        '[peft_config]\nr = 4\nlora_alpha = 8\ntarget_modules = ["o_proj"]\n', encoding="utf-8"
    )

    mine = recipe.load(str(path))

    assert (mine.name, mine.model["name"], mine.lora_config().target_modules) == (
        "mine",
        "tiny",
        ("o_proj",),
    )


@pytest.mark.parametrize(("model", "notes"), [("tiny", 0), ("tiny-gqa", 0), ("mini-4k", 1)])
def test_quick_on_another_model_than_tiny_is_noted(model, notes):
    """Its learning rate and window are tiny's."""
    loaded = recipe.load("quick", [f"model.name={model}"])

    assert len(loaded.notes) == notes
    assert all(n.endswith("; --recipe model-card is Phi-3's") for n in loaded.notes)


def test_an_older_name_is_read_as_todays_and_said():
    """`max_seq_length`, as older TRL had it, is max_length, with a note."""
    loaded = recipe.load("quick", ["training_config.max_seq_length=32"])

    assert loaded.training_config["max_length"] == 32
    assert loaded.notes == (
        "training_config.max_seq_length is read as training_config.max_length, its name today",
    )


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("0x10", 16), ("linear", "linear"), ('"a b"', "a b")]
)
def test_overrides_are_toml_and_plain_words_are_strings(text, value):
    """A value that TOML reads is what TOML says it is; anything else is a word."""
    key = "lr_scheduler_type" if isinstance(value, str) else "weight_decay"

    loaded = recipe.load("quick", [f"training_config.{key}={text}"])

    assert loaded.training_config[key] == value


def test_listing_recipes_loads_nothing_heavy():
    """Recipes are read without torch, transformers, peft or trl."""
    code = (
        "import sys; from harness import recipe; [recipe.load(n) for n in recipe.NAMES]; "
        "print(sorted({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)))"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "[]"
