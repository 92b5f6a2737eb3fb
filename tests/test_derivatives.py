"""Objective and Linearisation against dense Hessians of torch.func, and what they count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, hessian

import torch_bilevel as tb
from tests import reference
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.recorded.graph import BLOCK

D = torch.float64
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}

#: a f + b g + c <g_y, v>
COMBINATIONS = {
    "f": {"upper": 1.0},
    "g": {"lower": 1.0},
    "g + f / penalty": {"upper": 0.01, "lower": 1.0},
    "g - f / penalty": {"upper": -0.3, "lower": 1.0},
    "<g_y, v>": {"tangent": True},
    "f - <g_y, v>": {"upper": 1.0, "tangent": True, "tangent_weight": -1.0},
    "f + 2 g + <g_y, v> / 2": {"upper": 1.0, "lower": 2.0, "tangent": True, "tangent_weight": 0.5},
}


@pytest.fixture(params=["smooth", "one by one"])
def ref(request):
    return reference.smooth() if request.param == "smooth" else reference.smooth(1, 1, seed=3)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def pair(ref, combination, counts=None):
    """(objective, the same function written out) of a combination."""
    options = dict(COMBINATIONS[combination])
    v = draw(ref.y0.numel(), seed=9) if options.pop("tangent", False) else None
    problem = tb.BilevelProblem.from_functions(ref.f, ref.g, ref.x, ref.y0)
    objective = Objective(problem, tangent=v, counts=OracleCounts() if counts is None else counts, **options)

    def written(x, y):
        value = options.get("upper", 0.0) * ref.f(x, y) + options.get("lower", 0.0) * ref.g(x, y)
        if v is not None:
            value = value + options.get("tangent_weight", 1.0) * torch.dot(grad(ref.g, 1)(x, y), v)
        return value

    return objective, written


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_value_gradient_and_every_product(ref, combination):
    objective, written = pair(ref, combination)
    x, y = ref.x, ref.y0
    gx, gy = grad(written, (0, 1))(x, y)
    value = written(x, y)
    torch.testing.assert_close(objective.value(x, y), value, **TOLERANCE)
    for wrt in ("xy", "x", "y"):
        got = objective.gradient(x, y, wrt)
        torch.testing.assert_close(got[0], value, **TOLERANCE)
        for letter, found, expected in (("x", got[1], gx), ("y", got[2], gy)):
            if letter in wrt:
                torch.testing.assert_close(found, expected, **TOLERANCE)
            else:
                assert found is None
    at = objective.linearise(x, y)
    torch.testing.assert_close((at.value, at.gx, at.gy), (value, gx, gy), **TOLERANCE)
    xx, xy, yx, yy = reference.blocks(written, x, y)
    u, w = draw(x.numel(), seed=1), draw(y.numel(), seed=2)
    torch.testing.assert_close(at.xx(u), xx @ u, **TOLERANCE)
    torch.testing.assert_close(at.xy(w), xy @ w, **TOLERANCE)
    torch.testing.assert_close(at.yx(u), yx @ u, **TOLERANCE)
    torch.testing.assert_close(at.yy(w), yy @ w, **TOLERANCE)
    torch.testing.assert_close(at.joint(u, w), (xx @ u + xy @ w, yx @ u + yy @ w), **TOLERANCE)
    torch.testing.assert_close(at.joint(None, w), (xy @ w, yy @ w), **TOLERANCE)
    torch.testing.assert_close(at.joint(u, None), (xx @ u, yx @ u), **TOLERANCE)
    torch.testing.assert_close(at.to_x(w), (xy @ w, yy @ w), **TOLERANCE)


@pytest.mark.parametrize("columns", [1, 3, BLOCK, BLOCK + 1])
def test_blocks_are_their_columns(columns):
    ref = reference.smooth()
    objective, written = pair(ref, "f - <g_y, v>")
    at = objective.linearise(ref.x, ref.y0)
    xx, xy, yx, yy = reference.blocks(written, ref.x, ref.y0)
    U, W = draw(6, columns, seed=1), draw(8, columns, seed=2)
    torch.testing.assert_close(at.joint(U, W), (xx @ U + xy @ W, yx @ U + yy @ W), **TOLERANCE)
    torch.testing.assert_close(at.yy(W), yy @ W, **TOLERANCE)
    torch.testing.assert_close(at.yx(U.T.contiguous().T), yx @ U, **TOLERANCE)
    torch.testing.assert_close(torch.stack([at.xy(w) for w in W.T], 1), at.xy(W), **TOLERANCE)


def test_a_linearisation_of_one_block_serves_that_block():
    ref = reference.smooth()
    objective, written = pair(ref, "g")
    at = objective.linearise(ref.x, ref.y0, "y")
    _, xy, yx, yy = reference.blocks(written, ref.x, ref.y0)
    w = draw(8)
    torch.testing.assert_close(at.yy(w), yy @ w, **TOLERANCE)
    torch.testing.assert_close(at.xy(w), xy @ w, **TOLERANCE)
    torch.testing.assert_close(at.to_x(w), (xy @ w, yy @ w), **TOLERANCE)
    assert at.gx is None
    with pytest.raises(RuntimeError, match="no derivative in x"):
        at.yx(draw(6))


def test_products_survive_many_uses_and_do_not_touch_the_point():
    ref = reference.smooth()
    at = pair(ref, "g")[0].linearise(ref.x, ref.y0)
    w = draw(8)
    first = at.yy(w)
    for _ in range(3):
        at.xx(draw(6)), at.yy(draw(8, 5))
    assert torch.equal(at.yy(w), first)
    assert not first.requires_grad
    assert ref.x.grad is None
    assert not ref.x.requires_grad


def test_functions_that_do_not_mix_have_zero_blocks():
    """Linear and separable parts: derivatives that autograd does not record are zeros."""
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: y.sum() + x.sum(), lambda x, y: (y**2).sum() + (x**3).sum(), torch.ones(2, dtype=D),
        torch.ones(3, dtype=D),
    )  # fmt: skip
    f, g = (Objective(problem, **{k: 1.0}, counts=OracleCounts()).linearise(problem.x, problem.y)
            for k in ("upper", "lower"))  # fmt: skip
    for columns in ((), (4,)):
        u, w = torch.ones(2, *columns, dtype=D), torch.ones(3, *columns, dtype=D)
        assert torch.equal(f.yy(w), torch.zeros_like(w))
        assert torch.equal(f.xx(u), torch.zeros_like(u))
        assert torch.equal(f.xy(w), torch.zeros_like(u))
        assert torch.equal(f.yx(u), torch.zeros_like(w))
        assert torch.equal(g.xy(w), torch.zeros_like(u))
        assert torch.equal(g.yx(u), torch.zeros_like(w))
        assert torch.equal(g.yy(w), 2 * w)
        assert torch.equal(g.xx(u), 6 * u)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_loader_of_chunks_has_the_derivatives_of_the_whole(combination):
    gen = torch.Generator().manual_seed(0)
    X, t = torch.randn(7, 3, generator=gen, dtype=D), torch.randint(0, 2, (7,), generator=gen)
    learner = nn.Linear(3, 2, dtype=D)

    def loss(m, h, b):
        losses = nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
        return (losses * h.exp().sum()).mean() + (m.weight**4).sum()

    class Chunks:
        def __iter__(self):
            yield X[:4], t[:4]
            yield X[4:], t[4:]

    whole = tb.BilevelProblem(learner, torch.zeros(2, dtype=D), loss, loss, (X, t), (X + 1, t))

    class Shifted(Chunks):
        def __iter__(self):
            return ((a + 1, b) for a, b in super().__iter__())

    options = dict(COMBINATIONS[combination])
    v = draw(8, seed=9) if options.pop("tangent", False) else None
    u, w, W = draw(2, seed=1), draw(8, seed=2), draw(8, 3, seed=3)
    answers = []
    for problem in (whole, whole.at(Chunks(), Shifted()), whole.at(upper_batch=Shifted())):
        objective = Objective(problem, tangent=v, counts=OracleCounts(), **options)
        at = objective.linearise(problem.x, problem.y)
        answers.append([objective.value(problem.x, problem.y), *objective.gradient(problem.x, problem.y),
                        at.value, at.gx, at.gy, *at.joint(u, w), at.yy(W), at.xy(W)])  # fmt: skip
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], **TOLERANCE)


class NoBatchRule(torch.autograd.Function):
    """y^3 by a Function that has no vmap rule in its double backward."""

    @staticmethod
    def forward(y):
        return y**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        (y,) = ctx.saved_tensors
        return CubeSlope.apply(y, cotangent)


class CubeSlope(torch.autograd.Function):
    @staticmethod
    def forward(y, cotangent):
        return 3 * y**2 * cotangent

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, c):
        y, cotangent = ctx.saved_tensors
        if torch._C._functorch.is_batchedtensor(c):
            raise RuntimeError("no vmap rule")
        return 6 * y * cotangent * c, 3 * y**2 * c


def test_an_operation_without_a_vmap_rule_goes_column_by_column():
    def g(x, y):
        return (NoBatchRule.apply(y) * x).sum() + (y**2).sum()

    problem = tb.BilevelProblem.from_functions(lambda x, y: y.sum(), g, draw(4), draw(4, seed=1))
    counts = OracleCounts()
    at = Objective(problem, lower=1.0, counts=counts).linearise(problem.x, problem.y)
    W = draw(4, 5, seed=2)
    expected = (6 * problem.x * problem.y + 2)[:, None] * W
    torch.testing.assert_close(at.yy(W), expected, **TOLERANCE)
    torch.testing.assert_close(at.yy(W), expected, **TOLERANCE)
    torch.testing.assert_close(at.xy(W), (3 * problem.y**2)[:, None] * W, **TOLERANCE)
    assert counts.lower_products == 15


# -- counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combination", "levels"),
    [("f", ("upper",)), ("g", ("lower",)), ("g + f / penalty", ("upper", "lower")), ("<g_y, v>", ("lower",)),
     ("f - <g_y, v>", ("upper", "lower"))],
)  # fmt: skip
def test_counts_are_per_level_and_per_vector(combination, levels):
    counts = OracleCounts()
    ref = reference.smooth()
    objective, _ = pair(ref, combination, counts)
    x, y = ref.x, ref.y0
    expected = dict.fromkeys(counts.as_dict(), 0)

    def check(kind, number):
        for level in levels:
            expected[f"{level}_{kind}"] += number
        assert counts.as_dict() == expected

    def check_call(kind):
        """<g_y, v> alone has the price of a product where others have that of a value or gradient."""
        if combination != "<g_y, v>" and "v>" in combination:
            expected["upper_" + kind] += 1
            expected["lower_products"] += 1
            assert counts.as_dict() == expected
        else:
            check("products" if "v>" in combination else kind, 1)

    objective.value(x, y)
    check_call("values")
    objective.gradient(x, y)
    check_call("gradients")
    at = objective.linearise(x, y)
    check_call("gradients")
    at.yy(draw(8))
    check("products", 1)
    at.xy(draw(8, 70))
    check("products", 70)
    at.joint(draw(6, 3), draw(8, 3))
    check("products", 3)
    at.to_x(draw(8)), at.yx(draw(6)), at.xx(draw(6))
    check("products", 3)


def test_counts_go_to_the_parent_too():
    total = OracleCounts()
    total.add(solves=2)
    child = total.child()
    child.add(solves=3, lower_products=5)
    assert (child.solves, total.solves, total.lower_products) == (3, 5, 5)
    frozen = child.copy()
    child.add(solves=1)
    assert (frozen.solves, total.solves) == (3, 6)
    frozen.add(solves=1)
    assert total.solves == 6
    child.add(upper_gradients=2, lower_gradients=3, upper_products=7)
    assert child.gradients == 5
    assert child.oracle_calls == 5 + 7 + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_preserved(dtype):
    ref = reference.smooth()
    problem = tb.BilevelProblem.from_functions(ref.f, ref.g, ref.x.to(dtype), ref.y0.to(dtype))
    at = Objective(problem, upper=1.0, lower=1.0, counts=OracleCounts()).linearise(problem.x, problem.y)
    found = (at.value, at.gx, at.gy, *at.joint(problem.x, problem.y), at.yy(draw(8, 3).to(dtype)))
    assert all(tensor.dtype == dtype and not tensor.requires_grad for tensor in found)


def test_works_under_no_grad_and_inference_of_the_caller():
    ref = reference.smooth()
    expected = hessian(lambda y: ref.g(ref.x, y))(ref.y0) @ ref.y0
    with torch.no_grad():
        at = pair(ref, "g")[0].linearise(ref.x, ref.y0)
        torch.testing.assert_close(at.yy(ref.y0), expected, **TOLERANCE)
        assert tb.ImplicitOracle(at.objective.problem).evaluate().hessian.to_dense().isfinite().all()
