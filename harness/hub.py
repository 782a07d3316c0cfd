"""The model hub, asked without waiting where it is plainly out of reach."""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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


def cached(repository: str, file: str, *, kind: Literal["model", "dataset"]) -> bool:
    """Whether a file of a repository is already on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, repo_type=kind), str)


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
