"""Adapter checkpoints on disk, and the bits of the base they leave alone.

An adapter is written in both forms that the documented procedure names: `adapter.pt`, by
`torch.save`, and `adapter.safetensors`. Reading never unpickles anything but tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

PLAIN = "adapter.safetensors"
PICKLED = "adapter.pt"


def write(state: Mapping[str, Tensor | float], folder: Path) -> None:
    """Write both forms into `folder`, each replaced at once or not at all.

    A number becomes a tensor without dimensions, which both forms can hold. Raises UsageError where the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    # Detached copies: safetensors refuses tensors that share storage, and a checkpoint holds numbers.
    tensors = {
        key: _tensor(value).detach().cpu().contiguous().clone() for key, value in state.items()
    }
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PLAIN, PICKLED):
            part = folder / f".{name}.part"
            try:
                if name == PLAIN:
                    save_file(tensors, part, metadata={"format": "pt"})
                else:
                    torch.save(tensors, part)
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)


def _tensor(value: Tensor | float) -> Tensor:
    """A tensor as it is; a number whole."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter checkpoint: a folder of ours, a `.safetensors` file, or a pickle.

    Raises UsageError on a file that is missing, cut short, empty of tensors, or a pickle that holds
    anything but tensors (which is never unpickled).
    """
    try:
        path.exists()
    except OSError as error:  # a name that no disk takes
        raise UsageError(
            f"checkpoint {str(path)[:60]}…: {error.strerror}; check the path"
        ) from error
    if path.is_dir():
        found = next((path / name for name in (PLAIN, PICKLED) if (path / name).is_file()), None)
        if found is None:
            raise UsageError(f"checkpoint {path}: holds neither {PLAIN} nor {PICKLED}")
        path = found
    if not path.is_file():
        raise UsageError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library and release raises its own kind on a bad file
        raise UsageError(
            f"checkpoint {path}: not a plain tensor file; nothing of it was unpickled. "
            f"Give what torch.save or safetensors wrote from a dictionary of tensors"
        ) from error
    if not isinstance(state, dict) or not state:
        raise UsageError(f"checkpoint {path}: holds no dictionary of tensors")
    strange = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UsageError(
            f"checkpoint {path}: {strange[0]!r} is a {type(state[strange[0]]).__name__}, not a tensor; "
            "give the adapter's own state dictionary"
        )
    return state


def check_whole(folder: Path) -> None:
    """Raise UsageError where a checkpoint that is to be gone on with is cut short."""
    bad = [
        name
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        if (folder / name).is_file() and not zipfile.is_zipfile(folder / name)
    ]
    try:
        json.loads((folder / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        bad.append("trainer_state.json")
    if bad:
        raise UsageError(
            f"checkpoint {folder}: {bad[0]} is damaged; remove this checkpoint to go on from the one "
            "before, or start afresh with --overwrite"
        )


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """A fingerprint of every tensor's bits, shape and dtype, by name."""
    found = {}
    for name, tensor in state.items():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        mark = hashlib.blake2b(flat.numpy().tobytes(), digest_size=16)
        mark.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found[name] = mark.hexdigest()
    return found


def base_keys(base: Mapping[str, str], injected: Mapping[str, str]) -> dict[str, str]:
    """Where each of the base's tensors lies in the injected model: base name -> its name there.

    Implementations may put a tensor deeper (`qkv_proj.weight` -> `qkv_proj.base_layer.weight`) but
    keep its path: the parts of the old name occur in the new one, in order. Among several such the
    one with the same bits is meant, then the shortest. A tensor without any is left out.
    """
    found = {}
    parts = {key: _plain(key).split(".") for key in injected}
    by_last: dict[str, list[str]] = {}
    for key, words in parts.items():
        by_last.setdefault(words[-1], []).append(key)
    for name, bits in base.items():
        if name in injected:  # the usual case, and the fast one
            found[name] = name
            continue
        words = name.split(".")
        inside = [key for key in by_last.get(words[-1], ()) if _in_order(words, parts[key])]
        same = [key for key in inside if injected[key] == bits]
        if candidates := same or inside:
            found[name] = min(candidates, key=len)
    return found


def _plain(key: str) -> str:
    """A key as it was before torch's own parametrisation moved the tensor."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", key)


def _in_order(words: list[str], among: list[str]) -> bool:
    rest = iter(among)
    return all(word in rest for word in words)


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Inside, a full disk or a folder that cannot be written is told as a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".lower()
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text or "os error 28" in text:
            raise UsageError(
                f"output folder {folder}: no space left on its disk; free some, or give another --output"
            ) from error
        if isinstance(error, PermissionError) or code == errno.EROFS:
            raise UsageError(
                f"output folder {folder}: cannot be written; give another --output"
            ) from error
        raise
