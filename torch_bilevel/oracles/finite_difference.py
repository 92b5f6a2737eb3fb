"""FiniteDifferenceOracle: the first-order penalty gradient of F2BA and F2SA-p."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Objective
from ..errors import ConfigError
from ..lower import GradientDescent
from .inexact import InexactOracle, at_least, positive

MAX_ORDER = 8


@final
class FiniteDifferenceOracle(InexactOracle):
    """p-point difference in sigma of d/dx h_sigma(x), h_sigma = min_y g + sigma f, in place of d/dsigma at 0.

        grad ~ sum_j w_j (penalty g_x(x, y_j) + j f_x(x, y_j)),   y_j ~ argmin_y g + (j / penalty) f
    over j = 0 .. p for odd p and j = +-1 .. +-p/2 for even p; sum_j w_j j^k = [k = 1]. The bias is
    O(penalty^-p) once the lower levels are solved; T steps leave an error of about penalty * |y_j - argmin|.
    p = 1 is f_x(x, y_1) + penalty (g_x(x, y_1) - g_x(x, y_0)). The value is f at the y_j, extrapolated to
    sigma = 0.

    Args:
        lower_steps, lower_lr: T and the length of gradient steps on g + sigma f (a step published for f +
            penalty g is to be multiplied by the penalty), see InexactOracle. Every y_j starts where it ended
            the time before.
        penalty: lambda, default 10. order: p, 1 (forward, default) to 8, 2 is central.
            Even orders need g - p f / (2 penalty) convex in y, or the steps diverge.

    Cost of an evaluation: T + 1 lower gradients per node, T + 1 upper ones per node other than j = 0.

    References: Chen, Ma, Zhang, JMLR 2025, arXiv 2306.14853 (F2BA: p = 1); Chen, Li, Chayti, Zhang, arXiv
        2509.02937 (F2SA-p); Kwon, Kwon, Wright, Nowak, ICML 2023 (F2SA).
    """

    def __init__(
        self, problem, *, lower_steps: int = 10, lower_lr: float | None = None, penalty: float = 10.0, order: int = 1
    ):
        super().__init__(problem, lower_steps=lower_steps, lower_lr=lower_lr)
        self.penalty = positive("penalty", penalty)
        if at_least("order", order, 1) > MAX_ORDER:
            raise ConfigError(f"order: expected 1 to {MAX_ORDER} (its weights grow without bound), got {order}")
        self.nodes, self.weights, self.value_weights = difference_weights(order)

    def _differentiate(self, x: Tensor, counts: OracleCounts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        f = Objective(self.problem, upper=1.0, counts=counts)
        g = Objective(self.problem, lower=1.0, counts=counts)
        value, gradient, y_zero, warm = 0.0, 0.0, 0.0, {}
        for j in reversed(self.nodes):  # the largest sigma first: its curvature sets the default step length
            h = Objective(self.problem, upper=j / self.penalty, lower=1.0, counts=counts)
            start = self.start(f"y{j}")
            solver = GradientDescent(self._step_length(h, x, start), steps=self.lower_steps)
            y = warm[f"y{j}"] = solver.solve(h, x, start, systems=self.systems).y
            gradient = gradient + self.weights[j] * self.penalty * g.gradient(x, y, "x")[1]
            if j:
                fy, fx, _ = f.gradient(x, y, "x")
                gradient = gradient + self.weights[j] * j * fx
                value, y_zero = value + self.value_weights[j] * fy, y_zero + self.value_weights[j] * y
        self.warm = warm
        return value, gradient, {"y": warm.get("y0", y_zero)}


def difference_weights(order: int) -> tuple[list[int], dict[int, float], dict[int, float]]:
    """(nodes j, weights of the first derivative at 0, weights of the value at 0 from the nodes other than 0)."""
    half = order // 2
    nodes = list(range(order + 1)) if order % 2 else [j for j in range(-half, half + 1) if j]
    others = [j for j in nodes if j]
    return nodes, dict(zip(nodes, _moments(nodes, 1))), dict(zip(others, _moments(others, 0)))


def _moments(nodes: list[int], derivative: int) -> list[float]:
    """w with sum_j w_j j^k = [k = derivative] for k < len(nodes)."""
    j = torch.tensor(nodes, dtype=torch.float64)
    powers = torch.stack([j**k for k in range(len(nodes))])
    return torch.linalg.solve(powers, torch.eye(len(nodes), dtype=torch.float64)[derivative]).tolist()
