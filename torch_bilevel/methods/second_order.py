"""FSBA, LFSBA, IFSBA, DLCRN and SLCRN: settings of the one cubic Newton method."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import ConfigError
from ..oracles import HyperOracle, ImplicitOracle, PenaltyOracle, SingleLoopOracle
from .cubic_newton import CubicNewton
from .registry import options_of, register
from .regularisation import FittedRegularisation, FixedRegularisation
from .schedule import make_schedule


def oracle_options(oracle: type[HyperOracle], *taken: str) -> tuple[str, ...]:
    """Keyword options of an oracle class and of its base, for constructors that pass them on."""
    found = []
    for cls in (oracle, HyperOracle):
        for parameter in inspect.signature(cls.__init__).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in (*taken, *found):
                found.append(parameter.name)
    return tuple(found)


def for_steps(oracle: dict[str, Any]) -> dict[str, Any]:
    """Oracle options with products as exact as a step needs: its Krylov model is solved to 1e-2, and steps are tested."""
    return {"hessian_tol": 1e-3, **oracle}


def regularisation(cubic_reg: float | None, adaptive: bool) -> FixedRegularisation | FittedRegularisation:
    if adaptive:
        return FittedRegularisation(cubic_reg)
    if cubic_reg is None:
        raise ConfigError("adaptive=False needs cubic_reg=M, a constant of the problem (theory: M >= its L2)")
    return FixedRegularisation(cubic_reg)


@register("fsba")
def FSBA(
    *,
    penalty: float = 1e4,
    scheme: str = "central",
    cubic_reg: float | None = None,
    adaptive: bool = True,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Fully second-order bilevel approximation: a fresh Hessian every iteration.

    Published (Yang, Liu, Chen, Lui, arXiv 2605.06431): for t = 0, 1, ...
        z ~ argmin g(x_t, .) and y ~ argmin f + penalty g by accelerated gradient, warm-started;
        g_t, H_t = gradient and Hessian of the penalty surrogate (no third derivatives);
        x_{t+1} = x_t + argmin_s g_t's + s'H_t s/2 + (M/6)|s|^3.
    Rate O~(eps^-1.5) iterations to an (eps, O(sqrt eps))-second-order stationary point.

    Published settings: scheme='forward', adaptive=False, cubic_reg=M, lower={'name': 'agd', 'steps': ..., ...}.
    Deviations of the defaults: central scheme (bias 1/penalty^2), Newton-CG for the lower level, fitted M with an
    acceptance test, Krylov models for large dx.

    Args:
        penalty, scheme and ``oracle``: see PenaltyOracle.
        cubic_reg: M; the first one when adaptive (None: estimated). adaptive: fit M to the steps (default).
        hessian: 'dense', 'krylov' or 'auto'; model_tol, max_basis: see HessianModel.
    """
    return CubicNewton(
        "fsba", lambda problem: PenaltyOracle(problem, penalty, scheme, **for_steps(oracle)), regularisation(cubic_reg, adaptive),
        make_schedule(1), hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip


@register("lfsba")
def LFSBA(
    *,
    period: int | str = "adaptive",
    penalty: float = 1e4,
    scheme: str = "central",
    cubic_reg: float | None = None,
    adaptive: bool = True,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Lazy FSBA: the gradient is always fresh, the Hessian is made anew only now and then.

    Published (arXiv 2605.06431): as FSBA with H computed at x_pi(t), pi(t) = t - t mod m; O~(sqrt m eps^-1.5)
    iterations with one Hessian per m of them. Theory's M = 6 m L2 is far too careful in practice (docs/methods.md).

    Args:
        period: m accepted steps per Hessian (published), or 'adaptive' (default): refreshed when that is worth
            its price, see AdaptiveRefresh. With a number the promise is kept to the letter: a rejected
            step raises M and never refreshes.
        Others: see FSBA.
    """
    return CubicNewton(
        "lfsba", lambda problem: PenaltyOracle(problem, penalty, scheme, **for_steps(oracle)),
        regularisation(cubic_reg, adaptive),
        make_schedule(period), hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip


@register("dlcrn")
def DLCRN(
    *,
    period: int | str = 1,
    cubic_reg: float | None = None,
    adaptive: bool = True,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Double-loop cubic-regularised Newton with exact implicit derivatives.

    Published (Bi, Li, Hong, Zhang, arXiv 2606.20534): solve the lower level to O(eps), take the implicit gradient and
    Hessian there, and a cubic step. Ours adds fitted M and, with ``period``, a lazy Hessian.

    Args:
        period: accepted steps per Hessian, default 1 (published), or 'adaptive'.
        oracle: options of ImplicitOracle. Others: see FSBA.
    """
    return CubicNewton(
        "dlcrn", lambda problem: ImplicitOracle(problem, **for_steps(oracle)), regularisation(cubic_reg, adaptive),
        make_schedule(period), hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip


@register("ifsba")
def IFSBA(
    *,
    period: int | str = "adaptive",
    penalty: float = 1e4,
    scheme: str = "central",
    cubic_reg: float | None = None,
    adaptive: bool = True,
    subproblem: str = "krylov",
    eps: float = 1e-4,
    solver: str = "cg",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Inexact FSBA: matrix-free. No hyper-Hessian and no lower Hessian is ever formed or factored.

    Published (public code that accompanies arXiv 2605.06431): Hessian products of the penalty surrogate with the inner
    inverse by a Chebyshev expansion; the cubic subproblem by gradient descent from the Cauchy point, a final solver
    when the model decrease falls below sqrt(eps^3 / M) / 128.

    Published settings: period=1, scheme='forward', adaptive=False, cubic_reg=M, solver='chebyshev',
    subproblem='gradient', eps=..., lower={'name': 'agd', ...}.
    Deviations of the defaults: CG instead of the expansion, a kept Krylov basis instead of gradient descent.

    Args:
        subproblem: 'krylov' (default) or 'gradient' (published). eps: accuracy of 'gradient', default 1e-4.
        solver: of the inner inverse: 'cg' (default), 'chebyshev' (published) or 'minres'.
        Others: see LFSBA. Memory: 2 dx max_basis numbers for 'krylov', a few dx for 'gradient'.
    """
    if subproblem not in ("krylov", "gradient"):
        raise ConfigError(f"subproblem: expected 'krylov' or 'gradient', got {subproblem!r}")
    return CubicNewton(
        "ifsba", lambda problem: PenaltyOracle(problem, penalty, scheme, solver=solver, **for_steps(oracle)),
        regularisation(cubic_reg, adaptive), make_schedule(period), hessian=subproblem, model_tol=model_tol,
        max_basis=max_basis, model_eps=eps,
    )  # fmt: skip


@register("slcrn")
def SLCRN(
    *,
    period: int | str = 1,
    cubic_reg: float | None = None,
    adaptive: bool = True,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> CubicNewton:
    """Single-loop cubic-regularised Newton: no inner loop at all.

    Published (Bi, Li, Hong, Zhang, arXiv 2606.20534), in the reading derived in docs/methods.md: per iteration one
    Newton-corrected point yh = y - g_yy^{-1} g_y (not kept), implicit gradient and Hessian at (x, yh), a cubic step in
    x, and one lower gradient step y+ = y - g_y(x, y) / L. O(eps^-1.5) oracle calls in total, no log factor.

    Deviations: the Newton step is damped where |g_y| would grow; fitted M with an acceptance test on the Lagrangian
    value, whose error is O(|y - y*|^4); with ``period``, a lazy Hessian (no paper has it).

    Args:
        period: accepted steps per Hessian, default 1 (published), or 'adaptive'.
        oracle: options of SingleLoopOracle. Others: see FSBA.

    Cost per iteration: two lower gradients when undamped, two linear solves, two more per Hessian product.
    """
    return CubicNewton(
        "slcrn", lambda problem: SingleLoopOracle(problem, **for_steps(oracle)), regularisation(cubic_reg, adaptive),
        make_schedule(period), hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip


@register("lazy_slcrn")
def LazySLCRN(*, period: int | str = "adaptive", **options: Any) -> CubicNewton:
    """SLCRN with a lazy Hessian, SLCRN(period='adaptive') unless a number is given. Ours; see SLCRN for the options."""
    method = SLCRN(period=period, **options)
    method.name = "lazy_slcrn"
    return method


FSBA.oracle_options = LFSBA.oracle_options = oracle_options(PenaltyOracle)
IFSBA.oracle_options = oracle_options(PenaltyOracle, "solver")
DLCRN.oracle_options = oracle_options(ImplicitOracle)
SLCRN.oracle_options = oracle_options(SingleLoopOracle, "lower", "lower_tol")
LazySLCRN.oracle_options = (*options_of("slcrn"),)
