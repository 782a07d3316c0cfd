"""The typed fingerprint of a machine and its libraries: what was true when a report was made.

Every quantity travels with its unit. Nothing names a person or a place: no host name, no user name,
no path.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from harness._version import __version__

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "loralib",
    "trl",
    "datasets",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
)
"""Distributions whose version can change a verdict, a counter or a clock."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Source = Literal["index", "vcs", "archive", "directory", "editable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number and its unit, SI or UCUM: `B`, `MHz`, `W`, `Cel`, `1`."""

    value: float | None
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One installed distribution.

    Attributes:
        version: as its metadata says.
        source: where it was installed from; `index` unless it says otherwise (PEP 610).
        commit: of a version-control or editable install; None where unknown.
        dirty: whether an editable install's tree differs from its commit; None where unknown.
    """

    version: str
    source: Source = "index"
    commit: str | None = None
    dirty: bool | None = None


def collect(*, accelerator: bool = False) -> dict[str, Any]:
    """The fingerprint, ready for JSON, as `environment` in `report/schema.json`.

    Args:
        accelerator: ask torch for CUDA's and cuDNN's versions, importing it if need be. Without it,
            torch is asked only if it is loaded already. GPUs are told by their driver either way.
    """
    if accelerator:
        import torch  # noqa: F401  # loaded, so that it is asked below
    return {
        "machine": _machine(),
        "gpus": _gpus(),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
        },
        **of_torch(),
        "libraries": {
            name: asdict(found) for name in LIBRARIES if (found := library(name)) is not None
        },
        "harness": {"version": __version__} | _checkout(Path(__file__).resolve().parent),
    }


def of_torch() -> dict[str, Any]:
    """What of the fingerprint this process's torch says: another's may have what this one has not."""
    cuda, cudnn = _cuda()
    return {"cuda": cuda, "cudnn": cudnn, "threads": _threads()}


def library(name: str) -> Library | None:
    """The installed distribution of that name, or None."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    # A broken install has metadata without a version.
    version = found.metadata["Version"] or "unknown"
    try:
        origin = json.loads(found.read_text("direct_url.json") or "null")
    except ValueError:
        origin = None
    if not isinstance(origin, dict):
        return Library(version=version)
    if "vcs_info" in origin:
        return Library(
            version=version, source="vcs", commit=origin["vcs_info"].get("commit_id"), dirty=False
        )
    if "dir_info" not in origin:
        return Library(version=version, source="archive")
    if not origin["dir_info"].get("editable", False):
        return Library(version=version, source="directory")
    tree = Path(unquote(urlsplit(origin.get("url", "")).path))
    return Library(version=version, source="editable", **_checkout(tree))


def _checkout(folder: Path) -> dict[str, Any]:
    """The commit of the checkout that tracks this folder, and whether files in it differ from it."""
    nothing = {"commit": None, "dirty": None}
    if not (folder / ".git").exists() and not (folder.parent / ".git").exists():
        # Installed elsewhere: a repository further up is somebody else's.
        return nothing
    commit = printed("git", "-C", str(folder), "rev-parse", "HEAD")
    changes = printed("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    if not commit or changes is None:
        return nothing
    return {"commit": commit, "dirty": bool(changes)}


def printed(*command: str, seconds: float = 10) -> str | None:
    """What a command printed, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _quantity(value: float | None, unit: str) -> dict[str, Any]:
    return asdict(Quantity(value=value, unit=unit))


def _machine() -> dict[str, Any]:
    import psutil

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "os": _os(),
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "physical_cores": _quantity(psutil.cpu_count(logical=False), "1"),
        "logical_cores": _quantity(psutil.cpu_count(logical=True), "1"),
        "usable_cores": _quantity(usable, "1"),
        "memory": _quantity(psutil.virtual_memory().total, "B"),
        "load": _quantity(load if load is None else round(load, 2), "1"),
    }


def _os() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = platform.platform(terse=True)
    # What a vendor appends to the release names a host more often than a kernel.
    release = re.match(r"[\d.]*\d", platform.release())
    return f"{name}, {platform.system()} {release[0] if release else ''}".rstrip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    brand = (
        printed("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else None
    )
    return brand or platform.processor() or platform.machine()


_GPU_FACTS = (
    ("memory", "memory.total", "MiB"),
    ("clock", "clocks.sm", "MHz"),
    ("clock_limit", "clocks.max.sm", "MHz"),
    ("memory_clock", "clocks.mem", "MHz"),
    ("power_limit", "power.limit", "W"),
    ("temperature", "temperature.gpu", "Cel"),
)


def _gpus() -> list[dict[str, Any]]:
    """Every GPU that the driver knows, by `nvidia-smi`; what it cannot say is None.

    Without `nvidia-smi`, those that torch sees, if it is loaded, with less to say.
    """
    query = ",".join(("name", "driver_version", *(field for _, field, _ in _GPU_FACTS)))
    said = printed("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    if said is None:
        return _gpus_of_torch()
    gpus = []
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 2 + len(_GPU_FACTS):  # words such as "No devices were found"
            continue
        name, driver, *values = cells
        gpu: dict[str, Any] = {"name": name, "driver": driver}
        for (fact, _, unit), text in zip(_GPU_FACTS, values, strict=True):
            try:
                value = float(text)
            except ValueError:  # "[N/A]", where a card or a virtual machine does not say
                gpu[fact] = None
            else:
                gpu[fact] = (
                    _quantity(value * 2**20, "B") if unit == "MiB" else _quantity(value, unit)
                )
        gpus.append(gpu)
    return gpus


def _gpus_of_torch() -> list[dict[str, Any]]:
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "cuda") or not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": one.name, "driver": None, "memory": _quantity(one.total_memory, "B")}
        for one in found
    ]


def _cuda() -> tuple[str | None, str | None]:
    torch: Any = sys.modules.get("torch")
    # Half imported, it has no `version` yet.
    if torch is None or not hasattr(torch, "version") or torch.version.cuda is None:
        return None, None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return torch.version.cuda, None if cudnn is None else str(cudnn)


def _threads() -> dict[str, int | str | None]:
    torch: Any = sys.modules.get("torch")
    counts: dict[str, int | str | None] = {name: os.environ.get(name) for name in THREADS}
    counts["torch"] = torch.get_num_threads() if hasattr(torch, "get_num_threads") else None
    return counts
