"""The penalty oracle: bias, cancellation, float32, what it does when a scheme is not convex, its cost."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import torch_bilevel as tb
from tests.reference import error

PENALTIES = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5)
SHIFTING = "going over from the central to the forward scheme"


def slope(penalties, errors) -> float:
    """Least-squares slope of log error against log penalty."""
    a = torch.tensor([math.log(p) for p in penalties], dtype=torch.float64)
    b = torch.tensor([math.log(e) for e in errors], dtype=torch.float64)
    a = a - a.mean()
    return float((a @ (b - b.mean())) / (a @ a))


@pytest.mark.parametrize("name", ["smooth", "modules"])
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
def test_bias_falls_as_a_power_of_the_penalty(scheme, order, name, make, expected):
    problem, exact = make(name), expected(name)
    first = 10.0 if name == "smooth" else 100.0  # modules: asymptotic, and central convex, from about 100 on
    penalties, biases = [], {"value": [], "gradient": [], "hessian": []}
    for penalty in (p for p in PENALTIES if p >= first):
        ev = tb.PenaltyOracle(problem, penalty, scheme).evaluate()
        found = {"value": ev.value, "gradient": ev.gradient, "hessian": ev.hessian.to_dense()}
        errors = {key: error(found[key], getattr(exact, key)) for key in found}
        if min(errors.values()) < 2e-9:  # what follows is rounding of the central scheme, not bias
            assert scheme == "central"
            assert penalty >= 1e4
            break
        penalties.append(penalty)
        for key in errors:
            biases[key].append(errors[key])
    assert len(penalties) >= 3
    for key in biases:
        assert slope(penalties, biases[key]) == pytest.approx(-order, abs=0.05), (key, biases[key])
    if scheme == "central":
        assert biases["gradient"][-1] <= 1e-5


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("name", ["smooth", "modules"])
def test_both_dtypes_equal_the_scheme_for_every_penalty(name, scheme, penalty, make, expected, device):
    for dtype, tolerances in ((torch.float64, (1e-8, 1e-7)), (torch.float32, (1e-4, 1e-3))):
        oracle = tb.PenaltyOracle(make(name, dtype, device), penalty, scheme)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ev = oracle.evaluate()
        shifted = any(SHIFTING in str(w.message) for w in caught)
        assert shifted == (oracle.scheme != scheme)
        assert not shifted or (penalty <= 10.0 and scheme == "central")
        truth = expected(name, penalty, oracle.scheme)
        assert error(ev.gradient, truth.gradient) <= tolerances[0]
        assert error(ev.hessian.to_dense(), truth.hessian) <= tolerances[1]


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_an_inexact_lower_level_is_not_multiplied_by_the_penalty(scheme, make, expected):
    """Both ends are taken at the same residual: an error e of y gives e in the gradient, not penalty * e."""
    for quadrature in (False, True):
        oracle = tb.PenaltyOracle(make("smooth"), 1e5, scheme, lower_tol=1e-5, quadrature=quadrature)
        ev = oracle.evaluate()
        distance = error(ev.points["lo"], expected("smooth", 1e5, scheme).points[0])
        assert 1e-9 <= distance <= 1e-4  # the lower solve was indeed inexact
        truth = expected("smooth", 1e5, scheme)
        assert error(ev.gradient, truth.gradient) <= 20 * distance + 1e-9
        assert error(ev.hessian.to_dense(), truth.hessian) <= 20 * distance + 1e-9


def test_a_large_learner_does_not_spoil_the_difference():
    """lo is held to eps |lo|, so d no better than eps |lo| / delta; what is left there is no reason to solve for hi anew,
    to 1e-10 |hi|, which over delta = 2e-4 was an error of the whole gradient (FSBA then stalled)."""
    size, slope = 700.0, 1e-4
    start = torch.full((1,), size, dtype=torch.float64)
    oracle = tb.PenaltyOracle(tb.BilevelProblem.from_functions(
        lambda x, y: slope * torch.sin(3 * y).sum(), lambda x, y: ((y - x) ** 2).sum() / 2, start, start.clone()
    ))  # fmt: skip
    for i in range(60):
        x = start + 0.37 * i * 10.0 ** -(i % 4)
        assert float((oracle.evaluate(x).gradient - 3 * slope * torch.cos(3 * x)).abs()) <= 5e-9


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_quadrature_and_subtraction_agree_in_float64(scheme, make, expected):
    for penalty in (3.0, 30.0, 1e3):
        direct = tb.PenaltyOracle(make("smooth"), penalty, scheme, quadrature=False).evaluate()
        integral = tb.PenaltyOracle(make("smooth"), penalty, scheme, quadrature=True).evaluate()
        bound = 1e-4 / penalty  # of the quadrature rule
        assert error(integral.gradient, direct.gradient) <= bound
        assert error(integral.hessian.to_dense(), direct.hessian.to_dense()) <= bound


def test_float32_takes_the_integral_only_where_subtraction_loses_digits(make):
    assert not tb.PenaltyOracle(make("smooth"), 1e5).uses_quadrature
    assert tb.PenaltyOracle(make("smooth", torch.float32), 1e3).uses_quadrature
    assert not tb.PenaltyOracle(make("smooth", torch.float32), 2.0, "forward").uses_quadrature


def test_naive_subtraction_in_float32_is_what_the_integral_avoids(make, expected):
    truth = expected("smooth", 1e4, "forward")
    naive = tb.PenaltyOracle(make("smooth", torch.float32), 1e4, "forward", quadrature=False).evaluate()
    ours = tb.PenaltyOracle(make("smooth", torch.float32), 1e4, "forward").evaluate()
    assert error(ours.gradient, truth.gradient) < error(naive.gradient, truth.gradient) / 20


@pytest.mark.parametrize(
    "lower",
    [{"name": "agd", "steps": 5, "step": 0.1, "momentum": 0.5},
     {"name": "torch", "optimizer": torch.optim.Adam, "steps": 3, "lr": 0.01}],
)  # fmt: skip
def test_published_inner_loops_are_taken_at_their_word(lower, make, referee):
    """With a fixed number of steps both ends are what the steps give; no Newton correction is made."""
    ref, problem, penalty = referee("smooth"), make("smooth"), 50.0
    oracle = tb.PenaltyOracle(problem, penalty, "forward", lower=lower)
    ev = oracle.evaluate()

    def steps(sigma, y):
        def slope(y):
            return torch.func.grad(lambda y: ref.g(ref.x, y) + sigma * ref.f(ref.x, y))(y)

        if lower["name"] == "torch":
            y = y.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([y], lr=0.01)
            for _ in range(3):
                y.grad = slope(y.detach())
                optimizer.step()
            return y.detach()
        z = y
        for _ in range(5):
            new = z - 0.1 * slope(z)
            z, y = new + 0.5 * (new - y), new
        return y

    lo = steps(0.0, ref.y0)
    hi = steps(1 / penalty, lo)
    slope_x = torch.func.grad(ref.g)
    gradient = torch.func.grad(ref.f)(ref.x, hi) + penalty * (slope_x(ref.x, hi) - slope_x(ref.x, lo))
    assert error(ev.gradient, gradient) <= 1e-12
    assert ev.counts.solves == 0
    again = oracle.evaluate()  # warm-started at both ends
    assert error(again.points["lo"], steps(0.0, lo)) <= 1e-12
    assert error(again.points["lo"] + again.points["d"] / penalty, steps(1 / penalty, hi)) <= 1e-12


def test_central_goes_over_to_forward_where_it_is_not_convex():
    """g = y^2/2 - x y, f = y^2: g - f/penalty is convex for penalty > 2 only."""
    def problem():
        return tb.BilevelProblem.from_functions(
            lambda x, y: (y * y).sum() + x.sum(), lambda x, y: (y * y).sum() / 2 - (x * y).sum(),
            torch.ones(2).double(), torch.zeros(2).double(),
        )  # fmt: skip

    oracle = tb.PenaltyOracle(problem(), 1.5)
    with pytest.warns(UserWarning, match=SHIFTING):
        ev = oracle.evaluate()
    assert oracle.scheme == "forward"
    # y = x, y_lam = x / (1 + 2 sigma), h_sigma = sigma sum x - |x|^2 / (2 (1 + 2 sigma))
    sigma = 1 / 1.5
    value = 2 + (-1 / (1 + 2 * sigma) + 1) / sigma
    assert float(ev.value) == pytest.approx(value, rel=1e-10)
    central = tb.PenaltyOracle(problem(), 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        central.evaluate()
    assert central.scheme == "central"


def test_costs(make):
    """Subtraction in float64: joint gradients are recorded at lo and at hi, and products are with those."""
    problem = make("smooth")
    oracle = tb.PenaltyOracle(problem, 1e3, "forward")
    ev = oracle.evaluate()
    assert ev.counts.evaluations == 1
    assert ev.counts.lower_solves == 1
    assert ev.counts.factorisations >= 1
    evaluated = ev.counts.copy()
    H = ev.hessian
    made = ev.counts.copy()
    H.matvec(torch.ones(6, dtype=torch.float64))
    single = ev.counts.copy()
    H.matmat(torch.randn(6, 3, dtype=torch.float64))
    block = ev.counts.copy()
    assert made.lower_solves == evaluated.lower_solves
    assert single.solves - made.solves == 2
    assert block.solves - single.solves == 6
    assert single.lower_gradients == made.lower_gradients
    assert block.lower_gradients == made.lower_gradients
    assert ev.counts.as_dict() == oracle.counts.as_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"penalty": 0.0}, "penalty: expected a positive number"), ({"penalty": -1}, "positive number"),
     ({"penalty": float("nan")}, "positive number"), ({"penalty": float("inf")}, "positive number"),
     ({"penalty": "1e3"}, "positive number"), ({"scheme": "centre"}, "expected 'central' or 'forward'"),
     ({"lower": "newton"}, "did you mean 'newton_cg'"), ({"solver": "cgg"}, "did you mean 'cg'"),
     ({"damping": -1.0}, "damping: expected"), ({"lower": "external"}, "external")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message, make):
    with pytest.raises(tb.ConfigError, match=message):
        tb.PenaltyOracle(make("smooth"), **options)
