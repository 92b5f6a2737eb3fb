"""KeptFactor: the factor or sketch of one lower Hessian that goes on serving later ones, and when to make it anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..linalg import CholeskyFactor, NystromPreconditioner, Solution, nystrom
from ..outputs import (
    KroneckerPreconditioner,
    corner_ranks,
    factor_application,
    kronecker_application,
    kronecker_price,
    price,  # fmt: skip
)
from ..problem import BilevelProblem
from ..recorded import LinearCall

if TYPE_CHECKING:
    from .operator import LowerHessian

Factor = CholeskyFactor | KroneckerPreconditioner | NystromPreconditioner

#: up to this many learner parameters a Cholesky factor is made at once: its n block products cost what a handful of
#: plain CG solves cost, and it then serves as an exact solver where it was made and as a preconditioner elsewhere.
MAX_AUTO_FACTOR = 2000
#: up to this many (1.2 GB in float64) one is made, as a preconditioner, once CG has cost as much.
MAX_FACTOR = 12_000
#: a product in a block costs about half of a single one where products are dear (docs/performance.md).
BLOCK_DISCOUNT = 2
#: iterations of a solve with a Cholesky factor of some points ago.
AGED_SOLVE = 6
#: iterations from which the outputs' Hessian pays where products in float32 then take the place of float64 ones.
SOME = 3
#: bytes of a sketch's basis; making it takes three times that.
SKETCH_BYTES = 300_000_000
#: solves that a hyper-Hessian or its Krylov model is reckoned to take.
MODEL_SOLVES = 60
#: solves that a Kronecker preconditioner is reckoned to serve, and iterations per decade of accuracy where none was seen yet.
FORESEEN, RATE = 4, 20
#: solves after which a new factor's rate of convergence counts as known.
FRESH_SOLVES = 4
#: Ritz vectors kept of a solve, bytes that they may take (a checkpoint holds them), fewest steps that are worth it, and
#: when they are given up: iterations over those of that solve, iterations per decade over those when new.
RITZ, RITZ_BYTES, RITZ_STEPS, OUTGROWN, WORN = 64, 64_000_000, 16, 2.0, 1.5


def decades_of(tol: float) -> float:
    """Of accuracy, that a solve to this relative residual gains; at least one."""
    return max(1.0, -math.log10(max(tol, 1e-16)))


def is_exact(n: int) -> bool:
    """Whether a factor of this size also solves at the point where it was made (and is small enough to save)."""
    return n <= MAX_AUTO_FACTOR


def factor_price(n: int, calls: list[LinearCall], single: bool = False) -> float:
    """What a Cholesky factor costs, in float32 or not, in products with one vector."""
    return min(price(calls, n**3 / 6, single), n / BLOCK_DISCOUNT) if calls else n / BLOCK_DISCOUNT


@dataclass(frozen=True)
class Ladder:
    """What may be kept for a Hessian of size n, and at what price.

    Attributes:
        prices: level -> price in iterations, ascending; n stands for Cholesky.
        kronecker: the levels that are ``KroneckerPreconditioner`` of the learner's outputs, by the rows of their corners.
        applying: level -> an application of what is kept there, in products; 0 where it is not said.
    """

    n: int
    prices: dict[int, float]
    kronecker: tuple[int, ...] = ()
    applying: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, n: int, dtype: torch.dtype, calls: list[LinearCall], single: bool = False) -> Ladder:
        """That of a Hessian which is one of its outputs with these calls, or, without calls, known by its products alone;
        ``single``: whose factor is made in float32."""
        plain = {level: level / BLOCK_DISCOUNT for level in KeptFactor.levels(n, dtype)}
        if not calls:
            return cls(n, plain)
        fits = not is_exact(n) and calls[0].index.shape[0] ** 2 * torch.finfo(dtype).bits / 8 <= SKETCH_BYTES
        ranks = {rows: r for rows, r in corner_ranks(calls).items() if rows < n} if fits else {}
        prices = {rows: kronecker_price(calls, r) for rows, r in ranks.items()} or {k: v for k, v in plain.items() if k < n}
        if n in plain:
            prices[n] = factor_price(n, calls, single)
        applying = {n: factor_application(calls, n), **{rows: kronecker_application(calls, rows) for rows in ranks}}
        return cls(n, prices, tuple(ranks), applying)

    def step(self, level: int) -> float:
        """An iteration with what is kept at this level, in products."""
        return 1 + self.applying.get(level, 0.0)


class KeptFactor:
    """A preconditioner that outlives the point where it was made: Kronecker, a Nystrom sketch or a Cholesky factor; or nothing.

    Its *levels* are the ranks n / 16 and n / 8 of sketches (for n > 2000, as far as 300 MB go) or, where the learner's
    outputs give them, Kronecker preconditioners with a small corner and a large one, and n, the Cholesky factor (for
    n <= 12,000). A level is climbed, or what is kept made anew, once the products that this could have saved have cost as
    much as it would (the rule of ski rental), counted, not by the clock, so that a run is reproducible. Anew saves what is
    above the rate when new (Cholesky: all but two iterations); the next level half of them, or all but six with a factor.
    Where an aged factor costs more than the Kronecker preconditioner did, this comes back. The first of these is made at once
    where what it saves in FORESEEN solves like the one at hand, with what it could have saved so far, is its price.

    At level 0 the Ritz vectors of a CG solve, which cost no product, precondition the next ones (deflation), until a solve
    takes clearly more iterations; then the next one goes without and leaves new ones.

    Attributes:
        factor: what preconditions now, or None. level: its rank, n for Cholesky, 0 for none.
        spent, missed: products that making it anew, and another level, could have saved since the last making.
        rate: iterations per decade of accuracy, lately; None before the first solve.
        contraction: what a chord step with it left lately; None before the first one.
    """

    def __init__(self) -> None:
        self.factor: Factor | None = None
        self.level, self.spent, self.missed = 0, 0.0, 0.0
        self.born: dict[str, Any] | None = None
        self.rate: float | None = None
        self._fresh: float | None = None  # and when the factor was new
        self._seen = 0
        self._kronecker_rate: float | None = None  # of the Kronecker preconditioner, when last new
        self._ritz_steps = 0  # iterations of the solve whose Ritz vectors are kept
        self.contraction: float | None = None

    @staticmethod
    def levels(n: int, dtype: torch.dtype) -> list[int]:
        """The ranks that may be kept at size n, ascending; n stands for Cholesky."""
        if is_exact(n):
            return [n]
        most = int(SKETCH_BYTES / (n * torch.finfo(dtype).bits / 8))
        ranks = [rank for rank in (n // 16, n // 8) if rank <= most] or ([most] if most >= 16 else [])
        return ranks + ([n] if n <= MAX_FACTOR else [])

    def is_cholesky(self) -> bool:
        return isinstance(self.factor, CholeskyFactor)

    def ritz_wanted(self, n: int, dtype: torch.dtype) -> int:
        """How many Ritz vectors a solve should leave; 0 where something is kept already."""
        if self.factor is not None or is_exact(n):
            return 0
        return min(RITZ, int(RITZ_BYTES / (n * torch.finfo(dtype).bits / 8)))

    def recycle(self, solution: Solution) -> None:
        """Keep the Ritz vectors of a solve, where it left some."""
        if self.factor is None and solution.ok and solution.ritz is not None and solution.iterations >= RITZ_STEPS:
            self.factor, self._ritz_steps = solution.ritz, solution.iterations
            self._seen, self._fresh = 0, None

    def is_recycled(self) -> bool:
        return self.factor is not None and self.level == 0

    def give_up(self) -> None:
        """Keep nothing."""
        self.factor = self.born = None
        self.level, self._seen, self._fresh, self.contraction = 0, 0, None, None

    def is_born_at(self, at: Linearisation) -> bool:
        """Whether what is kept was made at this very point, for this objective."""
        return self._is_born(_birth(at))

    def observe(self, solution: Solution, tol: float, columns: int, ladder: Ladder) -> None:
        """Learn from a solve with this preconditioner (or with none)."""
        decades = decades_of(tol)
        self.rate = solution.iterations / decades
        if self._seen < FRESH_SOLVES:
            self._fresh = self.rate if self._fresh is None else max(self._fresh, self.rate)
            self._seen += 1
            if self.level in ladder.kronecker:
                self._kronecker_rate = self._fresh
        renewal, climb = self._saved(self.rate, decades, ladder)
        self.spent += renewal * columns
        self.missed += climb * columns
        if self.is_recycled():
            outgrown = solution.iterations > OUTGROWN * self._ritz_steps
            if outgrown or self._seen >= FRESH_SOLVES and self.rate > WORN * self._fresh:
                self.give_up()

    def expects(self, tol: float) -> float:
        """Iterations that a solve to ``tol`` will take, at the rate of late; infinite before the first one."""
        return math.inf if self.rate is None else self.rate * decades_of(tol)

    def _saved(self, rate: float, decades: float, ladder: Ladder) -> tuple[float, float]:
        """Of a solve's cost in products, what the same level anew and what another one could save at least."""
        step = ladder.step(self.level)
        cost = rate * decades * step
        if self.is_cholesky():
            other = 0.0
            if ladder.kronecker and self._kronecker_rate is not None:
                other = cost - self._kronecker_rate * decades * ladder.step(ladder.kronecker[-1])
            return max(0.0, cost - 2 * step), max(0.0, other)
        renewal = 0.0 if self._fresh is None or self.factor is None else max(0.0, rate - self._fresh) * decades * step
        if ladder.kronecker and self.level == ladder.kronecker[-1]:
            return renewal, max(0.0, cost - AGED_SOLVE * ladder.step(ladder.n))
        return renewal, cost / 2

    def due(self, ladder: Ladder, tol: float) -> int | None:
        """The level that should be made now, before a solve to ``tol``, or None."""
        if self.factor is None and is_exact(ladder.n):
            return next(iter(ladder.prices))
        missed = self.missed
        if self.level == 0 and ladder.kronecker:
            missed += FORESEEN * self._saved(RATE if self.rate is None else self.rate, decades_of(tol), ladder)[1]
        return self._due(ladder, self.spent, missed)

    def due_for_model(self, ladder: Ladder, tol: float) -> int | None:
        """The level that should be made before the many solves to ``tol`` of a hyper-Hessian, or None."""
        if self.factor is None and is_exact(ladder.n):
            return next(iter(ladder.prices))
        rate, decades = ladder.n / 16 if self.rate is None else self.rate, decades_of(tol)
        renewal, climb = self._saved(rate, decades, ladder)
        if is_exact(ladder.n):
            renewal = rate * decades + 1  # all of them and the check of the residual: at its own point the factor solves
        return self._due(ladder, self.spent + MODEL_SOLVES * renewal, self.missed + MODEL_SOLVES * climb)

    def _due(self, ladder: Ladder, spent: float, missed: float) -> int | None:
        if self.factor is not None and spent > ladder.prices.get(self.level, math.inf):
            return self.level
        back = ladder.kronecker[-1] if ladder.kronecker and self.level > ladder.kronecker[-1] else None
        other = next((level for level in ladder.prices if level > self.level), back)
        return other if other is not None and missed > ladder.prices[other] else None

    def make(self, level: int, operator: LowerHessian, at: Linearisation, *, single: bool = False) -> Factor:
        """The factor (level n), Kronecker preconditioner or sketch of the operator at a recorded point; kept if it succeeds.

        Look at ``.ok``. ``single``: the factor in float32, by the learner's outputs, where rounding lets it.

        Cost: that of a ``KroneckerPreconditioner``; or ``level`` products in blocks, or those of ``OutputHessian``, and
            n^3 / 3 multiplications and n^2 numbers, or about 8 n level^2 and 3 n level.
        """
        at.objective.counts.add(factorisations=1)
        if level >= operator.n:
            made = CholeskyFactor(operator.single_to_dense(), overwrite=True) if single else None
            if made is None or not made.ok:
                made = CholeskyFactor(operator.to_dense(), overwrite=True)
        else:
            operator.find_outputs()
            made = operator.kronecker_preconditioner(level) or nystrom(operator, level)
        self.level, self.spent, self.missed = level, 0.0, 0.0
        self._seen, self._fresh, self.contraction = 0, None, None
        if made.ok:
            self.factor, self.born = made, _birth(at)
        elif level < operator.n:
            self.factor = self.born = None  # not positive semidefinite there: CG will say so
        return made

    def state_dict(self) -> dict[str, Any]:
        """For an exact resume. A large factor is not saved but the point where it was made, to make it there again."""
        small = self.is_cholesky() and is_exact(self.factor.n)
        ritz = [self.factor.U, self.factor.eigenvalues] if self.is_recycled() else None
        return {"L": self.factor.L if small else None, "ritz": ritz, "ritz_steps": self._ritz_steps,
                "born": None if self.factor is None else self.born,
                "single": self.is_cholesky() and self.factor.dtype is not self.born["y"].dtype,
                "level": self.level, "spent": [self.spent, self.missed],
                "rates": [self.rate, self._fresh, self._seen, self._kronecker_rate, self.contraction]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], problem: BilevelProblem, operator) -> None:
        """``operator``: the system's operator at a recorded point. A run's state is loaded more than once."""
        born = state["born"]
        if born is None or state["L"] is not None or not (
            self.factor is not None and self.level == state["level"] and self._is_born(born)
        ):
            self.factor, self.born = None if state["L"] is None else CholeskyFactor.from_lower(state["L"]), born
            if state["ritz"] is not None:
                self.factor = NystromPreconditioner(*state["ritz"])
        if born is not None and self.factor is None:
            h = Objective(problem, upper=born["upper"], lower=born["lower"], counts=OracleCounts())
            at = h.linearise(born["x"], born["y"], "y")
            self.make(state["level"], operator(at), at, single=state["single"])
        self.level, (self.spent, self.missed) = state["level"], state["spent"]
        self.rate, self._fresh, self._seen, self._kronecker_rate, self.contraction = state["rates"]
        self._ritz_steps = state["ritz_steps"]

    def _is_born(self, where: dict[str, Any]) -> bool:
        """Whether what is kept was made there, for that objective."""
        own = self.born
        return own is not None and all(
            torch.equal(own[key], value) if isinstance(value, Tensor) else own[key] == value for key, value in where.items()
        )


def _birth(at: Linearisation) -> dict[str, Any]:
    """Where something is made, and for which objective."""
    return {"x": at.x, "y": at.y, "upper": at.objective.upper, "lower": at.objective.lower}
