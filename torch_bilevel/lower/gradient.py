"""Gradient descent and Nesterov's accelerated gradient, the papers' lower solvers."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ..derivatives import Linearisation, Objective
from ..errors import ConfigError
from .solver import REDUCTION, LowerResult, LowerSolver, LowerStatus
from .systems import LowerSystems, tolerance_of_step


class _Gradient(LowerSolver):
    """y <- z - step h_y(z), z <- y + momentum (y - y_old): shared by plain and accelerated gradient."""

    accelerated: bool
    first_order = True
    takes_residual = True

    def __init__(
        self,
        step: float | None = None,
        *,
        momentum: float | None = None,
        steps: int | None = None,
        tol: float | None = None,
        max_iterations: int = 20_000,
    ):
        if step is not None and not step > 0:
            raise ConfigError(f"step: expected a positive number or None (1/L, estimated), got {step!r}")
        if steps is not None and steps < 0:
            raise ConfigError(f"steps: expected a non-negative int or None (to tolerance), got {steps!r}")
        self.step, self.momentum, self.steps = step, momentum, steps
        self.tol, self.max_iterations = tol, max_iterations
        self.reaches_tolerance = steps is None

    def solve(
        self, objective: Objective, x: Tensor, y0: Tensor, *, systems: LowerSystems, tol: float | None = None,
        residual: float = 0.0,
    ) -> LowerResult:  # fmt: skip
        objective.counts.add(lower_solves=1)
        tol = tol if tol is not None else self.tol if self.tol is not None else tolerance_of_step(y0.dtype)
        if residual > 0:
            gradient = objective.gradient(x, y0, "y")[2]
            residual = min(residual, REDUCTION * float(torch.linalg.vector_norm(gradient)))
            if residual == 0.0:
                return self._end(y0, gradient, None, LowerStatus.CONVERGED, 0)
        fixed = self.step is not None
        step = self.step if fixed else 1.0 / lipschitz_estimate(objective.linearise(x, y0, "y"))
        if self.steps is not None:
            return self._fixed(objective, x, y0, step)
        y = z = y0
        if not residual > 0:
            gradient = objective.gradient(x, z, "y")[2]
        weight, mu = 1.0, math.inf
        for iteration in range(1, self.max_iterations + 1):
            new = z - step * gradient
            momentum = 0.0
            if self.accelerated:
                if self.momentum is not None:
                    momentum = self.momentum
                else:
                    next_weight = (1 + math.sqrt(1 + 4 * weight * weight)) / 2
                    momentum, weight = (weight - 1) / next_weight, next_weight
                    if float(torch.dot(gradient, new - y)) > 0:  # adaptive restart
                        momentum, weight = 0.0, 1.0
            new_z = new + momentum * (new - y)
            new_gradient = objective.gradient(x, new_z, "y")[2]
            dz = new_z - z
            length, bend, along, norm, size = torch.stack(
                [torch.linalg.vector_norm(dz), torch.linalg.vector_norm(new_gradient - gradient),
                 torch.dot(new_gradient - gradient, dz), torch.linalg.vector_norm(new_gradient),
                 1.0 + torch.linalg.vector_norm(new_z)]
            ).tolist()  # fmt: skip
            if not (math.isfinite(norm) and math.isfinite(size)):
                return self._end(y, gradient, None, LowerStatus.NON_FINITE, iteration)
            if length > 0:
                curvature = along / length / length
                if curvature * length < -100 * torch.finfo(y0.dtype).eps * size / step:  # more than rounding
                    result = self._end(new_z, new_gradient, None, LowerStatus.NOT_CONVEX, iteration)
                    result.curvature = curvature
                    return result
                mu = min(mu, curvature) if curvature > 0 else mu
                if not fixed and bend > 1.001 * length / step:  # curvature above 1/step: the estimate of L was low
                    step, weight = 0.9 * length / bend, 1.0
            y, z, gradient = new, new_z, new_gradient
            error = norm / mu if 0 < mu < math.inf else math.inf
            if norm <= residual or error <= tol * size:
                known = 0.0 if norm == 0.0 else error if math.isfinite(error) else None
                return self._end(z, gradient, known, LowerStatus.CONVERGED, iteration)
        return self._end(z, gradient, None, LowerStatus.MAX_ITERATIONS, self.max_iterations)

    def _fixed(self, objective: Objective, x: Tensor, y0: Tensor, step: float) -> LowerResult:
        """The given number of steps and no look at the outcome, as the published inner loops do."""
        y = z = y0
        momentum = (self.momentum or 0.0) if self.accelerated else 0.0
        gradient = None
        for _ in range(self.steps):
            gradient = objective.gradient(x, z, "y")[2]
            new = z - step * gradient
            z = new + momentum * (new - y) if momentum else new
            y = new
        norm = y.new_tensor(float("nan")) if gradient is None else torch.linalg.vector_norm(gradient)
        return LowerResult(y, norm, None, LowerStatus.FIXED_STEPS, self.steps)

    @staticmethod
    def _end(y: Tensor, gradient: Tensor, error: float | None, status: LowerStatus, iterations: int) -> LowerResult:
        norm = torch.linalg.vector_norm(gradient)
        return LowerResult(y, norm, None if error is None else norm.new_tensor(error), status, iterations)


@final
class GradientDescent(_Gradient):
    """y <- y - step h_y(x, y).

    Args:
        step: default 1/L with L from a few products (power iteration), lowered when a step shows more curvature.
        steps: a fixed number of steps (as in published inner loops); None iterates to ``tol``.
        tol: relative error of y, estimated as |h_y| / mu with the least curvature met on the way.
        max_iterations: default 20,000.

    Cost: one gradient per step. Rate 1 - 1/kappa per step.
    """

    accelerated = False

    def __init__(self, step: float | None = None, *, steps: int | None = None, tol: float | None = None,
                 max_iterations: int = 20_000):  # fmt: skip
        super().__init__(step, steps=steps, tol=tol, max_iterations=max_iterations)


@final
class AGD(_Gradient):
    """Nesterov's accelerated gradient: y+ = z - step h_y(x, z), z+ = y+ + momentum (y+ - y).

    Args:
        step: as for GradientDescent. It acts on the objective as the oracle states it: the penalty oracle minimises
            g + f / penalty, so a step published for f + penalty g is to be multiplied by the penalty.
        momentum: constant momentum (published codes; theory: (sqrt kappa - 1) / (sqrt kappa + 1)); default:
            Nesterov's increasing sequence with adaptive restart, which needs no kappa (0 with fixed ``steps``).
        steps, tol, max_iterations: as for GradientDescent.

    Cost: one gradient per step. Rate 1 - 1/sqrt(kappa) per step.

    References: Nesterov 1983; O'Donoghue and Candes 2015 (restart).
    """

    accelerated = True


def lipschitz_estimate(at: Linearisation, products: int = 8) -> float:
    """1.05 times the largest |eigenvalue| of h_yy at the recorded point met by a seeded power iteration."""
    v = torch.randn(at.y.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(at.y)
    size = 0.0
    for _ in range(products):
        v = at.yy(v / torch.linalg.vector_norm(v))
        size = float(torch.linalg.vector_norm(v))
        if not size > 0:
            return 1.0
    return 1.05 * size
