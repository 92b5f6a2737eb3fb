"""The first-order oracles against dense formulas and loops written here: AID, unrolled, finite differences, stochastic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad

import torch_bilevel as tb
from tests.reference import argmin, blocks, error, smooth
from torch_bilevel.oracles import AIDOracle, FiniteDifferenceOracle, StochasticOracle, UnrolledOracle
from torch_bilevel.oracles.adjoint import conjugate_gradient_steps, fixed_point_steps, neumann_series
from torch_bilevel.oracles.finite_difference import difference_weights

LR = 0.15


@pytest.fixture(scope="module")
def ref():
    return smooth()


def problem_of(ref, dtype=torch.float64):
    return tb.BilevelProblem.from_functions(ref.f, ref.g, ref.x.to(dtype), ref.y0.to(dtype), check=False)


def descend(h, x, y, steps, lr=LR):
    for _ in range(steps):
        y = y - lr * grad(h, 1)(x, y)
    return y


# -- the adjoint system --------------------------------------------------------------------------------------


def spd(n=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    B = torch.randn(n, n, generator=gen, dtype=torch.float64)
    return B @ B.T / n + torch.eye(n, dtype=torch.float64), torch.randn(n, generator=gen, dtype=torch.float64)


def test_neumann_series_is_the_partial_sum_and_fixed_point_its_iteration():
    A, b = spd()
    lr, T = 0.2, torch.eye(6, dtype=torch.float64) - 0.2 * A
    expected = lr * sum(torch.linalg.matrix_power(T, k) @ b for k in range(5))
    assert error(neumann_series(lambda v: A @ v, b, 4, lr), expected) < 1e-14
    assert error(fixed_point_steps(lambda v: A @ v, b, 5, lr), expected) < 1e-14
    start = torch.ones(6, dtype=torch.float64)
    once = fixed_point_steps(lambda v: A @ v, b, 1, lr, start)
    assert error(once, start - lr * (A @ start - b)) < 1e-14


def test_conjugate_gradient_steps_minimise_over_the_krylov_space():
    A, b = spd()
    v0 = torch.ones(6, dtype=torch.float64)
    for start, steps in ((None, 3), (v0, 3), (None, 6), (v0, 40)):
        v, curvature = conjugate_gradient_steps(lambda v: A @ v, b, steps, start)
        origin = torch.zeros_like(b) if start is None else start
        r = b - A @ origin
        K = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(A, k) @ r for k in range(min(steps, 6))], 1))[0]
        expected = origin + K @ torch.linalg.solve(K.T @ A @ K, K.T @ r)
        assert error(v, expected) < 1e-9  # the power basis of the test is that ill-conditioned
        assert curvature > 0


def test_conjugate_gradient_steps_at_the_edges():
    A, b = spd()
    v, _ = conjugate_gradient_steps(lambda v: A @ v, torch.zeros_like(b), 5)
    assert torch.equal(v, torch.zeros_like(b))
    v, _ = conjugate_gradient_steps(lambda v: A @ v, b, 2000)  # long after convergence nothing underflows to NaN
    assert error(v, torch.linalg.solve(A, b)) < 1e-12
    v, _ = conjugate_gradient_steps(lambda v: A @ v, b, 0)
    assert torch.equal(v, torch.zeros_like(b))
    indefinite = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    _, curvature = conjugate_gradient_steps(lambda v: indefinite @ v, torch.ones(3, dtype=torch.float64), 3)
    assert curvature < 0
    v, _ = conjugate_gradient_steps(lambda v: A @ v * math.nan, b, 3)
    assert v.isnan().all()


# -- AID -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adjoint": "neumann"}, {"adjoint": "fixed_point"}, {"lower_momentum": 0.3}])
def test_aid_with_many_steps_is_the_exact_gradient(ref, options):
    oracle = AIDOracle(problem_of(ref), lower_steps=150, adjoint_steps=150, **options)
    ev = oracle.evaluate()
    exact = ref.implicit()
    assert error(ev.gradient, exact.gradient) < 1e-9
    assert error(ev.value, exact.value) < 1e-12
    assert error(ev.lower.y, exact.y) < 1e-10
    assert ev.lower.gradient_norm < 1e-9


def test_aid_with_few_steps_is_its_formula(ref):
    oracle = AIDOracle(problem_of(ref), lower_steps=2, lower_lr=LR, adjoint="fixed_point", adjoint_steps=3)
    y, v = ref.y0, torch.zeros_like(ref.y0)
    for x in (ref.x, ref.x + 0.3):  # the second evaluation starts from the y and v of the first
        ev = oracle.evaluate(x)
        y = descend(ref.g, x, y, 2)
        _, xy, _, yy = blocks(ref.g, x, y)
        fy = grad(ref.f, 1)(x, y)
        for _ in range(3):
            v = v - LR * (yy @ v - fy)
        assert error(ev.gradient, grad(ref.f)(x, y) - xy @ v) < 1e-12
        assert error(ev.value, ref.f(x, y)) < 1e-14
        assert error(ev.points["y"], y) < 1e-14


def test_aid_takes_another_lower_solver_and_damping(ref):
    oracle = AIDOracle(problem_of(ref), lower="newton_cg", adjoint_steps=20, damping=0.5)
    ev, y = oracle.evaluate(), ref.solution()
    _, xy, _, yy = blocks(ref.g, ref.x, y)
    v = torch.linalg.solve(yy + 0.5 * torch.eye(len(y), dtype=y.dtype), grad(ref.f, 1)(ref.x, y))
    assert error(ev.gradient, grad(ref.f)(ref.x, y) - xy @ v) < 1e-8


def test_aid_at_the_learner_that_the_user_trains(ref):
    problem = problem_of(ref)
    oracle = AIDOracle(problem, lower="external", adjoint_steps=20)
    oracle.evaluate()
    problem.write(y=ref.y0 + 1)
    ev = oracle.evaluate()
    _, xy, _, yy = blocks(ref.g, ref.x, ref.y0 + 1)
    v = torch.linalg.solve(yy, grad(ref.f, 1)(ref.x, ref.y0 + 1))
    assert error(ev.gradient, grad(ref.f)(ref.x, ref.y0 + 1) - xy @ v) < 1e-9


def test_aid_reports_a_lower_level_that_is_not_convex():
    one = torch.ones(2, dtype=torch.float64)
    D = torch.tensor([1.0, -1.0], dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: ((y - 2) ** 2).sum(), lambda x, y: (D * y * y).sum() / 2 - x @ y, one, one, check=False
    )
    with pytest.raises(tb.NotStronglyConvexError, match="damping"):
        AIDOracle(problem, lower_steps=1, lower_lr=0.1).evaluate()


def test_divergence_is_an_error_and_leaves_the_start_clean(ref):
    for make in (AIDOracle, UnrolledOracle, FiniteDifferenceOracle, StochasticOracle):
        oracle = make(problem_of(ref), lower_steps=200, lower_lr=1e4)
        with pytest.raises((tb.NonFiniteError, tb.NotStronglyConvexError)):
            oracle.evaluate()
        assert oracle.warm == {}


# -- unrolled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [None, 5, 2, 0])
def test_unrolled_is_autograd_through_the_loop(ref, unroll):
    oracle = UnrolledOracle(problem_of(ref), lower_steps=5, lower_lr=LR, unroll=unroll)
    y = ref.y0
    for start in (ref.x, ref.x - 0.2):
        ev = oracle.evaluate(start)
        x = start.clone().requires_grad_(True)
        for t in range(5):
            held = unroll is not None and t < 5 - unroll
            y_in = y if y.requires_grad else y.detach().requires_grad_(True)
            slope = torch.autograd.grad(ref.g(x, y_in), y_in, create_graph=not held)[0]
            y = y_in - LR * (slope.detach() if held else slope)
            y = y.detach() if held else y
        value = ref.f(x, y)
        expected = torch.autograd.grad(value, x)[0]
        y = y.detach()
        assert error(ev.gradient, expected) < 1e-12
        assert error(ev.value, value) < 1e-14
        assert error(ev.points["y"], y) < 1e-14


def test_unrolled_with_many_steps_is_the_exact_gradient(ref):
    ev = UnrolledOracle(problem_of(ref), lower_steps=150).evaluate()
    assert error(ev.gradient, ref.implicit().gradient) < 1e-9


# -- finite differences in the penalty -----------------------------------------------------------------------


def test_difference_weights_are_the_textbook_ones():
    expected = {
        1: {0: -1, 1: 1},
        2: {-1: -1 / 2, 1: 1 / 2},
        3: {0: -11 / 6, 1: 3, 2: -3 / 2, 3: 1 / 3},
        4: {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12},
    }
    for order, weights in expected.items():
        nodes, found, values = difference_weights(order)
        assert found == pytest.approx(weights, abs=1e-12)
        assert nodes == sorted(weights)
        assert sum(values.values()) == pytest.approx(1.0)
        assert 0 not in values


def test_f2ba_gradient_is_its_formula(ref):
    penalty, T = 7.0, 3
    oracle = FiniteDifferenceOracle(problem_of(ref), lower_steps=T, lower_lr=LR, penalty=penalty)
    y = z = ref.y0
    for x in (ref.x, ref.x + 0.1):
        ev = oracle.evaluate(x)
        z = descend(ref.g, x, z, T)
        y = descend(lambda x, y: ref.f(x, y) + penalty * ref.g(x, y), x, y, T, LR / penalty)
        gx = grad(ref.g)
        assert error(ev.gradient, grad(ref.f)(x, y) + penalty * (gx(x, y) - gx(x, z))) < 1e-11
        assert error(ev.value, ref.f(x, y)) < 1e-13
        assert error(ev.points["y"], z) < 1e-13


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bias_of_order_p_falls_as_the_penalty_to_the_minus_p(ref, order):
    exact = ref.implicit()
    errors = []
    for penalty in (20.0, 40.0):
        ev = FiniteDifferenceOracle(problem_of(ref), lower_steps=120, penalty=penalty, order=order).evaluate()
        errors.append((error(ev.gradient, exact.gradient), error(ev.value, exact.value), error(ev.points["y"], exact.y)))
    rates = [math.log2(a / b) for a, b in zip(*errors)]
    assert rates[0] == pytest.approx(order, abs=0.45)
    assert rates[1] == pytest.approx(order, abs=0.45)
    if order % 2 == 0:
        assert rates[2] == pytest.approx(order, abs=0.45)
    else:
        assert errors[1][2] < 1e-10  # node 0 is the lower level itself


def test_central_difference_is_the_penalty_oracle_s(ref):
    found = FiniteDifferenceOracle(problem_of(ref), lower_steps=150, penalty=30.0, order=2).evaluate().gradient
    assert error(found, ref.penalty(30.0, "central").gradient) < 1e-8


# -- stochastic ----------------------------------------------------------------------------------------------


class Loader:
    """A re-iterable loader of given chunks."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        return iter(self.chunks)


def regression(reduction="mean", whole=False):
    """Linear regression with one L2 weight per feature; chunks of 3 and 1 samples on both levels."""
    gen = torch.Generator().manual_seed(3)
    data = [(torch.randn(4, 3, generator=gen, dtype=torch.float64), torch.randn(4, 1, generator=gen, dtype=torch.float64))
            for _ in range(2)]  # fmt: skip

    def fit(learner, batch):
        residual = (learner(batch[0]) - batch[1]) ** 2
        return residual.mean() if reduction == "mean" else residual.sum()

    def lower(learner, hyper, batch):
        share = 1.0 if reduction == "mean" else len(batch[0])
        return fit(learner, batch) + share * (hyper["l2"].exp() * learner.weight**2).sum()

    def upper(learner, hyper, batch):
        return fit(learner, batch)

    learner = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        learner.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    batches = [d if whole else Loader([(d[0][:3], d[1][:3]), (d[0][3:], d[1][3:])]) for d in data]
    hyper = {"l2": torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64)}
    return tb.BilevelProblem(learner, hyper, lower, upper, *batches, reduction=reduction)


def expected_stochastic(problem, Q, lr):
    """f_x - g_xy v with v = lr sum_q (I - lr A)^q f_y at the problem's point, dense, on all the data."""
    def objective(level):
        return lambda x, y: sum(w * h(x, y) for w, h in problem.pieces(level))

    x, y = problem.x, problem.y
    _, xy, _, yy = blocks(objective("lower"), x, y)
    fy = grad(objective("upper"), 1)(x, y)
    v = lr * sum(torch.linalg.matrix_power(torch.eye(len(y), dtype=y.dtype) - lr * yy, q) @ fy for q in range(Q + 1))
    return grad(objective("upper"))(x, y) - xy @ v


def test_one_batch_makes_stocbio_deterministic():
    problem = regression(whole=True)
    ev = StochasticOracle(problem, lower_steps=0, lower_lr=0.1, adjoint_steps=4, seed=1).evaluate()
    assert error(ev.gradient, expected_stochastic(problem, 4, 0.1)) < 1e-12
    oracle = StochasticOracle(problem, lower_steps=2, lower_lr=0.1)
    problem_y = descend(lambda x, y: next(problem.pieces("lower"))[1](x, y), problem.x, problem.y, 2, 0.1)
    assert error(oracle.evaluate().points["y"], problem_y) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_expected_stochastic_gradient_is_that_of_all_the_data(reduction, monkeypatch):
    problem = regression(reduction)
    chances = {"mean": (0.75, 0.25), "sum": (0.5, 0.5)}[reduction]
    Q, lr = 2, 0.05
    mean = 0.0
    for outcome in range(16):  # draws: one upper batch, two factors, one cross product
        draws = [(outcome >> i) & 1 for i in range(4)]
        left = list(draws)

        def scripted(weights, number, generator=None, left=left):
            assert (weights / weights.sum()).tolist() == pytest.approx(list(chances))
            return torch.tensor([left.pop(0)])

        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", scripted)
            ev = StochasticOracle(problem, lower_steps=0, lower_lr=lr, adjoint_steps=Q).evaluate()
        assert not left
        mean = mean + math.prod(chances[i] for i in draws) * ev.gradient
    assert error(mean, expected_stochastic(problem, Q, lr)) < 1e-12


def test_stochastic_draws_follow_the_seed_and_the_saved_state():
    def gradients(oracle, n):
        return [oracle.evaluate().gradient for _ in range(n)]

    first, second = (StochasticOracle(regression(), lower_lr=0.05, seed=4) for _ in range(2))
    a = gradients(first, 6)
    b = gradients(second, 3)
    third = StochasticOracle(regression(), lower_lr=0.05, seed=9)
    third.load_state_dict(second.state_dict())
    b += gradients(third, 3)
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    other = gradients(StochasticOracle(regression(), lower_lr=0.05, seed=5), 6)
    assert not all(torch.equal(p, q) for p, q in zip(a, other))


def test_loaders_give_the_full_batch_gradient():
    whole, chunked = regression(whole=True), regression()
    for make in (AIDOracle, UnrolledOracle, FiniteDifferenceOracle):
        a, b = (make(p, lower_steps=4, lower_lr=0.1).evaluate() for p in (whole, chunked))
        assert error(b.gradient, a.gradient) < 1e-12
        assert error(b.value, a.value) < 1e-13


# -- counts, options, dtype ----------------------------------------------------------------------------------

T, K = 4, 3
COSTS = [
    (AIDOracle, {"adjoint_steps": K}, dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 2)),
    (AIDOracle, {"adjoint_steps": K, "adjoint": "neumann"},
     dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 1)),
    (AIDOracle, {"adjoint_steps": K, "adjoint": "fixed_point"},
     dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 1)),
    (UnrolledOracle, {}, dict(lower_gradients=T, upper_gradients=1, lower_products=T)),
    (UnrolledOracle, {"unroll": 2}, dict(lower_gradients=T, upper_gradients=1, lower_products=2)),
    (FiniteDifferenceOracle, {}, dict(lower_gradients=2 * T + 2, upper_gradients=T + 1, lower_solves=2)),
    (FiniteDifferenceOracle, {"order": 4}, dict(lower_gradients=4 * T + 4, upper_gradients=4 * T + 4, lower_solves=4)),
    (StochasticOracle, {"adjoint_steps": K}, dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 1)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "expected"), COSTS)
def test_cost_of_an_evaluation(ref, make, options, expected):
    oracle = make(problem_of(ref), lower_steps=T, lower_lr=LR, **options)
    oracle.evaluate()
    counts = oracle.evaluate(ref.x + 0.1).counts.as_dict()
    expected = {"evaluations": 1, "lower_solves": 1, **expected}
    assert {name: number for name, number in counts.items() if number} == expected


def test_the_default_step_length_is_estimated_once(ref):
    oracle = AIDOracle(problem_of(ref), lower_steps=T, adjoint_steps=K)
    oracle.evaluate()
    L = torch.linalg.eigvalsh(blocks(ref.g, ref.x, ref.y0)[3])[-1]
    assert 0.9 / L < oracle.lower_lr < 1.2 / L
    assert oracle.evaluate().counts.lower_gradients == T + 1


@pytest.mark.parametrize("make", [AIDOracle, UnrolledOracle, FiniteDifferenceOracle, StochasticOracle])
def test_restore_and_dtype(ref, make):
    single = make(problem_of(ref, torch.float32), lower_steps=20).evaluate()
    assert single.gradient.dtype == single.value.dtype == single.points["y"].dtype == torch.float32
    oracle = make(problem_of(ref), lower_steps=20)
    ev = oracle.evaluate()
    assert error(single.gradient, ev.gradient) < 1e-3  # penalty 10 times float32 rounding of the differences
    again = oracle.restore(ev.state_dict())
    assert torch.equal(again.gradient, ev.gradient)
    assert torch.equal(again.lower.y, ev.lower.y)
    with pytest.raises(tb.ConfigError, match="no hyper-Hessian"):
        ev.hessian  # noqa: B018


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (AIDOracle, {"lower_steps": -1}),
        (AIDOracle, {"lower_lr": 0.0}),
        (AIDOracle, {"lower_lr": math.nan}),
        (AIDOracle, {"adjoint": "gmres"}),
        (AIDOracle, {"adjoint_steps": 2.5}),
        (AIDOracle, {"lower_momentum": 1.0}),
        (UnrolledOracle, {"unroll": -1}),
        (FiniteDifferenceOracle, {"order": 0}),
        (FiniteDifferenceOracle, {"order": 9}),
        (FiniteDifferenceOracle, {"penalty": -1.0}),
        (StochasticOracle, {"adjoint_lr": "fast"}),
    ],
)
def test_bad_options_are_named(ref, make, options):
    with pytest.raises(tb.ConfigError, match=next(iter(options))):
        make(problem_of(ref), **options)


def test_argmin_of_the_referee_is_the_limit_of_gradient_descent(ref):
    assert error(descend(ref.g, ref.x, ref.y0, 200), argmin(lambda y: ref.g(ref.x, y), ref.y0)) < 1e-10
