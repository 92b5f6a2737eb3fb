"""Iterative refinement: the outer loop that the Krylov solvers share.

A Krylov method tracks its residual by a recursion, which drifts from the truth. So each *cycle* solves for a
correction, A e = r / |r|, and the loop recomputes r = b - A (x + |r| e) before it believes the answer.
Scaling by |r| makes the cycle blind to the size of b (1e-30 and 1e+30 give the same digits), and a cycle
whose true residual misses the tolerance is followed by another one as long as that residual at least halves. Where the
tolerance is so loose that the drift cannot matter, the recursion is believed, and the product saved: a fifth to a third of
them in solves of a few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .nystrom import NystromPreconditioner
from .operator import LinearOperator
from .solution import SEVERITY, Solution, SolveStatus

CONVERGED, MAX_ITERATIONS, STAGNATION, NEGATIVE_CURVATURE, NOT_POSITIVE_DEFINITE, NON_FINITE = range(
    len(SEVERITY)
)
RUNNING = -1
#: what a recursion in float64 leaves of what it starts from, and of b, and is believed: it drifts by its steps times 1e-16 times
#: the condition number
TRUSTED, TRUSTED_OF_B = 1e-4, 1e-7


@dataclass(frozen=True)
class Cycle:
    """What one run of a Krylov recursion gives: corrections E (n, m), codes (m,), what they cost, Ritz vectors, and the residuals
    (m,) that it ends with where they are those of A but for drift."""

    E: Tensor
    code: Tensor
    iterations: int
    products: int
    direction: Tensor | None = None
    curvature: Tensor | None = None
    ritz: NystromPreconditioner | None = None
    residual: Tensor | None = None


#: (R, target, budget) -> Cycle: solve A E = R (unit columns) to |A e - r| <= target (m,) in at most budget
#: steps.
RunCycle = Callable[[Tensor, Tensor, int], Cycle]


def column_norms(V: Tensor) -> Tensor:
    """|v| of each column, safe from under- and overflow of the squares: (n, k) -> (k,)."""
    largest = V.abs().amax(0)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return scale * torch.linalg.vector_norm(V / scale, dim=0)


def default_max_iterations(n: int) -> int:
    """10 n steps for small systems (rounding delays convergence beyond n), n + 1000 for large ones."""
    return min(10 * n, 1000 + n)


def refine(
    A: LinearOperator,
    b: Tensor,
    run_cycle: RunCycle,
    *,
    solver: str,
    tol: float,
    atol: float = 0.0,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    monotone: bool = False,
) -> Solution:
    """Solve A x = b column by column to |A x - b| <= max(tol |b|, atol), judged on the recomputed residual; on the recursion's
    own where that is TRUSTED.

    Args:
        b: (n,) or (n, k).
        run_cycle: the Krylov recursion.
        solver: its name, for the answer.
        tol, atol: relative and absolute tolerance.
        max_iterations: over all cycles; None: ``default_max_iterations``.
        x0: start of b's shape; None: zero.
        monotone: the method never increases the residual in exact arithmetic (MINRES; CG reduces the error in
            the norm of A instead), so that an increase is rounding and undone.

    Cost: the cycles' products, and per cycle one for the true residual of each of its columns where that is recomputed; one
        more with x0.
    """
    budget = default_max_iterations(A.n) if max_iterations is None else max_iterations
    B = b.unsqueeze(1) if b.ndim == 1 else b
    b_norm = column_norms(B)
    nonzero = b_norm != 0
    unit = torch.where(nonzero, b_norm, torch.ones_like(b_norm))
    goal = torch.clamp_min(atol / unit, tol)  # relative; the larger of the two tolerances, not a repair

    X = torch.zeros_like(B, memory_format=torch.contiguous_format)
    R = B.clone(memory_format=torch.contiguous_format)
    products = iterations = 0
    columns, number = _where(nonzero)
    if x0 is not None and number:
        X[:, columns] = x0.reshape(B.shape)[:, columns]
        R[:, columns] -= A.apply(X[:, columns])
        products += number
    r_norm = column_norms(R)
    code = torch.where(r_norm / unit <= goal, CONVERGED, RUNNING)
    code = torch.where(r_norm.isfinite(), code, NON_FINITE)
    direction = curvature = ritz = None

    while iterations < budget:
        columns, number = _where(code == RUNNING)
        if not number:
            break
        old = r_norm[columns].clone()
        target = goal[columns] * (unit[columns] / old)
        cycle = run_cycle(R[:, columns] / old, target, budget - iterations)
        iterations += cycle.iterations
        X_new = X[:, columns] + cycle.E * old
        loose = cycle.residual is not None and bool(((target >= TRUSTED) & (goal[columns] >= TRUSTED_OF_B)).all())
        if loose and bool((cycle.code == CONVERGED).all()):
            X[:, columns], r_norm[columns], code[columns] = X_new, cycle.residual * old, CONVERGED
            products, ritz = products + cycle.products, ritz or cycle.ritz
            break
        R_new = B[:, columns] - A.apply(X_new)
        products += cycle.products + number
        new = column_norms(R_new)
        # A cycle that ended for a reason of its own keeps its iterate; one that only drifted keeps the
        # better.
        drifted = (cycle.code == CONVERGED) | (cycle.code == STAGNATION)
        undo = drifted | (cycle.code == RUNNING) if monotone else drifted
        keep = (~undo | (new <= old)) & X_new.isfinite().all(0)
        X[:, columns] = torch.where(keep, X_new, X[:, columns])
        R[:, columns] = torch.where(keep, R_new, R[:, columns])
        r_norm[columns] = torch.where(undo & ~keep, old, new)
        verdict = torch.where(drifted, torch.where(new <= 0.5 * old, RUNNING, STAGNATION), cycle.code)
        verdict = torch.where(cycle.code == RUNNING, MAX_ITERATIONS, verdict)
        verdict = torch.where(new.isfinite(), verdict, NON_FINITE)
        code[columns] = torch.where(new / unit[columns] <= goal[columns], CONVERGED, verdict)
        if cycle.direction is not None and (curvature is None or bool(cycle.curvature < curvature)):
            direction, curvature = cycle.direction, cycle.curvature
        if cycle.ritz is not None and (ritz is None or ritz.U.shape[1] < cycle.ritz.U.shape[1]):
            ritz = cycle.ritz

    code = torch.where(code == RUNNING, MAX_ITERATIONS, code)
    residual = r_norm / unit
    status = SEVERITY[int(code.max())] if code.numel() else SolveStatus.CONVERGED
    single = b.ndim == 1
    return Solution(
        x=X[:, 0] if single else X,
        status=status,
        residual=residual[0] if single else residual,
        iterations=iterations,
        products=products,
        solver=solver,
        direction=direction,
        curvature=curvature,
        ritz=ritz,
    )


def _where(columns: Tensor) -> tuple[Tensor | slice, int]:
    """The columns of a mask, by a slice where it is all of them (no gathering, no scattering), and how many they are."""
    number = int(columns.sum())
    return (slice(None) if number == len(columns) else columns.nonzero().flatten()), number
