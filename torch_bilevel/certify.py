"""certify: is a point second-order stationary? Judged with exact derivatives, whatever method found it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .doctor import has_third_derivatives
from .errors import ConfigError
from .linalg import LinearOperator, lanczos_extreme
from .oracles import Evaluation, PenaltyOracle
from .problem import BilevelProblem


@dataclass(frozen=True)
class Certificate:
    """What is known of the hyper-objective at one point.

    Attributes:
        value: f(x, y*(x)). gradient_norm: |grad phi|, by implicit differentiation.
        gradient_error: first-order estimate of the gradient's error from the residuals of the lower level and of the
            adjoint system, plus rounding.
        min_eigenvalue: lowest Ritz value of hess phi by Lanczos (dense below 200 hyperparameters);
        min_eigenvalue_error: its residual bound: some eigenvalue lies within it.
        hessian_norm: largest |Ritz value| met.
        cubic_reg: M used for the default delta = sqrt(M eps).
        x_norm: |x|, large when weights run to infinity and there may be no finite minimiser.
    """

    value: float
    gradient_norm: float
    gradient_error: float
    min_eigenvalue: float
    min_eigenvalue_error: float
    hessian_norm: float
    cubic_reg: float
    x_norm: float

    def delta(self, eps: float) -> float:
        """sqrt(M eps), the curvature that an (eps, sqrt(M eps))-stationary point may have."""
        return math.sqrt(self.cubic_reg * eps)

    def is_sosp(self, eps: float, delta: float | None = None) -> bool:
        """Whether |grad phi| + error <= eps and lambda_min - error >= -delta; delta defaults to sqrt(M eps)."""
        if not eps > 0:
            raise ConfigError(f"eps: expected a positive number, got {eps!r}")
        delta = self.delta(eps) if delta is None else delta
        return (
            self.gradient_norm + self.gradient_error <= eps
            and self.min_eigenvalue - self.min_eigenvalue_error >= -delta
        )

    def describe(self, eps: float, delta: float | None = None) -> str:
        """The judgement at eps in one line, with the M and delta behind it."""
        used = self.delta(eps) if delta is None else delta
        verdict = "is" if self.is_sosp(eps, delta) else "is not"
        text = (
            f"{verdict} ({eps:.1e}, {used:.1e})-second-order stationary: |gradient| {self.gradient_norm:.2e}"
            f" +- {self.gradient_error:.0e}, smallest eigenvalue {self.min_eigenvalue:.2e}"
            f" +- {self.min_eigenvalue_error:.0e} (M = {self.cubic_reg:.2e})"
        )
        if self.x_norm > 100 and self.gradient_norm < eps:
            text += f"; |x| = {self.x_norm:.0f}: hyperparameters may be running to infinity, with no finite minimiser"
        return text

    def __str__(self) -> str:
        return self.describe(1e-6)


def certify(
    problem: BilevelProblem,
    x: Tensor | None = None,
    *,
    cubic_reg: float | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    **oracle: Any,
) -> Certificate:
    """Exact gradient norm with its error, and the smallest eigenvalue of the hyper-Hessian with its error bound.

    Args:
        x: (dx,), default the current hyperparameters. The learner's tensors are not changed.
        cubic_reg: M for delta = sqrt(M eps); default: estimated as |hess phi(x + h u) u - hess phi(x) u| / h along
            the bottom eigenvector u (one more evaluation).
        tol: of the eigenvalue, relative to |hess phi|.
        oracle: options of the exact oracle (lower=..., damping=...): ImplicitOracle, for a MinimaxProblem
            MinimaxOracle.

    Raises: as the exact oracle's ``evaluate``.

    Cost: one evaluation, 20-200 Hessian products (two linear solves each). Where a layer has no third derivatives the
        curvature is that of the central penalty surrogate with penalty 1e4.
    """
    exact = problem.exact_oracle(**oracle)
    ev = exact.exact(exact.evaluate(x))
    usable = not exact.third_derivatives or has_third_derivatives(problem)
    hessians = exact if usable else PenaltyOracle(problem, 1e4, **oracle)
    hessian_ev = ev if hessians is exact else hessians.evaluate(x)
    eigenvalue, error, norm, u = smallest_eigenvalue(hessian_ev.hessian, tol, seed)
    if cubic_reg is None:
        cubic_reg = _third_derivative(hessians, hessian_ev, u, norm)
    return Certificate(
        value=float(ev.value),
        gradient_norm=float(torch.linalg.vector_norm(ev.gradient)),
        gradient_error=_rounding(ev) + (exact.gradient_error(ev) if hessians is exact else 0.0),
        min_eigenvalue=eigenvalue,
        min_eigenvalue_error=error,
        hessian_norm=norm,
        cubic_reg=float(cubic_reg),
        x_norm=float(torch.linalg.vector_norm(ev.x)),
    )


def smallest_eigenvalue(H: LinearOperator, tol: float = 1e-3, seed: int = 0) -> tuple[float, float, float, Tensor]:
    """(lambda_min, its error bound, |H|, unit eigenvector): dense below 200 unknowns, else Lanczos."""
    if H.n < 200:
        values, vectors = torch.linalg.eigh(H.to_dense().to(torch.float64))
        norm = float(values.abs().max())
        return float(values[0]), 10 * torch.finfo(H.dtype).eps * norm * H.n**0.5, norm, vectors[:, 0].to(H.dtype)
    low = lanczos_extreme(H, which="min", tol=tol, generator=torch.Generator().manual_seed(seed))
    norm = float(torch.linalg.vector_norm(H.matvec(low.vector)))
    high = lanczos_extreme(H, which="max", tol=0.1, generator=torch.Generator().manual_seed(seed), max_iterations=15)
    return float(low.value), float(low.error_bound), max(norm, abs(float(high.value))), low.vector


def _rounding(ev: Evaluation) -> float:
    return 10 * torch.finfo(ev.x.dtype).eps * float(torch.linalg.vector_norm(ev.gradient))


def _third_derivative(oracle, ev: Evaluation, u: Tensor, norm: float) -> float:
    """|(hess phi(x + h u) - hess phi(x)) u| / h, a local estimate of the Lipschitz constant of the Hessian."""
    h = 1e-2 * max(1.0, float(torch.linalg.vector_norm(ev.x)) / ev.x.numel() ** 0.5)
    base = ev.hessian.matvec(u)
    moved = oracle.evaluate(ev.x + h * u).hessian.matvec(u)
    return max(float(torch.linalg.vector_norm(moved - base)) / h, 1e-8 * norm)
