"""The implicit oracle: closed forms, costs, external learners, damping."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.reference import error


def test_closed_form():
    """g = (y - x^2)^2 (1 + x^2) / 2, f = y^3: phi = x^6."""
    x = torch.tensor([1.3], dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**3).sum(), lambda x, y: ((y - x**2) ** 2 * (1 + x**2)).sum() / 2, x, 0 * x
    )
    ev = tb.ImplicitOracle(problem).evaluate()
    torch.testing.assert_close(ev.value, (x**6).sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(ev.gradient, 6 * x**5, rtol=1e-10, atol=0)
    torch.testing.assert_close(ev.hessian.to_dense(), (30 * x**4).view(1, 1), rtol=1e-9, atol=0)


def test_cost_of_a_gradient_and_of_products(make):
    """At a given point: one recorded lower gradient, one upper gradient, one solve, one cross product."""
    problem = make("smooth")
    oracle = tb.ImplicitOracle(problem, solver="cg")
    ev = oracle.at_point(problem.x, problem.y)
    counts = ev.counts
    assert (counts.lower_gradients, counts.upper_gradients, counts.solves) == (1, 1, 1)
    assert (counts.lower_solves, counts.factorisations) == (0, 0)
    assert 1 + 1 <= counts.lower_products <= 1 + 2 * problem.dy + 2  # the cross product, and those of CG
    H = ev.hessian
    before = counts.copy()
    H.matvec(torch.ones(6, dtype=torch.float64))
    assert counts.solves - before.solves == 2
    assert counts.upper_products - before.upper_products == 1
    assert counts.gradients == before.gradients
    H.matmat(torch.randn(6, 4, dtype=torch.float64))
    assert counts.solves - before.solves == 2 + 8
    assert counts.upper_products - before.upper_products == 1 + 4


def test_cost_of_a_dense_hessian_with_a_factor(make):
    """A factor is dy products; then per column yx, the true residual of two solves, the Lagrangian and xy."""
    problem = make("smooth")
    oracle = tb.ImplicitOracle(problem, solver="cholesky")
    ev = oracle.at_point(problem.x, problem.y)
    assert ev.counts.factorisations == 1
    H, before = ev.hessian, ev.counts.copy()
    H.to_dense()
    spent = {key: value - before.as_dict()[key] for key, value in ev.counts.as_dict().items()}
    assert spent["factorisations"] == 0
    assert spent["solves"] == 12
    assert spent["upper_products"] == 6
    assert spent["lower_products"] <= 6 * (3 + 2 * 2)  # a solve: residual at the start, at most a step
    assert ev.counts.lower_products - spent["lower_products"] <= 8 + 1 + 2


def test_warm_starts_make_a_second_evaluation_cheap(make):
    oracle = tb.ImplicitOracle(make("modules"), solver="cg")
    first = oracle.evaluate()
    second = oracle.evaluate()
    assert second.counts.lower_products < first.counts.lower_products / 3
    assert error(second.gradient, first.gradient) <= 1e-8


def test_external_learner_is_taken_where_it_is(make, referee):
    """lower='external': the formulas of the gradient at the learner's current parameters, none solved."""
    ref, problem = referee("smooth"), make("smooth")
    oracle = tb.ImplicitOracle(problem, lower="external")
    for y in (ref.y0, ref.y0 + 0.1):
        problem.write(y=y)
        ev = oracle.evaluate()
        _, xy, _, yy = _blocks(ref, y)
        grads = torch.func.grad(ref.f, (0, 1))(ref.x, y)
        gradient = grads[0] - xy @ torch.linalg.solve(yy, grads[1])
        assert torch.equal(ev.lower.y, y)
        assert ev.counts.lower_solves == 0
        assert error(ev.gradient, gradient) <= 1e-9
        assert float(ev.lower.gradient_norm) > 0.1


@pytest.mark.parametrize("solver", ["cg", "cholesky", "auto"])
def test_damping_is_added_to_the_lower_hessian(solver, make, referee):
    ref, problem, damping = referee("smooth"), make("smooth"), 0.7
    ev = tb.ImplicitOracle(problem, lower="external", damping=damping, solver=solver).evaluate()
    _, xy, _, yy = _blocks(ref, ref.y0)
    grads = torch.func.grad(ref.f, (0, 1))(ref.x, ref.y0)
    v = torch.linalg.solve(yy + damping * torch.eye(8, dtype=torch.float64), grads[1])
    assert error(ev.gradient, grads[0] - xy @ v) <= 1e-9


def _blocks(ref, y):
    from tests.reference import blocks

    return blocks(ref.g, ref.x, y)
