"""Newton-CG at the limit of its dtype."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.problems import ill_conditioned
from tests.reference import error
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.lower import LowerStatus, LowerSystems, NewtonCG


def test_float32_at_condition_1e4_ends_at_rounding_all_along_a_path():
    """y is good to eps kappa = 1e-3 at best; a step of that size that decreases nothing is rounding, not a fault."""
    case = ill_conditioned(3)
    result = tb.minimize(case.problem(torch.float32), "sgd", lr=0.1, max_steps=60, gradient_tol=0.0)
    assert error(result.y, case.reference.solution(result.x.double())) <= 5e-3


def test_a_gradient_above_rounding_is_no_convergence():
    """One that is not the gradient of its value: no decrease is found although |h_y| is large."""
    problem = ill_conditioned().problem()
    g = Objective(problem, lower=1.0, counts=OracleCounts())
    real = g.linearise

    def upside_down(x, y, wrt="xy"):
        at = real(x, y, wrt)
        at.value = -at.value
        return at

    g.linearise = upside_down
    result = NewtonCG().solve(g, problem.x, problem.y + 1, systems=LowerSystems())
    assert result.status is LowerStatus.STAGNATION


@pytest.mark.parametrize(("stiff", "dtype"), [(1e4, torch.float32), (1e4, torch.float64), (1e7, torch.float64)])
def test_a_stiff_direction_does_not_speak_for_the_soft_ones(stiff, dtype):
    """One CG step removes it and most of the gradient: what is left is small beside that, and far from solved."""
    n = 30
    curvature = torch.cat([torch.tensor([stiff]), torch.linspace(0.01, 1.0, n - 1)]).to(dtype)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.to(dtype)
    center = torch.ones(n, dtype=dtype)

    def g(x, y):
        z = Q @ (y - center)
        return 0.5 * (curvature * z * z).sum() + 0.01 * (z**4).sum() + 0 * x.sum()

    p = tb.BilevelProblem.from_functions(lambda x, y: y.sum(), g, torch.zeros(1, dtype=dtype), torch.zeros(n, dtype=dtype))
    objective = Objective(p, lower=1.0, counts=OracleCounts())
    tol = 1e-5
    result = NewtonCG(tol=tol).solve(objective, p.x, p.y, systems=LowerSystems(solver="cg"))
    assert result.status is LowerStatus.CONVERGED
    distance = float((result.y - center).norm())
    assert distance <= 10 * tol * (1 + float(center.norm()))


def test_what_a_step_left_tells_how_well_to_solve_for_the_next():
    """A step that can reach the residual is solved to reach it; one that cannot is not solved better for it."""
    torch.manual_seed(0)
    n, D = 40, torch.float64
    d = torch.logspace(-1, 1, n, dtype=D)

    def g(x, y):
        return (d * y**2).sum() / 2 + (y**4).sum() / 4 - x @ y

    p = tb.BilevelProblem.from_functions(lambda x, y: (y * y).sum() + x.sum(), g, torch.ones(n, dtype=D), torch.zeros(n, dtype=D))
    systems = LowerSystems(solver="cg")
    h = Objective(p, lower=1.0, counts=OracleCounts())
    y = NewtonCG().solve(h, p.x, p.y, systems=systems, residual=1e-3).y
    assert systems.bend is not None
    again = LowerSystems(solver="cg")
    again.load_state_dict(systems.state_dict(), p)
    assert again.bend == systems.bend
    x = p.x + 1e-3 * torch.randn(n, dtype=D)
    for residual, saved in ((1e-5, True), (1e-9, False)):
        gradients = []
        for bend in (None, systems.bend):
            again.bend, h = bend, Objective(p, lower=1.0, counts=OracleCounts())
            result = NewtonCG().solve(h, x, y, systems=again, residual=residual)
            assert result.status is LowerStatus.CONVERGED
            assert torch.linalg.vector_norm(torch.func.grad(g, 1)(x, result.y)) <= residual
            gradients.append(h.counts.lower_gradients)
        assert (gradients[1] < gradients[0]) == saved, (residual, gradients, systems.bend)

