"""The settings a recipe may hold: their sections, names, kinds and defaults.

`training_config` is keyed as TRL's `SFTConfig` (and so transformers' `TrainingArguments`),
`peft_config` as PEFT's `LoraConfig`. The names are listed here rather than read off those classes
because reading a recipe must not import them; `harness.trainer` meets the installed classes.
"""

from __future__ import annotations

from typing import Any, Literal

Section = Literal["model", "data", "training_config", "peft_config"]
SECTIONS: tuple[Section, ...] = ("model", "data", "training_config", "peft_config")

WHOLE, NUMBER, BOOLEAN, WORD, NAMES_LIST, TABLE = (
    "a whole number",
    "a number",
    "true or false",
    "a string",
    "a list of strings",
    "a table",
)

DTYPES = ("float32", "bfloat16", "float16", "float64")
ATTENTION = ("eager", "sdpa", "flash_attention_2")
CHECKPOINTING = (
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
)
"""What `torch.utils.checkpoint` takes and a recipe can hold."""

KEYS: dict[Section, dict[str, tuple[str, ...]]] = {
    "model": {
        "name": (WORD,),
        "dtype": (WORD,),
        "device": (WORD,),
        "attn_implementation": (WORD,),
        "use_cache": (BOOLEAN,),
        "seed": (WHOLE,),
        "gradient_checkpointing": (BOOLEAN,),
        "load_in_4bit": (BOOLEAN,),
        "bnb_4bit_quant_type": (WORD,),
        "bnb_4bit_use_double_quant": (BOOLEAN,),
        "bnb_4bit_compute_dtype": (WORD,),
    },
    "data": {
        "name": (WORD,),
        "prompt": (WORD,),
        "max_new_tokens": (WHOLE,),
        "match_examples": (WHOLE,),
    },
    "training_config": {
        # how long, how much at a time
        "num_train_epochs": (NUMBER,),
        "max_steps": (WHOLE,),
        "per_device_train_batch_size": (WHOLE,),
        "per_device_eval_batch_size": (WHOLE,),
        "gradient_accumulation_steps": (WHOLE,),
        "gradient_checkpointing": (BOOLEAN,),
        "gradient_checkpointing_kwargs": (TABLE,),
        "auto_find_batch_size": (BOOLEAN,),
        "group_by_length": (BOOLEAN,),
        "dataloader_num_workers": (WHOLE,),
        "dataloader_drop_last": (BOOLEAN,),
        # the optimizer and its schedule
        "learning_rate": (NUMBER,),
        "lr_scheduler_type": (WORD,),
        "lr_scheduler_kwargs": (TABLE,),
        "warmup_ratio": (NUMBER,),
        "warmup_steps": (NUMBER,),
        "optim": (WORD,),
        "optim_args": (WORD,),
        "weight_decay": (NUMBER,),
        "adam_beta1": (NUMBER,),
        "adam_beta2": (NUMBER,),
        "adam_epsilon": (NUMBER,),
        "max_grad_norm": (NUMBER,),
        "neftune_noise_alpha": (NUMBER,),
        # precision
        "bf16": (BOOLEAN,),
        "fp16": (BOOLEAN,),
        "tf32": (BOOLEAN,),
        # what is said, kept and judged on the way
        "do_eval": (BOOLEAN,),
        "eval_strategy": (WORD,),
        "eval_steps": (NUMBER,),
        "eval_on_start": (BOOLEAN,),
        "eval_accumulation_steps": (WHOLE,),
        "logging_strategy": (WORD,),
        "logging_steps": (NUMBER,),
        "logging_first_step": (BOOLEAN,),
        "log_level": (WORD,),
        "report_to": (WORD, NAMES_LIST),
        "run_name": (WORD,),
        "save_strategy": (WORD,),
        "save_steps": (NUMBER,),
        "save_total_limit": (WHOLE,),
        "save_only_model": (BOOLEAN,),
        "load_best_model_at_end": (BOOLEAN,),
        "metric_for_best_model": (WORD,),
        "greater_is_better": (BOOLEAN,),
        "disable_tqdm": (BOOLEAN,),
        "output_dir": (WORD,),
        "seed": (WHOLE,),
        "data_seed": (WHOLE,),
        "full_determinism": (BOOLEAN,),
        # TRL's own
        "max_length": (WHOLE,),
        "packing": (BOOLEAN,),
        "packing_strategy": (WORD,),
        "eval_packing": (BOOLEAN,),
        "padding_free": (BOOLEAN,),
        "pad_to_multiple_of": (WHOLE,),
        "assistant_only_loss": (BOOLEAN,),
        "completion_only_loss": (BOOLEAN,),
        "dataset_num_proc": (WHOLE,),
    },
    "peft_config": {
        "r": (WHOLE,),
        "lora_alpha": (NUMBER,),
        "lora_dropout": (NUMBER,),
        "bias": (WORD,),
        "task_type": (WORD,),
        "target_modules": (WORD, NAMES_LIST),
        "modules_to_save": (NAMES_LIST,),
        "use_rslora": (BOOLEAN,),
        "lora_bias": (BOOLEAN,),
        "enable_lora": (TABLE,),
    },
}
"""Every key a recipe may hold, with the kinds of value it takes."""

RENAMED: dict[tuple[Section, str], str] = {
    ("training_config", "evaluation_strategy"): "eval_strategy",
    ("training_config", "max_seq_length"): "max_length",
    ("training_config", "model_max_length"): "max_length",
    ("training_config", "train_batch_size"): "per_device_train_batch_size",
    ("training_config", "eval_batch_size"): "per_device_eval_batch_size",
    ("model", "torch_dtype"): "dtype",
    ("model", "name_or_path"): "name",
    ("data", "name_or_path"): "name",
    ("peft_config", "alpha"): "lora_alpha",
    ("peft_config", "rank"): "r",
}
"""Names that older releases and other samples use, with today's. Read as today's, and said so."""

DEFAULTS: dict[Section, dict[str, Any]] = {
    "model": {
        "name": "tiny",
        "dtype": "float32",
        "device": "auto",
        "attn_implementation": "sdpa",
        "use_cache": False,
        "seed": 0,
        "gradient_checkpointing": False,
        "load_in_4bit": False,
    },
    "data": {
        "name": "shipped",
        "max_new_tokens": 48,
        "match_examples": 100,
    },
    "training_config": {"seed": 0, "report_to": "none"},
    "peft_config": {
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "modules_to_save": [],
        "use_rslora": False,
        "lora_bias": False,
    },
}
