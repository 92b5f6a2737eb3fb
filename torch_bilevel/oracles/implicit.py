"""ImplicitOracle: exact derivatives of the hyper-objective by implicit differentiation."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..doctor import refuse_third_derivatives
from ..lower import LowerSystems
from ..problem import BilevelProblem
from .evaluation import (
    Evaluation,
    HyperOracle,
    LowerSolution,
    require_finite,
    require_lower,
    require_solution,  # fmt: skip
)
from .hessian import HyperHessian


@final
class ImplicitOracle(HyperOracle):
    """phi(x) = f(x, y*(x)) with its exact gradient and Hessian.

        v = g_yy^{-1} f_y,   L(x, y) = f - <v, g_y> (v held fixed),   Y = -g_yy^{-1} g_yx
        grad phi = f_x - g_xy v,     hess phi = [I; Y]' hess L [I; Y]
    Derived from the implicit function theorem; see docs/methods.md. The Hessian needs third derivatives of g, through
    products only.

    Args: see HyperOracle. ``hessian_tol``: relative residual of the solves inside a Hessian product.

    Raises:
        UnsupportedLayerError, on first use of ``hessian``: a layer whose third derivatives PyTorch has wrong.

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

    def __init__(self, problem, *, hessian_tol: float | None = None, **options: Any):
        super().__init__(problem, **options)
        self.hessian_tol = hessian_tol

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        start = self.warm.get("y")
        if start is None or self.lower_is_external:
            start = self.problem.y
        g = Objective(self.problem, lower=1.0, counts=counts)
        low = require_lower(self.lower_solver.solve(g, x, start, systems=self.systems, tol=self.lower_tol))
        at = low.at if low.at is not None else g.linearise(x, low.y, "y")
        evaluation = self._differentiate(x, low.y, at, counts, low.error)
        self.warm = {name: evaluation.points[name] for name in ("y", "v")}
        return evaluation

    def at_point(self, x: Tensor, y: Tensor, counts: OracleCounts | None = None) -> Evaluation:
        """The formulas at a given (x, y), whether or not y solves the lower level."""
        counts = self.counts.child() if counts is None else counts
        at = Objective(self.problem, lower=1.0, counts=counts).linearise(x, y, "y")
        return self._differentiate(x, y, at, counts, None)

    def _differentiate(
        self, x: Tensor, y: Tensor, at: Linearisation, counts: OracleCounts, error: Tensor | None
    ) -> Evaluation:
        value, fx, fy = Objective(self.problem, upper=1.0, counts=counts).gradient(x, y)
        v = require_solution(self.systems.solve(at, fy, x0=self.warm.get("v")), "adjoint system")
        gradient = fx - at.xy(v)
        require_finite(value, gradient, "ImplicitOracle")
        return self._evaluation(x, value, gradient, {"y": y, "v": v}, counts, at, error)

    def _evaluation(self, x, value, gradient, points, counts, at: Linearisation | None, error) -> Evaluation:
        y, v = points["y"], points["v"]
        problem = self.problem

        def hessian() -> HyperHessian:
            return lagrangian_hessian(problem, x, y, v, self.systems, self.hessian_tol, counts, at)

        def lower() -> LowerSolution:
            gy = at.gy if at is not None else Objective(problem, lower=1.0, counts=counts).gradient(x, y, "y")[2]
            return LowerSolution(y, torch.linalg.vector_norm(gy), error)

        return Evaluation(x, value, gradient, points, counts, hessian, lower, {} if at is None else {"at": at})

    def gradient_error(self, ev: Evaluation) -> float:
        """First-order effect on the gradient of the lower residual (through e = g_yy^{-1} g_y) and the adjoint's."""
        return lagrangian_gradient_error(self.problem, ev, self.systems)

    def restore(self, state: dict[str, Any]) -> Evaluation:
        x, points, counts = state["x"], dict(state["points"]), self.counts.child()
        at = self.record_again(state, "at", Objective(self.problem, lower=1.0, counts=counts), x, points["y"])
        return self._evaluation(x, state["value"], state["gradient"], points, counts, at, None)


def lagrangian_hessian(
    problem: BilevelProblem, x: Tensor, y: Tensor, v: Tensor, systems: LowerSystems, tol: float | None,
    counts: OracleCounts, at: Linearisation | None = None, lagrangian: Linearisation | None = None,
) -> HyperHessian:  # fmt: skip
    """[I; Y]' hess L [I; Y] at (x, y, v), reusing what was already recorded there (``at``: g, ``lagrangian``: L)."""
    refuse_third_derivatives(problem)
    lower = at
    if at is None or "x" not in at.wrt:
        lower = Objective(problem, lower=1.0, counts=counts).linearise(x, y)
        lower.factor, lower.prepared = getattr(at, "factor", None), getattr(at, "prepared", False)
    if lagrangian is None:
        lagrangian = Objective(problem, upper=1.0, tangent=v, tangent_weight=-1.0, counts=counts).linearise(x, y)
    hessian = HyperHessian(lower, lower, lagrangian.joint, systems, tol)
    if at is not None and at is not lower:  # what is saved of the evaluation says what was decided here
        at.factor, at.prepared = getattr(lower, "factor", None), lower.prepared
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
