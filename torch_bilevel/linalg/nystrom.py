"""Randomised Nystrom approximation of a positive semidefinite operator, as a preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import LinearOperator, as_operator
from .solution import SolveStatus


class NystromPreconditioner:
    """The inverse of A_r + mu I on the range of a low-rank A_r = U diag(s) U', scaled on its complement.

    P^{-1} = (s_r + mu) U diag(1 / (s + mu)) U' + (I - U U'), for systems with A + mu I; s_r is the smallest
    s.

    Args:
        U: (n, r), orthonormal columns.
        eigenvalues: (r,), descending, nonnegative.
        mu: the shift of the system that is solved; 0 where A itself is (it must then have rank r or more).
        products: what it cost to form.
        status: NOT_POSITIVE_DEFINITE or NON_FINITE where ``nystrom`` failed.

    Cost: 2 n r multiplications per application and column; memory n r.
    """

    def __init__(
        self,
        U: Tensor,
        eigenvalues: Tensor,
        mu: float | Tensor = 0.0,
        *,
        products: int = 0,
        status: SolveStatus = SolveStatus.CONVERGED,
    ) -> None:
        if U.ndim != 2 or eigenvalues.shape != (U.shape[1],):
            raise ValueError(
                f"U, eigenvalues: expected (n, r) and (r,), got {tuple(U.shape)}, {tuple(eigenvalues.shape)}."
            )
        self.U, self.eigenvalues, self.mu, self.products = U, eigenvalues, mu, products
        if status is SolveStatus.CONVERGED and not bool(eigenvalues[-1] + mu > 0):
            status = SolveStatus.NOT_POSITIVE_DEFINITE
        self.status = status
        self._gain = (eigenvalues[-1] + mu) / (eigenvalues + mu) - 1

    @property
    def ok(self) -> bool:
        """True where P is positive definite and can be applied."""
        return self.status is SolveStatus.CONVERGED

    def __call__(self, R: Tensor) -> Tensor:
        """P^{-1} R: (n,) or (n, k) -> same shape.

        Raises:
            RuntimeError: there is no such preconditioner; look at ``status`` first.
        """
        if not self.ok:
            raise RuntimeError(
                f"nystrom: {self.status.value}. Expected a positive semidefinite operator and mu > 0 (or "
                "rank of A at least r); raise mu, lower the rank, or solve without this preconditioner."
            )
        rows = R if R.ndim == 1 else R.mT  # few rows from the left: ten times faster than few columns from the right
        coefficients = (rows @ self.U) * self._gain
        return R + (coefficients @ self.U.mT).T if R.ndim == 2 else R + coefficients @ self.U.mT


def nystrom(
    A: LinearOperator | Tensor, rank: int, mu: float | Tensor = 0.0, generator: torch.Generator | None = None
) -> NystromPreconditioner:
    """Randomised Nystrom preconditioner of A + mu I from one block product with a Gaussian test matrix.

    A_r = (A Q) (Q' A Q)^+ (A Q)' with Q the orthonormalised Gaussian (n, r), computed for A + nu I with nu at
    the rounding level of A Q and shifted back (eigenvalues below nu come out as 0).

    Args:
        A: positive semidefinite operator or (n, n) matrix, *without* mu.
        rank: number r of test vectors, 1 <= r <= n. Eigenvalues beyond the r-th should be of the size of mu.
        mu: the shift of the system that is to be solved.
        generator: of the test matrix, on the CPU or on A's device; None: one seeded with 0.

    Returns:
        A preconditioner; look at ``.ok``: False where A has a clearly negative eigenvalue or a NaN.

    Cost: r products; n r^2 multiplications; memory 3 n r.

    References: Frangella, Tropp and Udell 2023 (arXiv:2110.02820), algorithm 2.1 and equation (1.3).
    """
    A = as_operator(A)
    if not isinstance(rank, int) or not 1 <= rank <= A.n:
        raise ValueError(f"rank: expected an int in [1, {A.n}], got {rank!r}.")
    if not bool(torch.as_tensor(mu) >= 0):
        raise ValueError(f"mu: expected a number >= 0, got {mu!r}.")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    Omega = torch.randn(A.n, rank, generator=generator, device=generator.device, dtype=A.dtype).to(A.device)
    Q = torch.linalg.qr(Omega).Q
    Y = A.apply(Q)
    eps = torch.finfo(A.dtype).eps
    size = torch.linalg.matrix_norm(Y)
    nu = eps * torch.where(size == 0, torch.ones_like(size), size)  # A = 0 is factored as nu I
    Y = Y + nu * Q
    core = Q.mT @ Y
    C, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
    finite = bool(Y.isfinite().all())
    if not finite or not bool(info == 0):
        status = SolveStatus.NOT_POSITIVE_DEFINITE if finite else SolveStatus.NON_FINITE
        return NystromPreconditioner(Q, Y.new_zeros(rank), mu, products=rank, status=status)
    B = torch.linalg.solve_triangular(C.mT, Y, upper=True, left=False)
    U, s, _ = torch.linalg.svd(B, full_matrices=False)
    eigenvalues = (s**2 - nu).clamp_min(0)  # the algorithm's own last step: undo the shift nu
    return NystromPreconditioner(U, eigenvalues, mu, products=rank)
