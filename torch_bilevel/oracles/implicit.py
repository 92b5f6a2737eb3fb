"""ImplicitOracle: exact derivatives of the hyper-objective by implicit differentiation."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..doctor import has_third_derivatives, refuse_third_derivatives
from ..lower import LowerSystems
from ..problem import BilevelProblem
from .accuracy import LOOSE, TIGHT, Accuracy, Goal
from .evaluation import (
    Evaluation,
    HyperOracle,
    LowerSolution,
    Precision,
    require_finite,
    require_lower,
    require_solution,  # fmt: skip
)
from .hessian import HyperHessian, dense_price

#: what accuracy='auto' takes, and the learner parameters above which its estimates cost less than it saves
ON_DEMAND, FEW = 0.1, 100


@final
class ImplicitOracle(HyperOracle):
    """phi(x) = f(x, y*(x)) with its exact gradient and Hessian.

        v = g_yy^{-1} f_y,   L(x, y) = f - <v, g_y> (v held fixed),   Y = -g_yy^{-1} g_yx
        grad phi = f_x - g_xy v,     hess phi = [I; Y]' hess L [I; Y]
    Derived from the implicit function theorem; see docs/methods.md. The Hessian needs third derivatives of g, through
    products only.

    Args: see HyperOracle. ``hessian_tol``: relative residual of the solves inside a Hessian product. ``accuracy``: the
        relative error allowed in the gradient, in (0, 1), say 0.1: lower level and adjoint system are then solved only
        as well as that needs, ``evaluation.gradient_bound`` bounds it to first order (see ``Accuracy``) and the value
        is L, whose error is of second order. None (default): always to ``lower_tol`` and ``linear_tol``. 'auto' (the
        default of method ``auto``): 0.1 where dy > 100, the lower solver iterates to a tolerance and third derivatives
        are right; else None.

    Raises:
        UnsupportedLayerError, on first use of ``hessian`` (with ``accuracy``: of ``evaluate``): a layer whose third
            derivatives PyTorch has wrong.

    Cost: evaluate: one lower solve, one upper gradient, one linear solve and one cross product. Hessian: two linear
        solves, one upper and a few lower products per vector.

    References: Dyro et al., AISTATS 2022; Bi, Li, Hong, Zhang, arXiv 2606.20534 (DLCRN, SLCRN).

    Example:
        >>> import torch, torch_bilevel as tb
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> p = tb.BilevelProblem.from_functions(
        ...     lambda x, y: ((y - 1) ** 2).sum() / 2, lambda x, y: ((y - x) ** 2).sum() / 2, 3 * one, 0 * one)
        >>> ev = tb.ImplicitOracle(p).evaluate()
        >>> ev.value.item(), ev.gradient.item(), ev.hessian.to_dense().item()
        (2.0, 2.0, 1.0)
    """

    third_derivatives = True

    def __init__(self, problem, *, hessian_tol: float | None = None, accuracy: float | str | None = None, **options: Any):
        super().__init__(problem, **options)
        self.hessian_tol = hessian_tol
        if accuracy == "auto":
            able = problem.dy > FEW and Accuracy.suits(self.lower_solver) and has_third_derivatives(problem)
            accuracy = ON_DEMAND if able else None
        self.accuracy = None if accuracy is None else Accuracy(accuracy, self.lower_solver)

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        g, v = Objective(self.problem, lower=1.0, counts=counts), self.warm.get("v")
        if self.accuracy is None:
            evaluation = self._solve(g, x, self.start(), v)
        else:
            evaluation = self.accuracy.evaluate(self, lambda *to: self._solve(g, x, *to), x, self.start(), v)
        self.warm = {name: evaluation.points[name] for name in ("y", "v")}
        return evaluation

    def _solve(self, g: Objective, x: Tensor, y: Tensor, v: Tensor | None, goal: Goal | None = None) -> Evaluation:
        """The evaluation by a lower solve from y and an adjoint solve from v, to ``goal`` or the default tolerances."""
        options = {} if goal is None else {"residual": goal.lower}
        low = require_lower(self.lower_solver.solve(g, x, y, systems=self.systems, tol=self.lower_tol, **options))
        at = low.at if low.at is not None else g.linearise(x, low.y, "y")
        return self._differentiate(x, low.y, at, g.counts, low.error, v, goal)

    def exact(self, ev: Evaluation) -> Evaluation:
        if ev.precision is None or ev.precision.tight:
            return ev
        counts = self.counts.child()
        counts.add(evaluations=1)
        g = Objective(self.problem, lower=1.0, counts=counts)
        new = self._solve(g, ev.x, ev.points["y"], ev.points["v"], TIGHT)
        self.accuracy.judge(new)
        self.warm = {name: new.points[name] for name in ("y", "v")}
        return new

    def stricter(self) -> None:
        if self.accuracy is not None:
            self.accuracy.stricter()

    def at_point(self, x: Tensor, y: Tensor, counts: OracleCounts | None = None) -> Evaluation:
        """The formulas at a given (x, y), whether or not y solves the lower level."""
        counts = self.counts.child() if counts is None else counts
        at = Objective(self.problem, lower=1.0, counts=counts).linearise(x, y, "y")
        return self._differentiate(x, y, at, counts, None, self.warm.get("v"))

    def _differentiate(
        self, x: Tensor, y: Tensor, at: Linearisation, counts: OracleCounts, error: Tensor | None, v: Tensor | None,
        goal: Goal | None = None,
    ) -> Evaluation:  # fmt: skip
        value, fx, fy = Objective(self.problem, upper=1.0, counts=counts).gradient(x, y)
        size = 0.0 if goal is None else float(torch.linalg.vector_norm(fy))
        wanted = goal.adjoint / size if size > 0 else LOOSE
        tol = None if goal is None else self.systems.loosened(wanted, LOOSE, fy.dtype)
        solution = self.systems.solve(at, fy, x0=v, tol=tol)
        v = require_solution(solution, "adjoint system")
        gradient = fx - at.xy(v)
        precision = None
        if goal is not None:
            value = value - torch.dot(v, at.gy)
            lower = float(torch.linalg.vector_norm(at.gy))
            precision = Precision(lower, float(solution.residual) * size, goal is TIGHT)
        require_finite(value, gradient, "ImplicitOracle")
        evaluation = self._evaluation(x, value, gradient, {"y": y, "v": v}, counts, at, error)
        evaluation.precision = precision
        return evaluation

    def _evaluation(self, x, value, gradient, points, counts, at: Linearisation | None, error) -> Evaluation:
        y, v = points["y"], points["v"]
        problem = self.problem

        def hessian() -> HyperHessian:
            return lagrangian_hessian(problem, x, y, v, self.systems, self.hessian_tol, counts, at)

        def lower() -> LowerSolution:
            gy = at.gy if at is not None else Objective(problem, lower=1.0, counts=counts).gradient(x, y, "y")[2]
            return LowerSolution(y, torch.linalg.vector_norm(gy), error)

        return Evaluation(x, value, gradient, points, counts, hessian, lower, {} if at is None else {"at": at})

    def dense_price(self) -> float | None:
        return dense_price(self.problem, self.systems)

    def gradient_error(self, ev: Evaluation) -> float:
        """First-order effect on the gradient of the lower residual (through e = g_yy^{-1} g_y) and the adjoint's."""
        return lagrangian_gradient_error(self.problem, ev, self.systems)

    def restore(self, state: dict[str, Any]) -> Evaluation:
        x, points, counts = state["x"], dict(state["points"]), self.counts.child()
        at = self.record_again(state, "at", Objective(self.problem, lower=1.0, counts=counts), x, points["y"])
        evaluation = self._evaluation(x, state["value"], state["gradient"], points, counts, at, None)
        if state.get("precision") is not None:
            evaluation.precision = Precision(*state["precision"])
        return evaluation

    def state_dict(self) -> dict[str, Any]:
        accuracy = {} if self.accuracy is None else {"accuracy": self.accuracy.state_dict()}
        return {**super().state_dict(), **accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.accuracy is not None and "accuracy" in state:
            self.accuracy.load_state_dict(state["accuracy"])


def lagrangian_hessian(
    problem: BilevelProblem, x: Tensor, y: Tensor, v: Tensor, systems: LowerSystems, tol: float | None,
    counts: OracleCounts, at: Linearisation | None = None, lagrangian: Linearisation | None = None,
) -> HyperHessian:  # fmt: skip
    """[I; Y]' hess L [I; Y] at (x, y, v), reusing what was already recorded there (``at``: g, ``lagrangian``: L)."""
    lower = at
    if at is None or "x" not in at.wrt:
        lower = Objective(problem, lower=1.0, counts=counts).linearise(x, y)
        if at is not None:
            lower.factor, lower.prepared = at.factor, at.prepared
    refuse_third_derivatives(lower)
    if lagrangian is None:
        lagrangian = Objective(problem, upper=1.0, tangent=v, tangent_weight=-1.0, counts=counts).linearise(x, y)
    hessian = HyperHessian(lower, lower, [(1.0, lagrangian)], systems, tol)
    if at is not None and at is not lower:  # what is saved of the evaluation says what was decided here
        at.factor, at.prepared = lower.factor, lower.prepared
    return hessian


def lagrangian_gradient_error(problem: BilevelProblem, ev: Evaluation, systems: LowerSystems) -> float:
    """What is left of g_y and of the adjoint system at ev, as a first-order error of its implicit gradient."""
    H, v = ev.hessian, ev.points["v"]
    lo = H.lo
    e = systems.solve(lo, lo.gy, tol=1e-2).x
    a, b = H.quotient(torch.zeros_like(ev.x), e)
    q = systems.solve(lo, b, tol=1e-2).x
    from_lower = float(torch.linalg.vector_norm(a - lo.xy(q)))
    # the y-gradient of L = f - <v, g_y> at fixed v is f_y - g_yy v: the adjoint's residual
    residual = Objective(problem, upper=1.0, counts=ev.counts).gradient(ev.x, lo.y, "y")[2] - lo.yy(v)
    from_adjoint = float(torch.linalg.vector_norm(lo.xy(systems.solve(lo, residual, tol=1e-2).x)))
    return from_lower + from_adjoint
