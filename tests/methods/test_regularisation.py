"""M: recovered from a cubic, shrinking on a quadratic, the same from values and from gradients."""

from __future__ import annotations

import math

import pytest
import torch

import torch_bilevel as tb
from tests.problems import Case, nonconvex, quadratic
from torch_bilevel.errors import ConfigError
from torch_bilevel.methods import FittedRegularisation, FixedRegularisation
from torch_bilevel.methods.cubic_newton import CubicNewtonRun
from torch_bilevel.methods.regularisation import Trial


def cubic_case(third: float, offset: float = 0.0) -> Case:
    """phi(x) = offset + b'x + x'Qx/2 + third (c'x)^3 / 6 exactly, y* = x; along c its third derivative is ``third``."""
    b, c = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.6, 0.8]).double()
    Q = torch.tensor([[3.0, 0.5], [0.5, 2.0]]).double()

    def f(x, y):
        return offset + b.to(y) @ y + y @ (Q.to(y) @ y) / 2 + third * (c.to(y) @ y) ** 3 / 6

    start = torch.tensor([0.7, 0.4]).double()
    return Case("cubic", f, lambda x, y: ((y - x) ** 2).sum() / 2, start, start)


def trials_of(case: Case, steps: int, **options):
    """(Trial, s, M) of each step of DLCRN, read where the run compares."""
    found = []
    real = CubicNewtonRun._compare

    def compare(self, ev, new, tried):
        trial = real(self, ev, new, tried)
        found.append((trial, tried.s.clone(), self.cubic_reg))
        return trial

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CubicNewtonRun, "_compare", compare)
        tb.minimize(case.problem(), "dlcrn", max_steps=steps, gradient_tol=0.0, **options)
    return found


@pytest.mark.parametrize("third", [5.0, -5.0, 0.3])
@pytest.mark.parametrize("offset", [0.0, 1e15])  # 1e15: values drown in rounding, gradients take their place
def test_fit_recovers_the_third_derivative_along_the_step(third, offset):
    c = torch.tensor([0.6, 0.8]).double()
    trial, s, _ = trials_of(cubic_case(third, offset), 1, cubic_reg=10.0)[0]
    expected = third * float((c @ s) / s.norm()) ** 3
    assert trial.fit == pytest.approx(expected, rel=1e-6)
    assert trial.ratio == pytest.approx(trial.actual / trial.predicted)
    if offset:
        return  # at rounding the actual decrease is only estimated
    # what was decreased, in closed form
    x = cubic_case(third).x0
    phi = cubic_case(third).f
    assert trial.actual == pytest.approx(float(phi(x, x) - phi(x + s, x + s)), rel=1e-6)


def test_a_model_that_is_exact_has_ratio_one():
    case = cubic_case(0.0)
    for trial, _, _ in trials_of(case, 2, cubic_reg=1e-9):
        assert trial.ratio == pytest.approx(1.0, abs=1e-6)


def test_a_quadratic_needs_no_regularisation():
    """Its first step shows it; the second is Newton's."""
    case = quadratic()
    regs = [M for _, _, M in trials_of(case, 2)]
    assert regs[1] < 1e-6 * regs[0]
    result = tb.minimize(case.problem(), "dlcrn", gradient_tol=1e-9)
    assert result.status.converged
    assert result.history[-1].step == 2
    assert result.value == pytest.approx(case.minimum, rel=1e-12)


def test_a_function_that_is_quadratic_only_for_a_while_is_no_trap():
    """phi is quadratic up to |x| = 1 and a quartic wall beyond: M is dropped, the next step fails, and M comes back at once."""
    wall = Case("wall", lambda x, y: (y * y / 2 - 20 * y).sum() + 1e3 * (torch.relu(y - 1) ** 4).sum(),
                lambda x, y: ((y - x) ** 2).sum() / 2, torch.zeros(2).double() - 300.0, torch.zeros(2).double())  # fmt: skip
    result = tb.minimize(wall.problem(), "dlcrn", cubic_reg=0.5)
    regs = [report.cubic_reg for report in result.history[1:]]
    assert min(regs) < 1e-6
    assert any(not report.accepted for report in result.history[1:])
    assert result.status.converged
    assert result.history[-1].step <= 40


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_first_regularisation_follows_the_scale_of_the_values(scale):
    """phi -> scale phi: M -> scale M, and the same iterates."""
    case = nonconvex()
    scaled = Case("scaled", lambda x, y: scale * case.f(x, y), case.g, case.x0, case.y0)
    plain = tb.minimize(case.problem(), "dlcrn", max_steps=8, gradient_tol=0.0)
    other = tb.minimize(scaled.problem(), "dlcrn", max_steps=8, gradient_tol=0.0)
    torch.testing.assert_close(other.x, plain.x, rtol=1e-6, atol=1e-6)
    assert other.history[1].cubic_reg == pytest.approx(scale * plain.history[1].cubic_reg, rel=1e-9)


def test_rules_of_the_fitted_coefficient():
    rule = FittedRegularisation()
    good = Trial(predicted=1.0, actual=0.9, fit=3.0)
    assert good.ratio == pytest.approx(0.9)
    assert rule.accepts(good)
    assert not rule.accepts(Trial(1.0, 0.05, 3.0))
    assert not rule.accepts(Trial(1.0, math.nan, math.nan))
    assert not rule.accepts(Trial(1.0, -math.inf, math.inf))
    assert math.isnan(Trial(0.0, 1.0, 1.0).ratio)
    assert not rule.accepts(Trial(0.0, 1.0, 1.0))

    def after(M, trial, accepted, streak=1):
        return rule.after(M, trial, accepted, steps=10, streak=streak)

    assert after(6.0, good, True) == 6.0  # twice the fit
    assert after(100.0, good, True) == 50.0  # down by two, by four on a streak
    assert after(100.0, good, True, streak=4) == 25.0
    assert after(1.0, good, True) == 4.0  # up by four
    assert after(1.0, Trial(1.0, -1.0, math.inf), False, streak=0) == 10.0  # a failed evaluation
    assert after(1.0, Trial(1.0, -1.0, 0.1), False, streak=0) == 2.0  # rejected: always up
    assert after(1.0, Trial(1.0, 0.9, -1.0), True) > 0
    assert after(1.0, Trial(1.0, 0.9, math.nan), True) == 4.0  # an unknown fit is no reason to shrink M
    for fit, M in ((1e-9, 2e-9), (0.0, 1e-12)):  # a convex quadratic
        assert after(1.0, Trial(1.0, 1.0, fit, reach=100.0), True) == M
        assert after(1.0, Trial(1.0, 1.0, fit, reach=1e5), True) == 0.5  # nothing but M would bound the next step
    assert after(1.0, Trial(1.0, 1.0, 1e-5), True) == 0.5
    # a rejected step that M was too small to shorten: M as large as one a third as long needs
    assert after(1e-9, Trial(1.0, -1.0, math.inf, pull=0.5), False, streak=0) == 10.0
    assert FittedRegularisation(7.0).initial(100.0, 1.0) == 7.0
    # as strong as |H| at the Newton step |g| / |H|
    H, g = 10.0, 1.0
    M = rule.initial(H, g)
    assert M / 2 * (g / H) >= 0.1 * H
    assert M > 0
    assert rule.initial(0.0, 1.0) > 0
    assert math.isfinite(rule.initial(1.0, 0.0))


def test_rules_of_the_fixed_coefficient():
    rule = FixedRegularisation(5)
    assert rule.cubic_reg == 5.0
    assert rule.initial(1.0, 1.0) == 5.0
    assert rule.accepts(Trial(1.0, -3.0, 9.0))
    assert rule.after(5.0, Trial(1.0, -3.0, 9.0), True, 1, 1) == 5.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, "big", None])
def test_wrong_coefficients(bad):
    with pytest.raises(ConfigError, match="cubic_reg: expected a positive number"):
        FixedRegularisation(bad)


def test_wrong_threshold():
    with pytest.raises(ConfigError, match="eta"):
        FittedRegularisation(eta=1.5)
    with pytest.raises(ConfigError, match="cubic_reg"):
        FittedRegularisation(-2.0)
