"""GradientMethod: hypergradient descent, the loop of AID, ITD, F2BA, F2SA-p, stocBiO, PAID, Adam and SGD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ..oracles import HyperOracle
from ..oracles.inexact import positive
from ..problem import BilevelProblem
from ..results import StepReport
from .base import Method, Run
from .perturbation import Escape, Perturbation
from .upper_step import UpperStep

OracleFactory = Callable[[BilevelProblem, int], HyperOracle]


class FirstOrderRun(Run):
    """What the runs of first-order methods share: one evaluation per iteration, at the new point."""

    @abstractmethod
    def step(self) -> StepReport:
        """One outer iteration."""

    def go_to(self, x_new: Tensor) -> StepReport:
        """Move to x_new and evaluate there. Beside a learner that the user trains nothing can be evaluated
        before the user's next step: the report is then of the point left."""
        if self.box is not None:
            x_new = self.box.project(x_new)
        length = float(torch.linalg.vector_norm(x_new - self.x))
        if self.oracle.lower_is_external:
            self.steps += 1
            report = self.report(step_norm=length)
            self.x, self.evaluation = x_new, None
            return report
        evaluation = self.oracle.evaluate(x_new)
        self.steps += 1
        self.x, self.evaluation = x_new, evaluation
        return self.report(step_norm=length)


@final
class GradientMethod(Method):
    """x+ = P(optimizer(x, gradient)) with the gradient of an oracle, and PAID's noise where it is small.

    Args:
        name: registry name.
        oracle: makes the HyperOracle for (problem, seed).
        lr: learning rate of the upper step.
        upper_optimizer, scheduler: see UpperStep. perturbation: settings of PAID's noise, or None.
    """

    def __init__(
        self,
        name: str,
        oracle: OracleFactory,
        *,
        lr: float,
        upper_optimizer: Any = "SGD",
        scheduler: Any = None,
        perturbation: Perturbation | None = None,
    ):
        self.name, self.oracle = name, oracle
        self.lr = positive("lr", lr)
        self.upper_optimizer, self.scheduler, self.perturbation = upper_optimizer, scheduler, perturbation
        self.upper_step(torch.zeros(1))  # an unknown optimizer or option is an error here

    def upper_step(self, x: Tensor) -> UpperStep:
        return UpperStep(self.upper_optimizer, self.lr, self.scheduler, x)

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> GradientRun:
        return GradientRun(self, problem, self.oracle(problem, seed), seed=seed, bounds=bounds)


@final
class GradientRun(FirstOrderRun):
    """A run of GradientMethod."""

    def __init__(self, method: GradientMethod, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any):
        super().__init__(method, problem, oracle, seed=seed, bounds=bounds)
        self.upper = method.upper_step(self.x)
        self.escape = None if method.perturbation is None else Escape(method.perturbation, seed)

    def step(self) -> StepReport:
        ev, x = self.current(), self.x
        if self.escape is not None:
            noise = self.escape.noise(x, float(ev.value), self.stationarity())
            x = x if noise is None else x + noise
        return self.go_to(self.upper.step(x, ev.gradient, ev.value, self.scale))

    def may_stop(self, eps: float) -> bool:
        settled = self.escape is None or self.escape.settled(float(self.current().value), self.stationarity())
        return settled and super().may_stop(eps)

    def state_dict(self) -> dict[str, Any]:
        escape = None if self.escape is None else self.escape.state_dict()
        return {**super().state_dict(), "upper": self.upper.state_dict(), "escape": escape}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.upper.load_state_dict(state["upper"])
        if self.escape is not None:
            self.escape.load_state_dict(state["escape"])
