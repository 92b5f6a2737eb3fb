"""Single runs of the whole-run benchmark: a library method, Adam on a peer's hypergradients, TPE; each as a trace.

A trace is a list of {seconds, calls, evaluations, hessians, value, gradient}, value and |gradient| of the exact
hyper-objective. Methods whose own numbers are not that (penalties, unrolling, single loops) are judged by an exact
oracle of our own, outside their time and counts, at every step at first and then at every tenth part more.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torch_bilevel as tb
from benchmarks.common import Skip
from benchmarks.peers import TorchOpt
from benchmarks.problems import Setting
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective, load_torch_func
from torch_bilevel.lower import LowerSystems, make_lower
from torch_bilevel.methods import make_method

#: methods of the library: (name there, options, learning rates to choose from, whether its own numbers are exact)
#: of those "..., compiled" the losses are
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...], bool]] = {
    "auto": ("auto", {}, (), True),
    "fsba": ("fsba", {}, (), False),
    "lfsba": ("lfsba", {}, (), False),
    "dlcrn": ("dlcrn", {}, (), True),
    "lazy dlcrn": ("dlcrn", {"period": "adaptive"}, (), True),
    "slcrn": ("slcrn", {}, (), False),
    "lazy_slcrn": ("lazy_slcrn", {}, (), False),
    "lbfgs": ("lbfgs", {}, (), True),
    "auto, compiled": ("auto", {}, (), True),
    "lbfgs, compiled": ("lbfgs", {}, (), True),
    "adam": ("adam", {}, (0.03, 0.1, 0.3, 1.0), True),
    "f2ba": ("f2ba", {}, (1.0, 10.0, 100.0, 1000.0), False),
    "aid": ("aid", {}, (1.0, 10.0, 100.0, 1000.0), False),
    "itd": ("itd", {}, (1.0, 10.0, 100.0, 1000.0), False),
    "tpe": ("tpe", {}, (), True),
}
COMPILED, PEER = ", compiled", "adam, TorchOpt"
#: of TPE: the interval of each log L2 weight
BOX = (-12.0, 2.0)


class Judge:
    """The exact value and gradient norm at x, in the problem's dtype; warm from call to call."""

    def __init__(self, setting: Setting):
        self.oracle = tb.ImplicitOracle(setting.problem())

    def __call__(self, x: Tensor) -> dict[str, float]:
        try:
            ev = self.oracle.evaluate(x)
        except tb.BilevelError:
            return {"value": float("nan"), "gradient": float("nan")}
        return {"value": float(ev.value), "gradient": float(ev.gradient.norm())}


class Trace:
    """Records, and which steps are worth one."""

    def __init__(self, judge: Judge | None):
        self.judge, self.records, self._next = judge, [], 0

    def wants(self, step: int) -> bool:
        return self.judge is None or step >= self._next

    def add(self, step: int, seconds: float, counts: OracleCounts, value: float, gradient: float, x: Tensor) -> None:
        numbers = {"value": value, "gradient": gradient} if self.judge is None else self.judge(x)
        self.records.append({"step": step, "seconds": seconds, "calls": counts.oracle_calls,
                             "evaluations": counts.evaluations, "hessians": counts.hessians, **numbers})  # fmt: skip
        self._next = max(step + 1, int(1.1 * step))


def library_run(setting: Setting, label: str, lr: float | None, *, max_seconds: float, max_steps: int, eps: float,
                seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """One run by ``minimize``; with compiled losses after two others, untimed, that compile all it needs."""
    name, options, _, exact = METHODS[label]
    if label == "tpe" and setting.hyper != "log_l2":
        raise Skip("TPE is for L2 tuning")
    if label == "tpe" and importlib.util.find_spec("optuna") is None:
        raise Skip("optuna is not installed")
    method = make_method(name, {**options, **({} if lr is None else {"lr": lr})})
    trace = Trace(None if exact else Judge(setting))

    def follow(report: tb.StepReport, x: Tensor, y: Tensor) -> bool:
        if trace.wants(report.step):
            trace.add(report.step, report.seconds, report.counts.copy(), report.value, report.gradient_norm, x)
            return not trace.records[-1]["gradient"] <= eps
        return True

    problem = setting.problem(compile=label.endswith(COMPILED))
    if problem.compile:
        start = problem.x, problem.y
        for _ in range(2):  # what the first has traced late, the second compiles
            tb.minimize(problem, name, max_steps=min(max_steps, 200), gradient_tol=eps, seed=seed)
            problem.write(*start)
    try:
        result = tb.minimize(problem, method, max_steps=max_steps, max_seconds=max_seconds, callback=follow,
                             gradient_tol=eps if exact else eps / 10, seed=seed,
                             bounds=BOX if label == "tpe" else None)  # fmt: skip
        status = result.status.name.lower()
    except tb.BilevelError as error:
        result, status = error.result, f"failed: {str(error)[:120]}"
    last = result.history[-1]
    if trace.records[-1]["step"] != last.step:
        trace.add(last.step, last.seconds, last.counts.copy(), last.value, last.gradient_norm, result.x)
    return {"status": status, "records": trace.records, "lr": lr}


def peer_run(setting: Setting, lr: float, *, max_seconds: float, max_steps: int, eps: float) -> dict[str, Any]:
    """torch.optim.Adam on TorchOpt's hypergradients; the lower level by our Newton-CG, warm, as for our own Adam."""
    reason = TorchOpt.missing()
    if reason is not None:
        raise Skip(reason)
    load_torch_func()
    problem, counts = setting.problem(), OracleCounts()
    solver, systems = make_lower(None), LowerSystems()
    g = Objective(problem, lower=1.0, counts=counts)
    x = setting.x.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=lr)
    y, trace, seconds, step = problem.y, Trace(None), 0.0, 0
    status = "max_steps"
    for step in range(max_steps):
        start = time.perf_counter()
        y = solver.solve(g, x.detach(), y, systems=systems).y
        counts.add(evaluations=1)
        value, gradient = torchopt_hypergradient(setting, x.detach(), y, counts)
        x.grad = gradient
        norm, value = float(gradient.norm()), float(value)
        seconds += time.perf_counter() - start
        trace.add(step, seconds, counts.copy(), value, norm, x)
        if norm <= eps or seconds >= max_seconds:
            status = "gradient_tolerance" if norm <= eps else "max_seconds"
            break
        start = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - start
    return {"status": status, "records": trace.records, "lr": lr}


def torchopt_hypergradient(setting: Setting, x: Tensor, y: Tensor, counts: OracleCounts) -> tuple[Tensor, Tensor]:
    """(f, its gradient through y*) by torchopt's custom_root and CG, to the tolerance of our own adjoint."""
    import torchopt
    from torchopt.diff.implicit import custom_root

    rtol = 1e-5 if x.dtype == torch.float32 else 1e-10
    cg = torchopt.linear_solve.solve_cg(rtol=rtol, maxiter=1000)

    def solve(matvec: Callable, b: Any) -> Any:
        def counted(v: Any) -> Any:
            counts.add(lower_products=1)
            return matvec(v)

        return cg(counted, b)

    optimality = torch.func.grad(setting.lower, argnums=0)
    solution = tuple(p.detach() for p in setting.parameters(y))

    @custom_root(lambda params, x: optimality(params, x), argnums=1, solve=solve)
    def solver(params: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        return solution

    counts.add(upper_gradients=1, lower_gradients=1, lower_products=1)
    leaf = x.clone().requires_grad_(True)
    value = setting.upper(solver(solution, leaf), leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]
