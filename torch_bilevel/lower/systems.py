"""LowerSystems: linear systems with the Hessian h_yy of a lower-level objective, served by one kept factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..counting import columns_of
from ..derivatives import Linearisation, Objective
from ..errors import ConfigError, nearest
from ..linalg import (
    CholeskyFactor,
    DenseOperator,
    LinearOperator,
    NystromPreconditioner,
    Solution,
    SolveStatus,
    Spectrum,
    cg,
    chebyshev,
    estimate_spectrum,  # fmt: skip
    minres,
)
from ..linalg.solve import default_tol
from ..outputs import (
    KroneckerPreconditioner,
    OutputHessian,
    products_to_find,
    single_factor_pays,
    single_pays,
)
from ..problem import BilevelProblem
from ..recorded import LinearCall
from .kept import SOME, Factor, KeptFactor, Ladder, factor_price, is_exact
from .operator import LowerHessian

SOLVERS = ("auto", "cg", "minres", "cholesky", "chebyshev")

#: iterations of CG after which a kept Cholesky factor is taken to be too old; a Kronecker preconditioner after five times as many
PATIENCE = 60


class LowerSystems:
    """Solves (h_yy(x, y) + damping I) w = b at recorded points, keeping a factor for as long as it is good.

    'auto' is CG with what ``KeptFactor`` keeps as its preconditioner: for dy <= 2000 a Cholesky factor, which also
    solves exactly at the point where it was made; above that the Kronecker preconditioner that the learner's outputs
    give, else a Nystrom sketch, and, for dy <= 12,000, a Cholesky factor, each made, or made anew, once the iterations it
    could have saved have cost as much. On a CPU a large factor of a float64 Hessian is made in float32, from the learner's
    outputs, unless it is for the many solves of a hyper-Hessian. Until there is one of these the Ritz vectors of a solve serve
    the next ones, where the outputs give nothing. CG is reorthogonalised in float32, and in float64 where it is to leave Ritz
    vectors, for up to a million numbers (up to 1 GB of residuals).

    Args:
        solver: 'auto', 'cg', 'minres', 'cholesky' (a factor at every point) or 'chebyshev' (the published expansion
            of the inverse of IMCN and IFSBA; its interval is kept from point to point).
        tol: relative residual, default 1e-10 in float64 and 1e-5 in float32.
        max_iterations: of an iterative solve.
        damping: added to the diagonal, for lower levels that are not strongly convex; default 0.
        chebyshev_order: terms of the expansion, taken at its word as published; None: from the tolerance.
        spectrum: (mu, L) for the expansion; None: estimated where first needed, and again where it has failed.

    Attributes:
        bend: what a Newton step on the objective left of |h_y| last, for the Hessian's change, over |h_y|^2; None: not known.

    Raises:
        ConfigError: an unknown solver, or options of the expansion beside another solver.
    """

    def __init__(
        self,
        *,
        solver: str = "auto",
        tol: float | None = None,
        max_iterations: int | None = None,
        damping: float = 0.0,
        chebyshev_order: int | None = None,
        spectrum: tuple[float, float] | None = None,
    ):
        if solver not in SOLVERS:
            raise ConfigError(f"solver {solver!r} is not known; {nearest(solver, SOLVERS)}")
        if not damping >= 0:
            raise ConfigError(f"damping: expected a number >= 0, got {damping!r}")
        self.solver, self.tol, self.max_iterations, self.damping = solver, tol, max_iterations, damping
        if solver != "chebyshev" and (chebyshev_order is not None or spectrum is not None):
            raise ConfigError(f"chebyshev_order and spectrum go with solver='chebyshev', got solver={solver!r}")
        if chebyshev_order is not None and not (isinstance(chebyshev_order, int) and chebyshev_order >= 0):
            raise ConfigError(f"chebyshev_order: expected an int >= 0 or None (from tol), got {chebyshev_order!r}")
        if spectrum is not None and not (len(spectrum) == 2 and 0 < spectrum[0] <= spectrum[1]):
            raise ConfigError(f"spectrum: expected (mu, L) with 0 < mu <= L, got {spectrum!r}")
        self.chebyshev_order = chebyshev_order
        self.spectrum = None if spectrum is None else Spectrum(*map(float, spectrum))
        self._spectrum_given = spectrum is not None
        self.kept = KeptFactor()
        self.bend: float | None = None
        self._single = True  # whether float32 has served float64 systems so far
        self._by_outputs: dict[str, bool] = {}  # whether its Hessian was seen to be that of its outputs

    @property
    def factor(self) -> Factor | None:
        """What preconditions CG now."""
        return self.kept.factor

    def keeps(self, problem: BilevelProblem) -> bool:
        """Whether its solver factors, or may come to precondition, systems of this problem."""
        return self.solver == "cholesky" or self.solver == "auto" and bool(KeptFactor.levels(problem.dy, problem.dtype))

    def describe(self) -> str:
        """What serves the systems now, in words."""
        if self.solver != "auto":
            return self.solver
        kind = {CholeskyFactor: "a Cholesky factor of", NystromPreconditioner: "CG with a Nystrom sketch of rank",
                KroneckerPreconditioner: "CG with a Kronecker preconditioner, its corner of"}  # fmt: skip
        if self.kept.is_recycled():
            return f"CG with {self.factor.U.shape[1]} Ritz vectors, kept"
        return "CG" if self.factor is None else f"{kind[type(self.factor)]} {self.kept.level}, kept"

    def operator(self, at: Linearisation) -> LowerHessian:
        """h_yy + damping I at the recorded point, as a LinearOperator."""
        return LowerHessian(at, self)

    def outputs(self, at: Linearisation) -> OutputHessian | None:
        """h_yy at the recorded point by the learner's outputs, or None where that is not to be had or saves nothing."""
        if at.outputs is None:
            calls = self.calls(at.objective, at.x, at.y)
            at.outputs = OutputHessian.of(at) if calls else None
            if calls:
                self._by_outputs[at.objective.kind] = at.outputs is not None
        return at.outputs

    def calls(self, objective: Objective, x: Tensor, y: Tensor) -> list[LinearCall]:
        """The linear maps by which such an objective sees the learner; none where its Hessian was seen to be no sum of theirs."""
        refused = self._by_outputs.get(objective.kind) is False
        return [] if refused else objective.calls(x, y)

    def products_to_factor(self, objective: Objective, x: Tensor, y: Tensor) -> int:
        """Products with h_yy that a Cholesky factor takes."""
        calls = self.calls(objective, x, y)
        return products_to_find(calls) if calls else y.numel()

    def ladder(self, at: Linearisation, *, attach: bool = False) -> Ladder:
        """What may be kept, and at what price; ``attach``: with a factor that solves at this very point."""
        calls = self._tested_calls(at)
        return Ladder.of(at.y.numel(), at.y.dtype, calls, not attach and self._factors_in_float32(calls))

    def _factors_in_float32(self, calls: list[LinearCall]) -> bool:
        """Whether a factor that only preconditions float64 systems of these calls is made in float32."""
        return self._single and bool(calls) and single_factor_pays(calls)

    def solve_price(self, at: Linearisation) -> float:
        """What a solve to five decades costs by now, in products with one vector."""
        ladder = self.ladder(at)
        if is_exact(ladder.n):
            return ladder.step(ladder.n)
        return ladder.n / 16 if self.kept.rate is None else self.kept.rate * 5.0 * ladder.step(self.kept.level)

    def _tested_calls(self, at: Linearisation) -> list[LinearCall]:
        """As ``calls``, once the Hessian at one point was seen to be that of its outputs."""
        calls = self.calls(at.objective, at.x, at.y)
        if calls and at.objective.kind not in self._by_outputs and self.solver in ("auto", "cholesky"):
            self.outputs(at)
            calls = self.calls(at.objective, at.x, at.y)
        return calls

    def factor_price(self, at: Linearisation) -> float:
        """What a Cholesky factor at this point costs, in products with one vector."""
        return factor_price(at.y.numel(), self._tested_calls(at))

    def solve(self, at: Linearisation, b: Tensor, *, tol: float | None = None, x0: Tensor | None = None) -> Solution:
        """w with |(h_yy + damping I) w - b| <= tol |b| for b (dy,) or (dy, k); the status says whether.

        Cost: counted as one solve per column; products as they come; a factorisation when one is made.
        """
        at.objective.counts.add(solves=columns_of(b))
        tol = self._tolerance(b.dtype, tol)
        if self.solver == "chebyshev":
            return self._expand(self.operator(at), b, tol)
        if self.solver == "minres":
            return minres(self.operator(at), b, tol=tol, max_iterations=self.max_iterations, x0=x0)
        exact, ladder = at.factor, None
        if exact is None and self.solver == "cholesky":
            exact = self.factor_at(at)
        elif exact is None and self.solver == "auto":
            ladder = self.ladder(at)
            exact = self._make(at, self.kept.due(ladder, tol))
        if exact is None:
            return self._iterate(at, b, tol, x0, ladder)
        return self._with_own_factor(at, exact, b, tol)

    def _iterate(self, at: Linearisation, b: Tensor, tol: float, x0: Tensor | None, ladder: Ladder | None) -> Solution:
        """By CG with what is kept, which learns from it; ``ladder`` None: by CG alone."""
        A, kept, limit = self.operator(at), self.kept, self.max_iterations
        if ladder is None:
            return self._cg(A, b, tol, x0, limit, self.factor)
        rough = self._rough(at, tol, ladder)
        patience = PATIENCE if kept.is_cholesky() else 5 * PATIENCE if kept.level in ladder.kronecker else None
        if patience is not None and not kept.is_born_at(at):
            limit = patience if limit is None else min(patience, limit)
        wanted = kept.ritz_wanted(len(b), b.dtype) if not ladder.kronecker and b.dim() == 1 else 0
        result = self._cg(A, b, tol, x0, limit, self.factor, wanted, rough)
        if not result.ok and self._removes_a_cause(at, result.status, rough is not None):
            if at.factor is not None:
                return self._with_own_factor(at, at.factor, b, tol)
            return self._iterate(at, b, tol, x0, ladder)
        kept.observe(result, tol, columns_of(b), ladder)
        kept.recycle(result)
        return result

    def _removes_a_cause(self, at: Linearisation, status: SolveStatus, rough: bool) -> bool:
        """After a solve has failed: whether something of ours may be why, which is then out of the way.

        What was kept from another point is made anew at this one, float32 is used no more (a factor in it is made anew in
        float64), what is kept is given up, in that order, one a call. Negative curvature is the matrix's own, but in float32,
        and a Cholesky factor says more of it.
        """
        kept = self.kept
        if status is SolveStatus.NEGATIVE_CURVATURE and not rough and not kept.is_cholesky():
            return False
        if kept.factor is not None and not kept.is_born_at(at):
            level = kept.level
            kept.give_up()
            self._make(at, level or None)
            return True
        rough_factor = kept.is_cholesky() and kept.factor.dtype is not at.y.dtype
        suspect, level = rough or kept.factor is not None, kept.level
        self._single = self._single and not (rough or rough_factor)
        kept.give_up()
        self._make(at, level if rough_factor else None)
        return suspect

    def _rough(self, at: Linearisation, tol: float, ladder: Ladder) -> LinearOperator | None:
        """The operator in float32 where that serves float64; the outputs' Hessian, which that takes, is found where enough
        products are to come."""
        if not ladder.kronecker or not self.in_float32(self.calls(at.objective, at.x, at.y)):
            return None
        if self.kept.expects(tol) >= SOME:
            self.outputs(at)
        return self.operator(at).single if at.outputs is not None and not self.kept.is_cholesky() else None

    def in_float32(self, calls: list[LinearCall]) -> bool:
        """Whether float64 systems of these calls are solved by float32 recursions, which have not failed so far."""
        return self._single and single_pays(calls)

    def loosened(self, tol: float, most: float, dtype: torch.dtype) -> float:
        """``tol``, but at least the default relative residual, and at most ``most`` beyond that."""
        return max(min(tol, most), self._tolerance(dtype))

    def _tolerance(self, dtype: torch.dtype, tol: float | None = None) -> float:
        return tol if tol is not None else self.tol if self.tol is not None else default_tol(dtype)

    def _cg(self, A: LinearOperator, b: Tensor, tol: float, x0: Tensor | None, limit: int | None,
            factor: Factor | None, recycle: int = 0, rough: LinearOperator | None = None) -> Solution:  # fmt: skip
        """Preconditioned CG; without the factor once more where only its rounding may have shown negative curvature."""
        stored = b.numel() * (1 if factor is None else 2)
        affordable = stored <= 1_000_000
        preconditioner = factor.preconditioner() if isinstance(factor, CholeskyFactor) else factor
        single = b.dtype != torch.float64 or rough is not None
        result = cg(A, b, tol=tol, x0=x0, preconditioner=preconditioner, max_iterations=limit, recycle=recycle, rough=rough,
                    reorthogonalise=affordable and (single or recycle > 0))  # fmt: skip
        if result.status is SolveStatus.NEGATIVE_CURVATURE and factor is not None and rough is None:
            result = cg(A, b, tol=tol, max_iterations=self.max_iterations)
        return result

    def _with_own_factor(self, at: Linearisation, factor: CholeskyFactor, b: Tensor, tol: float) -> Solution:
        """By the factor of this very matrix, refined by CG where rounding is above the tolerance."""
        if not factor.ok:
            return _refused(factor, b)
        A = self.operator(at)
        direct = self._direct(A, factor, b, tol)
        return direct if direct.ok else self._cg(A, b, tol, direct.x, self.max_iterations, factor)

    @staticmethod
    def _direct(A: LinearOperator, factor: CholeskyFactor, b: Tensor, tol: float) -> Solution:
        """By the factor of this very matrix; the residual is checked on one column (it is rounding in all of them).

        A small factor multiplies itself there, which is less than a product.
        """
        x = factor.solve(b)
        column, right = (x, b) if b.dim() == 1 else (x[:, 0], b[:, 0])
        small = is_exact(factor.n)
        back = factor.multiply(column) if small else A.matvec(column)
        size = torch.linalg.vector_norm(right)
        residual = torch.linalg.vector_norm(back - right) / torch.where(size > 0, size, size + 1)
        met = bool(residual <= tol) and bool(x.isfinite().all())
        status = SolveStatus.CONVERGED if met else SolveStatus.STAGNATION
        return Solution(x=x, status=status, residual=residual, iterations=0, products=0 if small else 1, solver="cholesky")

    def _expand(self, A: LinearOperator, b: Tensor, tol: float) -> Solution:
        """The Chebyshev expansion on the kept interval; on a new one where that no longer holds the spectrum."""
        order = self.chebyshev_order
        for kept in (self.spectrum is not None, False):
            if self.spectrum is None or not (kept or self._spectrum_given):
                self.spectrum = estimate_spectrum(A)
            result = chebyshev(A, b, spectrum=self.spectrum, order=order, tol=tol if order is None else None,
                               max_iterations=self.max_iterations)  # fmt: skip
            if result.ok or not kept or self._spectrum_given:
                break
        if self.spectrum.status is not SolveStatus.CONVERGED:
            self.spectrum = None  # the next point may be better
        return result

    def prepare(self, at: Linearisation, tol: float | None = None) -> None:
        """Ready for the many solves (to ``tol``) of a hyper-Hessian at this point: a factor where they would pay for it.

        Decided once a point, as ``at.prepared`` says.
        """
        if at.prepared:
            return
        at.prepared = True
        if self.solver == "cholesky":
            self.factor_at(at)
        elif self.solver == "auto" and at.factor is None:
            due = self.kept.due_for_model(self.ladder(at, attach=True), self._tolerance(at.y.dtype, tol))
            self._make(at, due, attach=True)

    def _make(self, at: Linearisation, level: int | None, *, attach: bool = False) -> CholeskyFactor | None:
        """What is due at this point; the factor if it is exact here, which ``attach`` asks for where one may be."""
        if level is None:
            return None
        single = not (attach and is_exact(at.y.numel())) and self._factors_in_float32(self._tested_calls(at))
        if level >= at.y.numel() and not single:
            return self.factor_at(at)
        made = self.kept.make(level, self.operator(at), at, single=single)
        if made.ok or not single or level < at.y.numel() or not is_exact(level):
            return None
        at.factor = made  # nor is h_yy positive definite in its own precision: that is the answer
        return made

    def factor_at(
        self, at: Linearisation, attach: bool | None = None, matrix: Tensor | None = None
    ) -> CholeskyFactor | None:
        """The Cholesky factor of h_yy + damping I at the recorded point, kept as ``factor``.

        ``attach``: tie it to the point, so that solves there start from it; default: for dy <= 2000. ``matrix``: h_yy
        (dy, dy) where it is at hand.

        Cost: without ``matrix`` dy products in blocks, dy^3 / 3 multiplications, dy^2 numbers. Look at ``.ok``.
        """
        attach = is_exact(at.y.numel()) or self.solver == "cholesky" if attach is None else attach
        factor = at.factor
        if factor is None:
            operator = self.operator(at)
            if matrix is not None:
                operator = DenseOperator(matrix + self.damping * torch.eye(len(matrix)).to(matrix) if self.damping else matrix)
            factor = self.kept.make(at.y.numel(), operator, at)
            if attach:
                at.factor = factor
        return factor if attach else None

    def state_dict(self) -> dict[str, Any]:
        """What is kept, for an exact resume."""
        interval = None if self.spectrum is None else [self.spectrum.lowest, self.spectrum.largest]
        return {"kept": self.kept.state_dict(), "spectrum": interval, "by_outputs": dict(self._by_outputs),
                "single": self._single, "bend": self.bend}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], problem: BilevelProblem) -> None:
        self._single, self._by_outputs, self.bend = state["single"], dict(state["by_outputs"]), state["bend"]
        self.kept.load_state_dict(state["kept"], problem, self.operator)
        self.spectrum = None if state["spectrum"] is None else Spectrum(*state["spectrum"])


def _refused(factor: CholeskyFactor, b: Tensor) -> Solution:
    """The answer where the matrix itself was factored and is not positive definite: what the factor found."""
    residual = b.new_ones(b.shape[1:])
    return Solution(x=torch.zeros_like(b), status=factor.factor_status, residual=residual, iterations=0, products=0,
                    solver="cholesky", curvature=factor.min_eigenvalue)  # fmt: skip


def tolerance_of_step(dtype: torch.dtype) -> float:
    """Default relative accuracy of a lower solution: 1e-10 in float64, 3e-6 in float32."""
    return 1e-10 if dtype == torch.float64 else 3e-6
