"""Phi-3 models: the shipped tiny one, the real dimensions, and real weights.

    name        made from                                   layers  heads/kv  hidden
    tiny        shipped weights, trained on shipped text        12       4/4      64
    tiny-gqa    seeded random weights, medium's proportions     12       8/2      64
    mini-4k     seeded random weights, real dimensions          32     32/32    3072
    mini-128k   the same with longrope                          32     32/32    3072
    medium-4k   seeded random weights, real dimensions          40     40/10    5120

Anything else is a directory in the form of `microsoft/Phi-3-mini-4k-instruct`, or a hub id.
Works on transformers 4.41 to 5.x; neither torch nor transformers is imported before a model is made.

In tiny, as in mini, `o_proj` alone is square: transformers 4.41 takes `head_dim` to be
`hidden_size / num_attention_heads` and nothing else, so that `o_proj` is `(hidden, hidden)`.
"""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import dialect, hub
from harness.errors import UsageError, first_line
from harness.settings import ATTENTION, DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

NAMES: tuple[str, ...] = ("tiny", "tiny-gqa", "mini-4k", "mini-128k", "medium-4k")

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def directory() -> Path:
    """The shipped tiny model: config.json, model.safetensors and the tokenizer's files."""
    return Path(str(files("harness"))) / "data" / "tiny"


def config(name: str) -> Phi3Config:
    """The configuration of a named model, spelled for the transformers that is installed.

    Raises:
        UsageError: the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise UsageError(_unknown(name))
    from transformers import Phi3Config

    path = Path(str(files("harness"))) / "data" / "configs" / f"{name}.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    scaling = settings["rope_scaling"]
    if scaling is not None and dialect.version() < (4, 42):
        scaling["type"] = "su"  # longrope's name before transformers 4.42
    with dialect.quietly():
        return Phi3Config(**settings)


def parameter_count(name: str) -> int:
    """How many parameters a named model has, counted on shapes alone: no memory is taken."""
    import torch
    from transformers import Phi3ForCausalLM

    with torch.device("meta"):
        model = Phi3ForCausalLM(config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    use_cache: bool = False,
    seed: int = 0,
) -> Phi3ForCausalLM:
    """A Phi-3 in eval mode, made on `device` in `dtype`.

    `tiny`, directories and hub ids have real weights. The other names have weights drawn from
    N(0, initializer_range²), norms one, by `seed`, directly on the device and in the dtype, in
    an order of our own: one seed gives one model on every transformers, and the global random
    state is not touched.

    Raises:
        UsageError: an unknown model, dtype or attention implementation; flash_attention_2 not
            installed; a device that is not there; a directory without config.json or weights; an
            architecture that is not Phi3ForCausalLM; a hub id that cannot be reached.
    """
    _check_settings(dtype, attn_implementation)
    dialect.mask_in_double()
    name = str(name_or_path)
    if name in NAMES and name != "tiny":
        return untrained(
            name,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            use_cache=use_cache,
            seed=seed,
        )
    return _pretrained(
        str(directory()) if name == "tiny" else source(name),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        use_cache=use_cache,
    )


def untrained(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    use_cache: bool = False,
    seed: int = 0,
) -> Phi3ForCausalLM:
    """A named model with seeded random weights, as `load` tells; `tiny`, too."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = config(name)
    settings.use_cache = use_cache
    where = _device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), where:
        model: Phi3ForCausalLM = AutoModelForCausalLM.from_config(
            settings,
            attn_implementation=dialect.attention(attn_implementation),
            **{dialect.dtype_argument(): getattr(torch, dtype)},
        )
    generator = torch.Generator(where).manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:  # the norms, Phi-3's only vectors
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=settings.initializer_range, generator=generator)
    return model.eval()


def _pretrained(
    place: str, *, dtype: str, device: str, attn_implementation: str, use_cache: bool
) -> Phi3ForCausalLM:
    import torch
    from transformers import Phi3ForCausalLM

    where = _device(device)
    options: dict[str, Any] = {dialect.dtype_argument(): getattr(torch, dtype)}
    if where.type != "cpu":
        options["device_map"] = {"": str(where)}
    try:
        with dialect.quietly():
            model, told = Phi3ForCausalLM.from_pretrained(
                place,
                attn_implementation=dialect.attention(attn_implementation),
                use_cache=use_cache,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise UsageError(
            f"model {place}: cannot be loaded ({first_line(error)}); check the files, or name one of "
            f"{', '.join(NAMES)}"
        ) from error
    check_whole(place, told)
    return model.eval()


def check_whole(place: str, told: Mapping[str, Any]) -> None:
    """Raise UsageError where `from_pretrained` tells of weights that it had to make up."""
    wrong = sorted(told["missing_keys"]) or sorted(str(key) for key in told["mismatched_keys"])
    if wrong:
        raise UsageError(
            f"model {place}: its weights do not fit a Phi3ForCausalLM of its config.json, first "
            f"at {wrong[0]}; use the files of one checkpoint"
        )


def source(name: str, *, weights: bool = True) -> str:
    """A directory or hub id that holds a Phi3ForCausalLM, judged by its config.json first.

    Raises:
        UsageError: as `load`; a directory without weights only where `weights` are asked for.
    """
    path = Path(name).expanduser()
    try:
        path.exists()
    except OSError as error:  # a name that no disk takes
        raise UsageError(f"model {name[:60]}…: {error.strerror}; check the path") from error
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"model directory {name}: no config.json; point to a directory in the form of "
                "microsoft/Phi-3-mini-4k-instruct"
            )
        if weights and not any((path / file).is_file() for file in _WEIGHTS):
            raise UsageError(
                f"model directory {name}: no weights; put {_WEIGHTS[0]} (or its shards with "
                f"{_WEIGHTS[1]}) beside config.json"
            )
        _check_architecture(name, path / "config.json")
        return str(path)
    if path.exists():
        raise UsageError(f"model {name}: is a file; give the directory that holds config.json")
    if name.startswith((".", "/", "~")):
        raise UsageError(f"model directory {name}: does not exist; check the path")
    if not hub.is_id(name):
        raise UsageError(
            f"{_unknown(name)}, a directory, or a hub id such as microsoft/Phi-3-mini-4k-instruct"
        )
    from huggingface_hub import hf_hub_download

    try:
        if not hub.cached(name, "config.json"):
            hub.check_reachable()
        with hub.quietly():
            downloaded = hf_hub_download(name, "config.json")
    except Exception as error:
        raise UsageError(
            f"model {name}: no such directory, and the model hub gave no config.json for it "
            f"({first_line(error)}); go online, check the id, or "
            "give a local directory"
        ) from error
    _check_architecture(name, Path(downloaded))
    return name


def _check_architecture(name: str, path: Path) -> None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        architectures = settings.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"model {name}: config.json is not a JSON object; use the checkpoint's own file"
        ) from error
    if architectures != ["Phi3ForCausalLM"]:
        found = ", ".join(map(str, architectures)) or settings.get("model_type") or "unnamed"
        raise UsageError(
            f"model {name}: its architecture is {found}, not Phi3ForCausalLM; give a Phi-3 "
            "in transformers' own form"
        )


def _check_settings(dtype: str, attn_implementation: str) -> None:
    for kind, value, known in (
        ("dtype", dtype, DTYPES),
        ("attention implementation", attn_implementation, ATTENTION),
    ):
        if value not in known:
            raise UsageError(f"{kind} {value!r}: unknown; use one of {', '.join(known)}")
    check_attention(attn_implementation)


def check_attention(name: str) -> None:
    """Raise UsageError where an attention implementation's package is missing."""
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UsageError(
            "model.attn_implementation: flash_attention_2 is asked for and its package flash_attn is "
            "not installed; install it, or say --set model.attn_implementation=sdpa"
        )


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)
    return f"model {name!r}: unknown; did you mean {nearest[0]}? Known are {', '.join(NAMES)}"


def _device(name: str) -> torch.device:
    import torch

    try:
        where = torch.device(name)
        torch.empty(0, device=where)
        if where.type == "meta":
            raise UsageError(f"device {name!r}: holds no numbers; use cpu or cuda")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {name!r}: this machine or this torch {torch.__version__} has none; use cpu"
        ) from error
    return where
