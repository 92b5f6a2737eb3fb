"""Every registered method in one table: the expected outcome in each cell, same seed same bits, resume, oracle counts.

Outcomes, each judged by dense float64 formulas of the problem (not by what the method reports):
    SOSP      ends as SECOND_ORDER, with the exact gradient below 1e-5 and no negative curvature
    MINIMUM   the same, and at the minimiser known in closed form
    STATIONARY  the exact gradient is below 1e-5
    STAYS     a first-order method at an exact saddle: it ends there, at step 0
    LEAVES    a perturbed first-order method at an exact saddle: phi falls by 2 % of the way to the minimum
    PROGRESS  a fixed step length cannot suit all problems: phi falls by at least a tenth of what a minimiser gains
              (a search: within a box about the start)
In float32 tolerances are 100 times as large.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import torch_bilevel as tb
from tests import minimax_problems as minimax
from tests.problems import Case, ill_conditioned, nonconvex, one_by_one, quadratic, saddle
from torch_bilevel.oracles.hessian import HyperHessian

CASES: dict[str, Case] = {
    "quadratic": quadratic(),
    "nonconvex": nonconvex(),
    "saddle": saddle(),
    "ill_conditioned": ill_conditioned(),
    "dx1": quadratic(1, 3),
    "dy1": quadratic(4, 1),
    "one_by_one": one_by_one(),
    "float32": nonconvex(),
}
#: second-order methods: the defaults everywhere
SECOND_ORDER = ("auto", "dlcrn", "fsba", "ifsba", "lazy_slcrn", "lfsba", "slcrn")
#: first-order methods: one setting each, for all problems
FIRST_ORDER = {
    "adam": {"lr": 0.05},
    "aid": {"lr": 0.1},
    "f2ba": {"lr": 0.05},
    "f2sa": {"lr": 0.05, "penalty": 100.0},  # at the default 10, g - f/10 is not convex on two of these problems
    "itd": {"lr": 0.1},
    "lbfgs": {},
    "paid": {"lr": 0.1},
    # 1/L is estimated once and its curvature doubles in one_by_one: stable without momentum only
    "prahgd": {"lr": 0.05, "lower_momentum": 0.0},
    "rahgd": {"lr": 0.05, "lower_momentum": 0.0},
    "sgd": {"lr": 0.1},
    "stocbio": {"lr": 0.1},
}
MINIMAX_SECOND_ORDER = ("imcn", "lmcn", "mcn")
MINIMAX_FIRST_ORDER = {"gda": {"lr": 1e-2, "ascent_lr": 0.1}}
#: without derivatives, in a box about the start
SEARCH = ("random_search", "tpe")
EVERY = {**dict.fromkeys(SECOND_ORDER, {}), **FIRST_ORDER, **dict.fromkeys(SEARCH, {})}
EVERY_MINIMAX = {**dict.fromkeys(MINIMAX_SECOND_ORDER, {}), **MINIMAX_FIRST_ORDER}


def expected(method: str, case: str) -> str:
    """The table."""
    if method in SECOND_ORDER:
        return "MINIMUM" if case in ("quadratic", "dx1", "dy1", "one_by_one") else "SOSP"
    if method in SEARCH:
        return "PROGRESS"
    if case == "saddle":
        return "LEAVES" if method in ("paid", "prahgd") else "STAYS"
    return "STATIONARY" if method == "lbfgs" else "PROGRESS"


def test_the_table_has_every_method():
    assert set(EVERY) | set(EVERY_MINIMAX) == set(tb.method_names())


@cache
def gain(name: str) -> float:
    """phi(x0) - phi at a minimiser, found by exact cubic Newton."""
    case = CASES[name]
    return float(case.reference.implicit().value) - tb.minimize(case.problem(), "dlcrn").value


def run(method: str, name: str) -> tb.Result:
    dtype = torch.float32 if name == "float32" else torch.float64
    second = method in SECOND_ORDER or method == "lbfgs"
    steps = 100 if second else 120 if expected(method, name) == "LEAVES" else 30
    kwargs = {"max_steps": steps, "gradient_tol": 1e-4 if name == "float32" else 1e-6}
    if method in SEARCH:
        x0 = CASES[name].x0.to(dtype)
        kwargs["bounds"] = (x0 - 1.0, x0 + 1.0)
    return tb.minimize(CASES[name].problem(dtype), method, **EVERY[method], **kwargs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", EVERY)
def test_outcome(method, name):
    case, outcome = CASES[name], expected(method, name)
    result = run(method, name)
    exact = case.reference.implicit(result.x.double())
    tol = 1e-3 if name == "float32" else 1e-5
    if outcome in ("SOSP", "MINIMUM"):
        assert result.status is tb.Status.SECOND_ORDER
        assert float(exact.gradient.norm()) <= tol
        assert float(torch.linalg.eigvalsh(exact.hessian)[0]) >= -tol
        if outcome == "MINIMUM":
            assert result.value == pytest.approx(case.minimum, abs=1e-9)
            assert float(exact.value) == pytest.approx(case.minimum, abs=1e-9)
    elif outcome == "STATIONARY":
        assert result.status is tb.Status.GRADIENT_TOLERANCE
        assert float(exact.gradient.norm()) <= tol
    elif outcome == "STAYS":
        assert result.status is tb.Status.GRADIENT_TOLERANCE
        assert result.history[-1].step == 0
        assert torch.equal(result.x, case.x0)
    elif outcome == "LEAVES":
        assert float(exact.value) < 0.02 * case.minimum < 0
    else:
        assert outcome == "PROGRESS"
        assert float(case.reference.implicit().value) - float(exact.value) >= 0.1 * gain(name)


# -- min_x max_y ---------------------------------------------------------------------------------------------------


def stretched(x, y):
    """P(x) = sum_i [x_i^2 / 2 + cos(x_i) + 0.3 x_i + x_i^2 / (2 c_i)] by a concave part of condition 1e4."""
    c = torch.logspace(-4, 0, y.numel(), dtype=torch.float64).to(y)
    return (x * x / 2 + torch.cos(x) + 0.3 * x + (c**0.5 * y * x) - c * y * y / 2).sum()


MINIMAX = {
    "quadratic": (minimax.quadratic()[0], 4, 6),
    "nonconvex": (minimax.smooth(), 5, 7),
    "saddle": (minimax.saddle, 3, 2),
    "ill_conditioned": (stretched, 2, 2),
    "dx1": (minimax.quadratic(1, 6)[0], 1, 6),
    "dy1": (minimax.quadratic(4, 1)[0], 4, 1),
    "float32": (minimax.smooth(), 5, 7),
}


@pytest.mark.parametrize("name", MINIMAX)
@pytest.mark.parametrize("method", EVERY_MINIMAX)
def test_minimax_outcome(method, name):
    f, dx, dy = MINIMAX[name]
    dtype = torch.float32 if name == "float32" else torch.float64
    x0 = torch.zeros(dx, dtype=dtype) if name == "saddle" else 0.5 * torch.ones(dx, dtype=dtype)
    tol = 1e-4 if name == "float32" else 1e-6
    result = tb.minimize(minimax.problem(f, dx, dy, x0, dtype), method, gradient_tol=tol, **EVERY_MINIMAX[method])
    start, end = (minimax.dense(f, x.double(), dy) for x in (x0, result.x))
    if method == "gda" and name == "saddle":  # STAYS
        assert result.history[-1].step == 0
        assert torch.equal(result.x, x0)
    elif method == "gda":  # PROGRESS
        best = tb.minimize(minimax.problem(f, dx, dy, x0.double()), "mcn").value
        assert float(start.value - end.value) >= 0.1 * (float(start.value) - best)
    else:  # SOSP
        assert result.status is tb.Status.SECOND_ORDER
        assert float(end.gradient.norm()) <= 10 * tol
        assert float(torch.linalg.eigvalsh(end.hessian)[0]) >= -10 * tol
        if name in ("dx1", "dy1", "quadratic"):
            torch.testing.assert_close(result.x, minimax.quadratic(dx, dy)[2], rtol=0, atol=1e-5)


# -- the same seed gives the same bits; a resumed run is the uninterrupted one ---------------------------------------


@pytest.mark.parametrize("method", [*EVERY, *EVERY_MINIMAX])
def test_same_seed_same_bits_and_resume_equals_uninterrupted(method, tmp_path):
    def go(steps, **kwargs):
        if method in EVERY_MINIMAX:
            problem, options = minimax.problem(minimax.smooth(), 5, 7), EVERY_MINIMAX[method]
        else:
            problem, options = nonconvex().problem(), EVERY[method]
        if method in SEARCH:
            kwargs["bounds"] = (-2.0, 2.0)
        return tb.minimize(problem, method, max_steps=steps, gradient_tol=0.0, seed=3, **options, **kwargs)

    whole, again = go(7), go(7)
    go(4, checkpoint=tmp_path / "run.pt")
    resumed = go(7, checkpoint=tmp_path / "run.pt", resume=True)
    for other in (again, resumed):
        assert torch.equal(other.x, whole.x)
        assert torch.equal(other.y, whole.y)
        assert other.counts.as_dict() == whole.counts.as_dict()
        for ours, theirs in zip(other.history, whole.history, strict=True):
            assert (ours.value, ours.counts) == (theirs.value, theirs.counts)
            assert repr(ours.gradient_norm) == repr(theirs.gradient_norm)  # NaN, of a search, equals NaN


# -- oracle counts, as the docstrings promise ------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "period"), [("fsba", 1), ("dlcrn", 1), ("dlcrn", 3), ("lfsba", 3), ("slcrn", 1),
                                                 ("lazy_slcrn", 4), ("ifsba", 3)])  # fmt: skip
def test_one_hessian_per_period_of_accepted_steps(method, period):
    options = {} if method == "fsba" else {"period": period}
    result = tb.minimize(nonconvex().problem(), method, cubic_reg=0.1, max_steps=14, gradient_tol=0.0, **options)
    steps = result.history[1:]
    assert any(not step.accepted for step in steps) or method == "ifsba"
    before_last = sum(step.accepted for step in steps[:-1])
    assert result.counts.hessians == before_last // period + 1
    assert result.counts.evaluations >= 15


def test_a_single_loop_iteration_takes_two_lower_gradients_and_two_solves(monkeypatch):
    """Beside them, two solves per Hessian product, or dx for a dense Hessian from its short side (dx = 12, dy = 8);
    nothing is minimised. A rejected step is evaluated anew in place."""
    columns = 0
    real = HyperHessian._product

    def product(self, u):
        nonlocal columns
        columns += 1 if u.dim() == 1 else u.shape[1]
        return real(self, u)

    monkeypatch.setattr(HyperHessian, "_product", product)
    for options in ({}, {"hessian": "krylov"}, {"solver": "cg"}):
        columns = 0
        result = tb.minimize(nonconvex().problem(), "slcrn", max_steps=10, gradient_tol=0.0, **options)
        counts, evaluations = result.counts, result.counts.evaluations
        assert evaluations == 11 + sum(not report.accepted for report in result.history)
        assert counts.lower_solves == 0
        assert (columns > 0) == (options.get("hessian") == "krylov")
        assert counts.lower_gradients == 2 * evaluations  # no Newton step had to be damped here
        assert counts.solves == 2 * evaluations + (2 * columns if columns else 12 * counts.hessians)
        assert counts.upper_gradients == 2 * evaluations  # f_y for v, and f's part of the Lagrangian


def test_double_loop_counts():
    """DLCRN: one adjoint solve per evaluation and two per Hessian product, one lower solve per evaluation."""
    result = tb.minimize(quadratic().problem(), "dlcrn", max_steps=3, gradient_tol=0.0, solver="cg")
    counts = result.counts
    assert counts.lower_solves == counts.evaluations == 4
    assert counts.factorisations == 0
    assert counts.hessians == 3
    # quadratic g: a lower solve is one Newton step where y moved, confirmed without another solve
    assert counts.solves <= 2 * counts.evaluations + 2 * 4 * counts.hessians


@pytest.mark.parametrize("solver", ["cg", "chebyshev", "minres"])
def test_ifsba_never_factors(solver):
    result = tb.minimize(quadratic().problem(), "ifsba", solver=solver, max_steps=4, gradient_tol=0.0)
    assert result.counts.factorisations == 0
    assert result.counts.hessians >= 1
    assert result.counts.lower_products > 0


def test_auto_makes_no_hessian_before_it_switches():
    run = tb.make_method("auto").start(nonconvex().problem())
    while not run.is_second_order:
        assert run.counts.hessians == 0
        assert run.steps < 50
        run.step()
    assert run.counts.hessians == 1
