"""Gradient descent ascent, the first-order yardstick for min_x max_y f(x, y)."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from ..derivatives import Objective
from ..errors import ConfigError, NonFiniteError
from ..oracles import Evaluation
from ..oracles.minimax import MinimaxOracle
from ..problem import BilevelProblem
from ..results import StepReport
from .base import Method, Run
from .registry import register


@register("gda")
@final
class GDA(Method):
    """Two-time-scale gradient descent ascent: x+ = x - lr f_x, y+ = y + ascent_lr f_y.

    simultaneous:  both gradients at (x, y), the usual GDA;
    alternating:   f_x at (x, y), then ``ascent_steps`` ascent steps at x+ (AGDA; with many of them, GDmax).
    Where f is strongly concave in y and ascent_lr = 1/l, lr = Theta(1 / (kappa^2 l)), GDA finds |grad P| <= eps in
    O(kappa^2 eps^-2) iterations; it stays at a saddle of P from which it starts, with f_y = 0.

    Args:
        lr: step of the min player, default 1e-2. ascent_lr: step of the max player, default 1e-1.
        alternating: default False. ascent_steps: per descent step, default 1; more only with alternating=True.

    Reports: value f(x, y) at the pair held, not P(x); gradient_norm |(f_x, f_y)|, which is 0 only where both are.

    Cost per iteration: one gradient, plus ``ascent_steps`` when alternating (counted as lower_gradients: f is the lower
    objective up to its sign).

    References: Lin, Jin, Jordan, ICML 2020 (two-time-scale GDA, GDmax); Yang, Orvieto, Lucchi, He, AISTATS 2022
    (alternating).
    """

    name = "gda"

    def __init__(self, *, lr: float = 1e-2, ascent_lr: float = 1e-1, alternating: bool = False, ascent_steps: int = 1):
        for key, rate in (("lr", lr), ("ascent_lr", ascent_lr)):
            if not (isinstance(rate, (int, float)) and rate > 0 and math.isfinite(rate)):
                raise ConfigError(f"{key}: expected a positive number, got {rate!r}")
        if not (isinstance(ascent_steps, int) and ascent_steps >= 1):
            raise ConfigError(f"ascent_steps: expected an int >= 1, got {ascent_steps!r}")
        if ascent_steps > 1 and not alternating:
            raise ConfigError("ascent_steps > 1 needs alternating=True: simultaneous steps are one and one")
        self.lr, self.ascent_lr = float(lr), float(ascent_lr)
        self.alternating, self.ascent_steps = alternating, ascent_steps

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> GDARun:
        return GDARun(self, problem, MinimaxOracle(problem), seed=seed, bounds=bounds)


@final
class GDARun(Run):
    """A run of GDA: the pair (x, y) and both gradients there."""

    def __init__(self, method: GDA, problem: BilevelProblem, oracle: MinimaxOracle, *, seed: int, bounds: Any):
        super().__init__(method, problem, oracle, seed=seed, bounds=bounds)
        self.y = problem.y

    def current(self) -> Evaluation:
        if self.evaluation is None:
            self.evaluation = self.oracle.at_point(self.x, self.y)
        return self.evaluation

    def stationarity(self) -> float:
        """|(f_x, f_y)|, with bounds that of the projected step in x."""
        ascent = self.current().points["ascent"]
        return math.hypot(super().stationarity(), float(torch.linalg.vector_norm(ascent)))

    def step(self) -> StepReport:
        method, ev = self.method, self.current()
        x = self.x - (self.scale * method.lr) * ev.gradient
        if self.box is not None:
            x = self.box.project(x)
        if method.alternating:
            y, rounds = self.y, method.ascent_steps
            g = Objective(self.problem, lower=1.0, counts=self.counts)
            for _ in range(rounds):
                y = y - (self.scale * method.ascent_lr) * g.gradient(x, y, "y")[2]
        else:
            y = self.y + (self.scale * method.ascent_lr) * ev.points["ascent"]
        new = self.oracle.at_point(x, y)
        if not bool(torch.isfinite(y).all()):
            raise NonFiniteError("gda: the max player has diverged; lower ascent_lr")
        length = float(torch.linalg.vector_norm(x - self.x))
        self.x, self.y, self.evaluation = x, y, new
        self.steps += 1
        return self.report(step_norm=length)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "y": self.y}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.y: Tensor = state["y"]
