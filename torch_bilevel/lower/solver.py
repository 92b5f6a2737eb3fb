"""LowerSolver: what every minimiser of a lower-level objective takes and returns."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..derivatives import Linearisation, Objective
from .systems import LowerSystems

#: share of |h_y| at the start that a solve to a given residual leaves at most: an answer that has hardly moved tells nothing
#: of h at a new x, however small the residual that would have done
REDUCTION = 1e-2


class LowerStatus(enum.Enum):
    """How a lower solve ended."""

    CONVERGED = "converged"
    FIXED_STEPS = "took the given number of steps"
    EXTERNAL = "left to the user"
    MAX_ITERATIONS = "stopped at the iteration limit"
    STAGNATION = "stagnated above the tolerance"
    NOT_CONVEX = "met negative curvature"
    NON_FINITE = "met a NaN or an infinity"


@dataclass
class LowerResult:
    """An (approximate) minimiser y of h(x, .) and what is known of it.

    Attributes:
        y: (dy,).
        gradient_norm: |h_y(x, y)|, ().
        error: estimate of |y - y*|, () or None where no estimate is at hand.
        status, iterations.
        at: the recorded gradient at (x, y), or None.
        curvature: d'h_yy d / d'd of the direction that showed the objective not convex, or None.
    """

    y: Tensor
    gradient_norm: Tensor
    error: Tensor | None
    status: LowerStatus
    iterations: int
    at: Linearisation | None = None
    curvature: float | None = None

    @property
    def ok(self) -> bool:
        return self.status in (LowerStatus.CONVERGED, LowerStatus.FIXED_STEPS, LowerStatus.EXTERNAL)

    def describe(self) -> str:
        """One line: how it ended and, if it failed, what to do."""
        text = f"lower level: {self.status.value} after {self.iterations} iterations, |gradient| {float(self.gradient_norm):.1e}"
        advice = {
            LowerStatus.MAX_ITERATIONS: "raise max_iterations or loosen tol",
            LowerStatus.STAGNATION: "loosen tol, use float64, or check that the loss is smooth and deterministic",
            LowerStatus.NOT_CONVEX: "the lower objective must be strongly convex in the learner: add L2"
            " regularisation, or use lower='external' with damping",
            LowerStatus.NON_FINITE: "check the data for NaN and the loss for log(0) or overflow",
        }.get(self.status)
        return text if advice is None else f"{text}; {advice}"


class LowerSolver(ABC):
    """Minimises h(x, .) from a warm start.

    Attributes:
        reaches_tolerance: whether it iterates to a tolerance (so that its answer may be corrected by Newton steps),
            or does a set amount of work, as published first-order inner loops do.
        first_order: whether it takes many gradients where one linear solve would bring the start near; Newton-CG's
            first step is that solve.
        takes_residual: whether its ``solve`` has the option ``residual``: to end as soon as |h_y| is no larger than that, and
            than ``REDUCTION`` of what it was at y0.
    """

    reaches_tolerance: bool = True
    first_order: bool = False
    takes_residual: bool = False

    @abstractmethod
    def solve(
        self, objective: Objective, x: Tensor, y0: Tensor, *, systems: LowerSystems, tol: float | None = None
    ) -> LowerResult:
        """argmin_y h(x, y) from y0 (dy,), to |y - y*| <= tol (1 + |y|) where a tolerance applies."""
