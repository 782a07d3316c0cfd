"""Two processes judge one implementation at once, each its own families, on a machine with two cores.

    lane 0   targeting  trainable ─────── merge  checkpoint ─── state  quantized
    lane 1   initialization  forward ───────── training  several ─────────── cost

A spec waits for what it needs of the other lane. Which lane judges it is fixed, and so is the order within
a lane: what one spec leaves behind in its process, a patched torch say, meets the same specs in every run.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, as_completed
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from harness.judge import Judge, Result
    from harness.spec import Spec

SECOND = frozenset({"initialization", "forward", "training", "several", "cost"})
"""The families of lane 1: about half of the time, and few needs of the other half's."""


def lane_of(item: Spec) -> int:
    """Which lane judges a spec."""
    return int(item.family in SECOND)


def judge_in_two(judges: tuple[Judge, Judge], specs: Mapping[str, Spec]) -> Iterator[Result]:
    """What becomes of each spec, as it is known; what a lane raises is raised here.

    Args:
        judges: of one run, each with a process of its own.
        specs: with everything that they need, needed ones first.
    """
    found: dict[str, Future[Result]] = {id_: Future() for id_ in specs}

    def run(lane: int) -> None:
        mine = {id_: item for id_, item in specs.items() if lane_of(item) == lane}
        judge = judges[lane]
        judge.elsewhere = lambda item: None if item.id in mine else found[item.id].result()
        try:
            for id_, item in mine.items():
                found[id_].set_result(judge.result(item))
        except BaseException as error:  # noqa: BLE001  # whoever waits is told, here or in the other lane
            for id_ in mine:
                if not found[id_].done():
                    found[id_].set_exception(error)

    for lane in range(2):
        threading.Thread(target=run, args=(lane,), daemon=True).start()
    for future in as_completed(found.values()):
        yield future.result()
