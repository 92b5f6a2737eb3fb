"""Seconds and peak memory against n, dx and dy over three decades each, with fitted exponents.

    python -m benchmarks.scaling --threads 2 [--json FILE] [--axes n dx dy] [--max-point-seconds 60]

One family: softmax regression on n samples of d features and 10 classes (dy = 10 d), samples in dx groups, one weight
sigmoid(x_j) a group; float32, L2 of 1e-2. Measured at a given lower solution, everything made anew each time: a
hypergradient (recorded gradient, adjoint, cross product), one product with the hyper-Hessian after it, and the dense
hyper-Hessian. Exponents by least squares on logarithms, over all points and over the last decade, where the overhead of
small calls is gone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import torch_bilevel as tb
from benchmarks.common import begin, finish, interleaved, markdown, number, once, parser_of, peak_memory
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.lower import LowerSystems, make_lower

CLASSES = 10
BASE = {"n": 2000, "dx": 100, "dy": 100}
AXES = {
    "n": [100, 300, 1000, 3000, 10_000, 30_000, 100_000],
    "dx": [10, 30, 100, 300, 1000, 3000, 10_000],
    "dy": [30, 100, 300, 1000, 3000, 10_000, 30_000],
}
QUANTITIES = ("hypergradient", "Hessian product", "dense Hessian")


def family(n: int, dx: int, dy: int) -> tb.BilevelProblem:
    """n samples of dy / 10 features with a falling spectrum, in dx groups; as many validation samples, 2000 at most."""
    gen = torch.Generator().manual_seed(0)
    features, held = max(1, dy // CLASSES), min(n, 2000)
    scale = torch.arange(1, features + 1) ** -0.5
    inputs = torch.randn(n + held, features, generator=gen) * scale
    teacher = torch.randn(features, CLASSES, generator=gen)
    labels = (inputs @ teacher + torch.randn(n + held, CLASSES, generator=gen)).argmax(1)
    group = torch.arange(n) % dx
    shape = (CLASSES, features)

    def g(x: Tensor, y: Tensor) -> Tensor:
        losses = cross_entropy(inputs[:n].to(y) @ y.view(shape).T, labels[:n], reduction="none")
        return (x.sigmoid()[group] * losses).mean() + 1e-2 * y.square().sum()

    def f(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(inputs[n:].to(y) @ y.view(shape).T, labels[n:])

    return tb.BilevelProblem.from_functions(f, g, torch.randn(dx, generator=gen), torch.zeros(CLASSES * features))


def point(n: int, dx: int, dy: int, args) -> dict[str, Any]:
    """Median seconds and peak MB of the three quantities; None where the limit of seconds would be passed."""
    problem = family(n, dx, dy)
    g = Objective(problem, lower=1.0, counts=OracleCounts())
    y = make_lower(None).solve(g, problem.x, problem.y, systems=LowerSystems(solver="cg"), tol=1e-4).y
    oracle = tb.ImplicitOracle(problem)
    kept: dict[str, Any] = {}

    def hypergradient() -> None:
        oracle.systems = LowerSystems()
        kept["ev"] = oracle.at_point(problem.x, y)

    def product() -> None:
        kept["Hv"] = kept["ev"].hessian.matvec(problem.x)

    def dense() -> None:
        kept["ev"].release()
        kept["H"] = kept["ev"].hessian.to_dense()

    found: dict[str, Any] = {"dy": problem.dy}
    runs: dict[str, Callable[[], None]] = dict(zip(QUANTITIES, (hypergradient, product, dense)))
    for name, run in runs.items():
        if name == "dense Hessian" and found["Hessian product"]["seconds"] * dx / 4 > args.max_point_seconds:
            found[name] = None  # blocks make it cheaper than dx products, by about four
            continue
        memory, (first, _) = peak_memory(lambda run=run: once(run))
        seconds = first
        if first < args.max_point_seconds / 4:
            times = interleaved({name: run}, args.repeats, warmup=0, max_seconds=args.max_point_seconds / 4)
            seconds = times[name].median
        found[name] = {"seconds": seconds, "mb": memory}
    return found


def exponent(sizes: list[float], values: list[float | None], from_size: float = 0.0) -> float | None:
    """The slope of log value against log size by least squares, from ``from_size`` on; None for fewer than two."""
    pairs = [(math.log(s), math.log(v)) for s, v in zip(sizes, values) if v is not None and v > 0 and s >= from_size]
    if len(pairs) < 2:
        return None
    return statistics.linear_regression(*zip(*pairs)).slope


def sweep(axis: str, sizes: list[int], args) -> dict[str, Any]:
    """The table of one axis, the other two as in BASE."""
    base = {key: value if not args.quick else 30 for key, value in BASE.items()}
    if axis == "dx":
        base["n"] = sizes[-1]  # at least one sample a group, and the same n for all
    others = ", ".join(f"{key} = {value}" for key, value in base.items() if key != axis)
    points = []
    for size in sizes:
        points.append(point(**{**base, axis: size}, args=args))
        print(f"  {axis} = {size}: " + ", ".join(f"{q} {number(points[-1][q] and points[-1][q]['seconds'])} s"
                                                 for q in QUANTITIES), flush=True)  # fmt: skip

    def column(quantity: str, what: str) -> list[float | None]:
        return [p[quantity] and p[quantity][what] for p in points]

    rows: list[list[Any]] = []
    for i, size in enumerate(sizes):
        row: list[Any] = [f"{size:,}"]
        for q in QUANTITIES:
            ms = column(q, "seconds")[i]
            row += [None if ms is None else ms * 1e3, column(q, "mb")[i]]
        rows.append(row)
    record: dict[str, Any] = {"sizes": sizes, "points": points, "exponents": {}}
    labels = (("exponent", 0.0), ("exponent, last decade", sizes[-1] / 10.5))
    for label, start in labels:
        row = [label]
        for q in QUANTITIES:
            slopes = [exponent(sizes, column(q, what), start) for what in ("seconds", "mb")]
            record["exponents"].setdefault(q, {})[label] = dict(zip(("seconds", "mb"), slopes))
            row += [None if slope is None else f"{slope:.2f}" for slope in slopes]
        rows.append(row)
    print(f"\n## Against {axis} ({others})\n")
    header = [axis]
    for q in QUANTITIES:
        header += [f"{q}, ms", "MB"]
    print(markdown(header, rows), flush=True)
    return record


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--max-point-seconds", type=float, default=60.0, help="of one quantity at one size")
    args = begin(parser, argv)
    record: dict = {}
    family_warm_up()
    for axis in args.axes:
        record[axis] = sweep(axis, [20, 60, 200] if args.quick else AXES[axis], args)
        finish(args, record)
    return record


def family_warm_up() -> None:
    """What PyTorch loads on first use is no cost of the first size."""
    problem = family(20, 5, 20)
    tb.ImplicitOracle(problem).at_point(problem.x, problem.y).hessian.to_dense()


if __name__ == "__main__":
    main()
