"""Any ``torch.optim`` optimizer as a lower solver, and the user's own training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ..derivatives import Objective
from .solver import LowerResult, LowerSolver, LowerStatus
from .systems import LowerSystems


@final
class TorchOptimizer(LowerSolver):
    """k steps of a ``torch.optim`` optimizer on h(x, .), its state made anew for every solve.

    Args:
        optimizer: an optimizer class (``torch.optim.Adam``) or any callable of a list of parameters.
        steps: k.
        options: passed to ``optimizer`` (lr=..., momentum=...).

    Cost: one gradient per step (LBFGS: as many as its closure asks for).
    """

    reaches_tolerance = False

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, *, steps: int = 10,
                 **options: Any):  # fmt: skip
        self.optimizer, self.steps, self.options = optimizer, steps, options

    def solve(
        self, objective: Objective, x: Tensor, y0: Tensor, *, systems: LowerSystems, tol: float | None = None
    ) -> LowerResult:
        objective.counts.add(lower_solves=1)
        y = y0.detach().clone().requires_grad_(True)
        optimizer = self.optimizer([y], **self.options)

        def closure() -> Tensor:
            value, _, gradient = objective.gradient(x, y.detach(), "y")
            y.grad = gradient
            return value

        for _ in range(self.steps):
            optimizer.step(closure)
        norm = y.new_tensor(float("nan")) if y.grad is None else torch.linalg.vector_norm(y.grad)
        return LowerResult(y.detach(), norm.detach(), None, LowerStatus.FIXED_STEPS, self.steps)


@final
class External(LowerSolver):
    """The user trains the learner; y is taken as it is. Cost: one gradient, to report the residual."""

    reaches_tolerance = False

    def solve(
        self, objective: Objective, x: Tensor, y0: Tensor, *, systems: LowerSystems, tol: float | None = None
    ) -> LowerResult:
        gradient = objective.gradient(x, y0, "y")[2]
        return LowerResult(y0, torch.linalg.vector_norm(gradient), None, LowerStatus.EXTERNAL, 0)
