"""AIDOracle: the hypergradient by approximate implicit differentiation."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Objective
from ..errors import ConfigError, NotStronglyConvexError, nearest
from ..lower import AGD, GradientDescent
from .adjoint import ADJOINTS, conjugate_gradient_steps, fixed_point_steps, neumann_series
from .evaluation import require_lower
from .inexact import InexactOracle, at_least, positive


@final
class AIDOracle(InexactOracle):
    """grad phi ~ f_x - g_xy v at (x, y_T): y by T lower steps, v by K products on g_yy v = f_y, both warm.

    Args:
        lower_steps, lower_lr: T and the step length, see InexactOracle.
        lower_momentum: of Nesterov's accelerated gradient on the lower level; default 0, gradient descent.
        adjoint: 'cg' (default), 'fixed_point' or 'neumann' (which starts from zero each time).
        adjoint_steps: K, default 10.
        adjoint_lr: step length of 'fixed_point' and 'neumann', default ``lower_lr``.
        lower: another lower solver in place of the T steps: a LowerSolver, a name or {'name': ...};
            'external'.
        damping: added to g_yy in the adjoint system.

    Raises:
        NotStronglyConvexError: conjugate gradients met negative curvature. NonFiniteError: the steps
            diverged.

    Cost of an evaluation: T + 1 lower gradients, one upper, K products for v ('cg': one more from a warm
        start), one cross product.

    References: Ji, Yang, Liang, ICML 2021 (AID-BiO); Grazzi et al., ICML 2020; Pedregosa, ICML 2016.
    """

    def __init__(
        self,
        problem,
        *,
        lower_steps: int = 10,
        lower_lr: float | None = None,
        lower_momentum: float = 0.0,
        adjoint: str = "cg",
        adjoint_steps: int = 10,
        adjoint_lr: float | None = None,
        lower: Any = None,
        damping: float = 0.0,
    ):
        super().__init__(problem, lower_steps=lower_steps, lower_lr=lower_lr, lower=lower, damping=damping)
        if adjoint not in ADJOINTS:
            raise ConfigError(f"adjoint {adjoint!r} is not known; {nearest(str(adjoint), ADJOINTS)}")
        if not (isinstance(lower_momentum, (int, float)) and 0 <= lower_momentum < 1):
            raise ConfigError(f"lower_momentum: expected a number in [0, 1), got {lower_momentum!r}")
        self.fixed_lower = lower is None
        self.lower_momentum = float(lower_momentum)
        self.adjoint = adjoint
        self.adjoint_steps = at_least("adjoint_steps", adjoint_steps, 0)
        self.adjoint_lr = positive("adjoint_lr", adjoint_lr, optional=True)

    def _differentiate(self, x: Tensor, counts: OracleCounts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        g = Objective(self.problem, lower=1.0, counts=counts)
        y0 = self.start()
        low = require_lower(self._solver(g, x, y0).solve(g, x, y0, systems=self.systems))
        y = low.y
        at = low.at if low.at is not None else g.linearise(x, y, "y")
        value, fx, fy = Objective(self.problem, upper=1.0, counts=counts).gradient(x, y)
        v = self._adjoint(at, fy, g, x)
        self.warm = {"y": y, "v": v}
        return value, fx - at.xy(v), {"y": y, "v": v}

    def _solver(self, g: Objective, x: Tensor, y0: Tensor):
        """T steps of (accelerated) gradient descent, or the solver that the user chose."""
        if not self.fixed_lower:
            return self.lower_solver
        lr = self._step_length(g, x, y0)
        if self.lower_momentum:
            return AGD(lr, momentum=self.lower_momentum, steps=self.lower_steps)
        return GradientDescent(lr, steps=self.lower_steps)

    def _adjoint(self, at, fy: Tensor, g: Objective, x: Tensor) -> Tensor:
        product, start = self.systems.operator(at).matvec, self.warm.get("v")
        if self.adjoint == "cg":
            v, curvature = conjugate_gradient_steps(product, fy, self.adjoint_steps, start)
            if bool(curvature < 0):
                raise NotStronglyConvexError(
                    f"adjoint system: the lower-level Hessian is not positive definite (curvature"
                    f" {float(curvature):.2e}); add L2 regularisation to the lower loss, or damping=...",
                    float(curvature),
                )
            return v
        lr = self.adjoint_lr if self.adjoint_lr is not None else self._step_length(g, x, at.y)
        if self.adjoint == "fixed_point":
            return fixed_point_steps(product, fy, self.adjoint_steps, lr, start)
        return neumann_series(product, fy, self.adjoint_steps, lr)
