"""Cholesky factorisation: the exact solver, and the best preconditioner for a system near by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..folding import bands, is_for_onednn, multiply
from .operator import LinearOperator, as_operator
from .preconditioner import Preconditioner
from .solution import SolveStatus

#: Up to this size a failed factorisation also answers with the smallest eigenvalue.
MAX_EIGENVALUE_SIZE = 2000
#: rows of a triangular system that LAPACK solves in one piece
BLOCK = 512
#: in which the lower triangle of a symmetric product is formed
BANDS = 6


class CholeskyFactor:
    """The factorisation A = L L' of a symmetric positive definite matrix, without jitter.

    A matrix that is not positive definite gives a factor with ``ok`` False and a status that says so.

    Args:
        A: (n, n), symmetric; only one triangle is read.
        overwrite: factor in A's own memory, which destroys A.
        products: what it cost to form A, kept for the record.

    Attributes:
        n, dtype, device: of A.
        factor_status: CONVERGED, NOT_POSITIVE_DEFINITE or NON_FINITE.
        min_eigenvalue: () the smallest eigenvalue, where the factorisation failed and n <= 2000; else None.
        products: see above.

    Cost: n^3 / 3 multiplications; memory n^2, none beyond A's own with ``overwrite`` (n > 2000).

    Example:
        >>> import torch
        >>> CholeskyFactor(torch.tensor([[4.0]])).solve(torch.tensor([2.0]))
        tensor([0.5000])
    """

    def __init__(self, A: Tensor, *, overwrite: bool = False, products: int = 0) -> None:
        if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.is_floating_point():
            raise ValueError(
                f"A: expected a square floating-point matrix, got {tuple(A.shape)} of {A.dtype}."
            )
        self.n, self.dtype, self.device, self.products = A.shape[0], A.dtype, A.device, products
        original = A.clone() if overwrite and self.n <= MAX_EIGENVALUE_SIZE else A
        finite = bool(A.sum().isfinite()) or bool(A.isfinite().all())  # the sum may overflow, and is much cheaper
        if self.n > 2 * BLOCK and is_for_onednn(A, A):
            L = A if overwrite else A.clone()
            info = factor_by_halves(L)
        elif overwrite and A.is_contiguous() and A.device.type == "cpu":
            info = torch.empty(0, dtype=torch.int32, device=A.device)
            L, info = torch.linalg.cholesky_ex(
                A.mT, out=(A.mT, info)
            )  # A' is column-major: LAPACK works in place
        else:
            L, info = torch.linalg.cholesky_ex(A)
        self.min_eigenvalue: Tensor | None = None
        self.L: Tensor | None = None
        self._inverse: Tensor | None = None
        if not finite:
            self.factor_status = SolveStatus.NON_FINITE
        elif bool(info == 0) and bool(L.diagonal().isfinite().all()):
            self.factor_status, self.L = SolveStatus.CONVERGED, L
        else:
            self.factor_status = SolveStatus.NOT_POSITIVE_DEFINITE
            if self.n <= MAX_EIGENVALUE_SIZE:
                self.min_eigenvalue = torch.linalg.eigvalsh(original)[0]

    @classmethod
    def from_lower(cls, L: Tensor) -> CholeskyFactor:
        """The factor whose lower triangle L (n, n) is at hand, as a checkpoint keeps it."""
        factor = cls.__new__(cls)
        factor.n, factor.dtype, factor.device, factor.products = L.shape[0], L.dtype, L.device, 0
        factor.min_eigenvalue, factor.L, factor.factor_status = None, L, SolveStatus.CONVERGED
        factor._inverse = None
        return factor

    @property
    def ok(self) -> bool:
        return self.factor_status is SolveStatus.CONVERGED

    def describe(self) -> str:
        """One line: how the factorisation ended and, where it failed, what to do."""
        text = f"cholesky: n = {self.n}, {'factored' if self.ok else self.factor_status.value}."
        if self.min_eigenvalue is not None:
            text += f" Smallest eigenvalue {float(self.min_eigenvalue):.3e}: shift by more than its size."
        elif self.factor_status is SolveStatus.NOT_POSITIVE_DEFINITE:
            text += " Add a positive shift, or solve with 'minres'."
        elif not self.ok:
            text += " Look at the function the matrix comes from."
        return text

    def solve(self, B: Tensor) -> Tensor:
        """A^{-1} B by two triangular solves, in the factor's precision: (n,) or (n, k) -> same shape and dtype.

        Two ``solve_triangular`` beat ``cholesky_solve`` tenfold on one vector (n = 7850, CPU).

        Raises:
            RuntimeError: the factorisation failed; look at ``factor_status`` first.
        """
        if self.L is None:
            raise RuntimeError(self.describe())
        if B.shape[0] != self.n or B.ndim not in (1, 2):
            raise ValueError(f"B: expected ({self.n},) or ({self.n}, k), got {tuple(B.shape)}.")
        X = (B.unsqueeze(1) if B.ndim == 1 else B).to(self.dtype)
        X = solve_triangular(self.L.mT, solve_triangular(self.L, X, upper=False), upper=True).to(B.dtype)
        return X.squeeze(1) if B.ndim == 1 else X

    __call__ = solve

    def multiply(self, x: Tensor) -> Tensor:
        """A x = L (L' x): (n,) -> (n,). Cost: n^2 multiplications twice."""
        return self.L @ (self.L.mT @ x)

    def preconditioner(self) -> Preconditioner:
        """For many solves of a system near by: ``solve``; on CUDA the product with the inverse, made at the first call.

        There two triangular solves of one vector take 1.04 ms at n = 7850 (float32, H200), the product 0.08, and the inverse
        31 once, with n^2 numbers more. Its residual is worse than that of the solves, which a preconditioner may be.
        """
        if self.L is None or not self.L.is_cuda:
            return self.solve
        if self._inverse is None:
            self._inverse = torch.cholesky_inverse(self.L)
        return lambda B: (self._inverse @ B.to(self.dtype)).to(B.dtype)


def factor_by_halves(A: Tensor) -> Tensor:
    """Write L over A (n, n), whose lower triangle is read: for where ``multiply`` is faster than LAPACK. As LAPACK's info."""
    n = len(A)
    if n <= 2 * BLOCK:
        L, info = torch.linalg.cholesky_ex(A)
        A.copy_(L)
        return info
    h = n // 2
    info = factor_by_halves(A[:h, :h])
    if bool(info != 0):
        return info
    A[h:, :h] = solve_triangular(A[:h, :h], A[h:, :h].mT, upper=False).mT
    left, right = A[h:, :h], A[h:, h:]
    for a, b in bands(n - h, BANDS):
        right[a:b, :b] -= multiply(left[a:b], left[:b].mT)
    A[:h, h:] = 0
    info = factor_by_halves(right)
    return torch.where(info > 0, info + h, info)


def solve_triangular(T: Tensor, B: Tensor, *, upper: bool) -> Tensor:
    """T^{-1} B, by halves where ``multiply`` is the faster: (n, n), (n, k) -> (n, k)."""
    n = len(T)
    if n <= BLOCK or not is_for_onednn(T[:BLOCK, :BLOCK], B[:BLOCK]):
        return torch.linalg.solve_triangular(T, B, upper=upper)
    X = torch.empty_like(B, memory_format=torch.contiguous_format)
    first, second = slice(0, n // 2), slice(n // 2, n)
    if upper:
        first, second = second, first
    X[first] = solve_triangular(T[first, first], B[first], upper=upper)
    X[second] = solve_triangular(T[second, second], B[second] - multiply(T[second, first], X[first]), upper=upper)
    return X


def cholesky(A: LinearOperator | Tensor) -> CholeskyFactor:
    """Factor an operator or matrix; look at ``.ok`` and ``.factor_status`` of the answer.

    Cost: ``A.products_to_dense`` products (n unless the matrix is at hand), then n^3 / 3 multiplications.
    """
    A = as_operator(A)
    return CholeskyFactor(A.to_dense(), overwrite=True, products=A.products_to_dense)
