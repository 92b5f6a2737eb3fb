"""BilevelProblem: what it accepts, what it refuses, and that it computes the user's losses alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective

D = torch.float64


@pytest.fixture
def data():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, generator=gen, dtype=D), torch.randn(7, 2, generator=gen, dtype=D)


def ridge(learner, log_l2, batch):
    X, t = batch
    return ((learner(X) - t) ** 2).mean() + (log_l2.exp() * learner.weight**2).sum()


def mse(learner, hyper, batch):
    X, t = batch
    return ((learner(X) - t) ** 2).mean()


def linear(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(3, 2, dtype=D, **options)


def numbers(problem, level="lower"):
    """Value and joint gradient of one level at the current point."""
    objective = Objective(problem, **{level: 1.0}, counts=OracleCounts())
    return objective.gradient(problem.x, problem.y)


class Log(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.log_l2 = nn.Parameter(start)

    def forward(self):
        return self.log_l2


def test_three_kinds_of_hyper_give_identical_numbers(data):
    start = torch.linspace(-1, 1, 6, dtype=D).view(2, 3)
    kinds = {
        "module": (Log(start.clone()), lambda m, h, b: ridge(m, h(), b)),
        "dict": ({"log_l2": start.clone()}, lambda m, h, b: ridge(m, h["log_l2"], b)),
        "tensor": (start.clone(), ridge),
    }
    found = {}
    for kind, (hyper, lower) in kinds.items():
        problem = tb.BilevelProblem(linear(), hyper, lower, mse, data, data)
        assert (problem.dx, problem.dy, problem.dtype) == (6, 8, D)
        hypergradient = tb.ImplicitOracle(problem).evaluate().gradient
        found[kind] = (*numbers(problem), *numbers(problem, "upper"), hypergradient)
    learner = linear()
    plain = torch.autograd.grad(ridge(learner, start, data), learner.parameters())
    plain = torch.cat([p.reshape(-1) for p in plain])
    torch.testing.assert_close(found["tensor"][2], plain, rtol=1e-12, atol=1e-14)
    for kind in kinds:
        for a, b in zip(found[kind], found["dict"]):
            assert torch.equal(a, b), kind


def test_x_y_and_write_round_trip(data):
    learner, hyper = linear(), {"a": torch.zeros(2, 3, dtype=D), "b": torch.tensor(1.0, dtype=D)}
    problem = tb.BilevelProblem(learner, hyper, lambda m, h, b: h["b"] * ridge(m, h["a"], b), mse, data, data)
    weight, a = learner.weight, hyper["a"]
    x, y = torch.arange(7, dtype=D), torch.arange(8, dtype=D)
    problem.write(x, y)
    assert torch.equal(problem.x, x)
    assert torch.equal(problem.y, y)
    assert learner.weight is weight
    assert hyper["a"] is a
    assert hyper["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert hyper["b"] == 6
    assert learner.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert learner.bias.tolist() == [6, 7]
    problem.x.zero_(), problem.y.zero_()  # copies
    assert torch.equal(problem.x, x)
    assert torch.equal(problem.y, y)
    problem.write(y=torch.zeros(8, dtype=D))
    assert torch.equal(problem.x, x)
    assert not problem.y.any()
    named = problem.hyperparameters(x)
    assert named["a"].shape == (2, 3)
    assert named["b"].shape == ()
    assert list(problem.learner_parameters(y)) == ["weight", "bias"]
    for bad in ({"x": y}, {"y": x}, {"x": x.float()}):
        with pytest.raises(tb.ShapeError, match="write: expected"):
            problem.write(**bad)


def test_an_evaluation_touches_nothing_of_the_users(data):
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D, requires_grad=True)
    problem = tb.BilevelProblem(learner, hyper, ridge, mse, data, data)
    before = [p.detach().clone() for p in (*learner.parameters(), hyper)]
    tb.ImplicitOracle(problem).evaluate().hessian.to_dense()
    for tensor, old in zip((*learner.parameters(), hyper), before):
        assert torch.equal(tensor, old)
        assert tensor.grad is None
        assert tensor.requires_grad


def test_tied_weights_count_once(data):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False, dtype=D)
            self.b = nn.Linear(3, 3, bias=False, dtype=D)
            self.b.weight = self.a.weight

        def forward(self, X):
            return self.b(torch.tanh(self.a(X)))

    X = data[0]
    learner = Tied()

    def lower(m, h, b):
        return (m(b) ** 2).mean() + (h.exp() * m.a.weight**2).sum()

    def upper(m, h, b):
        return (m(b) ** 2).mean()

    problem = tb.BilevelProblem(learner, torch.zeros(3, 3, dtype=D), lower, upper, X, X)
    assert problem.dy == 9
    loss = lower(learner, torch.zeros(3, 3, dtype=D), X)
    expected = torch.autograd.grad(loss, learner.a.weight)[0].reshape(-1)
    torch.testing.assert_close(numbers(problem)[2], expected, rtol=1e-12, atol=1e-15)
    w = torch.randn(9, dtype=D)

    def plain(w):
        W = w.view(3, 3)
        return ((torch.tanh(X @ W.T) @ W.T) ** 2).mean() + (W**2).sum()

    product = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(problem.x, problem.y).yy(w)
    torch.testing.assert_close(product, torch.func.hessian(plain)(problem.y) @ w, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_are_constants(data):
    learner = nn.Sequential(nn.Linear(3, 3, dtype=D), nn.Tanh(), nn.Linear(3, 2, dtype=D))
    learner[0].requires_grad_(False)
    problem = tb.BilevelProblem(learner, torch.zeros(2, 3, dtype=D), lambda m, h, b: mse(m, h, b)
                                + (h.exp() * m[2].weight ** 2).sum(), mse, data, data)  # fmt: skip
    assert problem.dy == 8
    assert problem.y_layout.names == ("2.weight", "2.bias")
    frozen = learner[0].weight.clone()
    tb.minimize(problem, method="dlcrn", max_steps=1)
    assert torch.equal(learner[0].weight, frozen)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=D)
        self.head = nn.Linear(3, 2, dtype=D)

    def forward(self, X):
        return self.head(self.norm(X))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_statistics_are_left_alone(training, data):
    learner = Normed().train(training)
    X, t = data
    learner.norm.running_mean += 0.3

    def lower(m, h, b):
        return mse(m, h, b) + h.exp() * sum((p * p).sum() for p in m.parameters())

    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    problem = tb.BilevelProblem(learner, torch.zeros((), dtype=D), lower, mse, data, data)
    ev = tb.PenaltyOracle(problem, 1e2).evaluate()
    ev.hessian.to_dense()
    for name, buffer in learner.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert learner.training == training
    assert learner.norm.training == training
    features = X
    if training:
        normed = (features - features.mean(0)) / torch.sqrt(features.var(0, unbiased=False) + 1e-5)
    else:
        normed = (features - buffers["norm.running_mean"]) / torch.sqrt(buffers["norm.running_var"] + 1e-5)
    problem.write(y=torch.linspace(-1, 1, problem.dy, dtype=D))
    weight, bias = learner.norm.weight, learner.norm.bias
    plain = ((learner.head(normed * weight + bias) - t) ** 2).mean()
    torch.testing.assert_close(numbers(problem, "upper")[0], plain.detach(), rtol=1e-12, atol=0)


def test_hyper_module_buffers_and_frozen_parts_are_constants(data):
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.free = nn.Parameter(torch.zeros(2, 3, dtype=D))
            self.held = nn.Parameter(torch.ones(2, 3, dtype=D), requires_grad=False)
            self.register_buffer("offset", torch.full((2, 3), 0.5, dtype=D))

        def forward(self):
            return self.free * self.held + self.offset

    problem = tb.BilevelProblem(linear(), Hyper(), lambda m, h, b: ridge(m, h(), b), mse, data, data)
    assert problem.dx == 6
    assert problem.x_layout.names == ("free",)
    expected = ridge(problem.learner, problem.hyper(), data).detach()
    torch.testing.assert_close(numbers(problem)[0], expected)


# -- refusals --------------------------------------------------------------------------------------


def test_several_dtypes_are_refused(data):
    with pytest.raises(tb.ProblemError, match="hyper is torch.float32.*learner torch.float64"):
        tb.BilevelProblem(linear(), torch.zeros(2, 3), ridge, mse, data, data)
    mixed = nn.Sequential(nn.Linear(3, 2, dtype=D), nn.Linear(2, 2))
    with pytest.raises(tb.ProblemError, match="learner: expected one dtype"):
        tb.BilevelProblem(mixed, torch.zeros(2, 3, dtype=D), ridge, mse, data, data)
    hyper = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=D)}
    with pytest.raises(tb.ProblemError, match="hyper: expected one dtype"):
        tb.BilevelProblem(linear(), hyper, ridge, mse, data, data)


def test_shared_tensors_are_refused(data):
    learner = linear()
    for hyper in (learner.weight, {"w": learner.weight.detach()}, learner.weight[0]):
        with pytest.raises(tb.ProblemError, match="learner\\['weight'\\] share memory.*clone"):
            tb.BilevelProblem(learner, hyper, ridge, mse, data, data)
    module = Log(torch.zeros(2, 3, dtype=D))
    module.log_l2 = learner.weight
    with pytest.raises(tb.ProblemError, match="share memory"):
        tb.BilevelProblem(learner, module, lambda m, h, b: ridge(m, h(), b), mse, data, data)


def test_a_closure_over_the_global_tensor_is_refused(data):
    hyper, learner = torch.zeros(2, 3, dtype=D, requires_grad=True), linear()
    with pytest.raises(tb.ProblemError, match="neither loss depends on the hyperparameters it is"):
        tb.BilevelProblem(learner, hyper, lambda m, h, b: ridge(m, hyper, b), mse, data, data)
    with pytest.raises(tb.ProblemError, match="lower loss does not depend on the learner it is given"):
        tb.BilevelProblem(
            learner, hyper, lambda m, h, b: h.sum() + (b[0] @ hyper.T).mean(), mse, data, data
        )
    with pytest.raises(tb.ProblemError, match="neither loss depends.*detach"):
        tb.BilevelProblem(learner, hyper, lambda m, h, b: ridge(m, h.detach(), b), mse, data, data)
    with pytest.raises(tb.ProblemError, match="lower loss does not depend"):
        tb.BilevelProblem(learner, hyper, lambda m, h, b: torch.tensor(1.0, dtype=D), mse, data, data)


def test_the_users_own_module_may_be_named_in_the_loss(data):
    """The learner's parameters are swapped in place, so calling the user's module is right too."""
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D)
    named = tb.BilevelProblem(learner, hyper, lambda m, h, b: ridge(learner, h, b), mse, data, data)
    given = tb.BilevelProblem(learner, hyper, ridge, mse, data, data)
    for a, b in zip(numbers(named), numbers(given)):
        assert torch.equal(a, b)


def test_wrong_constructor_arguments(data):
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D)
    cases = [
        ((torch.zeros(3), hyper, ridge, mse), {}, "learner: expected an nn.Module, got Tensor"),
        ((learner, [hyper], ridge, mse), {}, "hyper: expected an nn.Module, a dict of tensors or a tensor"),
        ((learner, hyper, None, mse), {}, "lower_loss: expected loss"),
        ((learner, hyper, ridge, 3.0), {}, "upper_loss: expected loss"),
        ((learner, hyper, ridge, mse), {"reduction": "average"}, "expected 'mean' or 'sum', got 'average'"),
        ((nn.ReLU(), hyper, ridge, mse), {}, "learner: nothing to optimise"),
        ((learner, nn.ReLU(), ridge, mse), {}, "hyper: nothing to optimise"),
    ]
    for args, options, message in cases:
        with pytest.raises(tb.ProblemError, match=message):
            tb.BilevelProblem(*args, data, data, **options)


@pytest.mark.parametrize("bad", [lambda m, h, b: (m(b[0]) - b[1]) ** 2, lambda m, h, b: 1.0,
                                 lambda m, h, b: ridge(m, h, b).view(1)])  # fmt: skip
def test_a_loss_that_is_no_scalar_is_refused(bad, data):
    with pytest.raises(tb.ShapeError, match="the lower loss must return a scalar tensor.*mean"):
        tb.BilevelProblem(linear(), torch.zeros(2, 3, dtype=D), bad, mse, data, data)


def test_missing_data_is_an_error_that_says_so(data):
    problem = tb.BilevelProblem(linear(), torch.zeros(2, 3, dtype=D), ridge, mse)
    with pytest.raises(tb.ProblemError, match="the lower loss has no data: pass lower_batch"):
        numbers(problem)
    with pytest.raises(tb.ProblemError, match="the upper loss has no data: pass upper_batch"):
        numbers(problem.at(lower_batch=data), "upper")
    with pytest.raises(tb.ProblemError, match="no data"):
        tb.minimize(problem, method="dlcrn", max_steps=1)
    assert torch.isfinite(numbers(problem.at(data, data))[0])


def test_a_loss_without_data_takes_an_empty_tuple():
    learner = linear()
    problem = tb.BilevelProblem(
        learner, torch.zeros(2, 3, dtype=D), lambda m, h, b: ((m.weight - h) ** 2).sum() + (m.bias**2).sum(),
        lambda m, h, b: ((m.weight - 1) ** 2).sum(), (), (),
    )  # fmt: skip
    assert float(tb.ImplicitOracle(problem).evaluate().value) == pytest.approx(6.0)


# -- data ------------------------------------------------------------------------------------------


def test_at_is_the_same_problem_on_other_data(data):
    X, t = data
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D)
    problem = tb.BilevelProblem(learner, hyper, ridge, mse, data, data)
    other = problem.at(upper_batch=(X * 2, t))
    torch.testing.assert_close(numbers(other, "upper")[0], mse(learner, None, (X * 2, t)).detach())
    torch.testing.assert_close(numbers(problem, "upper")[0], mse(learner, None, data).detach())
    assert torch.equal(numbers(other)[0], numbers(problem)[0])
    other.write(x=torch.ones(6, dtype=D))
    assert (problem.x == 1).all()
    assert (hyper == 1).all()


class Chunks:
    """A re-iterable loader of given chunks."""

    def __init__(self, *chunks):
        self.chunks, self.passes = chunks, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.chunks)


def uneven(X, t):
    return Chunks((X[:4], t[:4]), (X[4:6], t[4:6]), (X[6:], t[6:]))


def with_sum(learner, log_l2, batch):
    X, t = batch
    return ((learner(X) - t) ** 2).sum() * log_l2.exp().sum()


@pytest.mark.parametrize(("reduction", "loss"), [("mean", ridge), ("sum", with_sum)])
def test_a_loader_of_chunks_is_the_full_batch(reduction, loss, data):
    X, t = data
    learner, hyper = linear(), torch.linspace(-1, 0, 6, dtype=D).view(2, 3)
    whole = tb.BilevelProblem(learner, hyper, loss, mse, data, data)
    chunked = tb.BilevelProblem(learner, hyper, loss, mse, uneven(X, t), data, reduction=reduction)
    assert not chunked.is_single_piece("lower")
    assert chunked.is_single_piece("upper")
    for a, b in zip(numbers(chunked), numbers(whole)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    v = torch.linspace(1, 2, 8, dtype=D)
    a, b = (Objective(p, lower=1.0, counts=OracleCounts()).linearise(p.x, p.y) for p in (chunked, whole))
    torch.testing.assert_close(a.yy(v), b.yy(v), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a.xy(v), b.xy(v), rtol=1e-12, atol=1e-14)


def test_chunked_hyper_gradient_and_hessian(data):
    X, t = data
    learner, hyper = linear(), torch.linspace(-1, 0, 6, dtype=D).view(2, 3)
    whole = tb.BilevelProblem(learner, hyper, ridge, mse, data, (X * 2, t))
    chunked = whole.at(uneven(X, t), uneven(X * 2, t))
    for make in (tb.ImplicitOracle, tb.PenaltyOracle):
        a, b = make(chunked).evaluate(), make(whole).evaluate()
        torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(a.hessian.to_dense(), b.hessian.to_dense(), rtol=1e-6, atol=1e-9)


def test_data_loader_of_several_workers_batches(data):
    loader = DataLoader(TensorDataset(*data), batch_size=3)
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D)
    problem = tb.BilevelProblem(learner, hyper, ridge, mse, loader, data)
    torch.testing.assert_close(numbers(problem)[0], ridge(learner, hyper, data).detach(), rtol=1e-12, atol=0)


def test_an_iterator_is_refused(data):
    for iterator in (iter([data]), (chunk for chunk in [data])):
        with pytest.raises(tb.ProblemError, match="re-iterable loader; got an iterator"):
            tb.BilevelProblem(linear(), torch.zeros(2, 3, dtype=D), ridge, mse, iterator, data)
    problem = tb.BilevelProblem(linear(), torch.zeros(2, 3, dtype=D), ridge, mse, data, data)
    with pytest.raises(tb.ProblemError, match="iterator"):
        problem.at(upper_batch=iter([data]))


def test_empty_loaders_and_loaders_without_samples_are_refused(data):
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D)
    with pytest.raises(tb.ProblemError, match="yields no samples"):
        tb.BilevelProblem(learner, hyper, ridge, mse, Chunks(), data)
    with pytest.raises(tb.ProblemError, match="yields no|no samples|no chunk"):
        tb.BilevelProblem(learner, hyper, ridge, mse, Chunks(), data, reduction="sum")
    with pytest.raises(tb.ProblemError, match="sample dimension"):
        tb.BilevelProblem(learner, hyper, ridge, mse, Chunks({"n": 3}), data)


def test_batches_are_trees(data):
    X, t = data
    learner, hyper = linear(), torch.zeros(2, 3, dtype=D)

    def lower(m, h, b):
        return ridge(m, h, (b["in"][0], b["out"])) * b["scale"]

    problem = tb.BilevelProblem(learner, hyper, lower, mse, {"in": [X], "out": t, "scale": 2.0}, data)
    torch.testing.assert_close(numbers(problem)[0], 2 * ridge(learner, hyper, data).detach())


def test_per_sample_weights_addressed_by_index_from_a_data_loader(data):
    """learner(inputs), hyper.log_weight[idx]: a shuffled DataLoader gives the full batch's derivatives."""
    X, _ = data
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_weight = nn.Parameter(torch.linspace(-1, 1, 7, dtype=D))

    def lower(learner, hyper, batch):
        inputs, targets, idx = batch
        losses = F.cross_entropy(learner(inputs), targets, reduction="none")
        return (torch.sigmoid(hyper.log_weight[idx]) * losses).mean() + 0.1 * sum(
            (p * p).sum() for p in learner.parameters()
        )

    def upper(learner, hyper, batch):
        return F.cross_entropy(learner(batch[0]), batch[1])

    index = torch.arange(7)
    learner, hyper, clean = linear(), Weights(), (X * 1.5, labels)
    whole = tb.BilevelProblem(learner, hyper, lower, upper, (X, labels, index), clean)
    loader = DataLoader(TensorDataset(X, labels, index), batch_size=3, shuffle=True)
    chunked = whole.at(lower_batch=loader)
    a, b = tb.ImplicitOracle(chunked).evaluate(), tb.ImplicitOracle(whole).evaluate()
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-7, atol=1e-12)
    assert (a.gradient != 0).all()
    single = whole.at(lower_batch=(X[2:4], labels[2:4], index[2:4]))
    gradient = tb.ImplicitOracle(single).evaluate().gradient
    assert (gradient != 0).tolist() == [False, False, True, True, False, False, False]


# -- randomness ------------------------------------------------------------------------------------


def dropout_problem(data, **options):
    learner = nn.Sequential(nn.Linear(3, 8, dtype=D), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2, dtype=D))

    def lower(m, h, b):
        return mse(m, h, b) + h.exp() * sum((p * p).sum() for p in m.parameters())

    return tb.BilevelProblem(learner, torch.zeros((), dtype=D), lower, mse, data, data, **options)


def test_dropout_without_a_seed_is_refused(data):
    with pytest.raises(tb.ProblemError, match="changes between two calls.*eval.*seed"):
        dropout_problem(data)


def test_a_seed_fixes_dropout_and_leaves_the_global_stream_alone(data):
    problem = dropout_problem(data, seed=3)
    torch.manual_seed(11)
    first = numbers(problem)
    drawn = torch.rand(3)
    second = numbers(problem)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), drawn)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    other = dropout_problem(data, seed=4)
    other.write(y=problem.y)
    assert not torch.equal(numbers(other)[0], first[0])


def test_seeded_dropout_has_right_products(data):
    problem = dropout_problem(data, seed=3)
    g = Objective(problem, lower=1.0, counts=OracleCounts())
    x, y = problem.x, problem.y
    u = torch.randn(problem.dy, generator=torch.Generator().manual_seed(1), dtype=D)
    fd = (g.gradient(x, y + 1e-5 * u)[2] - g.gradient(x, y - 1e-5 * u)[2]) / 2e-5
    at = g.linearise(x, y)
    torch.testing.assert_close(at.yy(u), fd, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(at.yy(torch.stack([u, 2 * u], 1))[:, 1], 2 * fd, rtol=1e-6, atol=1e-8)


# -- plain functions -------------------------------------------------------------------------------


def test_from_functions():
    x0, y0 = torch.ones(2, dtype=D), torch.zeros(3, dtype=D)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum() + x[0], lambda x, y: ((y - x.sum()) ** 2).sum(), x0, y0
    )
    assert (problem.dx, problem.dy, problem.learner, problem.hyper) == (2, 3, None, None)
    problem.write(x=torch.full((2,), 3.0, dtype=D))
    assert (problem.x == 3).all()
    assert (x0 == 1).all()
    assert float(tb.ImplicitOracle(problem).evaluate().value) == pytest.approx(3 * 36 + 3)


def square(x, y):
    return ((y - x) ** 2).sum()


@pytest.mark.parametrize(
    ("f", "g", "x0", "y0", "error", "message"),
    [(None, square, torch.ones(1), torch.ones(1), tb.ProblemError, "f: expected a function"),
     (square, 3, torch.ones(1), torch.ones(1), tb.ProblemError, "g: expected a function"),
     (square, square, torch.ones(1, 1), torch.ones(1), tb.ShapeError, "x0: expected a flat .*reshape"),
     (square, square, torch.ones(1), 3.0, tb.ShapeError, "y0: .*got float"),
     (square, square, torch.ones(1), torch.ones(1).double(), tb.ProblemError, "expected the same"),
     (lambda x, y: y, square, torch.ones(1), torch.ones(1), tb.ShapeError, "the upper loss must return"),
     (lambda x, y: y.sum(), lambda x, y: (y * y).sum(), torch.ones(1), torch.ones(1), tb.ProblemError,
      "neither")],
)  # fmt: skip
def test_from_functions_refuses(f, g, x0, y0, error, message):
    with pytest.raises(error, match=message):
        tb.BilevelProblem.from_functions(f, g, x0, y0)
