"""What preconditions CG with the lower Hessian, level by level: iterations, what making and applying it takes.

    python -m benchmarks.preconditioners --data-dir DATA --threads 1 [--json FILE]

At the problems of ``benchmarks.hypergradient`` that see their learner through a linear layer: each preconditioner is made
at the outer step before, CG starts at that step's adjoint and solves the adjoint system of the next one to a relative
residual of 1e-4, reorthogonalised, in float32. *r*: leading inputs in the corner of a ``KroneckerPreconditioner``.
Milliseconds, median (quartiles), in turns.

Then the adjoint system in float64, by ``LowerSystems`` with what it keeps: all of it in float64 against float32 recursions
within refinement, each at a point of its own, so that finding the outputs' Hessian is part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import problems
from benchmarks.common import Skip, begin, finish, interleaved, markdown, parser_of
from benchmarks.problems import Setting
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Linearisation, Objective
from torch_bilevel.linalg import Solution, cg, cholesky
from torch_bilevel.lower import LowerSystems

RANKS, TOL = (0, 20, 40, 100, 160, 200), 1e-4


def compare(setting: Setting, args) -> dict:
    """The table of one problem."""
    problem, systems = setting.problem(), LowerSystems()

    def recorded(x: torch.Tensor, y: torch.Tensor) -> tuple[Linearisation, torch.Tensor]:
        at = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(x, y, "y")
        systems.outputs(at)
        return at, Objective(problem, upper=1.0, counts=OracleCounts()).gradient(x, y, "y")[2]

    before, b_before = recorded(setting.x_before, setting.y_before)
    here, b = recorded(setting.x, setting.y)
    A = systems.operator(here)
    start = cg(systems.operator(before), b_before, tol=TOL, reorthogonalise=True).x
    d, K = before.outputs.calls[0].index.shape
    makers: dict[str, Callable] = {f"Kronecker, r = {r}": lambda r=r: before.outputs.preconditioner(r)
                                   for r in sorted({min(r, d) for r in RANKS})}  # fmt: skip
    if not args.no_cholesky:
        makers["Cholesky"] = lambda: cholesky(systems.operator(before))
    made = {"none": None, **{name: make() for name, make in makers.items()}}
    making = interleaved(makers, args.repeats, max_seconds=args.max_seconds)
    applying = interleaved({name: lambda P=P: P(b) for name, P in made.items() if P is not None}, args.repeats)
    product = interleaved({"product": lambda: A.matvec(b)}, args.repeats)["product"]
    record, rows = {"product": product}, []
    for name, P in made.items():
        solution = cg(A, b, tol=TOL, x0=start, preconditioner=P, reorthogonalise=True)
        record[name] = {"iterations": solution.iterations, "status": solution.status.value, "made": making.get(name),
                        "applied": applying.get(name)}  # fmt: skip
        rows.append([name, solution.iterations if solution.ok else solution.status.value, making.get(name), applying.get(name)])
    print(f"\n## {setting.name}: {setting.dy} unknowns, {K} outputs; a product with the outputs' Hessian: {product.text()} ms\n")
    print(markdown(["preconditioner", "iterations", "made, ms", "applied, ms"], rows), flush=True)
    return record


def mixed(setting: Setting, args) -> dict:
    """Milliseconds of a float64 solve, with and without float32 recursions, to several tolerances."""
    exact = setting.to(torch.float64)
    problem, everyone = exact.problem(), ("float64", "float32 within float64")
    b = Objective(problem, upper=1.0, counts=OracleCounts()).gradient(exact.x, exact.y, "y")[2]
    systems = {name: LowerSystems() for name in everyone}
    systems["float64"]._single = False  # as after float32 has failed
    record: dict = {}

    def solve(name: str, tol: float) -> Solution:
        at = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(exact.x, exact.y, "y")
        return systems[name].solve(at, b, tol=tol)

    for tol in (1e-2, 1e-4, 1e-10):
        for _ in range(4):  # until what is kept is kept
            iterations = {name: solve(name, tol).iterations for name in everyone}
        times = interleaved({name: lambda name=name, tol=tol: solve(name, tol) for name in everyone}, args.repeats,
                            max_seconds=args.max_seconds)  # fmt: skip
        record[f"{tol:g}"] = {name: {"seconds": times[name], "iterations": iterations[name]} for name in everyone}
    rows = [[name, *(f"{entry[name]['seconds'].text()}; {entry[name]['iterations']}" for entry in record.values())]
            for name in everyone]  # fmt: skip
    print(f"\n{setting.name} in float64, ms; iterations, to a relative residual of:\n")
    print(markdown(["products", *record], rows), flush=True)
    return record


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__)
    parser.add_argument("--settings", nargs="+", default=["softmax", "mnist"], choices=["softmax", "mnist"])
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where learned weights are kept")
    parser.add_argument("--no-cholesky", action="store_true", help="without the factor, which takes seconds")
    args = begin(parser, argv)
    record: dict = {}
    for name in args.settings:
        try:
            setting = problems.mnist(args.data_dir, args.cache, args.quick) if name == "mnist" else problems.softmax(args.quick)
        except Skip as reason:
            print(f"\n## {name}: skipped: {reason}")
            continue
        record[name] = {**compare(setting, args), "mixed": mixed(setting, args)}
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
