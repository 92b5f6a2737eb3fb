"""auto: quasi-Newton first, second order to leave saddles, where L-BFGS is slow, and to certify."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import torch_bilevel as tb
from experiments import synthetic
from tests.problems import CASES, Case, hyper_cleaning, nonconvex, one_by_one, quadratic, saddle
from torch_bilevel.errors import NonFiniteError, SolverError
from torch_bilevel.methods.auto import AutoRun
from torch_bilevel.oracles.hessian import HyperHessian


def per_feature_ridge(features: int = 16, samples: int = 40) -> Case:
    """One log L2 weight per feature of a ridge regression with features of scales 1 to 100: ill-conditioned above."""
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(samples, features, generator=gen, dtype=torch.float64) * torch.logspace(0, -2, features).double()
    w = torch.randn(features, generator=gen, dtype=torch.float64) * (torch.arange(features) % 3 == 0)
    t = X @ (30 * w) + 0.3 * torch.randn(samples, generator=gen, dtype=torch.float64)
    train, held = slice(0, samples // 2), slice(samples // 2, samples)

    def g(x, y):
        return ((X[train].to(y) @ y - t[train].to(y)) ** 2).mean() + (x.exp() * y * y).mean()

    def f(x, y):
        return ((X[held].to(y) @ y - t[held].to(y)) ** 2).mean() + 1e-3 * (x * x).mean()

    return Case("ridge", f, g, torch.zeros(features, dtype=torch.float64), torch.zeros(features, dtype=torch.float64))


def switched_at(result: tb.Result) -> int | None:
    """The first step with a Hessian."""
    return next((report.step for report in result.history if report.counts.hessians), None)


def test_leaves_an_exact_saddle_at_once():
    result = tb.minimize(saddle().problem(), "auto")
    assert result.history[0].gradient_norm == 0.0
    assert switched_at(result) == 1
    assert result.status is tb.Status.SECOND_ORDER
    assert result.value == pytest.approx(saddle().minimum, abs=1e-9)
    sides = {float(tb.minimize(saddle().problem(), "auto", seed=s).x[2]) > 0 for s in range(6)}
    assert sides == {True, False}


def test_a_saddle_that_lbfgs_runs_into_is_left():
    """From x_3 = 0 the gradient never points along the negative curvature: L-BFGS ends at the saddle."""
    start = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    stuck = tb.minimize(saddle().problem(x0=start), "lbfgs")
    assert stuck.status is tb.Status.GRADIENT_TOLERANCE
    assert abs(stuck.value) < 1e-9
    result = tb.minimize(saddle().problem(x0=start), "auto")
    assert switched_at(result) > 1
    assert result.value == pytest.approx(saddle().minimum, abs=1e-9)


def test_switches_where_lbfgs_is_slow_and_saves_evaluations_and_calls():
    case = per_feature_ridge()
    lbfgs = tb.minimize(case.problem(), "lbfgs", max_steps=300)
    result = tb.minimize(case.problem(), "auto", max_steps=300)
    assert result.status is tb.Status.SECOND_ORDER
    assert switched_at(result) is not None
    assert result.value <= lbfgs.value + 1e-8
    assert result.counts.evaluations <= 0.65 * lbfgs.counts.evaluations
    assert result.counts.oracle_calls < 0.9 * lbfgs.counts.oracle_calls


def test_stays_with_lbfgs_where_that_is_cheap():
    assert switched_at(tb.minimize(one_by_one().problem(), "auto")) is None


def test_finishes_a_quadratic_by_one_cheap_hessian():
    result = tb.minimize(quadratic().problem(), "auto")
    assert switched_at(result) == 2
    assert result.counts.hessians == 1
    assert result.history[-1].step <= 4
    assert result.value == pytest.approx(quadratic().minimum, abs=1e-9)


def test_stays_with_lbfgs_where_a_hessian_is_dear():
    """LancBiO's problem: |gradient| goes up and down, and a Hessian costs what some sixty evaluations do."""
    config = synthetic.Config(n=200, condition=100.0)
    lbfgs, auto = (tb.minimize(synthetic.build(config, 0), m, max_steps=300, gradient_tol=1e-5) for m in ("lbfgs", "auto"))
    assert auto.status is tb.Status.SECOND_ORDER
    assert auto.value <= lbfgs.value + 1e-6
    reached = auto.history[-1].counts.oracle_calls  # without the certificate, which L-BFGS does not make
    assert reached <= 1.3 * lbfgs.counts.oracle_calls


@pytest.mark.parametrize("case", [*CASES, per_feature_ridge()], ids=lambda case: case.name)
def test_never_much_dearer_than_the_better_of_its_two_halves(case):
    """Within 1.3 of the oracle calls of L-BFGS (which certifies nothing) and of lazy DLCRN, whichever took fewer among
    those that ended at a minimum at least as low."""
    auto = tb.minimize(case.problem(), "auto", max_steps=300)
    others = [tb.minimize(case.problem(), "lbfgs", max_steps=300),
              tb.minimize(case.problem(), "dlcrn", period="adaptive", max_steps=300)]  # fmt: skip
    good = [other for other in others if other.status.converged and other.value <= auto.value + 1e-6]
    assert auto.status is tb.Status.SECOND_ORDER
    assert good
    assert auto.counts.oracle_calls <= 1.3 * min(other.counts.oracle_calls for other in good)


@pytest.fixture
def hasty(monkeypatch):
    """An `auto` that tries a second-order finish at the first opportunity: where Hessians are dear it is a mistake."""
    monkeypatch.setattr("torch_bilevel.methods.auto.FINISH_HESSIANS", 0.01)
    monkeypatch.setattr("torch_bilevel.methods.auto.FINISH_EVALUATIONS", 1)
    monkeypatch.setattr("torch_bilevel.methods.auto.STAKE", float("inf"))


def phases(result: tb.Result) -> list[bool]:
    """Per step, whether it was of second order (those alone report an M)."""
    return [report.cubic_reg == report.cubic_reg for report in result.history[1:]]


def test_goes_back_to_lbfgs_from_a_finish_that_is_slower_and_then_waits(hasty):
    problem = synthetic.build(synthetic.Config(n=200, condition=100.0), 0)
    seen = phases(tb.minimize(problem, "auto", max_steps=150, gradient_tol=1e-5))
    changes = [i for i in range(1, len(seen)) if seen[i] != seen[i - 1]]
    assert len(changes) >= 2
    assert not seen[0]
    lbfgs = tb.minimize(synthetic.build(synthetic.Config(n=200, condition=100.0), 0), "lbfgs", max_steps=150, gradient_tol=1e-5)
    run = tb.minimize(synthetic.build(synthetic.Config(n=200, condition=100.0), 0), "auto", max_steps=300, gradient_tol=1e-5)
    assert run.history[-1].counts.oracle_calls <= 2 * lbfgs.counts.oracle_calls


@pytest.mark.parametrize(
    ("value", "norm", "first", "slower", "rates", "back"),
    [
        (0.9, 1e-3, True, False, (1e-4, 1e-3), False),  # ten times L-BFGS's gain of value, as much of gradient
        (0.99999, 9e-3, True, False, (1e-4, 1e-3), True),  # less of both
        (0.999, 1e-3, True, False, (1e-4, 0.0), True),  # the gradient falls as it did not before, the value hardly
        (0.999, 1e-3, False, False, (1e-4, 0.0), False),  # which later is said once
        (0.999, 1e-3, False, True, (1e-4, 0.0), True),  # before it counts
        (0.999, 9e-5, False, True, (1e-4, 0.0), False),  # but not where the finish converges
    ],
)  # fmt: skip
def test_what_a_finish_is_judged_by(value, norm, first, slower, rates, back):
    """A trial of 100 calls, begun at a value of 1 and a gradient of 1e-2."""
    trial = {"rates": rates, "calls": 1000, "value": 1.0, "start": 1e-2, "before": 1e-2, "norm": norm, "first": first,
             "slower": slower}  # fmt: skip
    gone = []
    schedule = SimpleNamespace(due=lambda age: True)
    active = SimpleNamespace(model=object(), age=1, method=SimpleNamespace(schedule=schedule),
                             current=lambda: SimpleNamespace(value=value))  # fmt: skip
    run = SimpleNamespace(_trial=trial, active=active, counts=SimpleNamespace(oracle_calls=1100), _failed=0, _wait=0,
                          _go_first_order=lambda: gone.append(True))  # fmt: skip
    run._give_up = lambda spent: AutoRun._give_up(run, spent)
    AutoRun._judge(run)
    assert bool(gone) == back
    assert run._wait == (1300 if back else 0)


@pytest.mark.parametrize("error", [NonFiniteError, SolverError])
def test_goes_back_to_lbfgs_where_a_hessian_fails_on_trial(hasty, error, monkeypatch):
    """A Hessian that overflows is the trial's end, not the run's."""
    failed = []

    def fails(self, v):
        failed.append(True)
        raise error("a product overflowed", None)

    monkeypatch.setattr(HyperHessian, "matvec", fails)
    monkeypatch.setattr(HyperHessian, "to_dense", lambda self: fails(self, None))
    problem = synthetic.build(synthetic.Config(n=200, condition=100.0), 0)
    seen = tb.minimize(problem, "auto", max_steps=30, gradient_tol=0.0)
    assert failed
    assert len(seen.history) == 31
    assert not any(phases(seen))
    assert len(failed) <= 4  # it waits longer and longer


def test_resume_after_going_back_is_bit_for_bit(hasty, tmp_path):
    def go(steps, **kwargs):
        problem = synthetic.build(synthetic.Config(n=200, condition=100.0), 0)
        return tb.minimize(problem, "auto", max_steps=steps, gradient_tol=0.0, **kwargs)

    whole = go(45)
    seen = phases(whole)
    back = next(i for i in range(1, len(seen)) if seen[i - 1] and not seen[i])
    for stop in (back - 1, back + 2):  # within the trial, and after it
        folder = tmp_path / str(stop)
        folder.mkdir()
        go(stop, checkpoint=folder / "run.pt")
        resumed = go(45, checkpoint=folder / "run.pt", resume=True)
        assert torch.equal(resumed.x, whole.x)
        assert resumed.counts.as_dict() == whole.counts.as_dict()


def test_bounds_are_kept_in_both_phases(hasty):
    problem, seen = nonconvex().problem(), []
    result = tb.minimize(problem, "auto", bounds=(-0.5, 0.8), max_steps=60,
                         callback=lambda report, x, y: seen.append(x.clone()))  # fmt: skip
    assert all(bool(((x >= -0.5) & (x <= 0.8)).all()) for x in seen)
    assert bool(((result.x == -0.5) | (result.x == 0.8)).any())
    assert result.status is tb.Status.SECOND_ORDER
    assert switched_at(result) is not None


@pytest.mark.parametrize("stop", [3, 17])
def test_resume_in_both_phases_is_bit_for_bit(stop, tmp_path):
    def go(steps, **kwargs):
        return tb.minimize(hyper_cleaning().problem(), "auto", max_steps=steps, gradient_tol=0.0, **kwargs)

    whole = go(20)
    before, last = whole.history[stop].counts.hessians, whole.counts.hessians
    assert (before == 0) == (stop == 3)
    assert last > 0
    go(stop, checkpoint=tmp_path / "run.pt")
    resumed = go(20, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.y, whole.y)
    assert resumed.counts.as_dict() == whole.counts.as_dict()
    assert [r.value for r in resumed.history] == [r.value for r in whole.history]


def test_a_hessian_is_not_tried_before_twice_its_price_is_spent():
    problem = hyper_cleaning().problem()
    run = tb.make_method("auto").start(problem)
    while not run.is_second_order and run.steps < 60:
        price, spent = run.hessian_cost(), run.counts.evaluations
        run.step()
    assert run.is_second_order
    assert run.steps < 60
    assert price <= 0.5 * spent


def test_hessian_cost_follows_the_counts():
    """8 columns (the short side) of 3 + 2 products and a factor of size 8, in evaluations; factors are not evaluations."""
    run = tb.make_method("auto").start(nonconvex().problem())
    run.step()
    counts = run.counts
    per_evaluation = (counts.oracle_calls - 8 * counts.factorisations) / counts.evaluations
    assert counts.factorisations >= 1
    assert run.hessian_cost() == pytest.approx((8 * 5 + 8) / per_evaluation)
    before = run.hessian_cost()
    counts.add(factorisations=100, lower_products=800)
    assert run.hessian_cost() == pytest.approx(before)


@pytest.mark.parametrize(
    ("options", "scaling"), [({}, "diagonal"), ({"solver": "cholesky"}, "diagonal"), ({"solver": "cg"}, "scalar")]
)
def test_the_scaling_is_scalar_where_systems_are_solved_by_cg_alone(options, scaling):
    run = tb.make_method("auto", options).start(nonconvex().problem())
    assert run.active.method.scaling == scaling
    assert run.method.first.scaling == scaling
