"""certify against dense formulas: gradient, curvature, and honest errors."""

from __future__ import annotations

import math

import pytest
import torch

import torch_bilevel as tb
from tests.problems import CASES, hyper_cleaning, ill_conditioned, nonconvex, one_by_one, quadratic, saddle
from torch_bilevel.certify import Certificate, smallest_eigenvalue
from torch_bilevel.errors import ConfigError
from torch_bilevel.linalg import FunctionOperator


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_gradient_and_curvature(case):
    x = case.x0 + 0.1
    cert = tb.certify(case.problem(), x)
    dense = case.reference.implicit(x)
    values = torch.linalg.eigvalsh(dense.hessian)
    assert cert.value == pytest.approx(float(dense.value), rel=1e-8)
    assert abs(cert.gradient_norm - float(dense.gradient.norm())) <= cert.gradient_error + 1e-9 * cert.gradient_norm
    size = float(values.abs().max())
    assert abs(cert.min_eigenvalue - float(values[0])) <= cert.min_eigenvalue_error + 1e-7 * size
    assert cert.hessian_norm == pytest.approx(size, rel=1e-6)
    assert cert.x_norm == pytest.approx(float(x.norm()))


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("case", [nonconvex(), hyper_cleaning(), ill_conditioned(), one_by_one()], ids=lambda c: c.name)
def test_gradient_error_covers_a_loose_lower_solve(case, tol):
    x = case.x0 - 0.2
    loose = {"lower": {"name": "newton_cg", "tol": tol}, "lower_tol": tol}
    cert = tb.certify(case.problem(), x, **loose)
    exact = float(case.reference.implicit(x).gradient.norm())
    # a first-order estimate: the second-order remainder is the square of the lower error
    assert abs(cert.gradient_norm - exact) <= 2 * cert.gradient_error + 1e-12


def test_gradient_error_is_not_vacuous():
    case = nonconvex()
    tight = tb.certify(case.problem(), case.x0)
    assert tight.gradient_error <= 1e-8 * tight.gradient_norm
    loose = tb.certify(case.problem(), case.x0, lower={"name": "gradient_descent", "steps": 3})
    exact = float(case.reference.implicit(case.x0).gradient.norm())
    assert loose.gradient_error > 100 * tight.gradient_error
    assert abs(loose.gradient_norm - exact) <= 3 * loose.gradient_error  # far off, the estimate still sees it


@pytest.mark.parametrize("method", ["fsba", "lfsba", "dlcrn"])
def test_the_end_of_a_run_is_second_order_stationary(method):
    case = nonconvex()
    problem = case.problem()
    result = tb.minimize(problem, method, gradient_tol=1e-7)
    cert = tb.certify(problem)  # at the point the run has written
    eps = 1e-6 if method == "dlcrn" else 1e-4  # the surrogate's bias, O(1/penalty^2) of terms of size 10
    assert cert.is_sosp(eps)
    assert cert.is_sosp(eps, math.sqrt(cert.cubic_reg * eps))
    assert "is (" in cert.describe(eps)
    assert not cert.is_sosp(1e-14)
    assert torch.equal(problem.x, result.x)
    assert torch.equal(problem.y, result.y)


def test_a_saddle_is_not_second_order_stationary():
    cert = tb.certify(saddle().problem())
    assert cert.gradient_norm == 0.0
    assert cert.min_eigenvalue == pytest.approx(-0.2, abs=1e-9)
    assert cert.cubic_reg == pytest.approx(2.0, rel=1e-6)  # |w'''| = 2 beside 0
    assert not cert.is_sosp(1e-6)
    assert not cert.is_sosp(1e-3)
    assert cert.is_sosp(1e-6, delta=0.21)
    assert not cert.is_sosp(1e-6, delta=0.19)
    assert cert.is_sosp(0.03)  # sqrt(2 * 0.03) > 0.2: at so rough an eps it does count as one
    assert "is not" in str(cert)
    assert tb.certify(saddle().problem(), cubic_reg=8.0).cubic_reg == 8.0


def test_wrong_eps():
    with pytest.raises(ConfigError, match="eps: expected a positive number"):
        tb.certify(quadratic().problem()).is_sosp(0.0)


def test_a_runaway_is_mentioned():
    cert = Certificate(1.0, 1e-9, 1e-12, 1e-8, 1e-12, 1.0, 1.0, x_norm=500.0)
    assert "running to infinity" in cert.describe(1e-6)
    near = Certificate(1.0, 1e-9, 1e-12, 1e-8, 1e-12, 1.0, 1.0, x_norm=5.0)
    assert "infinity" not in near.describe(1e-6)


def test_nan_is_never_stationary():
    for field in ("gradient_norm", "gradient_error", "min_eigenvalue", "min_eigenvalue_error"):
        numbers = {"value": 1.0, "gradient_norm": 0.0, "gradient_error": 0.0, "min_eigenvalue": 1.0,
                   "min_eigenvalue_error": 0.0, "hessian_norm": 1.0, "cubic_reg": 1.0, "x_norm": 1.0}  # fmt: skip
        assert Certificate(**numbers).is_sosp(1e-6)
        assert not Certificate(**{**numbers, field: math.nan}).is_sosp(1e-6)


@pytest.mark.parametrize("n", [50, 400])  # dense, Lanczos
def test_smallest_eigenvalue(n):
    values = torch.linspace(-0.5, 3.0, n, dtype=torch.float64)
    values[0] = -1.0
    H = FunctionOperator(n, lambda v: values * v, lambda V: values[:, None] * V, dtype=torch.float64,
                         device=torch.device("cpu"))  # fmt: skip
    value, error, norm, u = smallest_eigenvalue(H, tol=1e-4)
    assert abs(value + 1.0) <= error + 1e-12
    assert error <= 1e-2
    assert 2.5 <= norm <= 3.0 + 1e-9
    assert float((values * u - value * u).norm()) <= error + 1e-9


def test_layers_without_third_derivatives_are_judged_by_the_surrogate():
    gen = torch.Generator().manual_seed(0)
    X, t = torch.randn(10, 3, generator=gen).double(), torch.randn(10, 1, generator=gen).double()
    learner = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 1)).double()

    def lower(learner, hyper, batch):
        parts = sum((p**2).sum() for p in learner.parameters())
        return ((learner(X) - t) ** 2).mean() + hyper.exp().sum() * parts

    problem = tb.BilevelProblem(learner, torch.zeros(2).double(), lower,
                                lambda learner, hyper, batch: (learner(X) ** 2).mean() + (hyper**2).sum(), (), ())  # fmt: skip
    with pytest.raises(tb.UnsupportedLayerError):
        _ = tb.ImplicitOracle(problem).evaluate().hessian
    cert = tb.certify(problem)
    h = 1e-4
    oracle = tb.ImplicitOracle(problem)
    columns = [(oracle.evaluate(problem.x + h * e).gradient - oracle.evaluate(problem.x - h * e).gradient) / (2 * h)
               for e in torch.eye(2, dtype=torch.float64)]  # fmt: skip
    expected = float(torch.linalg.eigvalsh(torch.stack(columns))[0])
    assert cert.min_eigenvalue == pytest.approx(expected, rel=1e-4)
