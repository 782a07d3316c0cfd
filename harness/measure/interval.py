"""A distribution-free interval for a median, and a decision that may be looked at more than once.

    −margin        0        +margin
       │           │           │
       │      [────┼─•──]      │               same
       │           │      [────┼─•───────]     worse
       │         [─┼───────────┼─•───────]     not yet: go on, or inconclusive when the time is up

Noise here has no normal distribution: it is one-sided, comes in bursts and has long tails. The
order statistics x₍ₖ₎ and x₍ₙ₊₁₋ₖ₎ enclose the median whatever the distribution, except with a chance of
2·P(Bin(n, ½) < k) (Thompson 1936; the interval of the sign test). Looking L times at an error of α
each errs at most L·α in all, so each look gets its share (Bonferroni). Both hold of rounds that are
independent of each other; a burst that lasts for several rounds is one event, counted as several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Verdict = Literal["better", "same", "worse", "inconclusive"]

LOOKS = (24, 48, 96, 192, 384, 768, 1536)
"""After how many rounds the question is put; once more when the time is up."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Median and the bounds that enclose the true one."""

    middle: float
    low: float
    high: float


def median_interval(values: Sequence[float], error: float) -> Interval:
    """The median and an interval that misses the true one with a chance of at most `error`.

    Infinite where there are too few values to say.
    """
    n = len(values)
    if not n:
        return Interval(math.nan, -math.inf, math.inf)
    ordered = sorted(values)
    rank = _rank(n, error)
    if rank == 0:
        return Interval(median(ordered), -math.inf, math.inf)
    return Interval(median(ordered), ordered[rank - 1], ordered[n - rank])


def _rank(n: int, error: float) -> int:
    """The largest k with 2·P(Bin(n, ½) < k) ≤ error; 0 if there is none."""
    below, k = 0.0, 0
    log_term = -n * math.log(2)
    while k < n / 2:
        term = math.exp(log_term)
        if 2 * (below + term) > error:
            return k
        below += term
        log_term += math.log(n - k) - math.log(k + 1)
        k += 1
    return k


def decide(
    log_ratios: Sequence[float], *, margin: float, error: float = 0.05
) -> tuple[Verdict, Interval]:
    """What the rounds say of the second side's time over the first's.

    Worse or better needs both: an interval beyond half the margin, and a median past all of it. Two
    processes that do the same differ by up to a per cent, in where their memory lies; that is no
    change, however sure one can be of it. The same needs the whole interval within the margin.

    Args:
        log_ratios: of each round, log(second / first).
        margin: a true change beyond it is not the same, one within half of it is neither worse nor
            better; of what lies between, either may be said. 0.02 is two per cent either way.
        error: the chance of a wrong answer over all looks together, of rounds that are independent.
    """
    found = median_interval(log_ratios, error / (len(LOOKS) + 1))
    bound = math.log1p(margin)
    if found.low > bound / 2 and found.middle > bound:
        return "worse", found
    if found.high < -bound / 2 and found.middle < -bound:
        return "better", found
    if -bound <= found.low and found.high <= bound:
        return "same", found
    return "inconclusive", found
