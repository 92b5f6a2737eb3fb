"""KeptFactor: the factor or sketch of one lower Hessian that goes on serving later ones, and when to make it anew."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..linalg import CholeskyFactor, LinearOperator, NystromPreconditioner, Solution, nystrom
from ..problem import BilevelProblem

#: up to this many learner parameters a Cholesky factor is made at once: its n block products cost what a handful of
#: plain CG solves cost, and it then serves as an exact solver where it was made and as a preconditioner elsewhere.
MAX_AUTO_FACTOR = 2000
#: up to this many (1.2 GB in float64) one is made, as a preconditioner, once CG has cost as much.
MAX_FACTOR = 12_000
#: a product in a block costs about half of a single one where products are dear (docs/performance.md).
BLOCK_DISCOUNT = 2
#: bytes of a sketch's basis; making it takes three times that.
SKETCH_BYTES = 300_000_000
#: solves, and their decades of accuracy, that a hyper-Hessian or its Krylov model is reckoned to take.
MODEL_SOLVES, MODEL_DECADES = 60, 3
#: solves after which a new factor's rate of convergence counts as known.
FRESH_SOLVES = 4


def is_exact(n: int) -> bool:
    """Whether a factor of this size also solves at the point where it was made (and is small enough to save)."""
    return n <= MAX_AUTO_FACTOR


class KeptFactor:
    """A preconditioner that outlives the point where it was made: nothing, a Nystrom sketch or a Cholesky factor.

    Its *levels* are the ranks n / 16 and n / 8 of sketches (for n > 2000, as far as 300 MB go) and n, the Cholesky
    factor (for n <= 12,000). A level is climbed, or a factor that has aged renewed, once the CG iterations that this
    could have saved have cost as much as it would (the rule of ski rental), counted, not by the clock, so that a run is
    reproducible. What the next level saves is reckoned: all but two iterations, or half of them below Cholesky.

    Attributes:
        factor: what preconditions now, or None. level: its rank, n for Cholesky, 0 for none.
        spent: iterations that the next making could have saved, since the last one.
    """

    def __init__(self) -> None:
        self.factor: CholeskyFactor | NystromPreconditioner | None = None
        self.level, self.spent = 0, 0.0
        self.born: dict[str, Any] | None = None
        self._rate: float | None = None  # iterations per decade of accuracy, lately
        self._fresh: float | None = None  # and when the factor was new
        self._seen = 0

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

    def observe(self, solution: Solution, tol: float, columns: int) -> None:
        """Learn from a solve with this preconditioner (or with none)."""
        if self.is_cholesky():
            self.spent += max(0, solution.iterations - 2) * columns
        else:
            self.spent += solution.iterations * columns / 2  # what the next level saves at least
        self._rate = solution.iterations / max(1.0, -math.log10(max(tol, 1e-16)))
        if self._seen < FRESH_SOLVES:
            self._fresh = self._rate if self._fresh is None else max(self._fresh, self._rate)
            self._seen += 1

    def due(self, n: int, dtype: torch.dtype) -> int | None:
        """The level that should be made now, or None."""
        level = self._candidate(n, dtype)
        if level is None:
            return None
        at_once = is_exact(n) and self.factor is None
        return level if at_once or self.spent * BLOCK_DISCOUNT > level else None

    def due_for_model(self, n: int, dtype: torch.dtype) -> int | None:
        """The level that should be made before the many solves of a hyper-Hessian, or None."""
        level = self._candidate(n, dtype)
        if level is None or (is_exact(n) and self.factor is None):
            return level
        iterations = MODEL_DECADES * (n / 16 if self._rate is None else self._rate)
        saved = max(0.0, iterations - 2) if self.is_cholesky() else iterations / 2
        return level if (self.spent + MODEL_SOLVES * saved) * BLOCK_DISCOUNT > level else None

    def _candidate(self, n: int, dtype: torch.dtype) -> int | None:
        """The same level anew where the factor has aged, else the next one up."""
        levels = self.levels(n, dtype)
        if self.factor is not None:
            aged = None not in (self._rate, self._fresh) and self._rate > 2 * self._fresh
            if self.is_cholesky() or aged:
                return self.level
        return next((level for level in levels if level > self.level), None)

    def make(self, level: int, operator: LinearOperator, at: Linearisation) -> CholeskyFactor | NystromPreconditioner:
        """The factor (level n) or sketch of the operator at a recorded point; kept if it succeeds. Look at ``.ok``.

        Cost: ``level`` products in blocks; n^3 / 3 multiplications and n^2 numbers, or about 8 n level^2 and 3 n level.
        """
        at.objective.counts.add(factorisations=1)
        if level >= operator.n:
            made = CholeskyFactor(operator.to_dense(), overwrite=True)
        else:
            made = nystrom(operator, level)
        self.level, self.spent, self._seen, self._fresh = level, 0.0, 0, None
        if made.ok:
            h = at.objective
            self.factor = made
            self.born = {"x": at.x, "y": at.y, "upper": h.upper, "lower": h.lower}
        elif level < operator.n:
            self.factor = self.born = None  # not positive semidefinite there: CG will say so
        return made

    def state_dict(self) -> dict[str, Any]:
        """For an exact resume. A large factor is not saved but the point where it was made, to make it there again."""
        small = self.is_cholesky() and is_exact(self.factor.n)
        return {"L": self.factor.L if small else None, "born": None if small or self.factor is None else self.born,
                "level": self.level, "spent": self.spent, "rates": [self._rate, self._fresh, self._seen]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], problem: BilevelProblem, operator) -> None:
        """``operator``: the system's operator at a recorded point. A run's state is loaded more than once."""
        born = state["born"]
        if born is None or not self._made_at(born, state["level"]):
            self.factor = None if state["L"] is None else CholeskyFactor.from_lower(state["L"])
        if born is not None and self.factor is None:
            h = Objective(problem, upper=born["upper"], lower=born["lower"], counts=OracleCounts())
            at = h.linearise(born["x"], born["y"], "y")
            self.make(state["level"], operator(at), at)
        self.level, self.spent = state["level"], state["spent"]
        self._rate, self._fresh, self._seen = state["rates"]

    def _made_at(self, born: dict[str, Any], level: int) -> bool:
        own = self.born
        return self.factor is not None and own is not None and self.level == level and all(
            torch.equal(own[key], born[key]) if isinstance(born[key], Tensor) else own[key] == born[key] for key in born
        )  # fmt: skip
