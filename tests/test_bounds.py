"""Simple bounds: iterates in the box, stationary there, as good as L-BFGS-B."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch

import torch_bilevel as tb
from tests.problems import Case, nonconvex, saddle
from tests.reference import cleaning
from torch_bilevel.bounds import Box
from torch_bilevel.errors import ConfigError


def clip_weights() -> Case:
    """Hyper-cleaning with the weights themselves as x in [0, 1]: g = mean x_i CE_i + l2 |y|^2."""
    made = cleaning()
    base = made.reference

    def g(x, y):
        return base.g(torch.logit(x.clamp(1e-300, 1 - 1e-16)), y)  # the reference takes log-odds

    def plain(x, y):  # the same, smooth up to the bounds
        c, d = made.classes, made.A.shape[1]
        logits = made.A.to(y) @ y[: c * d].view(c, d).T + y[c * d :]
        loss = torch.logsumexp(logits, 1) - logits[torch.arange(len(made.t)), made.t]
        return (x * loss).mean() + made.l2 * (y * y).sum()

    inside = torch.full((len(made.t),), 0.4, dtype=torch.float64)
    assert torch.allclose(g(inside, base.y0), plain(inside, base.y0))
    return Case("clip", lambda x, y: base.f(x, y) + 1e-3 * (x * x).sum(), plain, inside, torch.zeros_like(base.y0))


@pytest.mark.parametrize(
    ("method", "kind"), [("fsba", "dense"), ("lfsba", "krylov"), ("dlcrn", "dense"), ("auto", "auto")]
)
def test_clipped_weights(method, kind):
    case = clip_weights()
    inside = []
    result = tb.minimize(case.problem(), method, bounds=(0.0, 1.0), hessian=kind,
                         callback=lambda report, x, y: inside.append(bool(((x >= 0) & (x <= 1)).all())))  # fmt: skip
    assert all(inside)
    assert result.status is tb.Status.SECOND_ORDER
    active = (result.x == 0) | (result.x == 1)
    assert 3 <= int(active.sum()) < 12  # some at a bound, exactly, and some between
    assert result.history[-1].step <= 30
    reference = case.reference.implicit(result.x)
    projected = result.x - (result.x - reference.gradient).clamp(0, 1)
    assert float(projected.norm()) <= 1e-5
    assert bool((reference.gradient[result.x == 0] >= -1e-5).all())
    assert bool((reference.gradient[result.x == 1] <= 1e-5).all())
    assert result.gradient_norm <= 1e-6  # the projected one
    values = [report.value for report in result.history]
    assert all(later <= earlier + 1e-10 for earlier, later in zip(values, values[1:]))  # y is good to 1e-10


def test_as_good_as_lbfgsb():
    case = clip_weights()

    oracle = tb.ImplicitOracle(case.problem())

    def phi(x):
        found = oracle.evaluate(torch.as_tensor(x, dtype=torch.float64))
        return float(found.value), found.gradient.numpy()

    best = scipy.optimize.minimize(phi, case.x0.numpy(), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 12,
                                   options={"ftol": 1e-12, "gtol": 1e-6})  # fmt: skip
    result = tb.minimize(case.problem(), "dlcrn", bounds=(0.0, 1.0))
    dense = float(case.reference.implicit(result.x).value)
    assert dense <= float(case.reference.implicit(torch.as_tensor(best.x)).value) + 1e-7


@pytest.mark.parametrize("kind", ["dense", "krylov"])
def test_a_box_around_a_saddle(kind):
    """The step that leaves the saddle would cross the bound: it ends on it, where phi is least."""
    result = tb.minimize(saddle().problem(), "lfsba", bounds=(-0.3, 0.3), hessian=kind)
    assert result.status is tb.Status.SECOND_ORDER
    assert abs(float(result.x[2])) == 0.3
    assert float(result.x[:2].norm()) <= 1e-6
    assert result.value == pytest.approx(-0.003 + 0.001 / 3, abs=1e-12)


def test_a_corner():
    """phi falls in every variable: the answer is the corner, where nothing is free."""
    one = torch.ones(3, dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: -y.sum(), lambda x, y: ((y - x) ** 2).sum() / 2, 0 * one, 0 * one
    )
    result = tb.minimize(problem, "dlcrn", bounds=(-one, 2 * one))
    assert torch.equal(result.x, 2 * one)
    assert result.status.converged
    assert result.gradient_norm == 0.0


def test_bounds_as_tensors_and_a_start_outside():
    lo, hi = torch.full((12,), -0.3, dtype=torch.float64), torch.linspace(0.1, 0.5, 12, dtype=torch.float64)
    result = tb.minimize(nonconvex().problem(), "dlcrn", bounds=(lo, hi))
    assert bool(((result.x >= lo) & (result.x <= hi)).all())
    assert result.status.converged


def test_wide_bounds_change_nothing():
    free = tb.minimize(nonconvex().problem(), "dlcrn")
    wide = tb.minimize(nonconvex().problem(), "dlcrn", bounds=(-1e6, 1e6))
    torch.testing.assert_close(wide.x, free.x, rtol=0, atol=1e-6)


def test_box():
    like = torch.zeros(3, dtype=torch.float64)
    box = Box((-1.0, torch.tensor([1.0, 2.0, 3.0])), like)
    x = torch.tensor([-5.0, 0.5, 9.0]).double()
    assert torch.equal(box.project(x), torch.tensor([-1.0, 0.5, 3.0]).double())
    at = box.project(x)
    assert box.free(at, torch.tensor([1.0, 1.0, -1.0]).double()).tolist() == [False, True, False]
    assert box.free(at, torch.tensor([-1.0, 1.0, 1.0]).double()).tolist() == [True, True, True]
    assert float(box.stationarity(at, torch.tensor([7.0, 0.0, -7.0]).double())) == 0.0
    assert float(box.stationarity(at, torch.tensor([0.0, 0.25, 0.0]).double())) == 0.25


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (3.0, "expected a pair"),
        ((1.0, 2.0, 3.0), "expected a pair"),
        ((1.0, 1.0), "lo < hi"),
        ((torch.tensor([0.0, 5.0, 0.0]), 1.0), "lo < hi"),
        ((float("nan"), 1.0), "lo < hi"),
        ((torch.zeros(2), 1.0), r"expected numbers or tensors \(3,\), got \(2,\)"),
    ],
)
def test_wrong_bounds(bounds, text):
    with pytest.raises(ConfigError, match=text):
        Box(bounds, torch.zeros(3))
