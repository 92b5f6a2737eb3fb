"""ValueOracle: the hyper-objective alone, for methods that take no derivatives."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..derivatives import Objective
from ..errors import NonFiniteError
from ..linalg import FunctionOperator
from ..minimax import MinimaxProblem
from .evaluation import Evaluation, HyperOracle, LowerSolution, require_lower


@final
class ValueOracle(HyperOracle):
    """phi(x) = f(x, y*(x)) by one training of the learner; for a minimax problem P(x) = max_y f(x, y).

    ``gradient`` of an evaluation is NaN, and ``hessian`` raises TypeError: neither is computed.

    Args: see HyperOracle.

    Cost: evaluate: one lower solve and one value of f.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> p = tb.BilevelProblem.from_functions(
        ...     lambda x, y: ((y - 1) ** 2).sum() / 2, lambda x, y: ((y - x) ** 2).sum() / 2, 3 * one, 0 * one)
        >>> oracle = tb.oracles.ValueOracle(p)
        >>> oracle.evaluate().value.item(), oracle.counts.lower_solves, oracle.counts.upper_gradients
        (2.0, 1, 0)
    """

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        g = Objective(self.problem, lower=1.0, counts=counts)
        low = require_lower(self.lower_solver.solve(g, x, self.start(), systems=self.systems, tol=self.lower_tol))
        if isinstance(self.problem, MinimaxProblem):
            value = -Objective(self.problem, lower=1.0, counts=counts).value(x, low.y)
        else:
            value = Objective(self.problem, upper=1.0, counts=counts).value(x, low.y)
        if not bool(torch.isfinite(value)):
            raise NonFiniteError("ValueOracle: the hyper-objective is not finite; check the batch for NaN")
        self.warm = {"y": low.y}
        return self._evaluation(x, value, {"y": low.y}, counts, low.error)

    def _evaluation(self, x, value, points, counts, error) -> Evaluation:
        problem, y = self.problem, points["y"]

        def hessian() -> FunctionOperator:
            raise TypeError("a ValueOracle computes no derivatives; use ImplicitOracle")

        def lower() -> LowerSolution:
            gy = Objective(problem, lower=1.0, counts=counts).gradient(x, y, "y")[2]
            return LowerSolution(y, torch.linalg.vector_norm(gy), error)

        return Evaluation(x, value, torch.full_like(x, torch.nan), points, counts, hessian, lower)

    def restore(self, state: dict[str, Any]) -> Evaluation:
        return self._evaluation(state["x"], state["value"], dict(state["points"]), self.counts.child(), None)
