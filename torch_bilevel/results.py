"""What a step, a run and a certificate report."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .counting import OracleCounts


class Status(enum.Enum):
    """Why a run ended."""

    RUNNING = "running"
    SECOND_ORDER = "gradient below tolerance and no negative curvature beyond sqrt(cubic_reg * tolerance)"
    GRADIENT_TOLERANCE = "gradient below tolerance; curvature not examined (a first-order method)"
    STEP_RULE = "step below the published bound sqrt(tolerance / cubic_reg) / 2"
    MAX_STEPS = "reached max_steps"
    MAX_SECONDS = "reached max_seconds"
    STALLED = "no further decrease is possible at this precision"
    CALLBACK = "stopped by the callback"
    NON_FINITE = "met a NaN or an infinity"
    FAILED = "a solver failed"

    @property
    def converged(self) -> bool:
        return self in (Status.SECOND_ORDER, Status.GRADIENT_TOLERANCE, Status.STEP_RULE)


@dataclass
class StepReport:
    """One outer iteration; numbers at the point held after it. ``step`` 0 is the starting point.

    Attributes:
        value, gradient_norm: of the method's own oracle (with bounds: norm of the projected gradient).
        step_norm: |s| of the step tried. accepted: whether it was taken.
        cubic_reg: M used, NaN for methods without one. refreshed: whether the Hessian was made anew.
        predicted_decrease, ratio: of the cubic model, and actual over predicted; NaN where they do not apply.
        counts: all oracle calls so far. seconds: of the run so far, callbacks excluded. extra: the callback's numbers.
    """

    step: int
    value: float
    gradient_norm: float
    step_norm: float = 0.0
    accepted: bool = True
    cubic_reg: float = math.nan
    refreshed: bool = False
    predicted_decrease: float = math.nan
    ratio: float = math.nan
    counts: OracleCounts = field(default_factory=OracleCounts)
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    stalled: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, counts and extras flattened in, as for one line of a log."""
        own = {k: v for k, v in self.__dict__.items() if k not in ("counts", "extra")}
        return {**own, **self.counts.as_dict(), **self.extra}


@dataclass
class Result:
    """Outcome of ``minimize``.

    Attributes:
        x (dx,), y (dy,): hyperparameters and the lower solution there; both are also in the user's tensors.
        value, gradient_norm: of the method's own oracle (``certify`` gives the exact gradient).
        status: why the run ended; ``message`` says it in words.
        min_eigenvalue: of the hyper-Hessian at x where the run examined it, else NaN.
        cubic_reg: the last M, NaN for methods without one.
        history: one StepReport per outer iteration, the starting point first.
        choices: what served the 'lower systems' and the 'hyper-Hessian' at the end, in words. Override them by the
            options ``solver`` and ``hessian``.
    """

    x: Tensor
    y: Tensor
    value: float
    gradient_norm: float
    status: Status
    message: str
    history: list[StepReport]
    counts: OracleCounts
    seconds: float
    method: str
    cubic_reg: float = math.nan
    min_eigenvalue: float = math.nan
    choices: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The line that ``print`` gives, and one for each choice."""
        return "\n".join([str(self), *(f"  {what}: {choice}" for what, choice in self.choices.items())])

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.message}; {self.history[-1].step if self.history else 0} steps,"
            f" value {self.value:.6g}, |gradient| {self.gradient_norm:.2e}, {self.counts.hessians} Hessians,"
            f" {self.seconds:.1f} s"
        )
