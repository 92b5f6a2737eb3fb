"""Every oracle, on every problem, dtype and device, against the dense float64 referee."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.reference import error

PROBLEMS = ("smooth", "one by one", "modules")
ORACLES = {
    "implicit": (None, "central"),
    "central": (1e3, "central"),
    "forward": (1e3, "forward"),
    "forward, small penalty": (2.0, "forward"),
}


def build(oracle, problem, **options):
    penalty, scheme = ORACLES[oracle]
    if penalty is None:
        return tb.ImplicitOracle(problem, **options)
    return tb.PenaltyOracle(problem, penalty, scheme, **options)


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_float64_equals_the_referee(name, oracle, make, expected, device):
    problem = make(name, device=device)
    ev = build(oracle, problem).evaluate()
    truth = expected(name, *ORACLES[oracle])
    assert error(ev.value, truth.value) <= 1e-10
    assert error(ev.gradient, truth.gradient) <= 1e-8
    dense = ev.hessian.to_dense()
    assert error(dense, truth.hessian) <= 1e-6
    assert ev.value.shape == ()
    assert ev.gradient.shape == (problem.dx,)
    assert dense.shape == (problem.dx,) * 2
    for tensor in (ev.value, ev.gradient, dense, ev.lower.y, ev.lower.gradient_norm):
        assert tensor.dtype == torch.float64
        assert tensor.device.type == device.type
        assert not tensor.requires_grad


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_equals_the_same_scheme_in_float64(name, oracle, make, expected, device):
    ev = build(oracle, make(name, torch.float32, device)).evaluate()
    truth = expected(name, *ORACLES[oracle])
    assert error(ev.gradient, truth.gradient) <= 1e-4
    assert error(ev.hessian.to_dense(), truth.hessian) <= 1e-3
    assert ev.gradient.dtype == ev.value.dtype == ev.hessian.to_dense().dtype == torch.float32


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_single_blocked_and_dense_agree(name, oracle, make, device):
    ev = build(oracle, make(name, device=device)).evaluate()
    H = ev.hessian
    V = torch.randn(H.n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    dense = H.to_dense()
    assert error(H.matmat(V), dense @ V) <= 1e-8
    assert error(torch.stack([H.matvec(v) for v in V.T], 1), dense @ V) <= 1e-8
    assert error(dense, dense.T) == 0.0


@pytest.mark.parametrize("solver", ["cg", "minres", "cholesky", "auto"])
@pytest.mark.parametrize("oracle", ORACLES)
def test_every_linear_solver_gives_the_same(oracle, solver, make, expected):
    oracle_ = build(oracle, make("smooth"), solver=solver)
    ev = oracle_.evaluate()
    truth = expected("smooth", *ORACLES[oracle])
    assert error(ev.gradient, truth.gradient) <= 1e-8
    assert error(ev.hessian.to_dense(), truth.hessian) <= 1e-6
    if solver in ("cg", "minres"):
        assert oracle_.counts.factorisations == 0
    else:
        assert oracle_.counts.factorisations >= 1


@pytest.mark.parametrize(
    "lower", ["newton_cg", {"name": "agd", "tol": 1e-12}, {"name": "gradient_descent", "tol": 1e-12}]
)
@pytest.mark.parametrize("oracle", ["implicit", "central", "forward"])
def test_every_lower_solver_that_converges_gives_the_same(oracle, lower, make, expected):
    ev = build(oracle, make("smooth"), lower=lower).evaluate()
    truth = expected("smooth", *ORACLES[oracle])
    assert error(ev.gradient, truth.gradient) <= 1e-8
    assert error(ev.hessian.to_dense(), truth.hessian) <= 1e-6


@pytest.mark.parametrize("oracle", ORACLES)
def test_lower_solution_is_reported_with_its_true_residual(oracle, make, referee, expected):
    problem = make("smooth")
    lower = build(oracle, problem).evaluate().lower
    y = expected("smooth").y
    # the penalty oracle's y is a midpoint (central) or lo (forward) after one Newton step for g itself
    assert error(lower.y, y) <= 1e-6
    ref = referee("smooth")
    residual = torch.func.grad(ref.g, 1)(ref.x, lower.y).norm()
    torch.testing.assert_close(lower.gradient_norm, residual, rtol=1e-3, atol=1e-13)
    if lower.error is not None:
        assert float((lower.y - y).norm()) <= 20 * float(lower.error) + 1e-12


@pytest.mark.parametrize("oracle", ORACLES)
def test_evaluate_takes_x_or_the_current_point_and_leaves_both_alone(oracle, make):
    problem = make("modules")
    x, y = problem.x, problem.y
    here = build(oracle, problem).evaluate()
    again = build(oracle, problem).evaluate(x.clone())
    torch.testing.assert_close(here.gradient, again.gradient, rtol=0, atol=0)
    moved = build(oracle, problem).evaluate(x + 1)
    assert error(moved.gradient, here.gradient) > 1e-2
    assert torch.equal(problem.x, x)
    assert torch.equal(problem.y, y)
    assert all(p.grad is None for p in problem.learner.parameters())


@pytest.mark.parametrize("oracle", ORACLES)
def test_gradient_is_the_slope_of_the_value_and_the_hessian_of_the_gradient(oracle, make):
    problem = make("smooth")
    oracle_ = build(oracle, problem, lower_tol=1e-13)
    x, h = problem.x, 1e-4
    u = torch.randn(problem.dx, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ev = oracle_.evaluate(x)
    plus, minus = oracle_.evaluate(x + h * u), oracle_.evaluate(x - h * u)
    assert float((plus.value - minus.value) / (2 * h)) == pytest.approx(float(ev.gradient @ u), rel=1e-5)
    assert error(ev.hessian.matvec(u), (plus.gradient - minus.gradient) / (2 * h)) <= 1e-5


@pytest.mark.parametrize("oracle", ORACLES)
def test_wrong_x_is_refused(oracle, make):
    oracle_ = build(oracle, make("smooth"))
    double = torch.float64
    for bad in (torch.zeros(7, dtype=double), torch.zeros(6), torch.zeros(6, 1, dtype=double), [0.0] * 6):
        with pytest.raises(tb.ShapeError, match="x: expected"):
            oracle_.evaluate(bad)
    assert oracle_.counts.gradients == 0


@pytest.mark.parametrize("oracle", ORACLES)
def test_restored_evaluation_is_the_same_without_a_lower_solve(oracle, make):
    problem = make("smooth")
    first = build(oracle, problem)
    ev = first.evaluate()
    H = ev.hessian.to_dense()
    second = build(oracle, problem)
    second.load_state_dict(first.state_dict())
    before = second.counts.copy()
    restored = second.restore(ev.state_dict())
    assert torch.equal(restored.value, ev.value)
    assert torch.equal(restored.gradient, ev.gradient)
    assert error(restored.hessian.to_dense(), H) <= 1e-12
    assert second.counts.lower_solves == before.lower_solves == first.counts.lower_solves


@pytest.mark.parametrize("oracle", ORACLES)
def test_evaluation_of_another_batch_keeps_its_own_problem(oracle, make, expected):
    """An operator made after ``oracle.problem`` moved on belongs to the data it was evaluated on."""
    problem = make("modules")
    oracle_ = build(oracle, problem)
    ev = oracle_.evaluate()
    inputs, labels = problem.batch("upper")
    oracle_.problem = problem.at(upper_batch=(inputs.flip(0) * 2, labels))
    other = oracle_.evaluate()
    truth = expected("modules", *ORACLES[oracle])
    assert error(ev.hessian.to_dense(), truth.hessian) <= 1e-6
    assert error(other.hessian.to_dense(), truth.hessian) > 1e-2
    assert float((ev.lower.y - expected("modules").y).norm()) <= 1e-4
