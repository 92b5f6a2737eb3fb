"""What a linear solver answers: the vector, how it ended, and the residual it really has."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .nystrom import NystromPreconditioner


class SolveStatus(enum.Enum):
    """How a solve ended."""

    CONVERGED = "converged"
    MAX_ITERATIONS = "stopped at the iteration limit"
    STAGNATION = "stagnated above the tolerance"
    NEGATIVE_CURVATURE = "met negative curvature"
    NOT_POSITIVE_DEFINITE = "not positive definite"
    NON_FINITE = "met a NaN or an infinity"


#: From best to worst; the place of a status here is its code in the per-column tensors of the solvers.
SEVERITY: tuple[SolveStatus, ...] = tuple(SolveStatus)

_ADVICE = {
    SolveStatus.CONVERGED: "",
    SolveStatus.MAX_ITERATIONS: "Raise max_iterations, loosen tol, or give a preconditioner.",
    SolveStatus.STAGNATION: (
        "The residual is at the rounding level or the system is singular and inconsistent: loosen tol, use "
        "float64, or regularise the matrix."
    ),
    SolveStatus.NEGATIVE_CURVATURE: (
        "The matrix is indefinite: use the returned direction, add a shift, or solve with 'minres'."
    ),
    SolveStatus.NOT_POSITIVE_DEFINITE: (
        "The matrix or the preconditioner is not positive definite: add a shift, or solve with 'minres'."
    ),
    SolveStatus.NON_FINITE: "A product overflowed or the matrix holds a NaN: look at where it is made.",
}


@dataclass(frozen=True)
class Solution:
    """The answer to A x = b.

    Args:
        x: (n,) or (n, k), the last finite iterate.
        status: how it ended; of a block, the worst column's.
        residual: |A x - b| / |b| recomputed from x (see ``cg``), () or (k,); 0 for b = 0; 1 or NaN where nothing was
            found.
        iterations: of the slowest column.
        products: products with A, one per vector, a recomputed residual's included.
        solver: name of the method.
        direction: (n,), a unit d with d'Ad < 0 (the most negative of a block), where negative curvature was
            met.
        curvature: () d'Ad / d'd of that direction; of a failed Cholesky factorisation, the smallest
            eigenvalue.
        ritz: Ritz vectors and values of A from the iteration, as a preconditioner for systems near by, where ``cg`` was
            asked for them.
    """

    x: Tensor
    status: SolveStatus
    residual: Tensor
    iterations: int
    products: int
    solver: str
    direction: Tensor | None = None
    curvature: Tensor | None = None
    ritz: NystromPreconditioner | None = None

    @property
    def ok(self) -> bool:
        """True where every column meets its tolerance."""
        return self.status is SolveStatus.CONVERGED

    def describe(self) -> str:
        """One line: how it ended and, where it failed, what to do."""
        text = (
            f"{self.solver}: {self.status.value} after {self.iterations} iterations "
            f"({self.products} products), relative residual {_worst(self.residual):.2e}."
        )
        if self.curvature is not None:
            text += f" Curvature {float(self.curvature):.2e}."
        advice = _ADVICE[self.status]
        return f"{text} {advice}" if advice else text


def _worst(residual: Tensor) -> float:
    """The largest entry as a number; NaN wins, and no column counts as 0."""
    return float(residual.max()) if residual.numel() else 0.0
