"""What the reports of studies share: Markdown tables, medians with quartiles, curves as medians over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.comparison import first_reaching

#: a run that ended so has no more to give; its last record holds for all later times
ENDED = ("gradient_tolerance", "second_order", "step_rule", "stalled")

Record = Mapping[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column left-aligned, None as a dash."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"

    return "\n".join([line(header), "|---|" + "---:|" * (len(header) - 1), *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, without an exponent where it is short."""
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or value == 0:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits - 1}e}"


def quartiles(values: Sequence[float | None], digits: int = 3, scale: float = 1) -> str:
    """'median (first-third quartile)'; None counts as never: 'k of n' where the median is never."""
    n, reached = len(values), sorted(value * scale for value in values if value is not None and not math.isnan(value))
    if not n:
        return "-"
    filled = reached + [math.inf] * (n - len(reached))
    if n == 1:
        return number(filled[0], digits) if reached else "never"
    median = statistics.median(filled)
    if math.isinf(median):
        return f"{len(reached)} of {n}"
    low, _, high = quantiles(filled)
    return f"{number(median, digits)} ({number(low, digits)}-{'' if math.isinf(high) else number(high, digits)})"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile by linear interpolation; infinite where it meets an infinite value."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        return below if place == math.floor(place) else below + (place - math.floor(place)) * (above - below)

    return at(0.25), at(0.5), at(0.75)


def value_at(run: Record, key: str, axis: str, limit: float) -> float | None:
    """`key` of the last record with `axis` <= limit; None before the first one, and after a run that was cut short."""
    records = run.get("records") or []
    if not records or records[0][axis] > limit or (records[-1][axis] < limit and run["status"] not in ENDED):
        return None
    return [r[key] for r in records if r[axis] <= limit][-1]


def median_curve(
    runs: Sequence[Record], key: str, axis: str, points: int = 60, low: float | None = None
) -> list[dict[str, float]]:
    """Records {axis, key} of the median over `runs` on a logarithmic grid of `axis`, as far as most of them go."""
    runs = [run for run in runs if run.get("records")]
    if not runs:
        return []
    ends = [max(run["records"][-1][axis], 1e-9) for run in runs]
    first = max(low or 0.0, min(max(run["records"][0][axis], 1e-9) for run in runs))
    grid = [first * (max(ends) / first) ** (k / (points - 1)) for k in range(points - 1)] + [max(ends)]
    found = []
    for limit in grid:
        values = [value_at(run, key, axis, limit) for run in runs]
        values = [value for value in values if value is not None]
        if len(values) > len(runs) / 2:
            found.append({axis: limit, key: statistics.median(values)})
    return found


def with_gap(runs: Sequence[Record], key: str, best: float, name: str) -> list[Record]:
    """The runs with `name` = `key` - best in every record."""
    return [{**run, "records": [{**r, name: r[key] - best} for r in run["records"]]} for run in runs]


def best_of(runs: Sequence[Record], key: str) -> float:
    """The lowest `key` in any record of any run; infinite when there is none."""
    values = [r[key] for run in runs for r in run.get("records") or [] if r.get(key) is not None]
    return min(values, default=math.inf)


def stopped(runs: Mapping[str, Sequence[Record]]) -> str:
    """A sentence for every method whose runs failed or diverged; empty when none did."""
    lines = []
    for label, group in runs.items():
        bad = [run for run in group if run["status"] in ("failed", "non_finite")]
        if bad:
            lines.append(
                f"- {label}: {len(bad)} of {len(group)} runs ended early, the first after {bad[0]['steps']} steps:"
                f" {bad[0]['message']}"
            )
    return "\n".join(lines)


def leader(costs: Mapping[str, Sequence[float | None]]) -> str:
    """'label (median)' of the lowest median cost, None as never; 'none' when no median is finite."""
    medians = {}
    for label, values in costs.items():
        if values:
            medians[label] = statistics.median([math.inf if value is None else value for value in values])
    if not medians or math.isinf(min(medians.values())):
        return "none"
    label = min(medians, key=medians.get)
    return f"{label} ({number(medians[label])})"


#: axes of the cost of a run, with the words for them
AXES = {"seconds": "seconds", "oracle_calls": "oracle calls"}
Costs = dict[str, dict[float, dict[str, list[float | None]]]]


def costs_to(gaps: Mapping[str, Sequence[Record]], levels: Sequence[float]) -> Costs:
    """axis -> level -> label -> the cost, run by run, at which `gap` is first at most the level; None for never."""
    return {
        axis: {
            level: {
                label: [first_reaching(run["records"], "gap", level, axis) for run in group]
                for label, group in gaps.items()
            }
            for level in levels
        }
        for axis in AXES
    }


def cost_table(costs: Costs) -> str:
    """A row per method that has runs: median (quartiles) of the seconds, then of the calls, to every level."""
    levels = list(costs["seconds"])
    labels = [label for label, values in costs["seconds"][levels[0]].items() if values]
    rows = [[label, *[quartiles(costs[axis][level][label]) for axis in AXES for level in levels]] for label in labels]
    return markdown(["method", *[f"s to {v:g}" for v in levels], *[f"calls to {v:g}" for v in levels]], rows)


def first_at(costs: Costs, axis: str, keep: Callable[[str], bool] = lambda label: True) -> str:
    """'level: who is first (median)' for every level, among the labels to `keep`."""
    return "; ".join(
        f"{level:g}: {leader({label: values for label, values in of_level.items() if keep(label)})}"
        for level, of_level in costs[axis].items()
    )
