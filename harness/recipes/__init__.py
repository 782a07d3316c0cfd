"""training_config and peft_config, a TOML file each."""
