"""L-BFGS: the two-loop recursion, the line searches, convergence with and without bounds, and what a step costs."""

from __future__ import annotations

import math

import pytest
import torch

import torch_bilevel as tb
from tests.problems import hyper_cleaning, nonconvex, quadratic
from torch_bilevel.methods import lbfgs
from torch_bilevel.methods.lbfgs import _diagonal, inverse_product
from torch_bilevel.methods.line_search import Trial, _cubic_minimum, strong_wolfe


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_inverse(pairs, n):
    """H_{k+1} = (I - rho s y') H (I - rho y s') + rho s s', from gamma I of the last pair."""
    s, y = pairs[-1]
    H = (s @ y) / (y @ y) * torch.eye(n, dtype=torch.float64)
    for s, y in pairs:
        rho = 1 / (s @ y)
        V = torch.eye(n, dtype=torch.float64) - rho * torch.outer(y, s)
        H = V.T @ H @ V + rho * torch.outer(s, s)
    return H


def test_the_two_loop_recursion_is_the_dense_bfgs_inverse():
    B = randn(0, 6, 6)
    A = B @ B.T + torch.eye(6, dtype=torch.float64)
    pairs = [(s, A @ s) for s in randn(1, 4, 6)]
    g = randn(2, 6)
    assert torch.allclose(inverse_product(g, pairs, None), dense_inverse(pairs, 6) @ g, rtol=1e-10)
    assert torch.equal(inverse_product(g, [], None), g)
    free = torch.tensor([True, False, True, True, False, True])
    masked = [(torch.where(free, s, 0.0), torch.where(free, y, 0.0)) for s, y in pairs]
    masked = [(s, y) for s, y in masked if s @ y > 0]
    g = torch.where(free, g, 0.0)
    found = inverse_product(g, pairs, free)
    assert torch.allclose(found, dense_inverse(masked, 6) @ g, rtol=1e-10)
    assert torch.equal(found[~free], torch.zeros(2, dtype=torch.float64))


# -- line searches -------------------------------------------------------------------------------------------

CURVES = {
    "quadratic": (lambda a: (a - 3) ** 2, lambda a: 2 * (a - 3)),
    "quartic": (lambda a: (a - 0.01) ** 4, lambda a: 4 * (a - 0.01) ** 3),
    "wavy": (lambda a: a**2 / 20 - math.sin(3 * a), lambda a: a / 10 - 3 * math.cos(3 * a)),
    "flat": (lambda a: -math.log1p(a) + a / 500, lambda a: -1 / (1 + a) + 1 / 500),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("first", [1e-4, 1.0, 1e4])
def test_strong_wolfe_meets_its_conditions(curve, first):
    value, slope = CURVES[curve]
    tried = []

    def trial(a):
        tried.append(a)
        return Trial(a, value(a), slope(a), f"point {a}")

    found = strong_wolfe(trial, value(0.0), slope(0.0), first, 0.0)
    assert found.value <= value(0.0) + 1e-4 * found.length * slope(0.0)
    assert abs(found.slope) <= 0.9 * abs(slope(0.0))
    assert found.found == f"point {found.length}"
    assert len(tried) <= 25


def test_strong_wolfe_backs_out_of_failed_evaluations():
    def trial(a):
        return Trial(a, (a - 1) ** 2, 2 * (a - 1)) if a < 1.5 else Trial(a, math.inf, math.nan)

    found = strong_wolfe(trial, 1.0, -2.0, 1e3, 0.0)
    assert 0 < found.length < 1.5
    assert found.value < 1.0


def test_strong_wolfe_gives_up_on_what_does_not_decrease():
    tried = []

    def trial(a):
        tried.append(a)
        return Trial(a, 1.0 + a, 1.0)  # the slope promised was a lie

    assert strong_wolfe(trial, 1.0, -1.0, 1.0, 0.0) is None
    assert len(tried) <= 25
    assert strong_wolfe(lambda a: Trial(a, math.nan, math.nan), 1.0, -1.0, 1.0, 0.0) is None
    falling = strong_wolfe(lambda a: Trial(a, -a, -1.0), 0.0, -1.0, 1.0, 0.0)  # unbounded below: the last decrease
    assert falling.value < -1e6


def test_strong_wolfe_allows_for_noise_in_the_values():
    slope = -1e-11
    found = strong_wolfe(lambda a: Trial(a, 1.0 + 1e-15, slope * (1 - a)), 1.0, slope, 1.0, 1e-14)
    assert found is not None
    assert abs(found.slope) <= 0.9 * abs(slope)


def test_cubic_minimum_is_exact_on_a_cubic():
    def at(a):
        return Trial(a, a**3 - 3 * a, 3 * a**2 - 3)

    assert _cubic_minimum(at(0.0), at(2.5)) == pytest.approx(1.0)
    assert _cubic_minimum(at(2.5), at(0.0)) == pytest.approx(1.0)
    assert math.isnan(_cubic_minimum(at(0.0), Trial(1.0, math.inf, math.nan)))


def test_along_a_projected_path_the_decrease_is_asked_of_what_moved():
    """x(a) = min(a d, 1e-3) in a steep component, a in the other: phi'(0) = -1001, all but 1 of it used up at once."""

    def trial(a):
        moved = min(a, 1e-6), a
        slope = -1000.0 * (a <= 1e-6) + 2 * (a - 0.5)
        return Trial(a, -1000 * moved[0] + (a - 0.5) ** 2, slope, predicted=-1000 * moved[0] - moved[1])

    assert strong_wolfe(trial, 0.25, -1001.0, 0.5, 0.0).length == 0.5
    away = strong_wolfe(lambda a: Trial(a, -a, -1.0, predicted=1.0), 0.0, -1.0, 1.0, 0.0)
    assert away is None  # the path as projected does not descend


# -- the method ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "steps"), [(quadratic(), 30), (nonconvex(), 100), (hyper_cleaning(), 250)])
def test_converges(case, steps):
    result = tb.minimize(case.problem(), "lbfgs", max_steps=steps, gradient_tol=1e-6)
    assert result.status is tb.Status.GRADIENT_TOLERANCE
    assert case.reference.implicit(result.x).gradient.norm() < 2e-6
    values = [r.value for r in result.history]
    assert all(b < a + 1e-8 for a, b in zip(values, values[1:]))
    assert result.counts.hessians == 0
    if case.minimum is not None:
        assert result.value - case.minimum < 1e-11


def first_trial(scale: float, x0: float = 0.0, offset: float = 0.0) -> float:
    """How far x goes in the first trial on scale ((x - 30)^2 / 2 + 50 + offset), y* = x."""
    one = torch.ones(1, dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: scale * ((y - 30) ** 2 / 2 + 50 + offset).sum(), lambda x, y: ((y - x) ** 2).sum() / 2, x0 * one, 0 * one
    )
    run, seen = tb.LBFGS().start(problem), []
    evaluate = run.oracle.evaluate
    run.oracle.evaluate = lambda x: seen.append(float(x)) or evaluate(x)
    run.step()
    return seen[1] - x0


def test_the_first_length_does_not_depend_on_the_scale_of_the_value():
    """A tenth off the value takes 0.1 * 500 / 30 = 17 units at x = 0, where one is allowed, and 0.1 * 50.5 at 29."""
    assert first_trial(1.0) == pytest.approx(1.0)
    for scale in (1e-6, 1.0, 1e2):
        assert first_trial(scale, 29.0) == pytest.approx(0.1 * 50.5)
    assert first_trial(1.0, 0.0, offset=1e9) == pytest.approx(1.0)  # a large constant in the value: one unit of x
    assert first_trial(1e-3, 20.0, offset=-50.0) == pytest.approx(0.5)


def test_a_tiny_gradient_costs_no_search_for_a_length():
    """A mean over many samples: each hyperparameter has a gradient of 1e-6 and wants to move by about 1."""
    n = 2000
    target = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: ((y - target.to(y)) ** 2).mean() + 0.1, lambda x, y: ((y - x) ** 2).sum() / 2,
        torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64),
    )  # fmt: skip
    run = tb.LBFGS().start(problem)
    run.step()
    assert run.counts.evaluations <= 3  # a step of length 1 along the gradient would be 1e-3 of what is wanted
    assert (run.x - target).abs().mean() < 1.4


def test_every_trial_is_counted():
    run = tb.LBFGS().start(nonconvex().problem())
    calls = []
    evaluate = run.oracle.evaluate
    run.oracle.evaluate = lambda x: calls.append(x) or evaluate(x)
    run.report()
    for _ in range(12):
        report = run.step()
        assert report.counts.evaluations == len(calls) == report.counts.upper_gradients
    assert 13 <= len(calls) <= 24  # mostly one trial a step
    assert len(run.pairs) == 10


def test_memory_is_bounded_and_only_curved_pairs_are_kept():
    run = tb.LBFGS(memory=2).start(nonconvex().problem())
    for _ in range(5):
        run.step()
        assert all(s @ y > 0 for s, y in run.pairs)
    assert len(run.pairs) == 2


def test_bounds_end_at_the_constrained_minimum():
    case, lo, hi = quadratic(), -0.1, torch.tensor([0.2, 0.5, 0.1, 0.5], dtype=torch.float64)
    result = tb.minimize(case.problem(), "lbfgs", bounds=(lo, hi), max_steps=15, gradient_tol=1e-8)
    assert result.status is tb.Status.GRADIENT_TOLERANCE
    exact = case.reference.implicit(torch.zeros(4, dtype=torch.float64))
    H, g = exact.hessian, exact.gradient  # phi is quadratic: g'x + x'Hx/2 + const
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(5000):
        x = (x - (g + H @ x) / torch.linalg.eigvalsh(H)[-1]).clamp(lo).minimum(hi)
    assert torch.allclose(result.x, x, atol=1e-7)
    assert bool(((x == lo) | (x == hi)).any())
    assert bool(((x > lo) & (x < hi)).any())


def test_with_bounds_steps_lengthen_where_the_function_is_flat_and_concave():
    """phi = -exp(-(x - 8)^2 / 8): near 0 it is concave with slope 7e-4, so no pair is kept and lengths must grow."""
    one = torch.ones(1, dtype=torch.float64)
    for bounds in (None, (-20.0, 20.0), (-20.0, 7.0)):
        problem = tb.BilevelProblem.from_functions(
            lambda x, y: -torch.exp(-((y - 8) ** 2) / 8).sum(), lambda x, y: ((y - x) ** 2).sum() / 2, 0 * one, 0 * one
        )
        result = tb.minimize(problem, "lbfgs", bounds=bounds, max_steps=30)
        assert result.status is tb.Status.GRADIENT_TOLERANCE
        assert float(result.x) == pytest.approx(7.0 if bounds == (-20.0, 7.0) else 8.0, abs=1e-5)
        assert result.counts.evaluations <= 25


def test_a_wall_of_failures_stalls_instead_of_raising():
    """Beyond x = 1 the lower level is not convex: steps into it are shortened, and at the wall the run ends."""
    one = torch.ones(1, dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: -x.sum() - y.sum() / 100, lambda x, y: ((1 - x) * y * y / 2 - y).sum(), 0 * one, one, check=False
    )
    result = tb.minimize(problem, "lbfgs", max_steps=60, gradient_tol=1e-9)
    assert result.status in (tb.Status.STALLED, tb.Status.MAX_STEPS)
    assert 0.9 < float(result.x) < 1.0


def test_float32_stays_float32_and_settles():
    result = tb.minimize(quadratic().problem(torch.float32), "lbfgs", max_steps=60, gradient_tol=1e-4)
    assert result.x.dtype == torch.float32
    assert result.status is tb.Status.GRADIENT_TOLERANCE


def test_the_diagonal_scaling_keeps_the_secant_equation_and_undoes_the_scales_of_the_hyperparameters():
    gen = torch.Generator().manual_seed(0)
    scales = torch.logspace(-0.5, 0.5, 6, dtype=torch.float64)
    pairs = [(s, scales * s) for s in torch.randn(4, 6, generator=gen, dtype=torch.float64)]
    s, y = pairs[-1]
    assert torch.allclose(inverse_product(y, pairs, None, "diagonal"), s)
    with pytest.raises(tb.ConfigError, match="scaling 'diag' is not known"):
        tb.LBFGS(scaling="diag")


@pytest.mark.parametrize("count", [1, 4, 36])
def test_the_diagonal_scaling_counts_for_as_much_as_there_are_pairs(count):
    """Of a diagonal function k pairs give its inverse to the power k / (k + 4), at the mean curvature of the last."""
    gen = torch.Generator().manual_seed(0)
    scales = torch.logspace(-0.5, 0.5, 6, dtype=torch.float64)
    pairs = [(s, scales * s) for s in torch.randn(count, 6, generator=gen, dtype=torch.float64)]
    (s, y), size = pairs[-1], scales ** (-count / (count + 4))
    expected = size * (torch.dot(s, y) / torch.dot(y, size * y))
    torch.testing.assert_close(_diagonal(pairs, torch.dot(s, y) / torch.dot(y, y)), expected)


def test_the_first_diagonal_direction_moves_small_gradients_too():
    """Halfway, on a logarithmic scale, between the gradient and its signs; no further for what is below a hundredth."""
    g = torch.tensor([-4.0, 1.0, 0.04, 4e-6, 0.0], dtype=torch.float64)
    found = inverse_product(g, [], None, "diagonal")
    torch.testing.assert_close(found, torch.tensor([-4.0, 2.0, 0.4, 4e-5, 0.0], dtype=torch.float64))
    assert torch.equal(inverse_product(g, [], None), g)
    assert torch.equal(inverse_product(0 * g, [], None, "diagonal"), 0 * g)


def test_a_first_gradient_that_is_even_is_left_as_it_is():
    """One of normally distributed components is; one whose sizes differ by orders of magnitude is not."""
    even = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(inverse_product(even, [], None, "diagonal"), even)
    uneven = even * torch.logspace(-2, 0, 1000, dtype=torch.float64)
    assert not torch.allclose(inverse_product(uneven, [], None, "diagonal"), uneven)


@pytest.mark.parametrize("scaling", ["scalar", "diagonal"])
def test_an_inverse_hessian_does_not_depend_on_how_long_its_steps_were(scaling):
    gen = torch.Generator().manual_seed(3)
    s = torch.randn(3, 5, generator=gen, dtype=torch.float64)
    pairs, g = [(v, torch.logspace(-1, 1, 5, dtype=torch.float64) * v + 0.1 * v.flip(0)) for v in s], s[0] - s[1]
    longer = [(c * u, c * y) for c, (u, y) in zip((1e3, 1.0, 1e-3), pairs)]
    found = inverse_product(g, pairs, None, scaling)
    torch.testing.assert_close(inverse_product(g, longer, None, scaling), found)


@pytest.mark.parametrize("scaling", ["scalar", "diagonal"])
def test_a_component_sent_far_is_cut_and_the_others_go_their_way(scaling, monkeypatch):
    """Nothing but it is shortened to 4 max(1, |x|_inf), as long as it has less than half of the slope."""

    def searched(gradient, direction):
        run = tb.make_method("lbfgs", {"scaling": scaling}).start(quadratic().problem())
        run.step()
        run.evaluation.gradient.copy_(gradient)
        found = []
        monkeypatch.setattr(lbfgs, "inverse_product", lambda *_: -direction)
        monkeypatch.setattr(run, "_search", lambda ev, direction, slope: found.append(direction))
        run.step()
        monkeypatch.undo()
        return found[0], 4 * max(1.0, float(run.x.abs().max()))

    gradient = torch.tensor([1.0, 2.0, -1.0, 1e-6], dtype=torch.float64)
    near = torch.tensor([-0.5, -1.0, 1.0, -0.5], dtype=torch.float64)
    assert torch.equal(searched(gradient, near)[0], near)
    far = torch.tensor([-0.5, -1.0, 1.0, -1e4], dtype=torch.float64)
    found, reach = searched(gradient, far)
    assert torch.equal(found, far.clamp_min(-reach) if scaling == "diagonal" else far)
    gradient[3] = 1.0  # nearly all of the slope is its
    found, reach = searched(gradient, far)
    torch.testing.assert_close(found, far * (reach / 1e4) if scaling == "diagonal" else far)
