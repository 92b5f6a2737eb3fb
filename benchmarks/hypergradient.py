"""A hypergradient to a given error: ours, cold and warm, against other libraries, at the same lower solution.

    python -m benchmarks.hypergradient --data-dir DATA --threads 2 [--json FILE] [--settings softmax mnist mlp]

Problems: a 5000 x 784 softmax with an L2 weight per feature (7,840 unknowns), hyper-cleaning of MNIST-5000 at learned
weights (7,850), an MLP (235,146); float32. The error is that of the whole hypergradient, relative, against one in
float64. Every contestant is tuned: the fewest steps of its solver (for ours: the loosest tolerance) that reach the
error. Then all are timed in turns; medians (quartiles) of milliseconds. Equal work: 20 products each.

*Cold*: nothing kept (a preconditioner that 'auto' makes at once is part of it). *Warm start*: from the adjoint of the
outer step before; with what the library keeps from there, each of its levels by itself, and what making it cost.
*Compiled*: with ``BilevelProblem(..., compile=True)``, timed after compilation, as jaxopt is.
*Floor*: plain CG on closed-form products, two matrix products each. ``--device cuda``: everybody on the GPU. Else the process
is held to as many cores as PyTorch has threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import torch_bilevel as tb
from benchmarks import problems
from benchmarks.common import Skip, Spread, begin, finish, hold_to_cores, interleaved, markdown, number, once, parser_of
from benchmarks.floors import closed_form
from benchmarks.peers import PEERS, Peer, TorchOpt, TorchOptWarm
from benchmarks.problems import Setting, curvature
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import own_stream
from torch_bilevel.lower import LowerSystems
from torch_bilevel.lower.kept import is_exact

TARGETS = (1e-2, 1e-3, 1e-4, 1e-5)
EQUAL_PRODUCTS = 20


@dataclass
class Contestant:
    """``run(effort)`` with more accuracy for larger effort, up to ``most``; ``products(effort)`` where known."""

    name: str
    run: Callable[[int], Tensor]
    most: int
    products: Callable[[int], int | None]
    peer: bool = False
    errors: dict[int, float] = field(default_factory=dict)


class Ours:
    """Our hypergradient at (x, y), solved to a tolerance of 10^(-effort / 8).

    Args:
        level: None: cold, nothing kept. 0: started at the adjoint of the outer step before. n: also with what is kept
            from there, of rank n (n = dy: Cholesky), see ``lower.kept.Ladder``. "ritz": the Ritz vectors of that adjoint's
            solve.
        plain: CG without a preconditioner, with which 'auto' may begin at once, for later. compiled: the losses are.
    """

    def __init__(self, setting: Setting, level: int | str | None, plain: bool = False, compiled: bool = False):
        self.setting = setting
        problem = setting.problem(compile=compiled)
        self.oracle = tb.ImplicitOracle(problem, solver="cg" if plain or is_exact(setting.dy) and not level else "auto")
        self.preparation = 0.0
        if level is not None:
            oracle = tb.ImplicitOracle(self.oracle.problem, solver="auto" if level == "ritz" else "cg")
            before = oracle.at_point(setting.x_before, setting.y_before)
            self.oracle.warm = {"y": setting.y_before, "v": before.points["v"]}
        if level == "ritz":
            self.oracle.systems = oracle.systems
        self.systems = self.oracle.systems
        if level and level != "ritz":
            g = Objective(self.oracle.problem, lower=1.0, counts=OracleCounts())
            at = g.linearise(setting.x_before, setting.y_before, "y")
            systems = self.systems
            self.preparation = once(lambda: systems.kept.make(level, systems.operator(at), at))[0]
            self.oracle.at_point(setting.x_before, setting.y_before)  # what it was made for; how fast CG is with it is kept too

    def run(self, effort: int) -> Tensor:
        """As ``evaluate`` does once it has y; what a call leaves behind is forgotten, so that every call is alike."""
        self.oracle.systems = copy.copy(self.systems)
        self.oracle.systems.kept = copy.copy(self.systems.kept)
        self.oracle.systems.tol = 10 ** (-effort / 8)
        self.last = self.oracle.at_point(self.setting.x, self.setting.y)
        return self.last.gradient

    def products(self, effort: int) -> int:
        """Hessian products of the solve, from the counts (the one with g_xy is not among them)."""
        self.run(effort)
        return self.last.counts.lower_products - 1


def ours_with_products(setting: Setting, products: int, compiled: bool) -> Callable[[], Tensor]:
    """Our cold hypergradient with a set number of Hessian products (the last checks the residual)."""
    problem = setting.problem(compile=compiled)

    def run() -> Tensor:
        counts = OracleCounts()
        at = Objective(problem, lower=1.0, counts=counts).linearise(setting.x, setting.y, "y")
        _, fx, fy = Objective(problem, upper=1.0, counts=counts).gradient(setting.x, setting.y)
        systems = LowerSystems(solver="cg", tol=1e-12, max_iterations=products - 1)
        return fx - at.xy(systems.solve(at, fy).x)

    return run


def reference(setting: Setting) -> tuple[Tensor, Tensor]:
    """(hypergradient, adjoint at x_before) in float64 by double backward and plain CG: no contestant's code."""
    exact = setting.to(torch.float64)

    def solve(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf, params = x.clone().requires_grad_(True), exact.parameters(y)
        gradients = torch.autograd.grad(exact.lower(params, leaf), params, create_graph=True)
        b = torch.cat([p.reshape(-1) for p in torch.autograd.grad(exact.upper(params, leaf), params)])

        def split(v: Tensor) -> list[Tensor]:
            return [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params)]

        def product(v: Tensor) -> Tensor:
            parts = torch.autograd.grad(gradients, params, split(v), retain_graph=True)
            return torch.cat([part.reshape(-1) for part in parts])

        v, r = torch.zeros_like(b), b.clone()
        p, rr = r, torch.dot(r, r)
        goal = rr * 1e-11**2
        for _ in range(4000):
            Ap = product(p)
            alpha = rr / torch.dot(p, Ap)
            v, r = v + alpha * p, r - alpha * Ap
            new = torch.dot(r, r)
            if new <= goal:
                return -torch.autograd.grad(gradients, leaf, split(v))[0], v
            p, rr = r + new / rr * p, new
        raise RuntimeError(f"{setting.name}: the float64 reference did not converge; is its lower level convex?")

    gradient, _ = solve(exact.x, exact.y)
    _, adjoint = solve(exact.x_before, exact.y_before)
    return gradient, adjoint


def fewest(contestant: Contestant, target: float, exact: Tensor) -> int | None:
    """The least effort at which the relative error is at most the target, by bisection; None: not within ``most``.

    Errors once measured are kept, so that the next target starts from them.
    """

    def good(effort: int) -> bool:
        if effort not in contestant.errors:
            try:
                found = contestant.run(effort)
                contestant.errors[effort] = float((found.double() - exact).norm() / exact.norm())
            except tb.BilevelError:
                contestant.errors[effort] = float("inf")
        return contestant.errors[effort] <= target

    low, high = 0, 1
    while not good(high):
        if high == contestant.most:
            return None
        low, high = high, min(2 * high, contestant.most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def contestants_of(setting: Setting, adjoint: Tensor, quick: bool) -> tuple[list[Contestant], dict[str, float], dict]:
    """Everybody who can be had here, what making each kept factor cost, and why the others cannot be had."""
    most = 200 if not quick else 80
    found, making, absent = [], {}, {}
    cold = Ours(setting, None)
    cold.run(1)  # before anything is timed
    compiled = Ours(setting, None, compiled=True)
    making["compiled programs"] = once(lambda: compiled.run(1))[0]
    ours_by_name = {"ours, cold": cold, "ours, cold, compiled": compiled, "ours, warm start": Ours(setting, 0, plain=True)}
    at = Objective(cold.oracle.problem, lower=1.0, counts=OracleCounts()).linearise(setting.x, setting.y, "y")
    ladder = cold.systems.ladder(at)
    if ladder.kronecker:
        ours_by_name["ours, cold, no preconditioner"] = Ours(setting, None, plain=True)
        ours_by_name["ours, cold, no preconditioner, compiled"] = Ours(setting, None, plain=True, compiled=True)
    if cold.systems.kept.ritz_wanted(setting.dy, setting.x.dtype) and not ladder.kronecker:
        ours_by_name["ours, warm start, Ritz vectors"] = Ours(setting, "ritz")
        ours_by_name["ours, warm start, Ritz vectors, compiled"] = Ours(setting, "ritz", compiled=True)
    for level in ladder.prices:
        kind = "Kronecker, corner of" if level in ladder.kronecker else "sketch of rank"
        what = "Cholesky" if level == setting.dy else f"{kind} {level}"
        ours_by_name[f"ours, warm start, {what}"] = Ours(setting, level)
        making[what] = ours_by_name[f"ours, warm start, {what}"].preparation
        if level in ladder.kronecker:
            ours_by_name[f"ours, warm start, {what}, compiled"] = Ours(setting, level, compiled=True)
    for name, ours in ours_by_name.items():
        found.append(Contestant(name, ours.run, 56, ours.products))
    floor = closed_form(setting)
    if floor is not None:
        found.append(Contestant("floor: closed-form products, plain CG", floor.hypergradient, most, lambda k: k))
    for cls in PEERS:
        reason = cls.missing()
        if reason is None:
            try:
                peers: list[Peer] = [cls(setting)]
                peers[0].hypergradient(2)
                if cls is TorchOpt:
                    peers.append(TorchOptWarm(setting, adjoint.to(setting.x.dtype)))
            except Exception as error:  # a peer that fails on this problem is reported, and the others go on
                reason = f"{type(error).__name__}: {str(error)[:100]}"
            else:
                limit = (16 if quick else 64) if cls.kind == "unrolled" else most
                found += [Contestant(p.name, p.hypergradient, limit, p.products, True) for p in peers]
        if reason is not None:
            absent[cls.name] = reason
    return found, making, absent


def compare(setting: Setting, args) -> dict:
    """All tables of one problem."""
    print(f"\n## {setting.name}: {setting.dy} unknowns, dx = {len(setting.x)}, {str(setting.x.dtype)[6:]}", flush=True)
    exact, adjoint = reference(setting)
    everybody, making, absent = contestants_of(setting, adjoint, args.quick)
    record: dict = {"absent": absent, "targets": {}}
    for target in TARGETS[1:3] if args.quick else args.targets:
        efforts = {c.name: fewest(c, target, exact) for c in everybody}
        there = [c for c in everybody if efforts[c.name] is not None]
        times = interleaved({c.name: lambda c=c, effort=efforts[c.name]: c.run(effort) for c in there}, args.repeats,
                            max_seconds=args.max_seconds)  # fmt: skip
        products = {c.name: c.products(efforts[c.name]) for c in there}
        peers = [c.name for c in there if c.peer]
        fastest = min((times[name].median for name in peers), default=None)
        rows = [
            [c.name, None if c.name not in times else products[c.name], times.get(c.name, "not reached"),
             None if fastest is None or c.name not in times else f"{fastest / times[c.name].median:.2f}"]
            for c in everybody
        ]  # fmt: skip
        print(f"\nRelative error {target:g}:\n")
        print(markdown(["who", "products", "ms", "fastest peer / this"], rows), flush=True)
        record["targets"][f"{target:g}"] = {n: {"seconds": t, "products": products[n], "effort": efforts[n]}
                                            for n, t in times.items()}  # fmt: skip
    record["equal"] = equal_work(setting, everybody, exact, args)
    record["making_seconds"] = making
    record["product"] = product_cost(setting, args)
    print("\nMade before, once for many steps: "
          + "; ".join(f"{what} in {number(seconds)} s" for what, seconds in making.items()))  # fmt: skip
    for name, reason in absent.items():
        print(f"Not here: {name} ({reason})")
    return record


def equal_work(setting: Setting, everybody: list[Contestant], exact: Tensor, args) -> dict:
    """Milliseconds and error with 20 products for everybody."""
    runs: dict[str, Callable[[], Tensor]] = {
        "ours, cold": ours_with_products(setting, EQUAL_PRODUCTS, False),
        "ours, cold, compiled": ours_with_products(setting, EQUAL_PRODUCTS, True),
    }
    for c in everybody:
        if c.name.startswith("floor") or c.peer:
            steps = next(k for k in range(EQUAL_PRODUCTS, 0, -1) if c.products(k) <= EQUAL_PRODUCTS)
            runs[c.name] = lambda c=c, steps=steps: c.run(steps)
    errors = {name: float((run().double() - exact).norm() / exact.norm()) for name, run in runs.items()}
    times = interleaved(runs, args.repeats, max_seconds=args.max_seconds)
    print(f"\n{EQUAL_PRODUCTS} products each:\n")
    print(markdown(["who", "ms", "relative error"], [[n, times[n], f"{errors[n]:.1e}"] for n in runs]), flush=True)
    return {name: {"seconds": times[name], "error": errors[name]} for name in runs}


def product_cost(setting: Setting, args) -> dict[str, Spread]:
    """One product with g_yy, recorded: ours, a hand-written double backward, the closed form."""
    at = Objective(setting.problem(), lower=1.0, counts=OracleCounts()).linearise(setting.x, setting.y, "y")
    params = setting.parameters()
    by_hand = curvature(setting, params)
    w = torch.randn(setting.dy, generator=torch.Generator().manual_seed(0)).to(setting.x)
    parts = [p.detach() for p in setting.parameters(w)]
    runs = {"ours": lambda: at.yy(w), "autograd by hand": lambda: by_hand(parts)}
    floor = closed_form(setting)
    if floor is not None:
        point = floor.at(setting.x)
        runs["closed form"] = lambda: point.product(w)
    times = interleaved(runs, 3 * args.repeats, max_seconds=20)
    print("\nOne product:\n")
    print(markdown(["who", "ms"], [[name, t] for name, t in times.items()]), flush=True)
    return times


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__)
    names = ["softmax", "mnist", "mlp"]
    parser.add_argument("--settings", nargs="+", default=names, choices=names)
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="relative errors to reach")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where learned weights are kept")
    args = begin(parser, argv)
    if args.device == "cpu" and not args.quick:
        hold_to_cores(torch.get_num_threads())
    record: dict = {}
    for name in args.settings:
        try:
            if name == "mnist":
                setting = problems.mnist(args.data_dir, args.cache, args.quick)
            else:
                setting = problems.softmax(args.quick) if name == "softmax" else problems.mlp(args.cache, args.quick)
        except Skip as reason:
            print(f"\n## {name}: skipped: {reason}")
            continue
        with own_stream(torch.device(args.device)):  # as within minimize
            record[name] = compare(setting.to(device=args.device), args)
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
