"""MinimaxOracle: P(x) = max_y f(x, y) with its exact gradient and Hessian, from second derivatives only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..errors import ConfigError, NotStronglyConvexError
from ..linalg import LinearOperator
from ..lower.kept import is_exact
from ..lower.systems import LowerSystems
from ..minimax import MinimaxProblem
from .evaluation import (
    Evaluation,
    HyperOracle,
    LowerSolution,
    require_finite,
    require_lower,
    require_solution,  # fmt: skip
)
from .hessian import DENSE_BLOCK


@final
class MinimaxOracle(HyperOracle):
    """P(x) = max_y f(x, y) of a MinimaxProblem, by a lower solve of g = -f.

        grad P = f_x(x, y*),    hess P = f_xx - f_xy f_yy^{-1} f_yx at (x, y*)    (the Schur complement S[f]).
    By the envelope theorem the gradient needs no linear system, and no formula needs third derivatives.

    Args: see HyperOracle; ``lower`` maximises f (``lower={'name': 'agd'}``: accelerated gradient ascent, as
        published). hessian_tol: relative residual of the solve inside a Hessian product.

    Raises:
        ConfigError: the problem is not a MinimaxProblem.
        NotStronglyConvexError: f is not strongly concave in y at a point met; ``curvature`` is that of -f.

    Cost: evaluate: one inner maximisation and one gradient. Hessian: one solve and two products per vector. All calls
        are calls of f; they are counted as lower_gradients, lower_products.

    References: Luo, Li, Chen, NeurIPS 2022, arXiv 2110.04814, lemmas 2 and 3.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> p = tb.MinimaxProblem.from_functions(lambda x, y: (x * y - y**2 / 2).sum(), 3 * one, 0 * one)
        >>> ev = tb.MinimaxOracle(p).evaluate()  # P(x) = x^2 / 2
        >>> ev.value.item(), ev.gradient.item(), ev.hessian.to_dense().item()
        (4.5, 3.0, 1.0)
    """

    def __init__(self, problem: MinimaxProblem, *, hessian_tol: float | None = None, **options: Any):
        if not isinstance(problem, MinimaxProblem):
            raise ConfigError(
                f"expected a MinimaxProblem, got {type(problem).__name__}: mcn, lmcn, imcn and gda are for min_x max_y"
                " f(x, y); for a bilevel problem use lfsba, fsba, ifsba or dlcrn"
            )
        if options.pop("accuracy", None) not in (None, "auto"):
            raise ConfigError("accuracy: for bilevel problems; a minimax gradient needs no adjoint and its lower level is f")
        super().__init__(problem, **options)
        self.hessian_tol = hessian_tol

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        g = Objective(self.problem, lower=1.0, counts=counts)
        with _in_terms_of_f():
            low = require_lower(self.lower_solver.solve(g, x, self.start(), systems=self.systems, tol=self.lower_tol))
        value, gx, _ = g.gradient(x, low.y, "x")
        require_finite(value, gx, "MinimaxOracle")
        self.warm = {"y": low.y}
        return self._evaluation(x, -value, -gx, {"y": low.y}, counts, low.at, low.error)

    def at_point(self, x: Tensor, y: Tensor, counts: OracleCounts | None = None) -> Evaluation:
        """f(x, y), f_x(x, y), S[f](x, y) at any y; ``points['ascent']`` is f_y(x, y). Cost: one gradient."""
        counts = self.counts.child() if counts is None else counts
        value, gx, gy = Objective(self.problem, lower=1.0, counts=counts).gradient(x, y)
        require_finite(value, gx, "MinimaxOracle")
        return self._evaluation(x, -value, -gx, {"y": y, "ascent": -gy}, counts, None, None)

    def _evaluation(self, x, value, gradient, points, counts, at: Linearisation | None, error) -> Evaluation:
        y, problem = points["y"], self.problem

        def hessian() -> SchurComplement:
            joint = Objective(problem, lower=1.0, counts=counts).linearise(x, y)
            joint.factor = None if at is None else at.factor
            return SchurComplement(joint, self.systems, self.hessian_tol)

        def lower() -> LowerSolution:
            gy = points.get("ascent", None if at is None else at.gy)
            if gy is None:
                gy = Objective(problem, lower=1.0, counts=counts).gradient(x, y, "y")[2]
            return LowerSolution(y, torch.linalg.vector_norm(gy), error)

        return Evaluation(x, value, gradient, points, counts, hessian, lower, {} if at is None else {"at": at})

    def restore(self, state: dict[str, Any]) -> Evaluation:
        x, points, counts = state["x"], dict(state["points"]), self.counts.child()
        at = self.record_again(state, "at", Objective(self.problem, lower=1.0, counts=counts), x, points["y"])
        return self._evaluation(x, state["value"], state["gradient"], points, counts, at, None)

    def gradient_error(self, ev: Evaluation) -> float:
        """|f_xy (y - y*)| with y - y* by one solve: first-order effect of the inner residual on the gradient."""
        joint = ev.hessian.at
        with _in_terms_of_f():
            solution = self.systems.solve(joint, joint.gy, tol=1e-2)
            e = require_solution(solution, "inner maximisation")
        return float(torch.linalg.vector_norm(joint.xy(e)))


@final
class SchurComplement(LinearOperator):
    """u -> S[f] u with f = -g:  g_yy w = -g_yx u,  S[f] u = -(g_xx u + g_xy w).

    Args:
        at: the recorded joint gradient of g.
        systems: solves with g_yy. tol: relative residual, default that of ``systems``.

    Cost: one solve and two products per vector, for one vector or a block. Memory: the retained graph, and a factor
        of g_yy where dy <= 2000 and the solver may.
    """

    def __init__(self, at: Linearisation, systems: LowerSystems, tol: float | None = None):
        super().__init__(at.x.numel(), dtype=at.x.dtype, device=at.x.device, block_size=DENSE_BLOCK)
        self.at, self.systems, self.tol = at, systems, tol
        if is_exact(at.y.numel()) and systems.solver in ("auto", "cholesky"):
            systems.factor_at(at)

    def matvec(self, v: Tensor) -> Tensor:
        """(dx,) -> (dx,)."""
        return self._product(v)

    def matmat(self, V: Tensor) -> Tensor:
        """(dx, k) -> (dx, k)."""
        return self._product(V)

    def _product(self, u: Tensor) -> Tensor:
        with _in_terms_of_f():
            w = require_solution(self.systems.solve(self.at, -self.at.yx(u), tol=self.tol), "Hessian product of P")
        return -self.at.x_part(u, w)


@contextmanager
def _in_terms_of_f() -> Iterator[None]:
    """Says of an error about g = -f what it means for f."""
    try:
        yield
    except NotStronglyConvexError as error:
        raise NotStronglyConvexError(
            f"f is not strongly concave in y (max_player): -f has curvature {error.curvature:.2e} along a direction;"
            " subtract (mu/2) |y|^2 from the loss, or use damping=...",
            error.curvature,
            error.result,
        ) from error
