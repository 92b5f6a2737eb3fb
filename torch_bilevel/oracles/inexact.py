"""InexactOracle: what the first-order oracles share, an approximate gradient by a set amount of work."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Objective
from ..errors import ConfigError, NonFiniteError
from ..lower.gradient import lipschitz_estimate
from ..problem import BilevelProblem
from .evaluation import Evaluation, HyperOracle, LowerSolution, require_finite


class InexactOracle(HyperOracle):
    """Value f(x, y_T) and an approximation of grad phi(x), with y_T after T lower steps from the last one.

    Args:
        problem: the problem.
        lower_steps: T, default 10.
        lower_lr: step length of gradient descent on the lower level; None: 1/L, L estimated once, at the
            first point (one gradient and eight products). A curvature that doubles later makes such steps
            diverge: give a number.
        options: ``lower`` and ``damping`` of HyperOracle, where a subclass has use for them.

    Its evaluations have no Hessian: ``evaluation.hessian`` raises ConfigError.
    """

    def __init__(
        self, problem: BilevelProblem, *, lower_steps: int = 10, lower_lr: float | None = None, **options: Any
    ):
        super().__init__(problem, **options)
        self.lower_steps = at_least("lower_steps", lower_steps, 0)
        self.lower_lr = positive("lower_lr", lower_lr, optional=True)

    @abstractmethod
    def _differentiate(self, x: Tensor, counts: OracleCounts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(f(x, y_T), approximate gradient, lower-level vectors by name, 'y' among them); updates ``warm``."""

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        warm = dict(self.warm)
        value, gradient, points = self._differentiate(x, counts)
        try:
            require_finite(value, gradient, type(self).__name__)
        except NonFiniteError:
            self.warm = warm  # a start with a NaN would spoil every later evaluation
            raise
        return self._evaluation(x, value, gradient, points, counts)

    def _step_length(self, objective: Objective, x: Tensor, y: Tensor) -> float:
        """The lower step length, estimated on first use as 1/L of ``objective`` at (x, y)."""
        if self.lower_lr is None:
            self.lower_lr = 1.0 / lipschitz_estimate(objective.linearise(x, y, "y"))
        return self.lower_lr

    def _evaluation(self, x, value, gradient, points, counts) -> Evaluation:
        problem, name = self.problem, type(self).__name__

        def hessian():
            raise ConfigError(
                f"{name} has no hyper-Hessian: a first-order method works without; use certify(problem, x) or an"
                " ImplicitOracle for curvature"
            )

        def lower() -> LowerSolution:
            gy = Objective(problem, lower=1.0, counts=counts).gradient(x, points["y"], "y")[2]
            return LowerSolution(points["y"], torch.linalg.vector_norm(gy), None)

        return Evaluation(x, value, gradient, points, counts, hessian, lower)

    def restore(self, state: dict[str, Any]) -> Evaluation:
        return self._evaluation(
            state["x"], state["value"], state["gradient"], dict(state["points"]), self.counts.child()
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lower_lr": self.lower_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.lower_lr = state["lower_lr"]


def at_least(name: str, value: Any, least: int) -> int:
    """``value`` if it is an int >= least; ConfigError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: expected an int >= {least}, got {value!r}")
    return value


def positive(name: str, value: Any, *, optional: bool = False, zero: bool = False) -> float | None:
    """``value`` as a float if it is a positive finite number (or 0, or None, where that is allowed)."""
    if value is None and optional:
        return None
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value < float("inf")
    if not (good and (value > 0 or (zero and value == 0))):
        wanted = "a number >= 0" if zero else "a positive number"
        raise ConfigError(f"{name}: expected {wanted}{' or None' if optional else ''}, got {value!r}")
    return float(value)
