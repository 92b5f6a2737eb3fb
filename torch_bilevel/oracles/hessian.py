"""The Hessian of the hyper-objective as an operator, for every oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..folding import multiply
from ..linalg import LinearOperator
from ..lower import LowerSystems
from ..lower.kept import BLOCK_DISCOUNT
from ..outputs import (
    dense_multiplications,
    eigenvectors,
    finding_price,
    in_products,
    one_product,
    price,
    times_multiplications,  # fmt: skip
)
from ..problem import BilevelProblem
from ..recorded import LinearCall
from .evaluation import require_solution

#: columns at once in a block product, and numbers in a block of dx + dy rows: bounds memory at about ten such blocks.
DENSE_BLOCK, BLOCK_NUMBERS = 256, 2**25
#: products of a typical Krylov model.
KRYLOV_PRODUCTS = 40


class HyperHessian(LinearOperator):
    """u -> hess phi . u with two linear solves, for one vector or a block.

    With the lower solutions lo and hi, their Hessians A_lo, A_hi, and a quotient Q = Hess of (h_hi - h_lo) / delta:
        A_lo w = -lo_yx u,    (a, b) = Q (u, w),    A_hi q = -b,    hess phi . u = a + hi_xy q.
    The penalty oracle has it as it stands (the difference of two Schur complements over delta, rearranged so that
    no error of a solve is divided by delta). As delta -> 0 it becomes the implicit formula, lo = hi, Q = Hess L.

    Args:
        lo, hi: recorded joint gradients of the two objectives at their minimisers.
        terms: (weight, recorded joint gradient) of which Q is the weighted sum of Hessians.
        systems: solves A_lo and A_hi.
        tol: relative residual of the solves, default that of ``systems``.

    Cost: two solves and a few products per vector. Memory: the retained graphs.
    """

    def __init__(
        self,
        lo: Linearisation,
        hi: Linearisation,
        terms: Sequence[tuple[float, Linearisation]],
        systems: LowerSystems,
        tol: float | None = None,
    ):
        columns = max(1, min(DENSE_BLOCK, BLOCK_NUMBERS // (lo.x.numel() + lo.y.numel())))
        super().__init__(lo.x.numel(), dtype=lo.x.dtype, device=lo.x.device, block_size=columns)
        self.lo, self.hi, self.terms, self.systems, self.tol = lo, hi, terms, systems, tol
        systems.prepare(lo, tol)  # serves hi as well, as a preconditioner: the two differ by O(delta)

    def matvec(self, v: Tensor) -> Tensor:
        """(dx,) -> (dx,)."""
        return self._product(v)

    def matmat(self, V: Tensor) -> Tensor:
        """(dx, k) -> (dx, k)."""
        return self._product(V)

    def quotient(self, u: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """(a, b) = Q (u, w); None stands for zero."""
        pairs = [(weight, at.joint(u, w)) for weight, at in self.terms]
        return sum(weight * a for weight, (a, _) in pairs), sum(weight * b for weight, (_, b) in pairs)

    def _product(self, u: Tensor) -> Tensor:
        w = require_solution(self.systems.solve(self.lo, -self.lo.yx(u), tol=self.tol), "hyper-Hessian product")
        a, b = self.quotient(u, w)
        q = require_solution(self.systems.solve(self.hi, -b, tol=self.tol), "hyper-Hessian product")
        return a + self.hi.xy(q)

    def to_dense(self) -> Tensor:
        """(dx, dx), symmetrised. Both lower Hessians are factored first where that is cheaper than solving dx times.

        With fewer learner parameters than hyperparameters the four blocks are formed by dy products each instead of dx:
            hess phi = Q_xx + Q_xy W + P (Q_yx + Q_yy W),   W = -A_lo^{-1} lo_yx,   P' = -A_hi^{-1} hi_yx,
        and Q_xx by three products where it is diagonal (weights of samples, most regularisers), else by dx.

        Where the learner's outputs give the blocks (``torch_bilevel.outputs``), they are put together by matrix products.

        Cost: about 3 min(dx, dy) products and dx or 2 dx solves; Q_xx see above; 3 dx dy max(dx, dy) multiplications.
        """
        dy, worth = self.lo.y.numel(), self.systems.factor_price(self.lo)
        factored = self.systems.solver in ("auto", "cholesky") and factor_pays(self.n, dy, worth)
        if factored and self._by_outputs():
            return self._from_outputs()
        if dy < self.n:
            return self._from_short_side(dy, factored)
        if factored:
            self.systems.factor_at(self.hi, attach=True)
            self.systems.factor_at(self.lo, attach=True)
        return super().to_dense()

    @property
    def dense_pays(self) -> bool:
        """Whether the matrix, had by the learner's outputs, costs no more than a Krylov model, with its eigenvectors.

        Later steps with the same Hessian are free as well, where a Krylov model grows; but a model costs less than is reckoned
        here where solves are warm, so that a matrix which is dearer by these numbers is dearer in truth.
        """
        worth = dense_price(self.lo.objective.problem, self.systems)
        if worth is None:
            return False
        calls = self.systems.calls(self.lo.objective, self.lo.x, self.lo.y)
        worth += in_products(calls, eigenvectors(calls, self.n))
        return worth <= KRYLOV_PRODUCTS * (3 + 2 * self.systems.solve_price(self.lo))

    def _by_outputs(self) -> bool:
        """Whether all blocks are had by the learner's outputs, and cheaper than as many products as x has entries."""
        ends = [self.lo] if self.hi is self.lo else [self.lo, self.hi]
        everyone = ends + [at for _, at in self.terms if all(at is not end for end in ends)]
        calls = {id(at): self.systems.calls(at.objective, at.x, at.y) for at in everyone}
        if not all(calls.values()):
            return False
        if not outputs_pay([calls[id(at)] for at in ends], [calls[id(at)] for _, at in self.terms], self.lo.y.numel(), self.n):
            return False
        return all(self.systems.outputs(at) is not None for at in everyone)

    def _from_outputs(self) -> Tensor:
        """hess phi = Q_xx + Q_xy W + P (Q_yx + Q_yy W), as in ``to_dense``."""
        W = self._response(self.lo)
        P_t = W if self.hi is self.lo else self._response(self.hi)
        Q_yx = sum(weight * self._dense_yx(at) for weight, at in self.terms)
        Q_yy_W = sum(weight * at.outputs.times(W) for weight, at in self.terms)
        if P_t is W:
            H = multiply(Q_yx.add_(Q_yy_W, alpha=0.5).mT, W)
            H = H + H.mT
        else:
            H = multiply(Q_yx.mT, W) + multiply(P_t.mT, Q_yy_W.add_(Q_yx))
            H = (H + H.mT).mul_(0.5)
        if any(at.outputs.xx is None for _, at in self.terms):
            Q_xx = self._all_of_xx()
            return H.add_(Q_xx + Q_xx.mT, alpha=0.5)
        H.diagonal().add_(sum(weight * at.outputs.xx for weight, at in self.terms))
        return H

    def _response(self, at: Linearisation) -> Tensor:
        """-h_yy^{-1} h_yx (dy, dx), by a factor made here."""
        self.systems.factor_at(at, attach=True)
        return self._solved(at, self._dense_yx(at))

    def _dense_yx(self, at: Linearisation) -> Tensor:
        """h_yx (dy, dx): by outputs, else by products from its shorter side."""
        if at.outputs.cross is not None:
            return at.outputs.dense_yx()
        dy = at.y.numel()
        eye = torch.eye(min(self.n, dy), dtype=self.dtype, device=self.device)
        return at.yx(eye) if self.n <= dy else at.xy(eye).mT

    def _from_short_side(self, dy: int, factored: bool) -> Tensor:
        hi_yx = self._cross(self.hi, dy, factored)
        lo_yx = hi_yx if self.hi is self.lo else self._cross(self.lo, dy, factored)
        # the columns [0; I] of Q, and [u; 0] for three u that tell whether Q_xx is diagonal, in one block
        ones = torch.ones(self.n, 1, dtype=self.dtype, device=self.device)
        v = torch.randn(self.n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(ones)
        u = torch.cat([ones.new_zeros(self.n, dy), ones, v], dim=1)
        w = torch.cat([torch.eye(dy, dtype=self.dtype, device=self.device), ones.new_zeros(dy, 3)], dim=1)
        parts = [self.quotient(u[:, i : i + DENSE_BLOCK], w[:, i : i + DENSE_BLOCK]) for i in range(0, dy + 3, DENSE_BLOCK)]
        to_x, to_y = (torch.cat(part, dim=1) for part in zip(*parts))
        q_xy, q_yy = to_x[:, :dy], to_y[:, :dy]
        W = self._solved(self.lo, lo_yx)
        q_xx = self._upper_left(v, to_x[:, dy:])
        if self.hi is self.lo:
            H = multiply(W.mT, torch.add(q_xy.mT, multiply(q_yy, W), alpha=0.5))
            H = H + H.mT
        else:
            H = multiply(q_xy, W) + multiply(self._solved(self.hi, hi_yx).mT, q_xy.mT + multiply(q_yy, W))
            H = (H + H.mT).mul_(0.5)
        if q_xx.dim() == 1:
            H.diagonal().add_(q_xx)
            return H
        return H.add_(q_xx + q_xx.mT, alpha=0.5)

    def _cross(self, at: Linearisation, dy: int, factored: bool) -> Tensor:
        """h_yx (dy, dx); the products that give it give h_yy as well, which is factored where wanted."""
        identity = torch.eye(dy, dtype=self.dtype, device=self.device)
        if not factored or at.factor is not None:
            return at.xy(identity).mT
        xy, yy = at.to_x(identity)
        self.systems.factor_at(at, attach=True, matrix=(yy + yy.mT).mul_(0.5))
        return xy.mT

    def _solved(self, at: Linearisation, b: Tensor) -> Tensor:
        return require_solution(self.systems.solve(at, -b, tol=self.tol), "hyper-Hessian")

    def _upper_left(self, v: Tensor, probe: Tensor) -> Tensor:
        """Q_xx (dx, dx) or its diagonal (dx,): d is found by d = Q_xx 1 and believed if Q_xx v = d v for two random v.

        Args:
            v: (dx, 2). probe: Q_xx [1, v], (dx, 3).
        """
        diagonal = probe[:, :1]
        # a matrix with an entry off the diagonal passes with probability 0, up to rounding
        rounding = 100 * torch.finfo(self.dtype).eps * (diagonal.abs() * v.abs() + probe[:, 1:].abs().amax(0))
        if bool(((probe[:, 1:] - diagonal * v).abs() <= rounding).all()):
            return diagonal[:, 0]
        return self._all_of_xx()

    def _all_of_xx(self) -> Tensor:
        """Q_xx (dx, dx) by dx products."""
        Q = torch.empty(self.n, self.n, dtype=self.dtype, device=self.device)
        for start in range(0, self.n, DENSE_BLOCK):
            stop = min(start + DENSE_BLOCK, self.n)
            E = torch.zeros(self.n, stop - start, dtype=self.dtype, device=self.device)
            E[start:stop].fill_diagonal_(1)
            Q[:, start:stop] = self.quotient(E, None)[0]
        return Q


def dense_price(problem: BilevelProblem, systems: LowerSystems) -> float | None:
    """What a dense implicit Hessian by the learner's outputs costs, in products with one vector; None: it is not had so."""
    dx, dy, x, y = problem.dx, problem.dy, problem.x, problem.y
    lower = Objective(problem, lower=1.0, counts=OracleCounts())
    lagrangian = Objective(problem, upper=1.0, tangent=y, counts=OracleCounts())
    g, L = (systems.calls(objective, x, y) for objective in (lower, lagrangian))
    if not (g and L and systems.solver in ("auto", "cholesky") and factor_pays(dx, dy, price(g, dy**3 / 6))):
        return None
    if not outputs_pay([g], [L], dy, dx):
        return None
    return finding_price(L) + price(g, dy**3 / 6 + dy**2 * dx + dy * dx**2 + times_multiplications(L, dy, dx)[0])


def outputs_pay(ends: list[list[LinearCall]], terms: list[list[LinearCall]], dy: int, dx: int) -> bool:
    """Whether the blocks of A_lo, A_hi and Q by outputs cost less than the products of dx columns; factors apart."""
    by_outputs = sum(map(dense_multiplications, ends)) + sum(times_multiplications(calls, dy, dx)[0] for calls in terms)
    one = one_product(ends[0])
    by_columns = dx * (2 * sum(map(one_product, ends)) + sum(map(one_product, terms))) / BLOCK_DISCOUNT
    return in_products(ends[0], by_outputs) <= by_columns / one


def factor_pays(columns: int, dy: int, worth: float) -> bool:
    """Whether a Cholesky factor of size dy is cheaper than ``columns`` pairs of solves, and fits in 2 GB.

    Args:
        worth: price of the factor, in products with one vector. A solve takes 20 and more.
    """
    return dy * dy * 8 <= 2e9 and worth <= 20 * columns
