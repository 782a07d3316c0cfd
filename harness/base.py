"""The base of a run: a Phi-3 as the recipe's [model] table asks, 4-bit or whole."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from harness import dialect, phi3
from harness.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import Phi3ForCausalLM

SMALL = ("tiny", "tiny-gqa")
"""Models whose layers are too small to share: a second thread waits for the first, and on a busy
machine waits long. One thread also makes a run's numbers the same whatever the number of cores."""

KEPT_UNPACKED = (
    "model.load_in_4bit: bitsandbytes' packed format for CPUs with AVX512-BF16 is kept off; it rounds the "
    "base's scales and passes no gradient"
)
"""What a report notes of a 4-bit base on a CPU."""


def device(settings: Mapping[str, Any]) -> str:
    """The device that `model.device` names; `auto` is cuda where there is one."""
    asked = str(settings["device"])
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def hold_to(budget: int | None, where: str) -> None:
    """Take no more of the card than that many bytes. Raises UsageError on a CPU, which has no limit."""
    from harness.measure import clock

    if not budget:
        return
    if not where.startswith("cuda"):
        raise UsageError(
            "--budget: limits a GPU's memory, and this run is on the CPU; lora-harness plan "
            "tells what fits"
        )
    clock.limit_gpu(budget, where)


def load(settings: Mapping[str, Any]) -> Phi3ForCausalLM:
    """The base, in eval mode.

    Raises UsageError on what `phi3.load` refuses, and for a 4-bit base without bitsandbytes.
    """
    attention = settings["attn_implementation"]
    phi3.check_attention(attention)
    options = {
        "dtype": settings["dtype"],
        "device": device(settings),
        "attn_implementation": attention,
        "use_cache": settings["use_cache"],
    }
    name = settings["name"]
    if name in SMALL and options["device"] == "cpu":
        torch.set_num_threads(1)
    if not settings["load_in_4bit"]:
        return phi3.load(name, seed=settings["seed"], **options)
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "model.load_in_4bit: bitsandbytes is not installed; pip install 'lora-harness[quantized]'"
        )
    if name == "tiny":
        return _quantized(str(phi3.directory()), settings, options)
    if name not in phi3.NAMES:
        return _quantized(phi3.source(name), settings, options)
    # Random weights exist nowhere but in memory, and quantisation happens on the way in from a file.
    # A card that takes the base in four bits may be too small for it whole.
    with tempfile.TemporaryDirectory() as folder:
        whole = phi3.load(name, seed=settings["seed"], **options | {"device": "cpu"})
        whole.save_pretrained(folder)
        del whole
        return _quantized(folder, settings, options)


def _quantized(
    source: str, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> Phi3ForCausalLM:
    from transformers import BitsAndBytesConfig, Phi3ForCausalLM

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.get("bnb_4bit_quant_type", "nf4"),
        bnb_4bit_use_double_quant=settings.get("bnb_4bit_use_double_quant", False),
        bnb_4bit_compute_dtype=getattr(
            torch, settings.get("bnb_4bit_compute_dtype", settings["dtype"])
        ),
    )
    try:
        with dialect.quietly():
            model, told = Phi3ForCausalLM.from_pretrained(
                source,
                quantization_config=quantization,
                device_map={"": options["device"]},
                **{dialect.dtype_argument(): getattr(torch, options["dtype"])},
                attn_implementation=options["attn_implementation"],
                output_loading_info=True,
            )
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"model {source}: cannot be loaded in 4 bits ({first_line(error)})"
        ) from error
    phi3.check_whole(source, told)
    model.config.use_cache = options["use_cache"]
    _keep_unpacked(model)
    return model.eval()


def _keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes (0.49 to 0.50, at least) from repacking weights at their first evaluation.

    On CPUs with AVX512-BF16 it then rewrites the layer's weight in place and rounds its scales to
    bfloat16; `state_dict` packs them back, rounding again: the base drifts by how often it is looked
    at, and no fresh process repeats that. Worse, the packed product has no derivative, and training
    after an evaluation silently loses every gradient that goes through the base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain flag
