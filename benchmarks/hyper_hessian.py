"""The dense hyper-Hessian of hyper-cleaning against row-by-row autograd, and against what it must cost.

    python -m benchmarks.hyper_hessian --data-dir DATA --threads 2 [--json FILE] [--settings australian mnist]

*Row by row* is how public code of the papers builds its Hessians: the gradient of each of the two penalty functions in
(x, y), then one backward pass per entry, taken by indexing (``gradient[i]``) or by iterating (``for entry in
gradient``). Both sides start from the same (x, y*) and end with the same matrix; ours is timed from nothing recorded
and nothing factored, and also as in a run, where the evaluation of the gradient has left its factor; both also with
compiled losses, timed after compilation. australian: dx = 483, dy = 30, float64. MNIST-5000: dx = 5000, dy = 7850,
float32; there row by row is timed on a few rows and extrapolated. Floor: the operations of the closed form at the
measured rate of matrix products.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import torch_bilevel as tb
from benchmarks.common import Skip, begin, finish, interleaved, markdown, number, once, parser_of, peak_memory
from benchmarks.floors import hessian_operations, matmul_rate
from benchmarks.problems import Setting, cleaning, synthetic_cleaning
from experiments.data import DataError, corrupt, make_split
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.lower import LowerSystems

PENALTY = 1e4


class RowByRow:
    """S(hi) - S(lo) over delta, S = h_xx - h_xy h_yy^{-1} h_yx, from Hessians of h = g + sigma f built row by row."""

    def __init__(self, setting: Setting, points: dict[str, Tensor]):
        self.setting = setting
        self.sigmas = [float(s) for s in points["sigmas"]]
        delta = self.sigmas[1] - self.sigmas[0]
        self.ends = [points["lo"], points["lo"] + delta * points["d"]]

    def gradients(self, y: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(h_x, h_y, x, y as a list): both gradients with their graph, and the leaves."""
        s = self.setting
        x, params = s.x.clone().requires_grad_(True), s.parameters(y)
        h = s.lower(params, x) + sigma * s.upper(params, x)
        gx, *parts = torch.autograd.grad(h, [x, *params], create_graph=True)
        return gx, torch.cat([part.reshape(-1) for part in parts]), x, params

    @staticmethod
    def row(entry: Tensor, leaves: list[Tensor]) -> Tensor:
        parts = torch.autograd.grad(entry, leaves, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]) if len(parts) > 1 else parts[0]

    def rows(self, gradient: Tensor, leaves: list[Tensor], iterate: bool) -> Tensor:
        """One backward pass an entry."""
        entries = gradient if iterate else (gradient[i] for i in range(len(gradient)))
        return torch.stack([self.row(entry, leaves) for entry in entries])

    def hessian(self, iterate: bool) -> Tensor:
        """(dx, dx). Rows of h_xx with respect to x alone; rows of h_yx and h_yy together."""
        dx, schur = len(self.setting.x), []
        for y, sigma in zip(self.ends, self.sigmas):
            gx, gy, x, params = self.gradients(y, sigma)
            xx = self.rows(gx, [x], iterate)
            below = self.rows(gy, [x, *params], iterate)
            yx, yy = below[:, :dx], below[:, dx:]
            schur.append(xx - yx.T @ torch.linalg.solve(yy, yx))
        return (schur[1] - schur[0]) / (self.sigmas[1] - self.sigmas[0])

    def seconds_by_sample(self, rows: int) -> float:
        """Seconds for all rows at both ends, from some rows of one; solving the systems not counted."""
        gx, gy, x, params = self.gradients(self.ends[0], self.sigmas[0])
        total = 0.0
        for g, leaves in ((gx, [x]), (gy, [x, *params])):
            self.row(g[0], leaves)
            chosen = torch.linspace(0, len(g) - 1, rows).long().tolist()
            seconds = sum(once(lambda g=g, leaves=leaves, i=i: self.row(g[i], leaves))[0] for i in chosen)
            total += len(g) * seconds / rows
        return 2 * total


def fresh(oracle: tb.ImplicitOracle | tb.PenaltyOracle, state: dict) -> Tensor:
    """Our dense Hessian at a kept point: all recordings and factors made anew."""
    oracle.systems = LowerSystems()
    return oracle.restore(state).hessian.to_dense()


def small(setting: Setting, args) -> dict:
    """Everybody in turns, with the whole matrix."""
    problem = setting.problem()
    penalty, implicit = tb.PenaltyOracle(problem, penalty=PENALTY), tb.ImplicitOracle(problem)
    states = [oracle.evaluate(setting.x).state_dict() for oracle in (penalty, implicit)]
    for state in states:
        state["recorded"] = {name: [wrt, False, False, False] for name, (wrt, *_) in state["recorded"].items()}
    rows = RowByRow(setting, states[0]["points"])
    compiled = setting.problem(compile=True)
    in_a_run = [tb.ImplicitOracle(p).evaluate(setting.x) for p in (problem, compiled)]
    implicit_compiled = tb.ImplicitOracle(compiled)
    operator = in_a_run[0].hessian
    v = torch.randn(len(setting.x), 64, generator=torch.Generator().manual_seed(0), dtype=setting.x.dtype)

    def within_a_run(ev: tb.Evaluation) -> Tensor:
        ev.release()
        return ev.hessian.to_dense()

    runs = {
        "ours, implicit": lambda: fresh(implicit, states[1]),
        "ours, implicit, after an evaluation": lambda: within_a_run(in_a_run[0]),
        "ours, implicit, compiled": lambda: fresh(implicit_compiled, states[1]),
        "ours, implicit, compiled, after an evaluation": lambda: within_a_run(in_a_run[1]),
        "ours, penalty (central)": lambda: fresh(penalty, states[0]),
        "row by row, indexed": lambda: rows.hessian(iterate=False),
        "row by row, iterated": lambda: rows.hessian(iterate=True),
    }
    exact = rows.hessian(iterate=False)
    errors = {name: float((run() - exact).norm() / exact.norm()) for name, run in runs.items()}
    times = interleaved(runs, args.repeats, max_seconds=args.max_seconds)
    products = interleaved({"single": lambda: operator.matvec(v[:, 0]), "block of 64": lambda: operator.matmat(v)},
                           3 * args.repeats)  # fmt: skip
    floor = floor_of(setting)
    indexed = times["row by row, indexed"].median
    per_product = {"ours, implicit": products["single"], "row by row, indexed": indexed / len(setting.x)}
    print(markdown(["who", "ms", "indexed rows / this", "difference from row by row"],
                   [[n, t, indexed / t.median, f"{errors[n]:.1e}"] for n, t in times.items()]
                   + [["floor", floor["seconds"] * 1e3, indexed / floor["seconds"], None]]))  # fmt: skip
    print("\nPer product with a vector:\n")
    print(markdown(["who", "ms"], [["ours, one vector", products["single"]],
                                   ["ours, in a block of 64", products["block of 64"].median / 64 * 1e3],
                                   ["row by row, total / dx", per_product["row by row, indexed"] * 1e3],
                                   ["floor, total / dx", floor["seconds"] / len(setting.x) * 1e3]]))  # fmt: skip
    return {"seconds": times, "errors": errors, "products": products, "floor": floor}


def large(setting: Setting, args) -> dict:
    """The parts of one dense Hessian, its eigendecomposition and its memory; rows by sample."""
    problem = setting.problem()
    oracle = tb.ImplicitOracle(problem, solver="cg")  # leaves no factor behind
    seconds, ev = once(lambda: oracle.evaluate(setting.x))
    print(f"evaluation before: {number(seconds)} s, {ev.counts.lower_products} products")
    state = ev.state_dict()
    sigma = 1 / PENALTY
    points = {"lo": ev.points["y"], "d": -ev.points["v"], "sigmas": torch.tensor([0.0, sigma])}
    by_rows = RowByRow(setting, points).seconds_by_sample(3 if args.quick else 40)
    at = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(setting.x, state["points"]["y"], "y")
    systems = LowerSystems()
    found = {}
    operator = systems.operator(at)
    found["g_yy"], A = once(operator.to_dense)
    found["Cholesky"], _ = once(lambda A=A: torch.linalg.cholesky_ex(A))
    del A, at, ev, operator
    oracle = tb.ImplicitOracle(problem)
    (megabytes, (total, H)) = peak_memory(lambda: once(lambda: fresh(oracle, state)))
    found["eigendecomposition"], _ = once(lambda: torch.linalg.eigh(H))
    oracle = tb.ImplicitOracle(problem)
    floor = floor_of(setting)
    lines = [["g_yy, alone", found["g_yy"], floor["parts"]["g_yy"]],
             ["Cholesky, alone", found["Cholesky"], floor["parts"]["Cholesky"]],
             ["dense hyper-Hessian, both included", total, floor["seconds"]],
             ["its eigendecomposition", found["eigendecomposition"], None],
             ["both together", total + found["eigendecomposition"], None],
             ["row by row, indexed (extrapolated, without solving)", by_rows, None]]  # fmt: skip
    print(markdown(["part", "s", "floor, s"], lines))
    print(f"\npeak memory above what was there before: {number(megabytes)} MB; the matrix itself "
          f"{number(H.numel() * H.element_size() / 2**20)} MB; floor at"
          f" {number(floor['rate'] / 1e9)} GFLOP/s")  # fmt: skip
    return {"seconds": {**found, "dense": total, "row by row": by_rows}, "peak_mb": megabytes, "floor": floor,
            "symmetric_error": float((H - H.T).norm() / H.norm())}  # fmt: skip


def floor_of(setting: Setting) -> dict:
    """Seconds of the closed form's operations, by part and in all."""
    rate = matmul_rate(setting.x.dtype)
    features, classes = setting.sizes[0] + 1, setting.sizes[-1]
    operations = hessian_operations(len(setting.x), len(setting.valid[1]), features, classes)
    parts = {name: count / rate for name, count in operations.items()}
    return {"rate": rate, "operations": operations, "parts": parts, "seconds": sum(parts.values())}


def australian(args) -> Setting:
    """As configs/hyper_cleaning/australian.yaml, at random weights; 40 synthetic images with --quick."""
    if args.quick:
        return synthetic_cleaning(40, 4, 3).to(torch.float64)
    try:
        split = make_split("australian", args.data_dir)
    except DataError as error:
        raise Skip(str(error)) from error
    noisy, _ = corrupt(split.train.labels, 0.5, "flip", split.classes, 0)
    x = torch.randn(len(noisy), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Setting("australian", (split.train.inputs.shape[1], 2), True, "weights", 1e-3, (split.train.inputs, noisy),
                   (split.val.inputs, split.val.labels), x)  # fmt: skip


def mnist(args) -> Setting:
    """As configs/hyper_cleaning/mnist.yaml, at random weights; 60 synthetic images with --quick."""
    if args.quick:
        return synthetic_cleaning(60, 5, 4)
    setting = cleaning("mnist", args.data_dir, (None, None, None), 0, 1e-3)
    x = torch.randn(len(setting.x), generator=torch.Generator().manual_seed(0))
    return replace(setting, name=f"MNIST-{len(x)}", x=x)


SETTINGS = {"australian": (australian, small), "mnist": (mnist, large)}


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = begin(parser, argv)
    record: dict = {}
    for name in args.settings:
        make, measure = SETTINGS[name]
        try:
            setting = make(args)
        except Skip as reason:
            print(f"\n## {name}: skipped: {reason}")
            continue
        sizes = f"dx = {len(setting.x)}, dy = {setting.dy}, {str(setting.x.dtype)[6:]}"
        print(f"\n## {setting.name}: {sizes}\n", flush=True)
        record[name] = measure(setting, args)
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
