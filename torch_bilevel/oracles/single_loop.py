"""SingleLoopOracle: one gradient step and one Newton step on the lower level per evaluation, and no inner loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..errors import ConfigError, NonFiniteError
from ..lower.gradient import lipschitz_estimate
from .evaluation import Evaluation, HyperOracle, LowerSolution, require_finite, require_solution
from .implicit import lagrangian_gradient_error, lagrangian_hessian


class SingleLoopOracle(HyperOracle):
    """The derivatives of SLCRN at (x, y), y its own iterate that follows y*(x) by one gradient step per evaluation.

        yh = y - g_yy(x,y)^{-1} g_y(x,y)        one Newton step, not kept as the iterate
        v  = g_yy(x,yh)^{-1} f_y(x,yh)           at yh: the factor at y would lose an order of accuracy
        G  = f_x(x,yh) - g_xy(x,yh) v,   H the implicit formula at (x, yh)
        y+ = y - (1/L_g) g_y(x,y)                from the x and y of this evaluation
    With e = |y - y*| the error of G is O(e^2). The value is the Lagrangian f - <v, g_y> at yh, whose error is O(e^4)
    (ours). Safeguard (ours): the Newton step is halved until |g_y| decreases; a raw one may diverge from far away.

    Args:
        lower_step: the step 1/L_g; default: from a power iteration once, lowered when a Newton step shows more
            curvature.
        hessian_tol, and the linear-solver options of HyperOracle. There is no lower solver.

    Cost per evaluation: two lower gradients when undamped (one more per halving), two linear solves, one upper
        gradient, one cross product. Hessian: two solves and a few products per vector.

    References: Bi, Li, Hong, Zhang, arXiv 2606.20534 (SLCRN), in the reading derived in docs/methods.md.
    """

    single_loop = True

    def __init__(self, problem, *, lower_step: float | None = None, hessian_tol: float | None = None, **options: Any):
        for name in ("lower", "lower_tol"):
            if options.get(name) is not None:
                raise ConfigError(f"{name}: a single-loop oracle has no lower solver; it takes lower_step")
        super().__init__(problem, **options)
        if lower_step is not None and not lower_step > 0:
            raise ConfigError(f"lower_step: expected a positive number or None (1/L, estimated), got {lower_step!r}")
        self.lower_step, self.hessian_tol = lower_step, hessian_tol
        self._step = lower_step

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        y = self.start()
        g = Objective(self.problem, lower=1.0, counts=counts)
        at = g.linearise(x, y, "y")
        if self._step is None:
            self._step = 1.0 / lipschitz_estimate(at)
        yh, at_yh = self._correct(g, x, y, at)
        v = self._adjoint(at, at_yh, Objective(self.problem, upper=1.0, counts=counts).gradient(x, yh, "y")[2])
        evaluation = self._evaluation(x, yh, v, at_yh, counts)
        self.warm = {"y": self._advance(y, at, yh), "v": v}
        return evaluation

    def _correct(self, g: Objective, x: Tensor, y: Tensor, at: Linearisation) -> tuple[Tensor, Linearisation]:
        """The damped Newton point yh and the recorded gradient there."""
        norm = torch.linalg.vector_norm(at.gy)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError("SLCRN: the lower gradient is not finite; check the batch for NaN")
        p = require_solution(self.systems.solve(at, -at.gy), "Newton step on the lower level")
        rate = 1.0
        for _ in range(30):
            yh = y + rate * p
            at_yh = g.linearise(x, yh, "xy")
            if bool(torch.linalg.vector_norm(at_yh.gy) <= norm):
                break
            if bool(torch.linalg.vector_norm(p) <= 1e-6 * (1 + torch.linalg.vector_norm(y))):
                break  # at rounding there is nothing left to decrease
            rate *= 0.5
        moved = torch.linalg.vector_norm(yh - y)
        bend = torch.linalg.vector_norm(at_yh.gy - at.gy)
        if self.lower_step is None and bool(bend * self._step > moved):
            self._step = float(moved / bend)
        return yh, at_yh

    def _adjoint(self, at: Linearisation, at_yh: Linearisation, fy: Tensor) -> Tensor:
        """v = g_yy(x, yh)^{-1} f_y(x, yh)."""
        return require_solution(self.systems.solve(at_yh, fy, x0=self.warm.get("v")), "adjoint system")

    def _advance(self, y: Tensor, at: Linearisation, yh: Tensor) -> Tensor:
        """The next iterate y+."""
        return y - self._step * at.gy

    def _evaluation(self, x: Tensor, yh: Tensor, v: Tensor, at: Linearisation, counts: OracleCounts) -> Evaluation:
        lagrangian = Objective(self.problem, upper=1.0, tangent=v, tangent_weight=-1.0, counts=counts)
        recorded = lagrangian.linearise(x, yh)
        value, gradient = recorded.value, recorded.gx
        require_finite(value, gradient, "SingleLoopOracle")
        return self._assemble(x, value, gradient, yh, v, at, recorded, counts)

    def _assemble(self, x, value, gradient, yh, v, at, recorded, counts) -> Evaluation:
        problem = self.problem

        def hessian():
            return lagrangian_hessian(problem, x, yh, v, self.systems, self.hessian_tol, counts, at, recorded)

        def lower() -> LowerSolution:
            gy = at.gy if at is not None else Objective(problem, lower=1.0, counts=counts).gradient(x, yh, "y")[2]
            return LowerSolution(yh, torch.linalg.vector_norm(gy), None)

        found = {name: kept for name, kept in (("at", at), ("lagrangian", recorded)) if kept is not None}
        return Evaluation(x, value, gradient, {"y": yh, "v": v}, counts, hessian, lower, found)

    def gradient_error(self, ev: Evaluation) -> float:
        """First-order effect on the gradient of |yh - y*| (by one more solve) and of the adjoint's residual."""
        return lagrangian_gradient_error(self.problem, ev, self.systems)

    def restore(self, state: dict[str, Any]) -> Evaluation:
        x, points, counts = state["x"], state["points"], self.counts.child()
        y, v = points["y"], points["v"]
        g = Objective(self.problem, lower=1.0, counts=counts)
        lagrangian = Objective(self.problem, upper=1.0, tangent=v, tangent_weight=-1.0, counts=counts)
        at, recorded = self.record_again(state, "at", g, x, y), self.record_again(state, "lagrangian", lagrangian, x, y)
        return self._assemble(x, state["value"], state["gradient"], y, v, at, recorded, counts)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._step = state["step"]
