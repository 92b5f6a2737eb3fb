"""Chord steps: what they cost, where they stop, when none are made, and that Newton steps take over."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import CholeskyFactor
from torch_bilevel.lower import LowerStatus, LowerSystems, NewtonCG
from torch_bilevel.lower import chord as chord_module
from torch_bilevel.lower.chord import SLOW, chord_steps

D, N = torch.float64, 12


def quartic(x, y):
    """Strongly convex, with condition 100 and a Hessian that changes with y."""
    d = torch.logspace(-1, 1, N, dtype=y.dtype)
    return (d * y**2).sum() / 2 + 0.1 * (y**4).sum() - x @ y


@pytest.fixture
def problem():
    start = torch.linspace(-1, 1, N, dtype=D)
    return tb.BilevelProblem.from_functions(lambda x, y: (y * y).sum() + x.sum(), quartic, start, torch.zeros(N, dtype=D))


def objective(problem) -> Objective:
    return Objective(problem, lower=1.0, counts=OracleCounts())


def solution(x):
    """By Newton's method with dense Hessians of its own."""
    y = torch.zeros(N, dtype=D)
    for _ in range(60):
        step = torch.linalg.solve(torch.func.hessian(quartic, 1)(x, y), torch.func.grad(quartic, 1)(x, y))
        y = y - step
    return y


@pytest.fixture
def near(problem):
    """Systems whose factor is that of the solution at the problem's x, that solution, and an x not far."""
    systems = LowerSystems()
    y = NewtonCG().solve(objective(problem), problem.x, problem.y, systems=systems).y
    systems.factor_at(objective(problem).linearise(problem.x, y, "y"))
    return systems, y, problem.x + 0.01 * torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=D)


def test_near_the_factor_a_solve_takes_gradients_alone(problem, near):
    systems, y, x = near
    h = objective(problem)
    result = NewtonCG().solve(h, x, y, systems=systems)
    assert result.status is LowerStatus.CONVERGED
    assert result.iterations == 0  # of Newton's method
    distance = torch.linalg.vector_norm(result.y - solution(x))
    assert distance <= 1e-10 * (1 + torch.linalg.vector_norm(result.y))
    assert distance <= 2 * result.error
    assert h.counts.lower_products == h.counts.solves == 0
    assert 2 < h.counts.lower_gradients <= 2 + chord_module.MOST
    assert 0 < systems.kept.contraction <= SLOW


@pytest.mark.parametrize("residual", [1e-3, 1e-6, 1.0])
def test_they_end_at_the_residual_asked_for_and_a_hundredth_of_the_first(problem, near, residual):
    systems, y, x = near
    h = objective(problem)
    start = chord_steps(h, x, y, systems, tol=0.0, residual=residual, reduction=1e-2)
    gradient = torch.func.grad(quartic, 1)
    assert start.first == pytest.approx(float(gradient(x, y).norm()))
    torch.testing.assert_close(start.norm, gradient(x, start.y).norm())
    torch.testing.assert_close(start.at.gy, gradient(x, start.y))
    target = min(residual, 1e-2 * start.first)
    assert start.norm <= target
    before = y
    for _ in range(h.counts.lower_gradients - 2):  # one step less would not have done
        before = before - systems.factor.solve(gradient(x, before))
    assert gradient(x, before).norm() > target


def test_far_from_the_factor_one_slow_step_is_made_and_none_until_there_is_another(problem, near):
    systems, y, x = near
    far = x + 20.0
    start = chord_steps(objective(problem), far, y, systems, tol=1e-10, residual=0.0, reduction=1e-2)
    assert start.norm > SLOW * start.first
    assert systems.kept.contraction > SLOW
    h = objective(problem)
    again = chord_steps(h, far, y, systems, tol=1e-10, residual=0.0, reduction=1e-2)
    assert (h.counts.lower_gradients, again.error) == (1, None)
    result = NewtonCG().solve(h, far, y, systems=systems)
    assert result.status is LowerStatus.CONVERGED
    assert torch.linalg.vector_norm(result.y - solution(far)) <= 1e-9
    systems.factor_at(objective(problem).linearise(far, result.y, "y"))
    assert systems.kept.contraction is None


def test_a_step_that_raises_the_gradient_is_taken_back(problem, near):
    systems, y, x = near
    systems.kept.factor = CholeskyFactor.from_lower(0.5 * systems.factor.L)  # steps four times too long
    h = objective(problem)
    start = chord_steps(h, x, y, systems, tol=1e-10, residual=0.0, reduction=1e-2)
    assert torch.equal(start.y, y)
    assert torch.equal(start.at.gy, torch.func.grad(quartic, 1)(x, y))
    assert h.counts.lower_gradients == 2
    assert NewtonCG().solve(h, x, y, systems=systems).status is LowerStatus.CONVERGED


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_none_where_the_solver_is_another(problem, near, solver):
    _, y, x = near
    systems, h = LowerSystems(solver=solver), objective(problem)
    systems.factor_at(objective(problem).linearise(problem.x, y, "y"))
    start = chord_steps(h, x, y, systems, tol=1e-10, residual=0.0, reduction=1e-2)
    assert (h.counts.lower_gradients, start.error) == (1, None)
    assert torch.equal(start.y, y)


def test_a_nan_ends_a_solve_as_it_does_without_them(problem, near):
    systems, y, x = near
    for bad in (x.clone(), x + torch.inf):
        bad[0] = torch.nan
        assert NewtonCG().solve(objective(problem), bad, y, systems=systems).status is LowerStatus.NON_FINITE


def test_many_steps_bring_a_new_factor_near(problem, near):
    systems, y, x = near
    spent = systems.kept.spent
    h = objective(problem)
    NewtonCG().solve(h, x, y, systems=systems)
    steps = h.counts.lower_gradients - 1
    assert steps > 2
    assert systems.kept.spent == pytest.approx(spent + (steps - 2) * systems.ladder(h.linearise(x, y, "y")).step(N))


def test_a_checkpoint_knows_what_steps_leave(problem, near):
    systems, y, x = near
    NewtonCG().solve(objective(problem), x, y, systems=systems)
    other = LowerSystems()
    other.load_state_dict(systems.state_dict(), problem)
    assert other.kept.contraction == systems.kept.contraction
    one, two = (NewtonCG().solve(objective(problem), x + 0.01, y, systems=s) for s in (systems, other))
    assert torch.equal(one.y, two.y)


def test_what_a_factor_far_too_large_does_not_move_is_left_to_newton_steps(problem, near):
    """The only direction along which x has moved is 1e12 times too stiff: F^{-1} h_y is tiny, and y far from solved."""
    systems, y, x = near
    x = torch.where(torch.arange(N) == 0, x, problem.x)
    L = systems.factor.L.clone()
    L[0, 0] *= 1e6
    systems.kept.factor = CholeskyFactor.from_lower(L)
    result = NewtonCG().solve(objective(problem), x, y, systems=systems)
    assert result.status is LowerStatus.CONVERGED
    assert result.iterations > 0
    assert torch.linalg.vector_norm(result.y - solution(x)) <= 1e-9


def test_a_start_that_is_solved_says_nothing_of_the_factor(problem, near):
    systems, y, x = near
    solved = NewtonCG().solve(objective(problem), x, y, systems=systems).y
    contraction = systems.kept.contraction
    for _ in range(3):
        again = NewtonCG().solve(objective(problem), x, solved, systems=systems)
        assert again.status is LowerStatus.CONVERGED
        assert torch.linalg.vector_norm(again.y - solved) <= 1e-10
    assert systems.kept.contraction == contraction
