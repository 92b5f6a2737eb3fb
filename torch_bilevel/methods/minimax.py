"""MCN, LMCN and IMCN: the cubic Newton method on P(x) = max_y f(x, y)."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..oracles.minimax import MinimaxOracle
from .cubic_newton import CubicNewton
from .registry import register
from .schedule import make_schedule
from .second_order import oracle_options, regularisation


@register("mcn")
def MCN(
    *,
    cubic_reg: float | None = None,
    adaptive: bool = True,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Minimax cubic Newton: min_x max_y f(x, y), f strongly concave in y, with a fresh Hessian every iteration.

    Published (Luo, Li, Chen, NeurIPS 2022, arXiv 2110.04814, algorithm 1): for t = 0, 1, ...
        y_t ~ argmax f(x_t, .) by accelerated gradient ascent from y_{t-1};
        g_t = f_x(x_t, y_t),   H_t = f_xx - f_xy f_yy^{-1} f_yx at (x_t, y_t);
        x_{t+1} = x_t + argmin_s g_t's + s'H_t s/2 + (M/6)|s|^3,   M = 4 sqrt(2) kappa^3 rho.
    Rate O(sqrt(kappa^3 rho) eps^-1.5) iterations to an (eps, sqrt(M eps))-second-order stationary point of P, with
    kappa = l / mu, f l-smooth with rho-Lipschitz Hessian and mu-strongly concave in y.

    Published settings: adaptive=False, cubic_reg=M, lower={'name': 'agd', 'step': 1 / l, 'momentum': ...}, and
    stop_rule='step' of ``minimize``. Deviations of the defaults: Newton-CG for the maximisation, M fitted to the steps
    with an acceptance test (the constants are rarely known, and far too careful), Krylov models for large dx.

    Args:
        cubic_reg: M; the first one when adaptive (None: estimated). adaptive: fit M to the steps (default).
        hessian: 'dense', 'krylov' or 'auto'; model_tol, max_basis: see HessianModel.
        oracle: options of MinimaxOracle.
    """
    return CubicNewton(
        "mcn", lambda problem: MinimaxOracle(problem, **oracle), regularisation(cubic_reg, adaptive), make_schedule(1),
        hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip


@register("lmcn")
def LMCN(
    *,
    period: int | str = "adaptive",
    cubic_reg: float | None = None,
    adaptive: bool = True,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Lazy minimax cubic Newton: the gradient is always fresh, the Hessian is made anew only now and then.

    Published (Yang, Liu, Chen, Lui, arXiv 2605.06431): as MCN with H computed at x_pi(t), pi(t) = t - t mod m, and
    M = 6 m * 4 sqrt(2) kappa^3 rho; O~(sqrt m eps^-1.5) iterations with one Hessian per m of them.
    Published settings: period=m, adaptive=False, cubic_reg=M, lower={'name': 'agd', ...}. Deviations: as MCN's, and the
    adaptive refresh.

    Args:
        period: m accepted steps per Hessian (published), or 'adaptive' (default), see LFSBA.
        Others: see MCN.
    """
    return CubicNewton(
        "lmcn", lambda problem: MinimaxOracle(problem, **oracle), regularisation(cubic_reg, adaptive),
        make_schedule(period), hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip


@register("imcn")
def IMCN(
    *,
    period: int | str = 1,
    cubic_reg: float | None = None,
    adaptive: bool = True,
    subproblem: str = "krylov",
    eps: float = 1e-4,
    solver: str = "chebyshev",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Inexact minimax cubic Newton: matrix-free. Neither the Hessian of P nor f_yy is ever formed or factored.

    Published (Luo, Li, Chen, arXiv 2110.04814, algorithm 3): Hessian products of P with the inner inverse by a matrix
    Chebyshev expansion of order K = O(sqrt kappa log), the cubic subproblem by gradient descent from the Cauchy point,
    a final solver when the model decrease falls below sqrt(eps^3 / M) / 128.

    Published settings: subproblem='gradient', eps=..., chebyshev_order=K, spectrum=(mu, l), adaptive=False,
        cubic_reg=M,
    lower={'name': 'agd', ...}. Deviations of the defaults: a kept Krylov basis instead of gradient descent, K from the
    tolerance, the spectrum of -f_yy estimated once and kept, M fitted; with ``period``, a lazy Hessian.

    Args:
        period: accepted steps per Krylov model, default 1 (published), or 'adaptive'.
        subproblem: 'krylov' (default) or 'gradient' (published). eps: accuracy of 'gradient', default 1e-4.
        solver: of the inner inverse: 'chebyshev' (default, published), 'cg' or 'minres'.
        Others: see MCN. Memory: 2 dx max_basis numbers for 'krylov', a few dx for 'gradient'.
    """
    if subproblem not in ("krylov", "gradient"):
        raise ConfigError(f"subproblem: expected 'krylov' or 'gradient', got {subproblem!r}")
    return CubicNewton(
        "imcn", lambda problem: MinimaxOracle(problem, solver=solver, **oracle), regularisation(cubic_reg, adaptive),
        make_schedule(period), hessian=subproblem, model_tol=model_tol, max_basis=max_basis, model_eps=eps,
    )  # fmt: skip


MCN.oracle_options = LMCN.oracle_options = oracle_options(MinimaxOracle)
IMCN.oracle_options = oracle_options(MinimaxOracle, "solver")
