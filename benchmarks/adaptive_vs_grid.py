"""Adaptive M and adaptive refresh against the best fixed M and m that a grid finds in hindsight.

    OMP_NUM_THREADS=1 python -m benchmarks.adaptive_vs_grid [--json FILE]

The grid: M in 10^-4, 10^-3.5, ..., 10^3 with m = 1, 2, 3, 5, 10, every step accepted (the published algorithms); of the
runs that end certified and at a value no higher than the adaptive one's, the fewest steps, the fewest lower gradients,
the fewest Hessians and the fewest oracle calls are taken each by itself, so four different settings may be the
yardstick; then, in a second table, those of the one run with the fewest oracle calls. The adaptive runs have no
constants: FSBA (m = 1) and LFSBA with their defaults.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import torch_bilevel as tb

from .lazy_vs_fresh import cleaning, nonconvex

GRID_M = [10 ** (k / 2) for k in range(-8, 7)]
GRID_PERIOD = [1, 2, 3, 5, 10]
COUNTS = ("steps", "lower_gradients", "hessians", "oracle_calls")
EPS, MAX_STEPS = 1e-5, 150


def saddle() -> tb.BilevelProblem:
    """Strict saddle at exactly 0: phi = x_1^2/2 + x_2^2/4 - x_3^2/2 + x_3^4/10, through y = x."""

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[0] * y[0] / 2 + y[1] ** 2 / 4 - x[2] * y[2] / 2 + y[2] ** 4 / 10

    zeros = torch.zeros(3, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(f, lambda x, y: ((y - x) ** 2).sum() / 2, zeros, zeros)


def ridge(features: int = 12, samples: int = 40) -> tb.BilevelProblem:
    """One log L2 weight per feature, features of scales 1 to 100."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    X = draw(samples, features) * torch.logspace(0, -2, features, dtype=torch.float64)
    t = X @ (30 * draw(features) * (torch.arange(features) % 3 == 0)) + 0.3 * draw(samples)
    train, held = slice(0, samples // 2), slice(samples // 2, samples)

    def g(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((X[train].to(y) @ y - t[train].to(y)) ** 2).mean() + (x.exp() * y * y).mean()

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((X[held].to(y) @ y - t[held].to(y)) ** 2).mean() + 1e-2 * (x * x).mean()

    zeros = torch.zeros(features, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(f, g, zeros, zeros)


def quadratic(dx: int = 10, dy: int = 8) -> tb.BilevelProblem:
    """Strongly convex phi, quadratic: the less M the better."""
    gen = torch.Generator().manual_seed(1)
    B, t = torch.randn(dy, dx, generator=gen, dtype=torch.float64), torch.randn(dy, generator=gen, dtype=torch.float64)
    D = torch.linspace(1, 10, dy, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(
        lambda x, y: ((y - t.to(y)) ** 2).sum() / 2 + (x * x).sum() / 50,
        lambda x, y: (D.to(y) * y * y).sum() / 2 - y @ (B.to(y) @ x),
        torch.ones(dx, dtype=torch.float64), torch.zeros(dy, dtype=torch.float64),
    )  # fmt: skip


PROBLEMS = {
    "quadratic": quadratic,
    "strict saddle": saddle,
    "nonconvex": lambda: nonconvex(0, 10, 8),
    "hyper-cleaning": lambda: cleaning(0, samples=30, held=20, features=4),
    "L2 per feature": ridge,
}


def measure(make, method: str, **options) -> dict | None:
    """Counts of one run, None where it does not end at a certified point."""
    try:
        result = tb.minimize(make(), method, max_steps=MAX_STEPS, gradient_tol=EPS, **options)
    except tb.BilevelError:
        return None
    if result.status is not tb.Status.SECOND_ORDER:
        return None
    return {**options, "value": result.value, "steps": result.history[-1].step, **result.counts.as_dict(),
            "oracle_calls": result.counts.oracle_calls}  # fmt: skip


def print_table(rows: list[tuple], yardstick) -> None:
    """``rows``: (problem, method, adaptive counts, grid runs that got there, grid runs); yardstick(grid runs) -> counts."""
    print("| problem | method | steps | lower gradients | Hessians | oracle calls | grid runs that got there |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, label, ours, runs, tried in rows:
        best = yardstick(runs)
        cells = [f"{ours[c]} / {best[c]} = {ours[c] / best[c]:.2f}" if best[c] else f"{ours[c]} / -" for c in COUNTS]
        print(f"| {name} | {label} | {' | '.join(cells)} | {len(runs)} of {tried} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found, rows = {}, []
    for name, make in PROBLEMS.items():
        grid = {m: [measure(make, "lfsba", adaptive=False, cubic_reg=M, period=m) for M in GRID_M] for m in GRID_PERIOD}
        found[name] = {"grid": grid}
        for label, method, periods in (("FSBA", "fsba", [1]), ("LFSBA", "lfsba", GRID_PERIOD)):
            ours = found[name][label] = measure(make, method)
            tried = [run for m in periods for run in grid[m]]
            runs = [run for run in tried if run and run["value"] <= ours["value"] + 1e-6 * (1 + abs(ours["value"]))]
            rows.append((name, label, ours, runs, len(tried)))
            print(f"{name}, {label}: {len(runs)} of {len(tried)} grid runs got there", flush=True)
    print("\nEach count against the fewest of any grid point\n")
    print_table(rows, lambda runs: {count: min((run[count] for run in runs), default=None) for count in COUNTS})
    print("\nEvery count against the one grid point with the fewest oracle calls\n")
    print_table(rows, lambda runs: min(runs, key=lambda run: run["oracle_calls"], default=dict.fromkeys(COUNTS)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
