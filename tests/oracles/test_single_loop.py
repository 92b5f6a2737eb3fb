"""The single-loop oracle: orders of its errors against the dense reference, iterate, safeguard, error estimate."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad

import torch_bilevel as tb
from tests.reference import error, smooth
from torch_bilevel.oracles import SingleLoopOracle


def problem_at(ref, y: torch.Tensor) -> tb.BilevelProblem:
    return tb.BilevelProblem.from_functions(ref.f, ref.g, ref.x, y, check=False)


def direction(n: int) -> torch.Tensor:
    u = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return u / u.norm()


def orders(errors: list[float], ratio: float) -> list[float]:
    return [math.log(a / b) / math.log(ratio) for a, b in zip(errors, errors[1:])]


def test_gradient_and_hessian_err_by_e_squared_and_the_value_by_e_to_the_fourth():
    ref = smooth()
    exact, u = ref.implicit(), direction(ref.y0.numel())
    gradients, hessians, values = [], [], []
    for e in (0.4, 0.2, 0.1, 0.05):
        ev = SingleLoopOracle(problem_at(ref, exact.y + e * u)).evaluate()
        gradients.append(float((ev.gradient - exact.gradient).norm()))
        hessians.append(float((ev.hessian.to_dense() - exact.hessian).norm()))
        values.append(abs(float(ev.value - exact.value)))
    assert orders(gradients, 2.0)[-1] == pytest.approx(2.0, abs=0.2)
    assert orders(hessians, 2.0)[-1] == pytest.approx(2.0, abs=0.25)
    assert orders(values, 2.0)[-1] == pytest.approx(4.0, abs=0.4)
    # without the Newton step the gradient errs by e: a hundred times as much here
    at_y = tb.ImplicitOracle(problem_at(ref, ref.y0)).at_point(ref.x, exact.y + 0.05 * u)
    assert float((at_y.gradient - exact.gradient).norm()) > 10 * gradients[-1]


def test_its_iterate_takes_one_gradient_step_from_the_old_x_and_y():
    ref, step = smooth(), 0.1
    oracle = SingleLoopOracle(problem_at(ref, ref.y0), lower_step=step)
    y, x = ref.y0, ref.x
    for _ in range(3):
        oracle.evaluate(x)
        y = y - step * grad(ref.g, 1)(x, y)
        assert error(oracle.warm["y"], y) < 1e-12
        x = x + 0.1
    assert oracle.counts.lower_gradients == 6
    assert oracle.counts.lower_solves == 0
    assert oracle.counts.solves == 6


def test_repeated_at_one_point_it_becomes_exact():
    ref = smooth()
    exact, oracle = ref.implicit(), SingleLoopOracle(problem_at(ref, ref.y0))
    assert oracle.single_loop
    assert not tb.ImplicitOracle(problem_at(ref, ref.y0)).single_loop
    errors = [float((oracle.evaluate().gradient - exact.gradient).norm()) for _ in range(40)]
    assert errors[-1] < 1e-10
    assert errors[-1] < 1e-6 * errors[0]


def test_a_newton_step_that_diverges_is_halved():
    """g = sqrt(1 + (y-x)^2) + 0.025 (y-x)^2: from y - x = 2 the raw Newton point lies farther away."""
    one = torch.ones(1, dtype=torch.float64)

    def g(x, y):
        return (torch.sqrt(1 + (y - x) ** 2) + 0.025 * (y - x) ** 2).sum()

    problem = tb.BilevelProblem.from_functions(lambda x, y: ((y - 1) ** 2).sum() / 2, g, 0 * one, 2 * one, check=False)
    y = 2 * one
    slope = grad(g, 1)(0 * one, y)
    curvature = grad(grad(lambda y: g(0 * one, y.reshape(1))))(y[0])
    raw = y - slope / curvature
    assert abs(float(grad(g, 1)(0 * one, raw))) > abs(float(slope))
    oracle = SingleLoopOracle(problem)
    ev = oracle.evaluate()
    assert abs(float(grad(g, 1)(0 * one, ev.y))) < abs(float(slope))
    assert oracle.counts.lower_gradients > 2
    for _ in range(30):
        ev = oracle.evaluate()
    assert abs(float(ev.y)) < 1e-9


def test_gradient_error_estimates_the_error():
    ref = smooth()
    exact, u = ref.implicit(), direction(ref.y0.numel())
    for e in (0.2, 0.05):
        oracle = SingleLoopOracle(problem_at(ref, exact.y + e * u))
        ev = oracle.evaluate()
        true = float((ev.gradient - exact.gradient).norm())
        assert true / 1.5 <= oracle.gradient_error(ev) <= 1.5 * true


def test_options():
    ref = smooth()
    for name in ("lower", "lower_tol"):
        with pytest.raises(tb.ConfigError, match=f"{name}: a single-loop oracle has no lower solver"):
            SingleLoopOracle(problem_at(ref, ref.y0), **{name: 1e-3})
    with pytest.raises(tb.ConfigError, match="lower_step: expected a positive number"):
        SingleLoopOracle(problem_at(ref, ref.y0), lower_step=-1.0)
    with pytest.raises(tb.NonFiniteError):
        SingleLoopOracle(problem_at(ref, math.nan * ref.y0)).evaluate()
