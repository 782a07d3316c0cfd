"""A `LoraConfig` beside its tensors, in a directory: `adapter.json` and `adapter.safetensors`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from harness.adapter import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def write(directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write both; the same adapter gives the same bytes."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / "adapter.safetensors")
    text = json.dumps(asdict(config), indent=2, sort_keys=True)
    (directory / "adapter.json").write_text(text + "\n", encoding="utf-8")


def read(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read both; ValueError on settings that mean nothing, OSError where a file is missing."""
    from safetensors.torch import load_file

    given = json.loads((directory / "adapter.json").read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save"):
        if isinstance(given[key], list):
            given[key] = tuple(given[key])
    if given["enable_lora"] is not None:
        given["enable_lora"] = {
            name: tuple((size, want) for size, want in parts)
            for name, parts in given["enable_lora"].items()
        }
    return LoraConfig(**given), load_file(directory / "adapter.safetensors")
