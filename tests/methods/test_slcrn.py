"""SLCRN: the published loop iterate by iterate, the simple modifications that fail, lag, and its lazy kin."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad

import torch_bilevel as tb
from benchmarks.lazy_vs_fresh import cleaning
from tests.methods.test_cubic_newton import cubic_minimizer
from tests.problems import Case, hyper_cleaning, nonconvex
from tests.reference import blocks

FIXED = {"adaptive": False, "cubic_reg": 200.0, "lower_step": 0.2}


def published(f, g, x, y, *, M, lower_step, steps, period=1):
    """SLCRN in the reading of docs/methods.md, dense: x after each step."""
    points, H = [], None
    for t in range(steps):
        slope = grad(g, 1)(x, y)
        yh = y - torch.linalg.solve(blocks(g, x, y)[3], slope)
        _, xy, yx, yy = blocks(g, x, yh)
        v = torch.linalg.solve(yy, grad(f, 1)(x, yh))

        def lagrangian(x, y, v=v):
            return f(x, y) - v @ grad(g, 1)(x, y)

        gradient = grad(f)(x, yh) - xy @ v
        if t % period == 0:
            Y = -torch.linalg.solve(yy, yx)
            Lxx, Lxy, Lyx, Lyy = blocks(lagrangian, x, yh)
            H = Lxx + Lxy @ Y + Y.T @ Lyx + Y.T @ Lyy @ Y
        x, y = x + cubic_minimizer(gradient, (H + H.T) / 2, M), y - lower_step * slope
        points.append(x)
    return points


@pytest.mark.parametrize("period", [1, 3])
def test_published_settings_follow_the_published_loop(period):
    case, seen = nonconvex(), []
    expected = published(case.f, case.g, case.x0, case.y0, M=200.0, lower_step=0.2, steps=8, period=period)
    result = tb.minimize(case.problem(), "slcrn", period=period, max_steps=8, gradient_tol=0.0, **FIXED,
                         callback=lambda report, x, y: seen.append(x.clone()))  # fmt: skip
    assert result.counts.hessians == math.ceil(8 / period)
    assert result.counts.lower_gradients == 18
    for ours, theirs in zip(seen[1:], expected, strict=True):
        assert float((ours - theirs).norm()) <= 1e-8 * (1 + float(theirs.norm()))
    assert float((seen[-1] - seen[0]).norm()) > 0.1


def scalar(a: float) -> Case:
    """f = a x^2/2 + y^2/2, g = (y - x)^2/2: phi = (a + 1) x^2 / 2."""
    x0 = torch.ones(1, dtype=torch.float64)
    return Case("scalar", lambda x, y: (a * x * x + y * y).sum() / 2, lambda x, y: ((y - x) ** 2).sum() / 2, x0, 0 * x0)


def without_newton_step(a: float, steps: int) -> float:
    """|x| after the loop that takes the gradient at y itself, one lower gradient step of length 1/2 per iteration."""
    x, y, M = 1.0, 0.0, 1.0
    for _ in range(steps):
        gradient, H = a * x + y, a + 1.0  # v = f_y = y, grad = f_x - g_xy v
        # s solves (H + M|s|/2) s = -gradient
        s = -math.copysign((-H + math.sqrt(H * H + 2 * M * abs(gradient))) / M, gradient)
        x, y = x + s, y - 0.5 * (y - x)
    return abs(x)


@pytest.mark.parametrize("a", [0.5, -0.3, -0.5, -0.8])
def test_the_newton_step_is_what_makes_it_converge(a):
    result = tb.minimize(scalar(a).problem(), "slcrn", adaptive=False, cubic_reg=1.0, lower_step=0.5, max_steps=40,
                         gradient_tol=1e-12)  # fmt: skip
    assert result.status is tb.Status.SECOND_ORDER
    assert abs(float(result.x)) < 1e-11
    rest = without_newton_step(a, 400)
    assert rest < 1e-6 if a > 0 else rest > 1e-2


@pytest.mark.parametrize("method", ["slcrn", "lazy_slcrn"])
def test_a_lagging_learner_neither_stalls_nor_ends_the_run_too_early(method):
    """A weakly convex lower level: y is far behind. Values of different lag say nothing of M, and the gradient at yh is
    ten times smaller than the exact one; a run that ends has made sure of it."""
    case, tol = hyper_cleaning(), 1e-5
    result = tb.minimize(case.problem(), method, max_steps=150, gradient_tol=tol)
    assert result.status is tb.Status.SECOND_ORDER
    assert any(not report.accepted for report in result.history)
    assert next(report.step for report in result.history if report.gradient_norm <= tol) < result.history[-1].step
    assert float(case.reference.implicit(result.x).gradient.norm()) <= 2.1 * tol
    assert result.counts.lower_solves == 0


def test_lag_does_not_inflate_the_regularisation():
    """Values that only caught up made M grow without end; then the gradients are compared instead."""
    result = tb.minimize(cleaning(0), "slcrn", max_steps=60)
    assert result.status is tb.Status.SECOND_ORDER
    assert any(not report.accepted for report in result.history)
    assert max(report.cubic_reg for report in result.history[1:]) < 1e3
    assert tb.certify(cleaning(0), result.x).is_sosp(2e-6)


def test_lazy_slcrn_makes_fewer_hessians_for_as_many_gradients():
    eager, lazy = (tb.minimize(nonconvex().problem(), method) for method in ("slcrn", "lazy_slcrn"))
    assert lazy.status is eager.status is tb.Status.SECOND_ORDER
    assert lazy.value == pytest.approx(eager.value, abs=1e-8)
    assert lazy.counts.hessians <= 0.7 * eager.counts.hessians
    assert lazy.counts.lower_gradients <= 1.6 * eager.counts.lower_gradients
    assert lazy.method == "lazy_slcrn"
