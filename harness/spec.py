"""The `@spec` record and the catalogue.

A spec is one documented property: a permanent id `family/claim`, a sentence with MUST or SHOULD, why
it is asked, where that is written, and the function that judges it at one case:

    @spec(
        "merge/same-output",
        claim="Merged and unmerged outputs MUST agree within the rounding of the base's dtype.",
        why="...",
        source=("BUGS 1", "https://..."),
        features=("merge",),
        cases=(Case(), Case(dtype="bfloat16")),
    )
    def same_output(trial: Trial) -> None: ...

The function returns if the property holds and raises through `harness.failure.fail` if it does not.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Literal

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hypothesis.strategies import SearchStrategy

    from harness.adapter import Feature, Layer
    from harness.case import Case
    from harness.trial import Trial

Level = Literal["MUST", "SHOULD"]
Tier = Literal["smoke", "core", "full"]
TIERS: tuple[Tier, ...] = ("smoke", "core", "full")

SPEC_VERSION = "1"
"""Raised when an id is added, or what one asks becomes stricter; never when one is reworded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One documented property.

    Attributes:
        id: `family/claim`, for life.
        claim: one sentence with MUST or SHOULD.
        why: what goes wrong for a user where it does not hold.
        source: paper, guide, or a real bug by its number and thread.
        since: the spec version that brought it; `provisional` until a release.
        needs: ids of specs without which judging this one says nothing new, see `harness.reach`.
        features: what must be claimed for it to be asked, features and layer kinds.
        tier: smoke (a second for all), core, or full.
        cases: the points at which it is judged.
        more_cases: further points, in the full tier alone.
        search: a strategy over cases, for properties worth searching; derandomised in a verdict.
        fresh: whether it asks a fresh process, whose start is begun with the run's.
        judge: returns, or raises `Broken`.
    """

    id: str
    claim: str
    why: str
    source: tuple[str, ...]
    since: str
    needs: tuple[str, ...]
    features: tuple[Feature | Layer, ...]
    tier: Tier
    cases: tuple[Case, ...]
    more_cases: tuple[Case, ...]
    search: Callable[[], SearchStrategy[Case]] | None
    fresh: bool
    judge: Callable[[Trial], None]

    @property
    def family(self) -> str:
        """The part of the id before the slash."""
        return self.id.split("/")[0]

    @property
    def level(self) -> Level:
        """MUST or SHOULD, as the claim says."""
        return "SHOULD" if "SHOULD" in self.claim else "MUST"

    def as_dict(self) -> dict[str, object]:
        """The record as `lora-harness list --json` prints it."""
        return {
            "id": self.id,
            "level": self.level,
            "claim": self.claim,
            "why": self.why,
            "source": list(self.source),
            "since": self.since,
            "needs": list(self.needs),
            "features": list(self.features),
            "tier": self.tier,
            "cases": [str(case) for case in self.cases],
        }


_CATALOGUE: dict[str, Spec] = {}


def spec(
    id: str,  # noqa: A002  # it is the field's name for it
    *,
    claim: str,
    why: str,
    source: Sequence[str],
    cases: Iterable[Case],
    more_cases: Iterable[Case] = (),
    needs: Sequence[str] = (),
    features: Sequence[Feature | Layer] = (),
    tier: Tier = "core",
    since: str = "provisional",
    search: Callable[[], SearchStrategy[Case]] | None = None,
    fresh: bool = False,
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Enter a judge into the catalogue; raises ValueError on a record that is not whole."""
    if not re.fullmatch(r"[a-z]+/[a-z0-9]+(-[a-z0-9]+)*", id):
        raise ValueError(f"{id!r} is no spec id: family/claim, in lower case and hyphens")
    if ("MUST" in claim) == ("SHOULD" in claim):
        raise ValueError(f"{id}: the claim says MUST or SHOULD, and not both")
    if not why or not source:
        raise ValueError(f"{id}: a spec says why it is asked and where that is written")
    listed = tuple(cases)
    if not listed:
        raise ValueError(f"{id}: a spec has at least one case")

    def enter(judge: Callable[[Trial], None]) -> Callable[[Trial], None]:
        if id in _CATALOGUE and _CATALOGUE[id].judge.__module__ != judge.__module__:
            raise ValueError(f"{id} is in the catalogue already")
        _CATALOGUE[id] = Spec(
            id=id,
            claim=claim,
            why=why,
            source=tuple(source),
            since=since,
            needs=tuple(needs),
            features=tuple(features),
            tier=tier,
            cases=listed,
            more_cases=tuple(more_cases),
            search=search,
            fresh=fresh,
            judge=judge,
        )
        return judge

    return enter


@cache
def catalogue() -> dict[str, Spec]:
    """Every spec by id, needed ones before those that need them. Loads no heavy library."""
    # By name: in the tree its files stand at the top, see pyproject.toml.
    for module in iter_modules(import_module("harness.specs").__path__):
        import_module(f"harness.specs.{module.name}")
    ordered: dict[str, Spec] = {}

    def place(item: Spec, above: tuple[str, ...]) -> None:
        if item.id in above:
            raise ValueError(f"specs need each other in a ring: {' -> '.join((*above, item.id))}")
        for need in item.needs:
            if need not in _CATALOGUE:
                raise ValueError(f"{item.id} needs {need}, which is not in the catalogue")
            place(_CATALOGUE[need], (*above, item.id))
        ordered.setdefault(item.id, item)

    rank = {family: k for k, family in enumerate(FAMILIES)}
    for item in sorted(_CATALOGUE.values(), key=lambda s: rank.get(s.family, len(rank))):
        place(item, ())
    return ordered


FAMILIES = (
    "targeting",
    "trainable",
    "initialization",
    "forward",
    "merge",
    "checkpoint",
    "training",
    "several",
    "state",
    "quantized",
    "cost",
)
"""The order in which families are judged and shown."""


def select(only: Sequence[str], tier: Tier = "core") -> dict[str, Spec]:
    """The specs of a tier or, where ids or families are named, exactly those, of any tier.

    Raises `UsageError` on a name that matches nothing, and on a tier that there is not.
    """
    if tier not in TIERS:
        raise UsageError(f"--tier {tier}: no such tier; give {', '.join(TIERS)}")
    only = [only] if isinstance(only, str) else only  # a string is a sequence of letters
    known = catalogue()
    if not only:
        wanted = TIERS[: TIERS.index(tier) + 1]
        return {id_: item for id_, item in known.items() if item.tier in wanted}
    families = {item.family for item in known.values()}
    for name in only:
        if name not in known and name.rstrip("/") not in families:
            near = difflib.get_close_matches(name, [*known, *families], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `lora-harness list` shows them"
            raise UsageError(f"--only {name}: no spec and no family is called that{hint}")
    return {
        id_: item
        for id_, item in known.items()
        if id_ in only or item.family in {name.rstrip("/") for name in only}
    }
