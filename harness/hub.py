"""The model hub, asked without waiting where it is plainly out of reach."""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PART = re.compile(r"-(\d+)-of-(\d+)\.")
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`."""
    return _ID.fullmatch(name) is not None


def check_reachable() -> None:
    """Find out whether the hub may be worth asking, without asking it.

    The hub's own client retries an unresolved name for half a minute; a name that does not
    resolve, with no proxy that could, is told at once.

    Raises:
        ConnectionError: the hub is switched off, or plainly out of reach.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    if any(os.environ.get(proxy) for proxy in _PROXIES):
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise ConnectionError(f"{host} cannot be reached") from error


def cached(model: str, file: str) -> bool:
    """Whether a file of a model is already on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, file), str)


@contextmanager
def data(name: str) -> Iterator[str]:
    """What to name a set to `datasets`: its id or, with the hub out of reach, what is kept of it here.

    Raises:
        ConnectionError: the hub is out of reach, and the set is not on this machine, or not whole.
    """
    import datasets

    try:
        check_reachable()
    except ConnectionError as error:
        away = error
    else:
        yield name
        return
    # `datasets` looks on this machine first only where it knows that it must; older ones by another flag.
    flags = [f for f in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if hasattr(datasets.config, f)]
    before = {flag: getattr(datasets.config, flag) for flag in flags}
    for flag in flags:
        setattr(datasets.config, flag, True)
    try:
        yield _kept(name, away)
    finally:
        for flag, value in before.items():
            setattr(datasets.config, flag, value)


def _kept(name: str, away: ConnectionError) -> str:
    """The id of a set that was loaded here before; of one that was only downloaded, the folder."""
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # older releases, too, have it there
        LocalEntryNotFoundError,
    )

    with suppress(Exception):  # each release has its own way to say that it has none
        datasets.load_dataset_builder(name)
        return name
    try:
        folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        raise ConnectionError(f"{away}, and nothing of it is kept on this machine") from away
    if lacking := _lacking(Path(folder)):
        raise ConnectionError(f"{away}, and what is kept of it here lacks {lacking}") from away
    return folder


def _lacking(folder: Path) -> str:
    """The first part of a file in numbered parts that is not there, by its name; "" where none is."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    for name in sorted(names):
        if match := _PART.search(name):
            for k in range(int(match[2])):
                part = f"{name[: match.start(1)]}{k:0{len(match[1])}}{name[match.end(1) :]}"
                if part not in names:
                    return part
    return ""


@contextmanager
def quietly() -> Iterator[None]:
    """Without the hub client's log of its retries: what fails is told in one line of ours."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
