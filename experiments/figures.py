"""Figures of the experiments, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def curves(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Mapping[str, str],
    columns: Mapping[str, str],
    levels: Mapping[str, Mapping[str, float]] | None = None,
    log_rows: Sequence[str] = (),
    log_columns: Sequence[str] = (),
    floors: Mapping[str, float] | None = None,
) -> Path:
    """A grid of panels: each quantity in `rows` against each axis in `columns`, one curve per run.

    Args:
        path: the PNG to write.
        runs: label -> records as of `report.read_metrics`; a record without one of the two numbers is left
            out.
        rows, columns: record key -> axis label.
        levels: row key -> {label: value} of reference levels, drawn as dashed lines.
        log_rows, log_columns: keys with a logarithmic scale. floors: row key -> lower end of its axis.
    """
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(5.2 * len(columns), 3.6 * len(rows)), squeeze=False
    )
    for i, (row, row_label) in enumerate(rows.items()):
        for j, (column, column_label) in enumerate(columns.items()):
            axis = axes[i][j]
            for number, (label, records) in enumerate(runs.items()):
                points = [
                    (r[column], r[row])
                    for r in records
                    if r.get(column) is not None and r.get(row) is not None
                ]
                axis.plot(
                    *zip(*points) if points else ([], []),
                    marker=".",
                    markersize=4,
                    linewidth=1.3,
                    linestyle=("-", "--", ":")[number // 10 % 3],
                    label=label,
                )
            for k, (label, level) in enumerate((levels or {}).get(row, {}).items()):
                axis.axhline(level, linestyle="--", linewidth=1, color=f"C{k + len(runs)}", label=label)
            if row in log_rows:
                axis.set_yscale("log")
            if row in (floors or {}):
                axis.set_ylim(bottom=floors[row])
            if column in log_columns:
                has_zero = any(r.get(column) == 0 for records in runs.values() for r in records)
                axis.set_xscale("symlog" if has_zero else "log")
            axis.set_xlabel(column_label)
            axis.set_ylabel(row_label)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=7)
    return _save(figure, path)


def bands(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Sequence[tuple[str, str, str, str]],
    best: str,
    points: int = 80,
) -> Path:
    """A row of panels: for each label the median over its runs of the best point so far, quartiles shaded.

    Args:
        path: the PNG to write.
        runs: label -> runs, each with `records`; a curve goes as far as its longest run.
        panels: (axis key, quantity key, axis label, quantity label). The axes are logarithmic.
        best: the key whose running minimum says which point is the best so far.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    for axis, (x_key, y_key, x_label, y_label) in zip(axes[0], panels):
        for label, group in runs.items():
            if not group:
                continue
            first = max(run["records"][0][x_key] for run in group)
            last = max(run["records"][-1][x_key] for run in group)
            grid = np.geomspace(max(first, 1e-2), max(last, 2e-2), points)
            curves_ = np.array([[_best_so_far(run["records"], x_key, y_key, best, limit) for limit in grid] for run in group])
            low, middle, high = np.quantile(curves_, [0.25, 0.5, 0.75], axis=0)
            (line,) = axis.plot(grid, middle, linewidth=1.4, label=label)
            axis.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    return _save(figure, path)


def _best_so_far(records: Sequence[Mapping[str, Any]], axis: str, key: str, best: str, limit: float) -> float:
    """`key` at the record of least `best` among those up to `limit`; that of the first before it."""
    reached = [r for r in records if r[axis] <= limit] or records[:1]
    return min(reached, key=lambda r: r[best])[key]


def weight_histogram(path: Path, weights: Tensor, corrupted: Tensor) -> Path:
    """Histogram of learned sample weights (n,), clean and corrupted (n,) samples apart."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    weights, corrupted = weights.detach().cpu(), corrupted.cpu()
    parts = [weights[~corrupted].tolist(), weights[corrupted].tolist()]
    axis.hist(
        parts, bins=30, range=(0.0, 1.0), label=[f"clean ({len(parts[0])})", f"corrupted ({len(parts[1])})"]
    )
    axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("learned weight")
    axis.set_ylabel("training samples")
    axis.legend()
    return _save(figure, path)


def lowest_weights(
    path: Path,
    images: Tensor,
    weights: Tensor,
    given: Tensor,
    true: Tensor,
    count: int = 24,
    per_row: int = 8,
) -> Path:
    """The training images (n, h, w) of lowest weight, each with its given and, if wrong, its true label."""
    order = weights.detach().cpu().argsort(stable=True)[:count].tolist()
    rows = -(-len(order) // per_row)
    figure, axes = plt.subplots(rows, per_row, figsize=(1.15 * per_row, 1.5 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, order):
        axis.imshow(images[i].cpu().numpy(), cmap="gray_r")
        wrong = int(given[i]) != int(true[i])
        title = f"{int(given[i])} (is {int(true[i])})" if wrong else f"{int(given[i])}"
        axis.set_title(
            f"{title}\n{float(weights[i]):.2f}", fontsize=7, color="firebrick" if wrong else "black"
        )
    return _save(figure, path)
