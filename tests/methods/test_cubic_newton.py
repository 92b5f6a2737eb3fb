"""FSBA, LFSBA and DLCRN: saddles, laziness by counts, the published loops iterate by iterate, the theory's decrease."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import grad

import torch_bilevel as tb
from tests.problems import LENGTH, ROOT, hyper_cleaning, nonconvex, saddle, w_shape
from tests.reference import blocks

METHODS = ("fsba", "lfsba", "dlcrn")


def phi_of_saddle(x: Tensor) -> Tensor:
    """The saddle's hyper-objective in closed form."""
    return w_shape(x[2]) + x[0] ** 2 / 40 + x[1] ** 2 / 20


# -- strict saddles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "krylov"])
@pytest.mark.parametrize("method", METHODS)
def test_leaves_a_strict_saddle_from_exactly_zero(method, kind):
    problem = saddle().problem()
    assert float(grad(phi_of_saddle)(problem.x).norm()) == 0.0
    result = tb.minimize(problem, method, hessian=kind, gradient_tol=1e-7)
    assert result.history[0].gradient_norm == 0.0
    assert result.status is tb.Status.SECOND_ORDER
    assert float(grad(phi_of_saddle)(result.x).norm()) <= 1e-6
    H = torch.func.hessian(phi_of_saddle)(result.x)
    assert float(torch.linalg.eigvalsh(H)[0]) >= 0.04
    assert abs(float(result.x[2])) == pytest.approx((LENGTH + 1) * ROOT, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_saddle_may_be_left_to_both_sides(method):
    sides = {math.copysign(1.0, float(tb.minimize(saddle().problem(), method, seed=s).x[2])) for s in range(6)}
    assert sides == {-1.0, 1.0}


@pytest.mark.parametrize("start", [(0.0, 0.0, 1e-9), (0.3, -0.2, 0.0), (0.0, 1.0, -0.05)])
def test_saddle_from_nearby(start):
    result = tb.minimize(saddle(start).problem(), "lfsba")
    assert result.value == pytest.approx(saddle().minimum, abs=1e-9)


def test_saddle_in_float32_and_published_settings():
    assert tb.minimize(saddle().problem(torch.float32), "fsba", gradient_tol=1e-5).value == pytest.approx(
        saddle().minimum, abs=1e-7
    )
    agd = {"name": "agd", "steps": 25, "step": 0.05, "momentum": 0.2}
    options = {"adaptive": False, "cubic_reg": 2.0, "scheme": "forward", "penalty": 10.0, "lower": agd}
    for method in (tb.FSBA(**options), tb.LFSBA(period=2, **options)):
        result = tb.minimize(saddle().problem(), method, gradient_tol=1e-5, max_steps=200)
        assert result.status is tb.Status.SECOND_ORDER
        assert result.value == pytest.approx(saddle().minimum, abs=1e-5)


# -- laziness, by counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 4, 7])
@pytest.mark.parametrize("case", [nonconvex(), hyper_cleaning()], ids=lambda case: case.name)
def test_one_hessian_per_m_accepted_steps(case, period):
    # a first M far too small makes sure that steps are rejected
    result = tb.minimize(case.problem(), "lfsba", period=period, cubic_reg=1e-3, max_steps=12, gradient_tol=0.0)
    steps = result.history[1:]
    assert any(not step.accepted for step in steps)
    due, accepted = 0, 0
    for step in steps:
        assert step.refreshed == (accepted == due)
        due += period if step.refreshed else 0
        accepted += step.accepted
    accepted_before_last = sum(step.accepted for step in steps[:-1])
    assert result.counts.hessians == sum(step.refreshed for step in steps) == accepted_before_last // period + 1


def test_adaptive_refresh_makes_fewer_hessians_than_steps():
    for case in (nonconvex(), hyper_cleaning()):
        lazy = tb.minimize(case.problem(), "lfsba")
        assert lazy.status.converged
        assert lazy.counts.hessians <= 0.6 * lazy.history[-1].step
    eager = tb.minimize(case.problem(), "fsba")
    assert lazy.counts.hessians < eager.counts.hessians
    assert lazy.counts.oracle_calls < eager.counts.oracle_calls


def test_every_step_costs_one_evaluation():
    result = tb.minimize(nonconvex().problem(), "lfsba", max_steps=10, gradient_tol=0.0)
    assert result.counts.evaluations == 11


# -- the published loops -------------------------------------------------------------------------------------------


def cubic_minimizer(g: Tensor, H: Tensor, M: float) -> Tensor:
    """argmin g's + s'Hs/2 + (M/6)|s|^3 by bisection on r = |s| = |(H + M r / 2)^{-1} g| (not the hard case)."""
    values, Q = torch.linalg.eigh(H)
    b = Q.T @ g
    low = max(0.0, -2 * float(values[0]) / M)
    high = low + 1.0
    while float((b / (values + M * high / 2)).norm()) > high:
        high *= 2
    for _ in range(200):
        r = (low + high) / 2
        low, high = (r, high) if float((b / (values + M * r / 2)).norm()) > r else (low, r)
    return -Q @ (b / (values + M * high / 2))


def published(f, g, x, y, *, penalty, M, period, steps, inner, step, momentum) -> list[Tensor]:
    """FSBA (period 1) and LFSBA of arXiv 2605.06431, dense, with K steps of accelerated gradient inside."""

    def agd(h, start):
        y = z = start
        for _ in range(inner):
            new = z - step * grad(h)(z)
            z = new + momentum * (new - y)
            y = new
        return y

    def schur(h, x, y):
        xx, xy, yx, yy = blocks(h, x, y)
        return xx - xy @ torch.linalg.solve(yy, yx)

    iterates, z, H = [x], y, None
    y = None
    for t in range(steps):
        z = agd(lambda y, x=x: g(x, y), z)
        y = agd(lambda y, x=x: g(x, y) + f(x, y) / penalty, z if y is None else y)
        gradient = grad(f)(x, y) + penalty * (grad(g)(x, y) - grad(g)(x, z))
        if t % period == 0:
            H = penalty * (schur(lambda x, y: g(x, y) + f(x, y) / penalty, x, y) - schur(g, x, z))
            H = (H + H.T) / 2
        x = x + cubic_minimizer(gradient, H, M)
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("case", [nonconvex(), hyper_cleaning()], ids=lambda case: case.name)
def test_published_settings_follow_the_published_loop(case, period):
    M, penalty, steps = 300.0, 10.0, 9
    inner = {"steps": 8, "step": 0.3, "momentum": 0.2}
    expected = published(case.f, case.g, case.x0, case.y0, penalty=penalty, M=M, period=period, steps=steps,
                         inner=inner["steps"], step=inner["step"], momentum=inner["momentum"])  # fmt: skip
    seen = []
    options = {"adaptive": False, "cubic_reg": M, "scheme": "forward", "penalty": penalty,
               "lower": {"name": "agd", **inner}}  # fmt: skip
    method = tb.FSBA(**options) if period == 1 else tb.LFSBA(period=period, **options)
    result = tb.minimize(case.problem(), method, max_steps=steps, gradient_tol=0.0,
                         callback=lambda report, x, y: seen.append(x.clone()))  # fmt: skip
    assert result.counts.hessians == math.ceil(steps / period)
    assert all(report.accepted and report.cubic_reg == M for report in result.history[1:])
    for ours, theirs in zip(seen, expected, strict=True):
        assert float((ours - theirs).norm()) <= 1e-8 * (1 + float(theirs.norm()))
    assert float((seen[-1] - seen[0]).norm()) > 0.1  # they went somewhere


# -- theory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fsba", "dlcrn"])
@pytest.mark.parametrize("M", [2.0, 6.0])
def test_fixed_regularisation_decreases_as_the_theory_says(method, M):
    """|w'''| <= 2, so M >= L2 = 2 gives phi(x) - phi(x + s) >= M |s|^3 / 12 at every step."""
    case = saddle((1.0, -1.0, 0.02))
    result = tb.minimize(case.problem(), method, adaptive=False, cubic_reg=M, stop_rule="step", gradient_tol=1e-6)
    assert result.status is tb.Status.STEP_RULE
    assert result.status.converged
    for before, after in zip(result.history, result.history[1:]):
        decrease = before.value - after.value
        assert decrease >= M * after.step_norm**3 / 12 - 1e-14
    last = result.history[-1]
    assert last.step_norm <= 0.5 * math.sqrt(1e-6 / M)
    assert all(report.step_norm > 0.5 * math.sqrt(1e-6 / M) for report in result.history[1:-1])
    assert result.value == pytest.approx(case.minimum, abs=1e-6)


def test_newton_convergence_near_the_end():
    result = tb.minimize(nonconvex().problem(), "fsba", gradient_tol=1e-9)
    norms = [report.gradient_norm for report in result.history if report.accepted]
    # |g+| <= C |g|^2 once near; superlinear: the last two contractions are below 1/20 and get better
    assert norms[-1] / norms[-2] < 0.05
    assert norms[-2] / norms[-3] < 0.2


def test_more_regularisation_makes_a_shorter_first_step():
    lengths = []
    for M in (1.0, 100.0, 1e4):
        result = tb.minimize(nonconvex().problem(), "dlcrn", adaptive=False, cubic_reg=M, max_steps=1)
        lengths.append(result.history[1].step_norm)
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_failing_evaluations_end_in_an_error_with_the_run():
    """Every trial point fails: the steps shrink, and the run gives up at its start instead of looping."""
    problem = nonconvex().problem()
    oracle = tb.ImplicitOracle
    calls = {"n": 0}
    real = oracle.evaluate

    def evaluate(self, x=None):
        calls["n"] += 1
        if calls["n"] > 1:
            raise tb.SolverError("out of order")
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "evaluate", evaluate)
        with pytest.raises(tb.SolverError, match="out of order") as caught:
            tb.minimize(problem, "dlcrn")
    steps = caught.value.result.history[1:]
    assert 5 <= len(steps) <= 10
    assert not any(step.accepted for step in steps)
    assert all(b.cubic_reg > a.cubic_reg for a, b in zip(steps, steps[1:]))
    assert torch.equal(problem.x, nonconvex().x0)


def test_an_increase_of_the_value_is_no_decrease_whatever_the_gradients_say():
    """Float32, and a predicted decrease below a hundred times its rounding, which gradients judge; but a wall is on the way."""

    def upper(x, y):
        return 1.0 - 1e-6 * x.sum() + 0.5e-8 * x.square().sum() + 1e-3 * torch.sigmoid(x - 30).sum() + 0.0 * y.sum()

    def lower(x, y):
        return 0.5 * (y - x).square().sum()

    start = torch.zeros(1, dtype=torch.float32)
    problem = tb.BilevelProblem.from_functions(upper, lower, start, start.clone())
    result = tb.minimize(problem, "dlcrn", cubic_reg=1e-12, gradient_tol=1e-9, max_steps=12)
    assert any(not report.accepted for report in result.history)  # the step to 100, where the gradient vanishes
    assert float(result.x) < 30
    assert result.value <= 1.0 + 1e-6
