"""Every lower solver on every lower objective."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad

from tests.reference import argmin
from torch_bilevel.errors import ConfigError
from torch_bilevel.lower import (
    AGD,
    External,
    GradientDescent,
    LowerStatus,
    NewtonCG,
    TorchOptimizer,
    make_lower,
)

D = torch.float64
TO_TOLERANCE = {"newton_cg": NewtonCG, "agd": AGD, "gradient_descent": GradientDescent}
NAMES = ("quadratic, kappa 10", "quadratic, kappa 1e4", "softmax", "dy = 1")


def minimiser(case):
    return argmin(lambda y: case.h(case.x, y), case.y0)


ROWS = [
    pytest.param(solver, name, marks=[pytest.mark.slow] * ((solver, name) == ("gradient_descent", NAMES[1])))
    for solver in TO_TOLERANCE
    for name in NAMES
]


@pytest.mark.parametrize(("solver", "name"), ROWS)
def test_reaches_its_tolerance(solver, name, case):
    problem, tol = case(name), 1e-8
    budget = {} if solver == "newton_cg" else {"max_iterations": 200_000}
    if solver == "gradient_descent":
        tol = 1e-2 if "1e4" in name else 1e-5  # ln(1 / tol) kappa steps
    result, objective = problem.solve(TO_TOLERANCE[solver](**budget), tol=tol)
    y = minimiser(problem)
    assert result.status is LowerStatus.CONVERGED
    assert result.ok
    distance = float((result.y - y).norm())
    assert distance <= 3 * tol * (1 + float(y.norm()))
    # what it says of itself is true: the residual, and an error that is no wishful thinking
    residual = grad(problem.h, 1)(problem.x, result.y).norm()
    torch.testing.assert_close(result.gradient_norm, residual, rtol=1e-6, atol=1e-13)
    assert distance <= 10 * float(result.error) + 1e-12
    assert objective.counts.lower_solves == 1
    assert result.y.dtype == D
    assert not result.y.requires_grad


@pytest.mark.parametrize("name", ["quadratic, kappa 10", "softmax", "dy = 1"])
@pytest.mark.parametrize("solver", TO_TOLERANCE)
def test_float32_reaches_its_default_tolerance(solver, name, case):
    problem = case(name)
    result, _ = problem.solve(TO_TOLERANCE[solver](), torch.float32)
    y = minimiser(problem)
    assert result.status is LowerStatus.CONVERGED
    assert result.y.dtype == torch.float32
    assert float((result.y.double() - y).norm()) <= 2e-5 * (1 + float(y.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_newton_cg_reaches_its_default_tolerance(name, dtype, case):
    problem = case(name)
    result, objective = problem.solve(NewtonCG(), dtype)
    y = minimiser(problem)
    assert result.status is LowerStatus.CONVERGED
    # float32, kappa 1e4: the gradient itself is known to eps kappa only
    bound = 1e-9 if dtype == D else 2e-3 if "1e4" in name else 2e-5
    assert float((result.y.double() - y).norm()) <= bound * (1 + float(y.norm()))
    assert result.iterations <= 12
    assert objective.counts.solves == result.iterations


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", TO_TOLERANCE)
def test_started_at_the_solution(solver, name, case):
    problem = case(name)
    problem.y0 = minimiser(problem)
    if name.startswith("quadratic"):
        problem.y0 = problem.x  # exactly: the gradient is 0
    result, _ = problem.solve(TO_TOLERANCE[solver](), tol=1e-8)
    assert result.status is LowerStatus.CONVERGED
    assert result.iterations <= 3
    assert float((result.y - problem.y0).norm()) <= 1e-12
    assert float(result.error) <= 1e-8


@pytest.mark.parametrize("momentum", [None, 0.0, 0.7])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_fixed_steps_are_the_published_loop(steps, momentum, case):
    problem, step = case("softmax"), 0.05
    slope = grad(problem.h, 1)
    y = z = problem.y0
    for _ in range(steps):
        new = z - step * slope(problem.x, z)
        z, y = new + (momentum or 0.0) * (new - y), new
    result, objective = problem.solve(AGD(step, momentum=momentum, steps=steps))
    torch.testing.assert_close(result.y, y, rtol=1e-13, atol=1e-14)
    assert result.status is LowerStatus.FIXED_STEPS
    assert result.ok
    assert result.iterations == steps
    assert objective.counts.lower_gradients == steps
    assert objective.counts.lower_products == 0
    if momentum is None:
        plain, _ = problem.solve(GradientDescent(step, steps=steps))
        assert torch.equal(plain.y, result.y)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_torch_optimizers_are_themselves(optimizer, case):
    problem = case("softmax")
    options = {"lr": 0.05, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {})}
    y = problem.y0.clone().requires_grad_(True)
    theirs = optimizer([y], **options)

    def closure():
        theirs.zero_grad()
        loss = problem.h(problem.x, y)
        loss.backward()
        return loss

    for _ in range(6):
        theirs.step(closure)
    for _ in range(2):  # its state is made anew for every solve
        result, objective = problem.solve(TorchOptimizer(optimizer, steps=6, **options))
        torch.testing.assert_close(result.y, y.detach(), rtol=1e-12, atol=1e-13)
        assert result.status is LowerStatus.FIXED_STEPS
        if optimizer is not torch.optim.LBFGS:
            assert objective.counts.lower_gradients == 6
    assert not TorchOptimizer().reaches_tolerance


def test_external_leaves_the_learner_alone(case):
    problem = case("softmax")
    result, objective = problem.solve(External())
    assert torch.equal(result.y, problem.y0)
    assert result.status is LowerStatus.EXTERNAL
    assert result.ok
    torch.testing.assert_close(result.gradient_norm, grad(problem.h, 1)(problem.x, problem.y0).norm())
    assert (objective.counts.lower_gradients, objective.counts.lower_solves) == (1, 0)


@pytest.mark.parametrize("name", ["softmax", "dy = 1"])
@pytest.mark.parametrize("solver", ["agd", "gradient_descent"])
def test_costs_of_the_gradient_methods(solver, name, case):
    """One gradient per step, and the estimate of L before: one recorded gradient and eight products."""
    result, objective = case(name).solve(TO_TOLERANCE[solver](), tol=1e-3)
    assert objective.counts.lower_gradients == result.iterations + 2
    assert objective.counts.lower_products == 8
    given, objective = case(name).solve(TO_TOLERANCE[solver](0.05), tol=1e-2)
    assert objective.counts.lower_gradients == given.iterations + 1
    assert objective.counts.lower_products == 0


def test_momentum_pays(case):
    slow, _ = case("quadratic, kappa 1e4").solve(GradientDescent(max_iterations=2000), tol=1e-5)
    fast, _ = case("quadratic, kappa 1e4").solve(AGD(max_iterations=2000), tol=1e-5)
    assert slow.status is LowerStatus.MAX_ITERATIONS
    assert not slow.ok
    assert "raise max_iterations" in slow.describe()
    assert fast.status is LowerStatus.CONVERGED


# -- what is not solvable -------------------------------------------------------------------------------


def saddle(x, y):
    return y[0] ** 2 + x.sum() * y[0] - y[1:].pow(2).sum() / 4 + 0.3 * y.sum()


@pytest.mark.parametrize("solver", TO_TOLERANCE)
def test_negative_curvature_is_reported(solver, case):
    problem = case("softmax")
    problem.h = saddle
    result, _ = problem.solve(TO_TOLERANCE[solver]())
    assert result.status is LowerStatus.NOT_CONVEX
    assert not result.ok
    assert -0.51 <= result.curvature < 0
    assert "strongly convex" in result.describe()
    assert "L2" in result.describe()


@pytest.mark.parametrize("solver", ["agd", "gradient_descent"])
def test_a_step_that_is_too_long_diverges_and_says_so(solver, case):
    """Infinity is not below a tolerance times infinity."""
    problem = case("dy = 1")
    problem.h = lambda x, y: (y**2).sum() * 2 + x.sum()
    result, _ = problem.solve(TO_TOLERANCE[solver](1e3, max_iterations=3000))
    assert result.status is LowerStatus.NON_FINITE


@pytest.mark.parametrize("solver", TO_TOLERANCE)
def test_nan_at_the_start(solver, case):
    problem = case("softmax")
    problem.h = lambda x, y: (y**2).sum() * float("nan") + x.sum()
    result, _ = problem.solve(TO_TOLERANCE[solver]())
    assert result.status is LowerStatus.NON_FINITE
    assert not result.ok
    assert "NaN" in result.describe()


@pytest.mark.parametrize("solver", TO_TOLERANCE)
def test_nan_on_the_way_is_never_the_answer(solver, case):
    """log(y) is NaN for y < 0, where a long step lands: the line search turns back, or the status says so."""
    problem = case("dy = 1")
    problem.h = lambda x, y: (0.02 * y - torch.log(y)).sum() + 0 * x.sum()
    problem.y0 = torch.tensor([1e-3], dtype=D)
    result, _ = problem.solve(TO_TOLERANCE[solver](max_iterations=500), tol=1e-8)
    assert bool(result.y.isfinite().all())
    if result.ok:
        assert float(result.y) == pytest.approx(50.0, rel=1e-6)


# -- Newton's line search -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [2.0, 1e3, -1e3])
def test_newton_from_far_away(start, case):
    """g = sqrt(1 + (y - x)^2) + 0.025 (y - x)^2: the raw Newton iteration from 2 never converges."""
    problem = case("dy = 1")

    def h(x, y):
        return (torch.sqrt(1 + (y - x) ** 2) + 0.025 * (y - x) ** 2).sum()

    x = torch.tensor([0.0], dtype=D)
    problem.h, problem.x, problem.y0 = h, x, torch.tensor([start], dtype=D)
    result, objective = problem.solve(NewtonCG())
    assert result.status is LowerStatus.CONVERGED
    assert abs(float(result.y)) <= 1e-10
    assert objective.counts.lower_gradients <= 60
    if start == 2.0:
        y = problem.y0
        for _ in range(100):
            slope, bend = grad(h, 1)(x, y), torch.func.hessian(h, 1)(x, y)[0]
            y = y - slope / bend
        assert not abs(float(y)) <= 1.0


# -- names ----------------------------------------------------------------------------------------------


def test_make_lower():
    assert isinstance(make_lower(None), NewtonCG)
    assert isinstance(make_lower("agd"), AGD)
    solver = AGD(steps=3)
    assert make_lower(solver) is solver
    made = make_lower({"name": "agd", "step": 0.1, "momentum": 0.5, "steps": 4})
    assert (made.step, made.momentum, made.steps, made.reaches_tolerance) == (0.1, 0.5, 4, False)
    made = make_lower({"name": "torch", "optimizer": torch.optim.Adam, "steps": 2, "lr": 0.3})
    assert (made.optimizer, made.steps, made.options) == (torch.optim.Adam, 2, {"lr": 0.3})
    spec = {"name": "newton_cg", "tol": 1e-5}
    make_lower(spec)
    assert spec == {"name": "newton_cg", "tol": 1e-5}


@pytest.mark.parametrize(
    ("spec", "message"),
    [("newton", "lower solver 'newton' is not known; did you mean 'newton_cg'"),
     ({"name": "gradient_decent"}, "did you mean 'gradient_descent'"), ({"steps": 3}, "None is not known"),
     ({"name": "agd", "step_size": 0.1}, "unknown option 'step_size'; did you mean 'steps?'"),
     ({"name": "gradient_descent", "momentum": 0.9}, "unknown option 'momentum'"),
     ({"name": "newton_cg", "toll": 0.1}, "did you mean 'tol'"),
     ({"name": "agd", "step": -1.0}, "step: expected a positive number"),
     ({"name": "agd", "step": float("nan")}, "step: expected a positive number"),
     ({"name": "agd", "steps": -2}, "steps: expected a non-negative int")],
)  # fmt: skip
def test_make_lower_names_the_nearest(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_lower(spec)
