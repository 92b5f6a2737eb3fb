"""Symmetric linear algebra by products: operators, certifying solvers, preconditioners, eigenvalues."""

from .cg import cg
from .chebyshev import Spectrum, chebyshev, estimate_spectrum
from .cholesky import CholeskyFactor, cholesky
from .lanczos import EigenResult, lanczos_extreme
from .minres import minres
from .nystrom import NystromPreconditioner, nystrom
from .operator import DenseOperator, FunctionOperator, LinearOperator, ShiftedOperator, as_operator
from .preconditioner import Preconditioner, jacobi
from .replay import own_stream
from .solution import Solution, SolveStatus
from .solve import default_tol, solve

__all__ = [
    "CholeskyFactor",
    "DenseOperator",
    "EigenResult",
    "FunctionOperator",
    "LinearOperator",
    "NystromPreconditioner",
    "Preconditioner",
    "ShiftedOperator",
    "Solution",
    "SolveStatus",
    "Spectrum",
    "as_operator",
    "cg",
    "chebyshev",
    "cholesky",
    "default_tol",
    "estimate_spectrum",
    "jacobi",
    "lanczos_extreme",
    "minres",
    "nystrom",
    "own_stream",
    "solve",
]
