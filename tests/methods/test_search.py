"""Random search and TPE: one training a trial, the best is kept, resumable, and clear about what they need."""

from __future__ import annotations

import builtins
import math

import pytest
import torch

import torch_bilevel as tb
from tests.minimax_problems import problem as minimax_problem
from tests.minimax_problems import quadratic as minimax_quadratic
from tests.problems import nonconvex, quadratic
from torch_bilevel.bounds import Box
from torch_bilevel.methods.search import Parzen, Uniform

BOTH = ("random_search", "tpe")
BOX = (-3.0, 3.0)


@pytest.fixture(autouse=True)
def _optuna(request):
    if "random_search" not in request.node.name:
        pytest.importorskip("optuna", reason="TPE needs Optuna: pip install -e '.[baselines]'")


@pytest.mark.parametrize("method", BOTH)
def test_one_training_a_trial_and_the_best_is_kept(method):
    """phi is a convex quadratic known in closed form: every value is judged by it, not by the method."""
    case = quadratic()
    result = tb.minimize(case.problem(), method, max_steps=40, bounds=BOX, seed=1)
    assert result.status is tb.Status.MAX_STEPS
    assert len(result.history) == 41
    counts = result.counts
    assert counts.lower_solves == counts.evaluations == counts.upper_values == 41
    assert counts.upper_gradients == counts.upper_products == counts.hessians == 0
    for step in result.history:
        assert step.counts.lower_solves == step.step + 1
        assert math.isnan(step.gradient_norm)
    values = [step.value for step in result.history]
    trials = [step.extra["trial"] for step in result.history[1:]]
    assert values[0] == pytest.approx(float(case.reference.implicit().value), abs=1e-9)
    assert values == [min([values[0], *trials[:k]]) for k in range(41)]
    assert [step.accepted for step in result.history[1:]] == [b < a for a, b in zip(values, values[1:])]
    assert float(case.reference.implicit(result.x).value) == pytest.approx(result.value, abs=1e-9)
    assert case.minimum < result.value < values[0]
    assert bool(((result.x >= BOX[0]) & (result.x <= BOX[1])).all())


def test_tpe_is_optuna_s_and_better_than_chance():
    case = quadratic()
    gaps = {method: [tb.minimize(case.problem(), method, max_steps=40, bounds=BOX, seed=seed).value - case.minimum
                     for seed in range(3)] for method in BOTH}  # fmt: skip
    assert sorted(gaps["tpe"])[1] < 0.5 * sorted(gaps["random_search"])[1]


def test_tpe_proposes_what_optuna_proposes():
    import optuna

    box, n = Box((-1.0, 2.0), torch.zeros(3, dtype=torch.float64)), 14
    ours = Parzen(box, 5, startup=4, candidates=24, multivariate=False)
    space = {f"x{i}": optuna.distributions.FloatDistribution(-1.0, 2.0) for i in range(3)}
    study, tried = optuna.create_study(), []
    for number in range(n):
        study.sampler = optuna.samplers.TPESampler(seed=1_000_003 * 5 + number, n_startup_trials=4, multivariate=False)
        trial = study.ask(space)
        x = ours.propose(tried)
        assert x.tolist() == [trial.params[name] for name in space]
        value = float((x**2).sum())
        study.tell(trial, value)
        tried.append((x, value))


@pytest.mark.parametrize("options", [{"multivariate": False}, {"startup": 2, "candidates": 5}])
def test_tpe_resumes_with_its_options(options, tmp_path):
    def go(steps, **kwargs):
        return tb.minimize(nonconvex().problem(), "tpe", max_steps=steps, bounds=BOX, seed=3, **options, **kwargs)

    whole = go(16)
    go(7, checkpoint=tmp_path / "run.pt")
    resumed = go(16, checkpoint=tmp_path / "run.pt", resume=True)
    assert [s.extra["trial"] for s in resumed.history[1:]] == [s.extra["trial"] for s in whole.history[1:]]
    assert torch.equal(resumed.x, whole.x)
    assert resumed.counts == whole.counts


def test_uniform_fills_the_box():
    lo, hi = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])
    proposer = Uniform(Box((lo, hi), lo), seed=0)
    x = torch.stack([proposer.propose([(lo, 0.0)] * k) for k in range(400)])
    share = (x - lo) / (hi - lo)
    assert bool(((share >= 0) & (share <= 1)).all())
    assert torch.allclose(share.mean(0), torch.full((2,), 0.5), atol=0.06)
    assert torch.allclose(share.var(0), torch.full((2,), 1 / 12), atol=0.02)
    assert abs(float(torch.corrcoef(share.T)[0, 1])) < 0.15


@pytest.mark.parametrize("method", BOTH)
def test_a_trial_whose_lower_level_fails_is_passed_over(method):
    """For x > 1 the lower level is not convex; phi = y* = 1 / (1 - x) is least at the lower end."""
    half = torch.full((1,), 0.5, dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: y.sum(), lambda x, y: ((1 - x) * y * y / 2 - y).sum(), half, half, check=False
    )
    result = tb.minimize(problem, method, max_steps=25, bounds=(-2.0, 4.0))
    trials = [step.extra["trial"] for step in result.history[1:]]
    assert any(math.isnan(t) for t in trials)
    assert any(t == t for t in trials)
    assert result.value == pytest.approx(1 / (1 - float(result.x)), rel=1e-8)
    assert result.value < 1.0
    assert result.counts.lower_solves == 26


@pytest.mark.parametrize("method", BOTH)
def test_minimax_values(method):
    f, dx, dy = minimax_quadratic()[0], 4, 6
    problem = minimax_problem(f, dx, dy, torch.ones(dx, dtype=torch.float64))
    result = tb.minimize(problem, method, max_steps=12, bounds=BOX)
    exact = tb.MinimaxOracle(minimax_problem(f, dx, dy, result.x)).evaluate()
    assert result.value == pytest.approx(float(exact.value), abs=1e-9)
    assert result.value <= result.history[0].value


@pytest.mark.parametrize("method", BOTH)
def test_what_a_search_needs(method):
    for bounds in (None, (0.0, math.inf)):
        with pytest.raises(tb.ConfigError, match="finite bounds"):
            tb.minimize(quadratic().problem(), method, bounds=bounds)
    with pytest.raises(tb.ConfigError, match="external"):
        tb.minimize(quadratic().problem(), method, bounds=BOX, lower="external")
    with pytest.raises(tb.ConfigError, match="did you mean 'lower'"):
        tb.make_method(method, {"lowr": "newton_cg"})
    with pytest.raises(TypeError, match="ImplicitOracle"):
        _ = tb.oracles.ValueOracle(quadratic().problem()).evaluate().hessian


def test_bad_options_of_tpe():
    for options in ({"startup": -1}, {"candidates": 0}, {"startup": 2.5}):
        with pytest.raises(tb.ConfigError, match=next(iter(options))):
            tb.make_method("tpe", options)


def test_without_optuna_random_search_works_and_tpe_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "optuna":
            raise ImportError("No module named 'optuna'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(tb.ConfigError, match=r"torch-bilevel\[baselines\]"):
        tb.make_method("tpe")
    assert tb.minimize(quadratic().problem(), "random_search", max_steps=2, bounds=BOX).counts.lower_solves == 3


@pytest.mark.parametrize("method", BOTH)
def test_new_data_begin_the_search_again_beside_the_best_point(method):
    run = tb.make_method(method).start(quadratic().problem(), bounds=BOX)
    for _ in range(5):
        run.step()
    x = run.x
    run.set_data(quadratic().problem())
    assert run.tried == []
    assert torch.equal(run.x, x)
    run.step()
    assert len(run.tried) == 2
    assert torch.equal(run.tried[0][0], x)
