"""What a page draws: plain records that the page's script hands to Chart.js, each with its table.

training curves          a line a run, over steps
throughput, memory       a line an implementation, over rank; a chart a dtype; the budget dashed
memory by kind           stacked bars over rank; a chart an implementation
outcomes of specs        stacked bars over the runs of a history
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.report.rows import place
from harness.report.words import (
    OUTCOMES,
    compact,
    number_of,
    outcome,
    plain,
    quantity,
    seconds,
    told_apart,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.report.trend import Trend

    Cell = str
    RankRow = tuple[float, float, Mapping[str, Any]]

DRAWABLE = 1e300
"""The largest number on an axis: a stack of seven and the room above it are finite too."""

MOST = 48
"""Charts of one kind on a page; every value is in the tables all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line or a layer of bars: a name, and a value at each of the chart's `x`, None for none."""

    name: str
    y: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart and the table of its values.

    Attributes:
        kind: how it is drawn; `interval` takes the series low, ratio and high.
        title: what it shows.
        note: under which conditions.
        x: the places along it.
        x_label: what they are.
        y_label: what is drawn, with its unit.
        series: the data, in the unit of `y_label`.
        limits: lines across, and what each is called.
        top: the end of the y axis, where charts must be comparable.
        headers: of the table.
        rows: of the table.
    """

    kind: Literal["line", "bar", "interval"]
    title: str
    note: str
    x: tuple[str | float, ...]
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    limits: tuple[tuple[str, float], ...] = ()
    top: float | None = None
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def drawn(self) -> dict[str, Any]:
        """What the script needs; the table is in the page already."""
        told = asdict(self)
        del told["headers"], told["rows"], told["note"]
        # The script works with sums and differences of these: they must be finite as well.
        for one in told["series"]:
            one["y"] = [None if y is None or abs(y) > DRAWABLE else y for y in one["y"]]
        told["limits"] = [one for one in told["limits"] if abs(one[1]) <= DRAWABLE]
        return told


def training(reports: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Loss, evaluation loss and learning rate over steps, each report a line."""
    curves: dict[str, dict[str, list[list[Any]]]] = defaultdict(dict)
    for report, run in zip(reports, told_apart(reports), strict=True):
        for name, points in (report.get("training") or {}).items():
            if name in {"loss", "eval_loss", "learning_rate"} and points:
                group = "learning rate" if name == "learning_rate" else "loss"
                label = f"{run}{', held out' if name == 'eval_loss' else ''}"
                curves[group][label] = points
    for group, lines in curves.items():
        steps = sorted(
            {
                step
                for points in lines.values()
                for point in points
                if (step := finite(point[0])) is not None
            }
        )
        table = {
            name: {number_of(step): value for step, value in points}
            for name, points in lines.items()
        }
        yield Chart(
            kind="line",
            title=group.capitalize(),
            note="",
            x=tuple(steps),
            x_label="step",
            y_label=group,
            series=tuple(
                Series(name=name, y=tuple(finite(found.get(step)) for step in steps))
                for name, found in table.items()
            ),
            headers=("step", *table),
            rows=tuple(
                (f"{step:g}", *(quantity(found.get(step)) for found in table.values()))
                for step in steps
            ),
        )


def against_rank(reports: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Every timing and every total of memory that was measured at two ranks or more.

    A line is an implementation or, of several reports, an implementation in a run.
    """
    groups: dict[tuple[str, ...], dict[str, list[RankRow]]] = defaultdict(lambda: defaultdict(list))
    budgets: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for report, run in zip(reports, told_apart(reports), strict=True):
        budget = finite(report.get("budget"))
        for section in ("timings", "memory"):
            for row in report[section]:
                rank = finite((row.get("conditions") or {}).get("r"))
                value = seconds(row) if section == "timings" else finite(row["value"])
                if row.get("kind") or rank is None or value is None or not math.isfinite(value):
                    continue
                unit = plain(row.get("unit") or "", limit=24)
                key = (
                    section,
                    plain(row["metric"], limit=60),
                    unit,
                    plain(row.get("phase") or "", limit=60),
                    _rest(row),
                )
                subject = plain(row["subject"], limit=60)
                line = f"{subject}, {run}" if len(reports) > 1 else subject
                groups[key][line].append((rank, value, row))
                if budget and section == "memory" and unit in {"B", "bytes"}:
                    budgets[key][run] = budget
    charts = []
    for (section, metric, unit, phase, rest), lines in groups.items():
        ranks = sorted({rank for rows in lines.values() for rank, _, _ in rows if rank > 0})
        if len(ranks) < 2:
            continue
        scale, shown = scaled([value for rows in lines.values() for _, value, _ in rows], unit)
        found = {
            name: _over(ranks, {rank: value for rank, value, _ in rows})
            for name, rows in lines.items()
        }
        charts.append(
            Chart(
                kind="line",
                title=f"{phase} {metric}".strip().replace("_", " "),
                note=rest,
                x=tuple(ranks),
                x_label="rank r",
                y_label=shown or metric,
                series=tuple(
                    Series(
                        name=name,
                        y=tuple(values[rank] / scale if rank in values else None for rank in ranks),
                    )
                    for name, values in found.items()
                ),
                limits=_limits(budgets[section, metric, unit, phase, rest], scale),
                headers=("rank", *found),
                rows=tuple(
                    (f"{rank:g}", *(quantity(values.get(rank), unit) for values in found.values()))
                    for rank in ranks
                ),
            )
        )
    # A reader looks for one metric at a time, and for training first.
    return sorted(charts, key=lambda chart: (*_weight(chart.title), chart.title, chart.note))[:MOST]


def _limits(budgets: Mapping[str, float], scale: float) -> tuple[tuple[str, float], ...]:
    """A line for each budget, with its runs where there are several."""
    found: dict[float, list[str]] = defaultdict(list)
    for run, budget in budgets.items():
        found[budget].append(run)
    return tuple(
        (
            f"budget {quantity(budget, 'B')}{f' of {runs[0]}' if len(found) > 1 else ''}",
            budget / scale,
        )
        for budget, runs in found.items()
    )


def memory_by_kind(reports: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Memory's kinds stacked over rank, a chart for each implementation under the same axis."""
    groups: dict[tuple[str, str, str, str], dict[float | None, dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    budgets: dict[str, float] = {}
    for report, run in zip(reports, told_apart(reports), strict=True):
        if budget := finite(report.get("budget")):
            budgets[run] = budget
        for row in report["memory"]:
            value = finite(row["value"])
            if not row.get("kind") or value is None:
                continue
            rank = finite((row.get("conditions") or {}).get("r"))
            key = (
                plain(row.get("phase") or "", limit=60),
                _rest(row),
                plain(row["subject"], limit=60),
                run,
            )
            groups[key][rank][plain(row["kind"], limit=40)] = value
    sums = [sum(kinds.values()) for places in groups.values() for kinds in places.values()]
    tallest = max((one for one in sums if one <= DRAWABLE), default=0)
    scale, shown = scaled([tallest], "B")
    charts = []
    for (phase, rest, subject, run), unsorted in sorted(groups.items()):
        places = {
            "–" if rank is None else f"{rank:g}": unsorted[rank]
            for rank in sorted(unsorted, key=lambda rank: -1 if rank is None else rank)
        }
        named_ = f"{subject}, {run}" if len(reports) > 1 else subject
        kinds = list(dict.fromkeys(kind for found in places.values() for kind in found))
        charts.append(
            Chart(
                kind="bar",
                title=f"{named_}, {phase}" if phase else named_,
                note=rest,
                x=tuple(places),
                x_label="rank r",
                y_label=shown,
                series=tuple(
                    Series(
                        name=kind,
                        y=tuple(
                            # A stack that no axis holds is in the table alone.
                            found[kind] / scale
                            if kind in found and sum(map(abs, found.values())) <= DRAWABLE
                            else None
                            for found in places.values()
                        ),
                    )
                    for kind in kinds
                ),
                limits=_limits({run: budgets[run]} if run in budgets else {}, scale),
                top=tallest / scale,
                headers=("rank", *kinds, "sum"),
                rows=tuple(
                    (
                        where,
                        *(quantity(found.get(kind), "B") for kind in kinds),
                        quantity(sum(found.values()), "B"),
                    )
                    for where, found in places.items()
                ),
            )
        )
    return charts[:MOST]


def outcomes(trend: Trend) -> Iterator[Chart]:
    """How many specs had each outcome, run by run."""
    present = [name for name in OUTCOMES if any(run.outcomes[name] for run in trend.runs)]
    if present:
        moments = tuple(plain(run.started, limit=40)[:10] for run in trend.runs)
        yield Chart(
            kind="bar",
            title="Outcomes of specs",
            note=f"{moments[0]} to {moments[-1]}",
            x=moments,
            x_label="",
            y_label="specs",
            series=tuple(
                Series(name=outcome(name), y=tuple(run.outcomes[name] for run in trend.runs))
                for name in present
            ),
            headers=("run", *(outcome(name) for name in present)),
            rows=tuple(
                (plain(run.started, limit=40), *(str(run.outcomes[name]) for name in present))
                for run in trend.runs
            ),
        )


def scaled(values: Sequence[float], unit: str) -> tuple[float, str]:
    """What to divide by so that an axis has small numbers, and the unit that they then have."""
    size = max(map(abs, values), default=0)
    if unit in {"B", "bytes"}:
        steps: tuple[tuple[float, str], ...] = tuple(
            (1024.0**power, name) for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB"))
        )
    elif unit == "s":
        steps = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
    else:
        steps = tuple((10.0**power, f"{name}{unit}") for power, name in ((12, "T"), (9, "G")))
    return next(((scale, name) for scale, name in steps if size >= scale), (1.0, unit))


def _weight(heading: str) -> tuple[int, int]:
    def first(*words: str) -> int:
        return next((at for at, word in enumerate(words) if word in heading), len(words))

    return first("training", "evaluation", "merged"), first("tokens", "throughput", "peak")


def _over(ranks: Sequence[float], values: dict[float, float]) -> dict[float, float]:
    """The values at each rank; what has no adapter, and so the rank 0, is the same at all."""
    return dict.fromkeys(ranks, values[0.0]) if set(values) == {0.0} else values


def _rest(row: Mapping[str, Any]) -> str:
    """A row's model and conditions without the rank, in words."""
    others = {
        key: compact(value)
        for key, value in (row.get("conditions") or {}).items()
        if key not in {"r", "alpha", "lora_alpha"} and value is not None
    }
    return place({"model": row.get("model"), "conditions": others})


def finite(value: object) -> float | None:
    """A report's number where it is one, and finite."""
    if isinstance(value, bool):
        return None
    real = number_of(value) if isinstance(value, (int, float, str)) else None
    return real if real is not None and math.isfinite(real) else None
