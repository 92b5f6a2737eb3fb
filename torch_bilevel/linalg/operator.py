"""Symmetric linear operators: matrices that are known by their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class LinearOperator(ABC):
    """A real symmetric n x n matrix A known through its products A v.

    Args:
        n: number of rows and columns.
        dtype: floating-point type of the vectors it multiplies.
        device: where those vectors live.
        block_size: preferred number of right-hand sides in one call of ``matmat``; None: all at once.
    """

    block_size: int | None = None

    def __init__(
        self,
        n: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_size: int | None = None,
    ) -> None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n: expected a positive int (the number of rows), got {n!r}.")
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size: expected None or a positive int, got {block_size!r}.")
        self.n = n
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.device = torch.empty(0, device=device).device
        self.block_size = block_size

    @property
    def shape(self) -> tuple[int, int]:
        return (self.n, self.n)

    @property
    def products_to_dense(self) -> int:
        """Number of products that ``to_dense`` spends."""
        return self.n

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """The product A v: (n,) -> (n,)."""

    def matmat(self, V: Tensor) -> Tensor:
        """The products A V: (n, k) -> (n, k), here one column after the other."""
        return torch.stack([self.matvec(v) for v in V.unbind(1)], dim=1) if V.shape[1] else V.clone()

    def apply(self, V: Tensor) -> Tensor:
        """A V for (n,) or (n, k), with at most ``block_size`` columns in one call of ``matmat``.

        Cost: one product per column; a single column goes through ``matvec``.
        """
        if V.ndim == 1:
            return self.matvec(V)
        k = V.shape[1]
        if k == 1:
            return self.matvec(V[:, 0]).unsqueeze(1)
        if self.block_size is None or k <= self.block_size:
            return self.matmat(V)
        return torch.cat([self.apply(block) for block in V.split(self.block_size, dim=1)], dim=1)

    def count_replayed(self, products: int) -> None:  # noqa: B027  (most have no counts)
        """Told of so many products that were made without a call, by replaying one (negative: a call that made none)."""

    def to_dense(self) -> Tensor:
        """The matrix itself, (n, n), symmetrised as (A + A')/2.

        Cost: ``products_to_dense`` products; memory 2 n^2, beside one block of identity columns.
        """
        step = self.n if self.block_size is None else self.block_size
        A = torch.empty(self.n, self.n, dtype=self.dtype, device=self.device)
        for start in range(0, self.n, step):
            stop = min(start + step, self.n)
            E = torch.zeros(self.n, stop - start, dtype=self.dtype, device=self.device)
            E[start:stop].fill_diagonal_(1)
            A[:, start:stop] = self.apply(E)
        return (A + A.mT).mul_(0.5)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n}, dtype={self.dtype}, device={self.device})"


class FunctionOperator(LinearOperator):
    """The symmetric operator whose products are computed by the given functions.

    Args:
        n: number of rows and columns.
        matvec: v (n,) -> A v (n,).
        matmat: V (n, k) -> A V (n, k); None: ``matvec`` on each column.
        dtype, device, block_size: see ``LinearOperator``.

    Example:
        >>> import torch
        >>> A = FunctionOperator(3, lambda v: 2 * v)
        >>> A.matvec(torch.ones(3))
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        n: int,
        matvec: Callable[[Tensor], Tensor],
        matmat: Callable[[Tensor], Tensor] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__(n, dtype=dtype, device=device, block_size=block_size)
        if not callable(matvec):
            raise TypeError(f"matvec: expected a function (n,) -> (n,), got {type(matvec).__name__}.")
        self._matvec, self._matmat = matvec, matmat

    def matvec(self, v: Tensor) -> Tensor:
        return self._matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        return super().matmat(V) if self._matmat is None else self._matmat(V)


class DenseOperator(LinearOperator):
    """A symmetric matrix that is at hand.

    Args:
        A: (n, n), symmetric up to ``symmetry_tol`` times its largest entry. NaN entries are let through: the
            solvers answer them with a status.
        symmetry_tol: default: 100 times the rounding unit of A's dtype times sqrt(n).

    Raises:
        ValueError: A is not a square, symmetric floating-point matrix.
    """

    def __init__(self, A: Tensor, *, symmetry_tol: float | None = None) -> None:
        if not isinstance(A, Tensor) or A.ndim != 2 or A.shape[0] != A.shape[1] or not A.is_floating_point():
            got = f"{tuple(A.shape)} of {A.dtype}" if isinstance(A, Tensor) else type(A).__name__
            raise ValueError(f"A: expected a square floating-point matrix (n, n), got {got}.")
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        if symmetry_tol is None:
            symmetry_tol = 100 * torch.finfo(A.dtype).eps * self.n**0.5
        asymmetry, scale = (A - A.mT).abs().max(), A.abs().max()
        if bool(asymmetry > symmetry_tol * scale):
            raise ValueError(
                f"A: expected a symmetric matrix, got max|A - A'| = {float(asymmetry):.3g} against "
                f"max|A| = {float(scale):.3g}; pass (A + A.mT) / 2 if that is what you mean."
            )
        self.A = A

    @property
    def products_to_dense(self) -> int:
        return 0

    def matvec(self, v: Tensor) -> Tensor:
        return self.A @ v

    def matmat(self, V: Tensor) -> Tensor:
        return self.A @ V

    def to_dense(self) -> Tensor:
        return (self.A + self.A.mT).mul_(0.5)


class ShiftedOperator(LinearOperator):
    """A + shift I.

    Args:
        A: the operator to shift.
        shift: a number or a scalar tensor.
    """

    def __init__(self, A: LinearOperator, shift: float | Tensor) -> None:
        super().__init__(A.n, dtype=A.dtype, device=A.device, block_size=A.block_size)
        self.A, self.shift = A, shift

    @property
    def products_to_dense(self) -> int:
        return self.A.products_to_dense

    def matvec(self, v: Tensor) -> Tensor:
        return self.A.matvec(v) + self.shift * v

    def matmat(self, V: Tensor) -> Tensor:
        return self.A.matmat(V) + self.shift * V

    def count_replayed(self, products: int) -> None:
        self.A.count_replayed(products)

    def to_dense(self) -> Tensor:
        A = self.A.to_dense()
        A.diagonal().add_(self.shift)
        return A


def as_operator(A: LinearOperator | Tensor) -> LinearOperator:
    """A itself, or the ``DenseOperator`` of a matrix."""
    if isinstance(A, LinearOperator):
        return A
    if isinstance(A, Tensor):
        return DenseOperator(A)
    raise TypeError(f"A: expected a LinearOperator or an (n, n) tensor, got {type(A).__name__}.")
