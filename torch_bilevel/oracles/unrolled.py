"""UnrolledOracle: the hypergradient by differentiating through the lower gradient steps (reverse mode)."""

from __future__ import annotations

from typing import final

from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Objective
from .inexact import InexactOracle, at_least


@final
class UnrolledOracle(InexactOracle):
    """d/dx f(x, y_T(x)) with y_{t+1} = y_t - lr g_y(x, y_t), y_0 held constant.

        p <- f_y,   grad <- f_x,   then for t = T-1, ..., T-K:
        grad <- grad - lr g_xy(x, y_t) p,   p <- p - lr g_yy(x, y_t) p
    K = T is the derivative of the loop itself; K < T stops at the last K steps (truncated back-propagation).

    Args:
        lower_steps, lower_lr: T and the step length, see InexactOracle.
        unroll: K, the number of last steps that are differentiated; None (default): all T.

    Cost of an evaluation: T lower gradients, one upper, K products (each gives both blocks). Memory: the
        recorded graphs of K lower gradients (with a loader nothing is kept and each product records its
        chunks anew).

    References: Franceschi, Donini, Frasconi, Pontil, ICML 2017 (reverse mode); Shaban, Cheng, Hatch, Boots,
        AISTATS 2019 (truncation); Ji, Yang, Liang, ICML 2021 (ITD-BiO, warm-started y_0).
    """

    def __init__(self, problem, *, lower_steps: int = 10, lower_lr: float | None = None, unroll: int | None = None):
        super().__init__(problem, lower_steps=lower_steps, lower_lr=lower_lr)
        self.unroll = None if unroll is None else at_least("unroll", unroll, 0)

    def _differentiate(self, x: Tensor, counts: OracleCounts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        g = Objective(self.problem, lower=1.0, counts=counts)
        y = self.start()
        lr = self._step_length(g, x, y)
        counts.add(lower_solves=1)
        recorded = self.lower_steps if self.unroll is None else min(self.unroll, self.lower_steps)
        for _ in range(self.lower_steps - recorded):
            y = y - lr * g.gradient(x, y, "y")[2]
        tape = []
        for _ in range(recorded):
            at = g.linearise(x, y, "y")
            tape.append(at)
            y = y - lr * at.gy
        value, gradient, p = Objective(self.problem, upper=1.0, counts=counts).gradient(x, y)
        while tape:
            cross, hessian = tape.pop().to_x(p)
            gradient, p = gradient - lr * cross, p - lr * hessian
        self.warm = {"y": y}
        return value, gradient, {"y": y}
