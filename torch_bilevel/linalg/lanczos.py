"""Thick-restart Lanczos for one extreme eigenpair, with an error bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import LinearOperator, as_operator
from .replay import Replay, can_record
from .solution import SolveStatus


@dataclass(frozen=True)
class EigenResult:
    """An extreme eigenpair of a symmetric operator.

    Args:
        value: () the Ritz value theta; to rounding an upper bound of the smallest, a lower one of the
            largest.
        vector: (n,), unit.
        error_bound: () |A v - theta v|, recomputed: A has an eigenvalue within this distance of theta.
        iterations: Lanczos steps.
        products: products with A, the recomputed residual's included.
        status: CONVERGED where the bound meets the tolerance.
    """

    value: Tensor
    vector: Tensor
    error_bound: Tensor
    iterations: int
    products: int
    status: SolveStatus

    @property
    def ok(self) -> bool:
        return self.status is SolveStatus.CONVERGED


def lanczos_extreme(
    A: LinearOperator | Tensor,
    *,
    which: str = "min",
    tol: float = 1e-3,
    max_iterations: int | None = None,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    check_every: int | None = None,
) -> EigenResult:
    """Smallest or largest eigenvalue of a symmetric A by Lanczos with full reorthogonalisation.

    The basis V grows by A v, orthogonalised twice against all of V; theta is the extreme eigenvalue of V'AV.
    When V is full it restarts from its best Ritz vectors and the last residual. A vanishing residual is an
    invariant subspace and a success; after a start of the user's it is probed once by a random vector
    orthogonal to it, so that an extreme eigenvector orthogonal to the start is not missed.

    Args:
        A: operator or (n, n) matrix.
        which: "min" or "max".
        tol: stop at error bound <= tol * (the largest |Ritz value|, an estimate of |A|).
        max_iterations: Lanczos steps; default 10 n, at most 1000.
        max_basis: vectors kept, at least 3 (or n); default min(n, 200), fewer (but 20) beyond 1 GB.
        generator: of the start, on the CPU or on A's device; None: one seeded with 0.
        start: (n,), nonzero, instead of a random vector. A start close to an eigenvector that is not the
            extreme one can converge to it: give none where the answer is to be a certificate.
        check_every: steps between looks at the Ritz values; default 10 on CUDA, on the CPU 1 at first and one
            more for every 25 vectors of the basis, since a look costs an eigendecomposition of its size.

    Returns:
        An ``EigenResult``. The bound says that *an* eigenvalue is near; that it is the extreme one holds with
        probability one for a random start and to the digits that ``tol`` gives, not by proof.

    Cost: one product per step, one for the bound; memory n * max_basis; 4 n max_basis multiplications per
        step.

    References: Parlett, The Symmetric Eigenvalue Problem, chapters 11 and 13; Wu and Simon 2000 (thick
        restart).
    """
    A = as_operator(A)
    n = A.n
    if which not in ("min", "max"):
        raise ValueError(f"which: expected 'min' or 'max', got {which!r}.")
    max_iterations = min(10 * n, 1000) if max_iterations is None else max_iterations
    max_basis = affordable_basis(n, A.dtype, 200) if max_basis is None else min(n, max_basis)
    if max_basis < min(n, 3):
        raise ValueError(f"max_basis: expected at least {min(n, 3)}, got {max_basis}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: expected None or a positive int, got {max_iterations!r}.")
    if start is not None and (
        start.shape != (n,) or not bool(start.abs().max() > 0) or not start.isfinite().all()
    ):
        raise ValueError(f"start: expected a nonzero finite vector ({n},), got shape {tuple(start.shape)}.")
    if check_every is None and A.device.type == "cuda":
        check_every = 10
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    basis = _Basis(A, max_basis, generator, which, start)

    iterations = 0
    probe = start is not None  # a random start needs no probe: it meets every eigenspace
    status = SolveStatus.MAX_ITERATIONS
    while iterations < max_iterations:
        steps = min(
            check_every or 1 + basis.size // 25, basis.capacity - basis.size, max_iterations - iterations
        )
        basis.expand(steps)
        iterations += steps
        broke = basis.synchronise(steps)
        if not bool(basis.T.isfinite().all()):
            status = SolveStatus.NON_FINITE
            break
        if broke and probe and basis.size < n:
            probe = False
            basis.lock()
            basis.begin(None)
            continue
        if broke or basis.size == n or basis.converged(tol):
            status = SolveStatus.CONVERGED
            break
        if basis.size == basis.capacity:
            basis.restart()
    return basis.result(status, tol, iterations)


def affordable_basis(n: int, dtype: torch.dtype, wanted: int) -> int:
    """``wanted`` vectors of length n, at most n, fewer (but 20) where they would take more than 1 GB."""
    return min(n, wanted, max(20, int(1e9 / (n * torch.finfo(dtype).bits / 8))))


class _Basis:
    """Orthonormal V (n, size), T = V'AV in float64 on the CPU, and the next vector v."""

    def __init__(
        self, A: LinearOperator, capacity: int, generator: torch.Generator, which: str, start: Tensor | None
    ) -> None:
        self.A, self.capacity, self.generator, self.which = A, capacity, generator, which
        self.V = torch.zeros(capacity, A.n, dtype=A.dtype, device=A.device)  # rows, those from ``size`` on zero
        self.H, self.norms = self.V.new_zeros(capacity, capacity), self.V.new_zeros(capacity, 2)  # of each row's step
        self.v = self.V.new_zeros(A.n)
        self.size = self.locked = self.products = 0
        self.rows = 0  # that a step looks at: those in use, all of them where it is replayed
        self.next = torch.zeros(1, dtype=torch.int64, device=A.device)  # the row that comes next, counted by the GPU
        self.replay: Replay | None = None
        self.may_record = can_record(self.V.device)
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.beta = torch.zeros((), dtype=torch.float64)
        self.begin(start)

    def begin(self, start: Tensor | None) -> None:
        """Take ``start``, or a random vector, made orthogonal to V, as the next one."""
        if start is None:
            start = torch.randn(
                self.A.n, generator=self.generator, device=self.generator.device, dtype=self.A.dtype
            ).to(self.A.device)
        start = start / start.abs().max()
        self.v.copy_(self._orthonormalise(start / torch.linalg.vector_norm(start))[0])

    def expand(self, steps: int) -> None:
        """So many Lanczos steps, without looking at a number."""
        self.next.fill_(self.size)
        end = self.size + steps
        if self.may_record and self.replay is None and self.products > 0:
            before, v, self.rows = self.products, self.v.clone(), self.capacity
            self.replay = Replay.make(self._step, self.V.device)
            if self.replay is None:
                self.may_record = False
                self.v.copy_(v)
                self.next.fill_(self.size)
                self._drop(self.size)
            else:
                self.A.count_replayed(1 - (self.products - before))  # what is recorded was not done
                self.products, self.size = before + 1, self.size + 1
        if self.replay is not None:
            left = end - self.size
            for _ in range(left):
                self.replay()
            self.A.count_replayed(left)
            self.products, self.size = self.products + left, end
        while self.size < end:
            self.size = self.rows = self.size + 1
            self._step()

    def _step(self) -> None:
        """One step in place: v becomes the next row, H and norms get theirs, and v is the vector after it."""
        self.V.index_copy_(0, self.next, self.v.unsqueeze(0))
        w = self.A.matvec(self.v)
        self.products += 1
        V = self.V[: self.rows]
        h = V @ w
        w_norm = torch.linalg.vector_norm(w)
        w = w - h @ V
        beta = torch.linalg.vector_norm(w)
        w, shrink = self._orthonormalise(w / beta)
        self.H.index_copy_(0, self.next, torch.nn.functional.pad(h, (0, self.capacity - len(h))).unsqueeze(0))
        self.norms.index_copy_(0, self.next, torch.stack([beta * shrink, w_norm]).unsqueeze(0))
        self.v.copy_(w)
        self.next.add_(1)

    def synchronise(self, steps: int) -> bool:
        """Bring T up to date; True if V has become invariant (vectors beyond that are dropped)."""
        eps = max(10.0, self.A.n**0.5) * torch.finfo(self.A.dtype).eps
        first = self.size - steps
        norms = self.norms[first : self.size].to("cpu", torch.float64)
        columns = self.H[first : self.size].to("cpu", torch.float64)
        broke = False
        for j in range(steps):
            T = torch.zeros(first + j + 1, first + j + 1, dtype=torch.float64)
            T[:-1, :-1] = self.T
            T[:, -1] = T[-1, :] = columns[j, : first + j + 1]
            self.T, self.beta = T, norms[j, 0]
            size = max(float(norms[j, 1]), float(T.abs().max()))
            if not bool(self.beta > eps * size):
                broke = True
                break
        self._drop(self.T.shape[0])
        return broke

    def _drop(self, size: int) -> None:
        """Only so many vectors stay."""
        self.V[size:].zero_()
        self.size = size
        self.rows = size if self.replay is None else self.capacity

    def converged(self, tol: float) -> bool:
        """Whether the wanted Ritz vector of the unlocked part has residual |beta y_last| <= tol |T|."""
        values, vectors = torch.linalg.eigh(self.T[self.locked :, self.locked :])
        scale = torch.maximum(values.abs().max(), self.T.diagonal().abs().max())
        return bool(self.beta * vectors[-1, 0 if self.which == "min" else -1].abs() <= tol * scale)

    def lock(self) -> None:
        """Reduce an invariant subspace to its wanted Ritz vector, and set that aside."""
        self._keep(1)
        self.locked = 1

    def restart(self) -> None:
        """Reduce the unlocked part to the wanted third of its Ritz vectors; the last residual comes next."""
        self._keep(max(1, (self.capacity - self.locked) // 3))
        self.v.copy_(self._orthonormalise(self.v)[0])

    def _keep(self, count: int) -> None:
        """Keep the locked vectors and the ``count`` wanted Ritz vectors of the rest."""
        first = self.locked
        values, vectors = torch.linalg.eigh(self.T[first:, first:])
        chosen = slice(0, count) if self.which == "min" else slice(len(values) - count, None)
        Y = vectors[:, chosen].to(self.V.device, self.V.dtype)
        self.V[first : first + count] = Y.mT @ self.V[first : self.size]
        self.T = torch.block_diag(self.T[:first, :first], torch.diag(values[chosen]))
        self._drop(first + count)

    def result(self, status: SolveStatus, tol: float, iterations: int) -> EigenResult:
        """The extreme Ritz pair with its recomputed residual."""
        end = 0 if self.which == "min" else -1
        if status is SolveStatus.NON_FINITE:
            bad = torch.full((), torch.nan, dtype=self.A.dtype, device=self.A.device)
            return EigenResult(bad, self.V[0].clone(), bad, iterations, self.products, status)
        values, vectors = torch.linalg.eigh(self.T)
        v = vectors[:, end].to(self.V.device, self.V.dtype) @ self.V[: self.size]
        v = v / torch.linalg.vector_norm(v)
        Av = self.A.matvec(v)
        theta = v @ Av
        bound = torch.linalg.vector_norm(Av - theta * v)
        scale = values.abs().max().to(bound.device, bound.dtype)
        if bool(bound <= tol * scale):
            status = SolveStatus.CONVERGED
        elif status is SolveStatus.CONVERGED:
            status = SolveStatus.STAGNATION  # the recursion promised more than rounding allows
        if not bool(bound.isfinite()):
            status = SolveStatus.NON_FINITE
        return EigenResult(theta, v, bound, iterations, self.products + 1, status)

    def _orthonormalise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w made orthogonal to V and unit, twice; and the factor by which the first pass shrank it."""
        V = self.V[: self.rows]
        w = w - (V @ w) @ V
        shrink = torch.linalg.vector_norm(w)
        w = w / shrink
        w = w - (V @ w) @ V
        return w / torch.linalg.vector_norm(w), shrink
