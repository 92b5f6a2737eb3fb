"""Newton's method with conjugate gradients (or a kept factor) and a line search: the default lower solver."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..derivatives import Objective
from ..linalg import SolveStatus
from .chord import chord_steps
from .gradient import lipschitz_estimate
from .solver import REDUCTION, LowerResult, LowerSolver, LowerStatus
from .systems import LowerSystems, tolerance_of_step

#: residual over |h_y| from which a step is easy
NEAR = 0.05


@final
class NewtonCG(LowerSolver):
    """Inexact Newton: solve h_yy p = -h_y to a forcing tolerance, halve p until h decreases; after ``chord_steps``.

    The error after a step is estimated without another solve, |p| |h_y(y + p)| / |h_y(y)|, the quotient at least the
    tolerance of an iterative solve of p, and the method ends when that is below tol (1 + |y|). Each system is solved only as
    well as the target needs.

    Args:
        tol: relative error of y; default 1e-10 in float64, 3e-6 in float32.
        max_iterations: Newton steps, default 100.
        forcing: relative residual of a direction while far, default 1e-2.

    Cost: per iteration one gradient and one solve, more gradients when the line search halves; a gradient a chord step.

    References: Nocedal and Wright, Numerical Optimization, 2nd ed., algorithm 7.1; Dembo, Eisenstat, Steihaug 1982;
        Eisenstat and Walker 1996 (forcing terms).
    """

    takes_residual = True

    def __init__(self, *, tol: float | None = None, max_iterations: int = 100, forcing: float = 1e-2):
        self.tol, self.max_iterations, self.forcing = tol, max_iterations, forcing

    def solve(
        self, objective: Objective, x: Tensor, y0: Tensor, *, systems: LowerSystems, tol: float | None = None,
        residual: float = 0.0,
    ) -> LowerResult:  # fmt: skip
        objective.counts.add(lower_solves=1)
        tol = tol if tol is not None else self.tol if self.tol is not None else tolerance_of_step(y0.dtype)
        eps = torch.finfo(y0.dtype).eps
        start = chord_steps(objective, x, y0, systems, tol=tol, residual=residual, reduction=REDUCTION)
        y, at, norm, error = start.y, start.at, start.norm, start.error
        floor = 1e-10 if y0.dtype == torch.float64 else 1e-5
        eta = self.forcing
        if residual > 0:
            residual = min(residual, REDUCTION * start.first)
            eta = max(eta, min(0.3, 0.5 * residual / max(float(norm), 1e-300)))
            eta = self._to_residual(float(norm), residual, systems.bend, floor, eta)
        for iteration in range(self.max_iterations + 1):
            result = LowerResult(y, norm, error, LowerStatus.MAX_ITERATIONS, iteration, at)
            if not bool(torch.isfinite(norm) & torch.isfinite(at.value)):
                result.status = LowerStatus.NON_FINITE
                return result
            scale = 1.0 + float(torch.linalg.vector_norm(y))
            if float(norm) <= residual or (error is not None and float(error) <= tol * scale):
                result.status = LowerStatus.CONVERGED
                if float(norm) == 0.0 and error is None:
                    result.error = torch.zeros_like(norm)
                return result
            if iteration == self.max_iterations:
                return result
            direction = systems.solve(at, -at.gy, tol=eta)
            if direction.status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NOT_POSITIVE_DEFINITE):
                result.status = LowerStatus.NOT_CONVEX
                result.curvature = None if direction.curvature is None else float(direction.curvature.min())
                return result
            p = direction.x
            p_norm = float(torch.linalg.vector_norm(p))
            accepted = self._line_search(objective, x, y, at, norm, p, eps)
            if accepted is None:  # no decrease: rounding when the step is small, a fault otherwise
                small = p_norm <= max(tol, 100 * eps**0.75) * scale or self._is_rounding(at, float(norm), scale, eps)
                result.status = LowerStatus.CONVERGED if small else LowerStatus.STAGNATION
                result.error = norm.new_tensor(p_norm)
                return result
            y, new_at, rate = accepted
            new_norm = torch.linalg.vector_norm(new_at.gy)
            # a residual far below what was asked for may be a stiff direction's, with the soft ones unsolved; not a factor's
            least = eta if direction.iterations else 0.0
            error = rate * p_norm * torch.clamp(new_norm / norm, min=least, max=1.0)
            target = max(tol * scale / max(float(error), 1e-300), residual / max(float(new_norm), 1e-300))
            quadratic = 0.5 * float(new_norm / norm) ** 2  # what the next step can gain at best (Eisenstat, Walker)
            eta = min(self.forcing, max(0.3 * target, quadratic, floor))
            if rate == 1.0:
                self._observe(systems, float(norm), float(new_norm), float(direction.residual))
            if residual > 0:
                eta = self._to_residual(float(new_norm), residual, systems.bend, floor, eta)
            at, norm = new_at, new_norm
        return result

    @staticmethod
    def _to_residual(norm: float, residual: float, bend: float | None, floor: float, eta: float) -> float:
        """How well to solve for a step towards a residual far below: so that one step gets there, where the change of the
        Hessian lets it."""
        if bend is None or residual > NEAR * norm or bend * norm**2 > 0.5 * residual:
            return eta
        return max(0.4 * residual / norm, floor)

    @staticmethod
    def _observe(systems: LowerSystems, norm: float, new_norm: float, solved: float) -> None:
        """What a full step left of h_y beside what its system was solved to, over the square of what there was."""
        left = new_norm**2 - (solved * norm) ** 2
        if left > 0.5 * new_norm**2 > 0:
            systems.bend = left**0.5 / norm**2

    @staticmethod
    def _is_rounding(at, norm: float, scale: float, eps: float) -> bool:
        """Whether |h_y| is the rounding of products of size |h_yy| |y|: then y is as good as eps kappa allows."""
        return norm <= 10 * eps * lipschitz_estimate(at) * scale

    @staticmethod
    def _line_search(objective: Objective, x: Tensor, y: Tensor, at, norm: Tensor, p: Tensor, eps: float):
        """(y + rate p, its linearisation, rate) with sufficient decrease of h, or None after 30 halvings.

        Near rounding, where values no longer tell, a decrease of the gradient's norm counts as well.
        """
        slope = float(torch.dot(at.gy, p))
        value, noise = float(at.value), 10 * eps * (1.0 + abs(float(at.value)))
        rate = 1.0
        for _ in range(30):
            new = objective.linearise(x, y + rate * p, "y")
            change = float(new.value) - value
            if change <= 1e-4 * rate * slope:
                return y + rate * p, new, rate
            if change <= noise and float(torch.linalg.vector_norm(new.gy)) < 0.9 * float(norm):
                return y + rate * p, new, rate
            if rate * abs(slope) < noise and change <= noise:
                return None
            rate *= 0.5
        return None
