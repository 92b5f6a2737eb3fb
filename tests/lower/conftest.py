"""Lower objectives with known minimisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import torch_bilevel as tb
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.lower import LowerSystems

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@dataclass
class Case:
    """h(x, y) with its start, in any dtype."""

    h: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor
    x: Tensor

    def objective(self, dtype=D) -> Objective:
        problem = tb.BilevelProblem.from_functions(
            lambda x, y: (y**2).sum() + x.sum(), self.h, self.x.to(dtype), self.y0.to(dtype), check=False
        )
        return Objective(problem, lower=1.0, counts=OracleCounts())

    def solve(self, solver, dtype=D, tol=None, systems=None):
        """(result, objective): the solver's run from y0."""
        objective = self.objective(dtype)
        systems = LowerSystems() if systems is None else systems
        x, y0 = objective.problem.x, objective.problem.y
        return solver.solve(objective, x, y0, systems=systems, tol=tol), objective


def quadratic(kappa, n=6):
    Q = torch.linalg.qr(draw(n, n)).Q
    A = Q @ torch.diag(torch.logspace(0, torch.tensor(float(kappa)).log10().item(), n, dtype=D)) @ Q.T

    def h(x, y):
        r = y - x
        return r @ (A.to(y) @ r) / 2

    return Case(h, draw(n, seed=1), draw(n, seed=2))


def softmax():
    """Log-sum-exp of a linear map with an L2 term."""
    A, b = draw(12, 5, seed=3), draw(12, seed=4)

    def h(x, y):
        return torch.logsumexp(A.to(y) @ y + b.to(y), 0) + x.exp().sum() * (y**2).sum() / 10

    return Case(h, draw(5, seed=5), torch.zeros(1, dtype=D))


def scalar():
    return Case(lambda x, y: (torch.cosh(y - x) + (y - x) ** 2).sum(), torch.tensor([2.0], dtype=D),
                torch.tensor([0.5], dtype=D))  # fmt: skip


CASES = {
    "quadratic, kappa 10": lambda: quadratic(10),
    "quadratic, kappa 1e4": lambda: quadratic(1e4),
    "softmax": softmax,
    "dy = 1": scalar,
}


@pytest.fixture
def case():
    """case(name) -> Case."""
    return lambda name: CASES[name]()
