"""IFSBA: matrix-free steps, the published subsolver, and 100,000 hyperparameters in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import torch_bilevel as tb
from tests.problems import nonconvex, quadratic, saddle
from torch_bilevel.lower import LowerSystems


def test_no_factor_and_no_matrix_is_made(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("formed a matrix")

    monkeypatch.setattr(LowerSystems, "factor_at", refuse)
    run = tb.make_method("ifsba").start(nonconvex().problem())
    for _ in range(10):
        run.step()
    assert run.model.kind == "krylov"
    assert run.model.matrix is None
    assert run.counts.factorisations == 0
    assert run.counts.solves > 0


def test_follows_the_dense_method_when_solved_exactly():
    options = {"max_steps": 6, "gradient_tol": 0.0, "period": 1, "cubic_reg": 50.0}  # the first M looks at |H|
    dense = tb.minimize(nonconvex().problem(), "lfsba", **options)
    free = tb.minimize(nonconvex().problem(), "ifsba", model_tol=1e-10, hessian_tol=1e-12, **options)
    torch.testing.assert_close(free.x, dense.x, rtol=0, atol=1e-5)


def test_published_settings_reach_the_minimum():
    """Chebyshev inverse, gradient descent from the Cauchy point, constant M, forward scheme, period 1."""
    case = saddle((0.3, -0.2, 0.0))
    result = tb.minimize(
        case.problem(), "ifsba", period=1, scheme="forward", penalty=10.0, adaptive=False, cubic_reg=2.0,
        solver="chebyshev", subproblem="gradient", eps=1e-4, gradient_tol=1e-3, max_steps=100,
    )  # fmt: skip
    assert result.status is tb.Status.SECOND_ORDER
    assert result.counts.factorisations == 0
    assert result.value == pytest.approx(case.minimum, abs=1e-5)
    assert result.counts.hessians == result.history[-1].step


def test_inexact_products_cost_less():
    tight = tb.minimize(quadratic(8, 30).problem(), "ifsba", model_tol=1e-10, hessian_tol=1e-12)
    loose = tb.minimize(quadratic(8, 30).problem(), "ifsba")
    assert tight.status is loose.status is tb.Status.SECOND_ORDER
    assert loose.counts.oracle_calls < tight.counts.oracle_calls


LARGE = """
import resource, torch, torch_bilevel as tb
dx, dy = 100_000, 50
t = torch.linspace(-1, 1, dy, dtype=torch.float64)
def mean(x): return x.reshape(dy, -1).mean(1)
def g(x, y): return ((y - torch.sin(mean(x))) ** 2).sum() / 2 + (y ** 4).sum() / 20
def f(x, y): return ((y - t) ** 2).sum() / 2 + (x * x).mean() / 100 + (x ** 4).mean() / 100
problem = tb.BilevelProblem.from_functions(f, g, torch.full((dx,), 0.5, dtype=torch.float64), 0 * t)
problem.exact_oracle().evaluate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = tb.minimize(problem, "ifsba", max_basis=20, max_steps=12, gradient_tol=1e-6)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(grown, result.history[0].gradient_norm, result.gradient_norm, result.counts.factorisations)
"""


@pytest.mark.slow
def test_a_hundred_thousand_hyperparameters_in_bounded_memory():
    """A dense hyper-Hessian would take 80 GB; two bases of 20 vectors take 32 MB. Its own process, for the peak."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, first, last, factorisations = map(float, done.stdout.split())
    assert grown < 250  # MB
    assert last < 1e-2 * first
    assert factorisations == 0
