"""Preconditioned conjugate gradients on a block of right-hand sides."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .history import History
from .nystrom import NystromPreconditioner
from .operator import LinearOperator, as_operator
from .preconditioner import Preconditioner, apply_preconditioner
from .refinement import (
    CONVERGED,
    NEGATIVE_CURVATURE,
    NON_FINITE,
    NOT_POSITIVE_DEFINITE,
    RUNNING,
    STAGNATION,
    Cycle,
    refine,
)
from .replay import Replay, can_record
from .solution import Solution

#: steps before one is recorded as a CUDA graph, which costs as much as five: with a preconditioner there may be few
EAGER, EAGER_PRECONDITIONED = 2, 6
#: replayed steps between looks
LOOK = 10
#: relative residual of a recursion in float32, at most
REACH = 1e-5
#: what a step changes
_NUMBERS = ("e", "r", "p", "rho", "p_norm2", "largest")


def cg(
    A: LinearOperator | Tensor,
    b: Tensor,
    *,
    tol: float = 1e-6,
    atol: float = 0.0,
    max_iterations: int | None = None,
    preconditioner: Preconditioner | None = None,
    x0: Tensor | None = None,
    reorthogonalise: bool = False,
    recycle: int = 0,
    check_every: int | None = None,
    rough: LinearOperator | None = None,
) -> Solution:
    """Preconditioned conjugate gradients for a symmetric positive definite A.

    Minimises x'Ax/2 - b'x over growing Krylov spaces: x += alpha p, r -= alpha A p, p = M^{-1} r + beta p
    with alpha = r'z / p'Ap, z = M^{-1} r and beta = r'z (new) / r'z (old). All columns advance together
    through ``A.matmat``; each stops by itself. A direction with p'Ap < 0 (beyond rounding) ends its column.

    Args:
        A: operator or (n, n) matrix.
        b: (n,) or (n, k).
        tol, atol: stop at |A x - b| <= max(tol |b|, atol), per column.
        max_iterations: default min(10 n, n + 1000).
        preconditioner: R -> M^{-1} R, M positive definite.
        x0: start of b's shape; default zero.
        reorthogonalise: keep the residuals and orthogonalise each new one against them (in the inner product
            of M^{-1}). In float32 this needs far fewer products on ill-conditioned systems.
        recycle: answer with up to so many Ritz vectors for the largest eigenvalues of A (half as many as there were steps, no
            products): the ``ritz`` of the answer. Takes one column, ``reorthogonalise``, no preconditioner and no
            ``check_every``; else None.
        check_every: steps between looks at the convergence mask, each of which waits for the GPU; default 1, and 10
            where steps are replayed. With a number of your own nothing is replayed.
        rough: A as an operator in float32. The recursion then runs on it, in float32, to a residual of REACH at most; A itself
            gives the residuals of which the next recursion starts (mixed-precision iterative refinement), so that the answer
            is as good as without where the condition number is below some 1e6; else it stagnates. The preconditioner is
            given float32. Products with it count like those with A.

    Returns:
        A ``Solution`` whose residual is recomputed, but in float64 where it leaves 1e-4 of that of x0 and 1e-7 of b, or more (a
        recursion drifts by its steps times 1e-16 times the condition number); NEGATIVE_CURVATURE carries the direction and its
        curvature.

    Cost: one product per step and unfinished column, one more per column where the true residual is computed, one more
        with x0.
    On CUDA, on a stream that is not the default one (``minimize`` and the optimizers see to it), all but the first steps
        are replayed as a CUDA graph, where A and M ask nothing of the host.
    Memory: 5 blocks of b's size; ``reorthogonalise`` adds n * iterations per column (twice that with M), up to
        1 GB: later residuals are orthogonalised against those that fit.

    References: Hestenes and Stiefel 1952; Golub and Van Loan, Matrix Computations, 4th ed., section 11.5;
        van der Vorst and Ye 2000 (residual replacement); Higham and Mary 2022 (mixed precision).

    Example:
        >>> import torch
        >>> cg(torch.tensor([[2.0]]), torch.tensor([3.0])).x
        tensor([1.5000])
    """
    A = as_operator(A)

    def run(R: Tensor, target: Tensor, budget: int) -> Cycle:
        if rough is None:
            return _Recursion(A, R, target, preconditioner, reorthogonalise, check_every, recycle).run(budget)
        low = rough.dtype
        recursion = _Recursion(rough, R.to(low), target.clamp(min=REACH).to(low), preconditioner, reorthogonalise, check_every, 0)
        cycle = recursion.run(budget)
        direction = None if cycle.direction is None else cycle.direction.to(R.dtype)
        return replace(cycle, E=cycle.E.to(R.dtype), direction=direction, residual=None)

    return refine(A, b, run, solver="cg", tol=tol, atol=atol, max_iterations=max_iterations, x0=x0)


class _Recursion:
    """The three-term recursion for A E = R on the columns that still run."""

    def __init__(
        self,
        A: LinearOperator,
        R: Tensor,
        target: Tensor,
        preconditioner: Preconditioner | None,
        reorthogonalise: bool,
        check_every: int | None,
        recycle: int,
    ) -> None:
        k = R.shape[1]
        self.A, self.preconditioner, self.target = A, preconditioner, target
        self.E, self.code = torch.zeros_like(R), torch.full((k,), RUNNING, device=R.device)  # of all columns
        self.residual = R.new_zeros(k)
        self.columns = torch.arange(
            k, device=R.device
        )  # the working set; the fields below are of its columns
        self.state = self.code.clone()
        self.e, self.r = torch.zeros_like(R), R
        z = apply_preconditioner(preconditioner, R)
        self.p = z
        self.rho = (self.r * z).sum(0)
        self.p_norm2 = self.rho.clone()  # p'Mp, by recursion: the length of p in the metric of M
        self.largest = torch.zeros_like(
            self.rho
        )  # largest Rayleigh quotient p'Ap / p'Mp so far: the size of A
        self.curvature = torch.full_like(self.rho, torch.inf)  # p'Ap / p'p where negative
        self.history = (
            History(self.r, z, self.rho, preconditioner is not None) if reorthogonalise else None
        )
        #: p'Ap and r'z of the steps so far, of which Ritz values are made; None where nobody asks for them
        plain = k == 1 and preconditioner is None and check_every in (None, 1)
        self.recycle = recycle if plain and reorthogonalise else 0
        self.steps: tuple[list[Tensor], list[Tensor]] = ([], [self.rho.clone()])
        self.check_every = 1 if check_every is None else check_every
        self.replay: Replay | None = None
        self.may_record = check_every is None and can_record(R.device)
        self.values: list[Tensor] | None = None  # of a step that is replayed: p'Ap, |r|, r'z
        self.lazy = self.check_every != 1  # stopped columns may stay in the working set until the next look
        self.masked = self.lazy  # whether the working set may hold stopped columns
        if not self._all_fine(self.rho):
            self._stop(~self.rho.isfinite(), NON_FINITE)
            self._stop(~(self.rho > 0), NOT_POSITIVE_DEFINITE)
        self.products = 0

    def run(self, budget: int) -> Cycle:
        """Step until every column has stopped or the budget (at least 1 step) is spent."""
        iterations, eager = 0, EAGER if self.preconditioner is None else EAGER_PRECONDITIONED
        direction = curvature = None
        while iterations < budget:
            replays = self.may_record and not self.masked and iterations >= eager
            steps = self._replayed(budget - iterations) if replays else 0
            if steps == 0:
                self._advance()
            iterations += max(1, steps)
            if self.masked and (steps > 0 or iterations % self.check_every == 0 or iterations == budget):
                running = self.state == RUNNING
                if not bool(running.all()):
                    found = self._retire()
                    if found is not None and (curvature is None or bool(found[1] < curvature)):
                        direction, curvature = found
                    if not bool(running.any()):
                        break
                    self._compress(running)
            if steps == 0:
                self._turn()
            if self.history is not None and self.history.full:
                self._stop(torch.ones_like(self.state, dtype=torch.bool), STAGNATION)
                break
        self._retire()
        residual = self.residual if self.E.dtype is torch.float64 else None
        return Cycle(self.E, self.code, iterations, self.products, direction, curvature, self._ritz(), residual)

    def _replayed(self, budget: int) -> int:
        """Do up to LOOK steps by a CUDA graph, recorded now where there is none, and look at them; how many were done.

        They are done without verdicts. Where one was called for, other than convergence, all are undone and 0 is answered:
        the steps that follow see to it.
        """
        history, columns = self.history, len(self.columns)
        steps = min(LOOK, budget, LOOK if history is None else history.room)
        if steps == 0:
            self.replay, history.next = None, None  # its rows are about to move
            return 0
        before, row = {name: getattr(self, name).clone() for name in _NUMBERS}, 0 if history is None else history.count
        if self.replay is None:
            self.log = self.rho.new_zeros(LOOK, 3, columns)
            self.row = torch.zeros(1, dtype=torch.int64, device=self.r.device)
            if history is not None:
                history.record()
            made = self.products
            self.replay = Replay.make(self._in_place, self.r.device)
            if self.replay is None:
                return self._undo(before, row)
            done = 1
            self.A.count_replayed(columns - (self.products - made))  # what is recorded was not done
            self.products = made + columns
        else:
            self.row.zero_()
            done = 0
        for _ in range(steps - done):
            self.replay()
        self.A.count_replayed((steps - done) * columns)
        self.products += (steps - done) * columns
        if history is not None:
            history.added(steps)
        log = self.log[:steps].to("cpu", copy=True)
        if not bool(log.isfinite().all() & (log[:, 0] > 0).all() & (log[:, 2] > 0).all()):
            return self._undo(before, row)
        if self.recycle:
            self.steps[0].extend(log[:, 0])
            self.steps[1].extend(log[:, 2])
        if bool((log[-1, 1] <= self.target.cpu()).any()):
            self._stop(torch.linalg.vector_norm(self.r, dim=0) <= self.target, CONVERGED)
        return steps

    def _undo(self, before: dict[str, Tensor], row: int) -> int:
        """Back to where the steps began, and from now on one by one; 0 steps were done."""
        for name, value in before.items():
            setattr(self, name, value)
        if self.history is not None:
            self.history.drop(row)
        self.replay, self.may_record = None, False
        return 0

    def _in_place(self) -> None:
        """A step without verdicts that leaves its numbers where they were before, and what verdicts need in the log."""
        before = {name: getattr(self, name) for name in _NUMBERS}
        self.values = []
        try:
            self._advance()
            self._turn()
            self.log.index_copy_(0, self.row, torch.stack(self.values).unsqueeze(0))
            self.row.add_(1)
            for name, place in before.items():
                place.copy_(getattr(self, name))
        finally:
            self.values = None
            for name, place in before.items():
                setattr(self, name, place)

    def _advance(self) -> None:
        """x += alpha p, r -= alpha A p, where p'Ap > 0."""
        Ap = self.A.apply(self.p)
        self.products += Ap.shape[1]
        pAp = (self.p * Ap).sum(0)
        quotient = pAp / self.p_norm2
        self.largest = torch.maximum(self.largest, quotient)
        alpha = self.rho / pAp
        if self.recycle and self.values is None:
            self.steps[0].append(pAp)
        if not self._all_fine(pAp):
            rounding = 10 * torch.finfo(pAp.dtype).eps * self.largest
            negative = (self.state == RUNNING) & pAp.isfinite() & (quotient < -rounding)
            self.curvature = torch.where(negative, pAp / (self.p * self.p).sum(0), self.curvature)
            self._stop(~pAp.isfinite(), NON_FINITE)
            self._stop(negative, NEGATIVE_CURVATURE)
            self._stop(~(pAp > 0), STAGNATION)  # flat to rounding: no step length exists
            alpha = torch.where(self.state == RUNNING, alpha, torch.zeros_like(alpha))

        r = torch.addcmul(self.r, Ap, alpha, value=-1)
        if self.history is not None:
            r = self.history.orthogonalise(r)
        r_norm = torch.linalg.vector_norm(r, dim=0)
        if not self._all_fine(r_norm, above=self.target):
            self._stop(~r_norm.isfinite(), NON_FINITE)
            alpha = torch.where(r_norm.isfinite(), alpha, torch.zeros_like(alpha))
            self._stop(r_norm <= self.target, CONVERGED)  # the step that meets it is taken
        self.e = torch.addcmul(self.e, self.p, alpha)
        self.r = r

    def _turn(self) -> None:
        """The next direction, p = M^{-1} r + beta p."""
        z = apply_preconditioner(self.preconditioner, self.r)
        rho = (self.r * z).sum(0)
        beta = rho / self.rho
        p, p_norm2 = torch.addcmul(z, self.p, beta), rho + beta * beta * self.p_norm2
        if not self._all_fine(rho):
            self._stop(~rho.isfinite(), NON_FINITE)
            self._stop(rho < 0, NOT_POSITIVE_DEFINITE)
            self._stop(~(rho > 0), STAGNATION)  # underflow
            running = self.state == RUNNING
            p, p_norm2 = torch.where(running, p, self.p), torch.where(running, p_norm2, self.p_norm2)
            rho = torch.where(running, rho, self.rho)
        self.p, self.p_norm2, self.rho = p, p_norm2, rho
        if self.recycle and self.values is None:
            self.steps[1].append(rho.clone())  # a replay changes it in place
        if self.history is not None:
            self.history.append(self.r, z, self.rho)

    def _ritz(self) -> NystromPreconditioner | None:
        """The Ritz vectors asked for, from the tridiagonal matrix of the coefficients (Golub and Van Loan, section 10.2)."""
        if not self.recycle:
            return None
        size = min(self.history.count, len(self.steps[0]), len(self.steps[1]))
        pAp, rho = (torch.stack([number.reshape(()).cpu() for number in part[:size]]).double() for part in self.steps)
        rank = min(self.recycle, size // 2)
        if rank == 0 or not bool((pAp > 0).all() & (rho > 0).all() & pAp.isfinite().all() & rho.isfinite().all()):
            return None
        alpha, beta = rho / pAp, rho[1:] / rho[:-1]
        diagonal = 1 / alpha
        diagonal[1:] += beta / alpha[:-1]
        off = -beta.sqrt() / alpha[:-1]
        values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        Y = vectors[:, -rank:].flip(1).to(self.r)  # the largest first
        return NystromPreconditioner(self.history.R[0, :size].mT @ Y, values[-rank:].flip(0).to(self.r), products=0)

    def _all_fine(self, value: Tensor, above: Tensor | float = 0.0) -> bool:
        """Whether no column needs a verdict: all run, above < value < inf. In a replay: not asked yet."""
        if self.values is not None:
            self.values.append(value)
            return True
        if self.masked:
            return False
        if len(value) == 1:  # what is usual, in a third of the calls
            return float(above) < float(value) < math.inf
        return bool(((value > above) & (value < torch.inf)).all())

    def _stop(self, where: Tensor, code: int) -> None:
        self.state = torch.where((self.state == RUNNING) & where, code, self.state)
        self.masked = True

    def _retire(self) -> tuple[Tensor, Tensor] | None:
        """Write the working set back; return the most negative direction newly found with its curvature."""
        self.E[:, self.columns] = self.e
        self.code[self.columns] = self.state
        self.residual[self.columns] = torch.linalg.vector_norm(self.r, dim=0)
        worst = self.curvature.argmin()
        if not bool(self.state[worst] == NEGATIVE_CURVATURE):
            return None
        d = self.p[:, worst]
        return d / torch.linalg.vector_norm(d), self.curvature[worst]

    def _compress(self, keep: Tensor) -> None:
        """Drop the columns that have stopped, so that they cost no more products."""
        for name in ("columns", "state", "target", "rho", "p_norm2", "largest", "curvature"):
            setattr(self, name, getattr(self, name)[keep])
        for name in ("e", "r", "p"):
            setattr(self, name, getattr(self, name)[:, keep])
        self.replay = None
        if self.history is not None:
            self.history.compress(keep)
        self.masked = self.lazy
