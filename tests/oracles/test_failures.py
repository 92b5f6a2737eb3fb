"""What the oracles do when the problem is not what they assume: an error that says so, never a number."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb

ORACLES = {
    "implicit": tb.ImplicitOracle,
    "forward": lambda problem, **options: tb.PenaltyOracle(problem, 1e2, "forward", **options),
    "central": lambda problem, **options: tb.PenaltyOracle(problem, 1e2, "central", **options),
}
one = torch.ones(2, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:g - f/penalty")


def indefinite(start):
    """A saddle in y."""
    def g(x, y):
        return y[0] ** 2 - y[1] ** 2 / 2 + (x * y).sum()

    return tb.BilevelProblem.from_functions(lambda x, y: ((y - 3) ** 2).sum() / 2, g, one, start)


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
@pytest.mark.parametrize("oracle", ORACLES)
def test_lower_level_not_convex(oracle, solver):
    with pytest.raises(tb.NotStronglyConvexError, match="L2") as caught:
        ORACLES[oracle](indefinite(0.3 * one), solver=solver).evaluate()
    assert caught.value.curvature < 0
    assert isinstance(caught.value, tb.BilevelError)
    assert caught.value.result is not None


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
@pytest.mark.parametrize("oracle", ORACLES)
def test_lower_level_at_a_saddle(oracle, solver):
    """The start is an exact stationary point of g, which the lower solver takes; the adjoint system tells."""
    saddle = torch.tensor([-0.5, 1.0], dtype=torch.float64)
    with pytest.raises(tb.NotStronglyConvexError, match="positive definite|convex"):
        ORACLES[oracle](indefinite(saddle), solver=solver).evaluate()


@pytest.mark.parametrize("oracle", ORACLES)
def test_convex_but_not_strongly(oracle):
    """g = (y_0 + y_1 - x_0)^2: a whole line of minimisers; no answer may be given."""
    def f(x, y):
        return ((y - 1) ** 2).sum() / 2 + y[0] * x.sum()

    problem = tb.BilevelProblem.from_functions(f, lambda x, y: (y.sum() - x[0]) ** 2, one, 0 * one)
    with pytest.raises((tb.NotStronglyConvexError, tb.SolverError)):
        ORACLES[oracle](problem).evaluate()


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_not_finite_at_the_point(oracle, level):
    """NaN for x_0 > 2: fine at construction, not where it is evaluated."""
    def poisoned(x):
        return torch.where(x[0] > 2, torch.full_like(x[0], float("nan")), x[0])

    def f(x, y):
        return ((y - 1) ** 2).sum() + (poisoned(x) if level == "upper" else 0.0)

    def g(x, y):
        return ((y - x) ** 2).sum() / 2 + (poisoned(x) * y[0] if level == "lower" else 0.0)

    oracle_ = ORACLES[oracle](tb.BilevelProblem.from_functions(f, g, one, 0 * one))
    assert bool(torch.isfinite(oracle_.evaluate().value))
    with pytest.raises(tb.NonFiniteError, match="NaN"):
        oracle_.evaluate(3 * one)
    again = oracle_.evaluate(one)  # the failure has not poisoned the warm start
    assert bool(torch.isfinite(again.gradient).all())


@pytest.mark.parametrize("oracle", ORACLES)
def test_missing_data(oracle):
    learner = torch.nn.Linear(2, 1)
    problem = tb.BilevelProblem(
        learner, torch.zeros(2), lambda m, h, b: (m(b) ** 2).mean() + (h.exp() * m.weight**2).sum(),
        lambda m, h, b: (m(b) ** 2).mean(), torch.ones(3, 2),
    )  # fmt: skip
    with pytest.raises(tb.ProblemError, match="upper loss has no data: pass upper_batch"):
        ORACLES[oracle](problem).evaluate()


@pytest.mark.parametrize("oracle", ORACLES)
def test_a_lower_solver_that_does_not_arrive(oracle):
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2 * torch.tensor([1.0, 1e4])).sum(), one, 0 * one
    )
    with pytest.raises(tb.SolverError, match="iteration limit.*raise max_iterations"):
        ORACLES[oracle](problem, lower={"name": "gradient_descent", "max_iterations": 3}).evaluate()
