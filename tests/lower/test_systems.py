"""LowerSystems: solves with h_yy, by a kept factor or without."""

from __future__ import annotations

import pytest
import torch
from torch.func import hessian

from torch_bilevel.errors import ConfigError
from torch_bilevel.linalg import SolveStatus
from torch_bilevel.lower import LowerSystems

D = torch.float64


def at_start(case, dtype=D):
    objective = case.objective(dtype)
    return objective.linearise(objective.problem.x, objective.problem.y, "y"), objective.counts


@pytest.mark.parametrize("damping", [0.0, 2.5])
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("solver", ["auto", "cg", "minres", "cholesky"])
def test_solves_the_damped_system(solver, columns, damping, case):
    problem = case("softmax")
    at, counts = at_start(problem)
    A = hessian(lambda y: problem.h(problem.x, y))(problem.y0) + damping * torch.eye(5, dtype=D)
    b = torch.randn(5, *(() if columns is None else (columns,)), dtype=D)
    solution = LowerSystems(solver=solver, damping=damping).solve(at, b)
    assert solution.ok
    assert solution.x.shape == b.shape
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    assert counts.solves == (columns or 1)
    assert counts.factorisations == (1 if solver in ("auto", "cholesky") else 0)


def test_auto_keeps_its_factor_as_a_preconditioner_elsewhere(case):
    problem = case("softmax")
    objective = problem.objective()
    x, y = objective.problem.x, objective.problem.y
    systems = LowerSystems()
    here, near = objective.linearise(x, y, "y"), objective.linearise(x, y + 1e-4, "y")
    b = torch.ones(5, dtype=D)
    systems.solve(here, b)
    assert objective.counts.factorisations == 1
    preconditioned = systems.solve(near, b)
    assert objective.counts.factorisations == 1
    assert preconditioned.ok
    plain = LowerSystems(solver="cg").solve(near, b)
    assert preconditioned.iterations < plain.iterations
    torch.testing.assert_close(preconditioned.x, plain.x, rtol=1e-8, atol=1e-10)


def test_cholesky_factors_at_every_point_once(case):
    problem = case("softmax")
    objective = problem.objective()
    x, y = objective.problem.x, objective.problem.y
    systems = LowerSystems(solver="cholesky")
    here, near = objective.linearise(x, y, "y"), objective.linearise(x, y + 0.1, "y")
    b = torch.ones(5, dtype=D)
    for _ in range(3):
        systems.solve(here, b), systems.solve(near, b)
    assert objective.counts.factorisations == 2


def test_state_is_the_kept_factor(case):
    problem = case("softmax")
    at, _ = at_start(problem)
    first, second = LowerSystems(), LowerSystems()
    first.solve(at, torch.ones(5, dtype=D))
    fresh, counts = at_start(problem)
    second.load_state_dict(first.state_dict(), fresh.objective.problem)
    a = second.solve(fresh, torch.ones(5, dtype=D))
    assert a.ok
    assert counts.factorisations == 0
    assert a.iterations <= 2


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
def test_an_indefinite_system_is_reported(solver, case):
    problem = case("softmax")
    problem.h = lambda x, y: (y[0] ** 2 - y[1:].pow(2).sum() / 4) + x.sum()
    at, _ = at_start(problem)
    solution = LowerSystems(solver=solver).solve(at, torch.ones(5, dtype=D))
    assert solution.status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NOT_POSITIVE_DEFINITE)
    assert float(solution.curvature) < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"solver": "choleski"}, "did you mean 'cholesky'"), ({"damping": float("nan")}, "damping"),
     ({"damping": -0.1}, "damping: expected a number >= 0")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LowerSystems(**options)
