"""Hessians assembled from those of the learner's outputs, against the dense reference; and what they must refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bilevel as tb
from tests.objectives import objective, randn
from tests.reference import Reference, blocks, cleaning
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import LinearOperator, SolveStatus, cg, own_stream
from torch_bilevel.lower import LowerSystems, kept
from torch_bilevel.methods import model
from torch_bilevel.outputs import KroneckerPreconditioner, OutputHessian, kronecker, prices
from torch_bilevel.outputs import hessian as output_hessian
from torch_bilevel.recorded import calls

D = torch.float64
N, FEATURES, CLASSES = 9, 7, 3


X, LABELS = randn(0, N, FEATURES), torch.arange(N) % CLASSES


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Learners of a test's size are worth it."""
    monkeypatch.setattr(calls, "SMALL", 0)


def ce(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS, reduction="none")


def linear_layer(x, y):
    W, b = y[: CLASSES * FEATURES].view(CLASSES, FEATURES), y[CLASSES * FEATURES :]
    return (x.sigmoid() * ce(F.linear(X.to(y), W, b))).mean() + 0.1 * (y * y).sum()


def transposed(x, y):
    return (x.sigmoid() * ce(X.to(y) @ y.view(CLASSES, FEATURES).T)).mean() + 0.1 * (y**4).sum()


def added_bias(x, y):
    W, b = y[: CLASSES * FEATURES].view(CLASSES, FEATURES), y[CLASSES * FEATURES :]
    return (x.sigmoid() * ce(X.to(y) @ W.T + b)).mean() + 0.1 * (y * y).sum()


def scalar_bias(x, y):
    return (x.sigmoid() * F.softplus(y[-1] + X.to(y) @ y[:-1])).sum() + (y * y).sum()


def columns(x, y):
    return (x.sigmoid() * ce(torch.matmul(X.to(y), y.view(FEATURES, CLASSES)))).mean() + (y.cosh()).sum()


def by_keywords(x, y):
    """A bias by keyword; and a call that cannot be read and is left alone."""
    W, b = y[: CLASSES * FEATURES].view(CLASSES, FEATURES), y[CLASSES * FEATURES :]
    other = torch.matmul(input=X.to(y)[:2], other=torch.ones_like(X[0]).to(y))
    return (x.sigmoid() * ce(F.linear(X.to(y), W, bias=b))).mean() + 0.1 * (y * y).sum() + other.sum()


def logistic(x, y):
    y = y.view(-1)
    return (x.sigmoid() * F.softplus(torch.mv(X.to(y), y))).sum() + (y * y).sum()


def per_feature(x, y):
    """No x_i of a sample: one L2 weight per feature."""
    W = y.view(CLASSES, FEATURES)
    return ce(X.to(y) @ W.T).mean() + (x.exp() * W**2).sum()


def two_tasks(x, y):
    """Two heads, of which one sees the data twice, and an entry of y of its own."""
    a, b = y[: 2 * FEATURES].view(2, FEATURES), y[2 * FEATURES : 3 * FEATURES]
    first = torch.tanh(F.linear(X.to(y), a)).square().sum() + torch.logsumexp(F.linear(X.to(y) ** 2, a), 1).sum()
    return first + (x.sigmoid() * F.softplus(X.to(y) @ b)).sum() + (y.cosh()).sum() + y[-1] ** 4


def several_outputs(x, y):
    """Least squares in a tensor of inputs."""
    Z = F.linear(X.to(y).view(3, 3, FEATURES), y.view(2, FEATURES))
    return (x.exp()[:2] * (Z - 1) ** 2).sum() + (y * y).sum()


LOSSES = {  # g, dx, dy, whether x_i belongs to a sample
    "linear_layer": (linear_layer, N, CLASSES * (FEATURES + 1), True),
    "added_bias": (added_bias, N, CLASSES * (FEATURES + 1), True),
    "scalar_bias": (scalar_bias, N, FEATURES + 1, True),
    "by_keywords": (by_keywords, N, CLASSES * (FEATURES + 1), True),
    "transposed": (transposed, N, CLASSES * FEATURES, True),
    "columns": (columns, N, CLASSES * FEATURES, True),
    "logistic": (logistic, N, 14 // 2, True),
    "per_feature": (per_feature, FEATURES, CLASSES * FEATURES, False),
    "two_tasks": (two_tasks, N, 3 * FEATURES + 1, True),
    "several_outputs": (several_outputs, 2, 2 * FEATURES, False),
}


def f(x: Tensor, y: Tensor) -> Tensor:
    return ((y - 1) ** 2).cosh().sum() + (x * x).sum() / 10


def problem(g, dx: int, dy: int, upper=f, dtype=D, compile: bool = False) -> tb.BilevelProblem:
    x, y = randn(1, dx) / 2, randn(2, dy) / 4
    return tb.BilevelProblem.from_functions(upper, g, x.to(dtype), y.to(dtype), check=False, compile=compile)


def recorded(p: tb.BilevelProblem, **terms):
    return objective(p, **terms).linearise(p.x, p.y)


def found(at):
    return OutputHessian.of(at) if at.objective.calls(at.x, at.y) else None


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_are_those_of_the_reference(name, wide, monkeypatch):
    """In one piece, and in bands as where the inputs have many features."""
    g, dx, dy, own = LOSSES[name]
    if wide:
        monkeypatch.setattr(prices, "WIDE", 1)
    monkeypatch.setattr(calls, "PROBES", -100)  # as if they always paid
    at = recorded(problem(g, dx, dy), lower=1.0)
    o = found(at)
    xx, _, yx, yy = blocks(g, at.x, at.y)
    torch.testing.assert_close(o.dense_yy(), yy, rtol=1e-11, atol=1e-12)
    v = randn(3, dy, 4)
    torch.testing.assert_close(o.yy(v), yy @ v, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(o.yy(v[:, 0]), yy @ v[:, 0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(o.times(v), yy @ v, rtol=1e-11, atol=1e-12)
    assert (o.cross is not None) == own
    if own:
        torch.testing.assert_close(o.dense_yx(), yx, rtol=1e-11, atol=1e-12)
    if o.xx is not None:
        torch.testing.assert_close(torch.diag(o.xx), xx, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 127, 128, 785])
def test_bands_cover_a_symmetric_block_from_its_diagonal_on(d):
    formed = torch.zeros(d, d, dtype=torch.int)
    for a, b in prices.block_bands(d):
        formed[a:b, a:] += 1
    assert int(formed.max()) == 1
    assert bool((formed + formed.T > 0).all())
    assert int(formed.sum()) == prices.banded(d) <= (d * d if d < 128 else 0.68 * d * d)


@pytest.mark.parametrize("columns", [1, 100])
def test_times_by_matrix_and_by_products(columns, monkeypatch):
    """Many columns are multiplied by the matrix, few by blocks of products, in parts that fit the memory."""
    monkeypatch.setattr(output_hessian, "COLUMN_NUMBERS", 60)
    monkeypatch.setattr(calls, "PROBES", -100)
    o = found(recorded(problem(*LOSSES["logistic"][:3]), lower=1.0))
    made, original = [], OutputHessian.dense_yy
    monkeypatch.setattr(OutputHessian, "dense_yy", lambda self: made.append(1) or original(self))
    W = randn(5, len(o.diagonal), columns)
    torch.testing.assert_close(o.times(W), o.dense_yy() @ W)
    assert len(made) == (1 if columns == 1 else 2)


@pytest.mark.parametrize("terms", [{"upper": 0.3, "lower": 1.0}, {"upper": 1.0, "tangent": True, "tangent_weight": -1.0}])
def test_both_levels_and_the_lagrangian(terms):
    """h = g + sigma f sees the learner on training and on clean data; L = f - <v, g_y> by third derivatives."""
    made = cleaning(samples=10, features=5)
    r = made.reference
    p = problem(r.g, 10, 18, upper=r.f)
    v = randn(6, 18)
    if "tangent" in terms:
        terms = {**terms, "tangent": v}

        def h(x, y):
            return r.f(x, y) - torch.func.grad(r.g, argnums=1)(x, y) @ v
    else:

        def h(x, y):
            return r.g(x, y) + 0.3 * r.f(x, y)

    o = found(recorded(p, **terms))
    xx, _, yx, yy = blocks(h, p.x, p.y)
    assert len(o.calls) == 2
    torch.testing.assert_close(o.dense_yy(), yy, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(o.dense_yx(), yx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.diag(o.xx), xx, rtol=1e-10, atol=1e-12)


def test_a_module_on_frozen_features():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh()).to(D).requires_grad_(False)
    learner = nn.Sequential(body, nn.Linear(6, CLASSES).to(D))

    def loss(learner, hyper, batch):
        return F.cross_entropy(learner(batch), LABELS) + (hyper["log_l2"].exp() * learner[1].weight ** 2).sum()

    p = tb.BilevelProblem(learner, {"log_l2": torch.zeros(6, dtype=D)}, loss, loss, X, X)
    at = recorded(p, lower=1.0)
    o = found(at)
    torch.testing.assert_close(o.dense_yy(), at.yy(torch.eye(p.dy, dtype=D)))
    assert o.calls[0].inputs.shape == (N, 7)  # a column of ones for the bias
    chunks = p.at(lower_batch=torch.utils.data.DataLoader(X, batch_size=N))
    assert not Objective(chunks, lower=1.0, counts=OracleCounts()).calls(p.x, p.y)


def mlp(x, y):
    W = y[: 2 * FEATURES].view(2, FEATURES)
    return (x.sigmoid() * (torch.tanh(F.linear(X.to(y), W)) @ y[2 * FEATURES : 2 * FEATURES + 2])).sum() + (y * y).sum()


def samples_that_meet(x, y):
    Z = F.linear(X.to(y), y.view(2, FEATURES))
    return (x.sigmoid() * (Z - Z.mean(0)).square().sum(1)).sum() + (y * y).sum()


def scaled_weights(x, y):
    return F.softplus(X.to(y) @ (y * 2)).sum() + x.sum() * (y * y).sum()


def inputs_of_x(x, y):
    return F.softplus((X.to(y) * x[:, None]) @ y).sum() + (y * y).sum()


def coupled_penalty(x, y):
    return (x.sigmoid() * F.softplus(X.to(y) @ y)).sum() + y.sum() ** 2 + (y * y).sum()


@pytest.mark.parametrize(
    ("g", "dy"), [(mlp, 2 * FEATURES + 2), (samples_that_meet, 2 * FEATURES), (scaled_weights, 2 * FEATURES // 2),
              (inputs_of_x, FEATURES), (coupled_penalty, FEATURES)],
)  # fmt: skip
def test_what_is_not_of_this_kind_is_refused_and_still_right(g, dy, monkeypatch):
    monkeypatch.setattr(calls, "PROBES", -100)
    systems, at = LowerSystems(), recorded(problem(g, N, dy), lower=1.0)
    assert systems.outputs(at) is None
    counts = at.objective.counts.copy()
    assert systems.outputs(at) is None
    assert at.objective.counts.as_dict() == counts.as_dict()  # asked once a run
    torch.testing.assert_close(systems.operator(at).to_dense(), blocks(g, at.x, at.y)[3])
    assert systems.state_dict()["by_outputs"].get("g") is not True
    assert systems.ladder(at).prices == kept.Ladder.of(dy, D, []).prices


def test_x_of_other_samples_is_no_cross_term(monkeypatch):
    monkeypatch.setattr(calls, "PROBES", -100)

    def g(x, y):
        return (x.flip(0).sigmoid() * F.softplus(X.to(y) @ y)).sum() + (y.cosh()).sum()

    at = recorded(problem(g, N, FEATURES), lower=1.0)
    assert found(at).cross is None


def test_small_learners_are_not_watched(monkeypatch):
    g, dx, dy, _ = LOSSES["linear_layer"]
    at = recorded(problem(g, dx, dy), lower=1.0)
    assert at.objective.calls(at.x, at.y)
    assert not at.objective.calls(at.x.bfloat16(), at.y.bfloat16())
    monkeypatch.setattr(calls, "SMALL", dy)
    assert not at.objective.calls(at.x, at.y)


def cleaning_problem(samples: int = 30, features: int = 12, dtype=D):
    r = cleaning(samples=samples, features=features).reference
    return r, tb.BilevelProblem.from_functions(r.f, r.g, r.x.to(dtype), r.y0.to(dtype))


@pytest.mark.parametrize("solver", ["auto", "cholesky"])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_the_dense_hyper_hessian(solver, dtype):
    r, p = cleaning_problem(samples=40, dtype=dtype)
    ev = tb.ImplicitOracle(p, solver=solver).evaluate()
    before = ev.counts.oracle_calls
    H = ev.hessian.to_dense()
    spent = ev.counts.oracle_calls - before
    tol = 1e-8 if dtype is D else 2e-4
    torch.testing.assert_close(H.to(D), r.implicit().hessian, rtol=tol, atol=tol * 0.1)
    assert torch.equal(H, H.mT)
    assert spent <= 30 < min(p.dx, p.dy)  # K + 4 products of each level and recordings, not dx columns


def test_per_feature_l2_hyper_hessian():
    g, dx, dy, _ = LOSSES["per_feature"]

    clean = randn(8, N, FEATURES)

    def upper(x, y):
        return ce(clean.to(y) @ y.view(CLASSES, FEATURES).T).mean()

    p = problem(g, dx, dy, upper=upper)
    ev = tb.ImplicitOracle(p).evaluate()
    assert ev.hessian._by_outputs()
    H = ev.hessian.to_dense()
    torch.testing.assert_close(H, Reference(upper, g, p.x, p.y).implicit().hessian, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(H, LinearOperator.to_dense(ev.hessian), rtol=1e-7, atol=1e-9)


def test_damping_is_part_of_the_factor():
    _, p = cleaning_problem()
    at = recorded(p, lower=1.0)
    systems = LowerSystems(damping=0.5)
    A = systems.operator(at).to_dense()
    assert at.outputs is not None
    torch.testing.assert_close(A, at.yy(torch.eye(p.dy, dtype=D)) + 0.5 * torch.eye(p.dy, dtype=D))
    torch.testing.assert_close(systems.operator(at).matvec(p.y), A @ p.y)


def badly_scaled(least=-5, most=3):
    """Softmax with an L2 weight per feature over eight decades, where plain CG crawls."""
    n, d, K = 60, 20, 5
    A, t = randn(10, n, d), torch.arange(n) % K
    weights = torch.logspace(least, most, d, dtype=D)

    def g(x, y):
        W = y.view(K, d)
        return F.cross_entropy(A.to(y) @ W.T, t) + x.exp().sum() * (weights * W**2).sum()

    return tb.BilevelProblem.from_functions(lambda x, y: f(x[:1], y / 10), g, torch.zeros(1, dtype=D), randn(11, d * K))


def test_the_kronecker_preconditioner():
    p = badly_scaled()
    at = recorded(p, lower=1.0)
    P = found(at).preconditioner(4)
    assert P.ok
    inverse = P(torch.eye(p.dy, dtype=D))
    torch.testing.assert_close(inverse, inverse.mT)
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0
    b = randn(12, p.dy)
    torch.testing.assert_close(P(b), inverse @ b)
    A = LowerSystems().operator(at)
    with_it, without = cg(A, b, tol=1e-8, preconditioner=P), cg(A, b, tol=1e-8)
    assert with_it.ok
    assert 4 * with_it.iterations < without.iterations


def assembled(inputs, blocks, index, diagonal):
    """sum of B_i (x) x_i x_i' + diag, written out entry by entry."""
    H = torch.diag(diagonal)
    for X, B in zip(inputs, blocks):
        H[index[:, None, :, None], index[None, :, None, :]] += torch.einsum("nkl,ni,nj->ijkl", B, X, X)
    return H


def samples_last(blocks):
    return [B.permute(1, 2, 0).contiguous() for B in blocks]


@pytest.mark.parametrize("width", [1.0, 6.0, 1e9])
@pytest.mark.parametrize("rank", range(5))
def test_the_kronecker_preconditioner_against_its_definition(rank, width, monkeypatch):
    """The approximation, put together by dense algebra of another kind, with entries of y beside those of the calls."""
    monkeypatch.setattr(kronecker, "WIDTH", width)
    monkeypatch.setattr(kronecker, "GROUPS", 1e9)
    d, K, sizes = 4, 3, (7, 9)
    inputs = [randn(i, n, d) for i, n in enumerate(sizes)]
    roots = [randn(10 + i, n, K, K) for i, n in enumerate(sizes)]
    squeeze = torch.tensor([1.0, 1.2, 9.0], dtype=D).diag()
    blocks = [squeeze @ R @ R.mT @ squeeze / K for R in roots]
    index = torch.randperm(d * K + 2, generator=torch.Generator().manual_seed(0))[: d * K].view(d, K)
    diagonal = 0.5 + randn(20, d * K + 2) ** 2
    P = KroneckerPreconditioner(inputs, samples_last(blocks), index, diagonal, rank)
    assert P.ok
    assert len(P.groups) == {1.0: 3, 6.0: 2, 1e9: 1}[width]

    H, place = assembled(inputs, blocks, index, diagonal), index.reshape(-1)
    values, U = torch.linalg.eigh(torch.cat(blocks).mean(0))
    G = sum(X.mT @ (B.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / K * X) for X, B in zip(inputs, blocks))
    turned = torch.kron(torch.eye(d, dtype=D), U.contiguous())  # rows as in place
    own = (turned.mT @ torch.diag(diagonal[place]) @ turned).diagonal().view(d, K)
    mean = torch.zeros(d, K, d, K, dtype=D)
    for start, stop, _ in P.groups:
        level, direct = values[start:stop].log().mean().exp() / values.mean(), own[:, start:stop].mean(1)
        for a in range(start, stop):
            mean[:, a, :, a] = level * G + direct.diag()
    mean = mean.view(d * K, d * K)
    T = torch.kron(P.Z.contiguous(), torch.eye(K, dtype=D))
    inner = torch.linalg.inv(T.mT @ turned.mT @ H[place[:, None], place] @ turned @ T) - torch.linalg.inv(T.mT @ mean @ T)
    expected = torch.diag(1 / diagonal)
    expected[place[:, None], place] = turned @ (torch.linalg.inv(mean) + T @ inner @ T.mT) @ turned.mT
    torch.testing.assert_close(P(torch.eye(len(diagonal), dtype=D)), expected)
    assert float(torch.linalg.eigvalsh(expected)[0]) > 0
    if rank == d:
        torch.testing.assert_close(expected, torch.linalg.inv(H))


def test_the_corner_is_on_the_leading_inputs():
    """Those in which the data curves most, by the measure of the regulariser."""
    d, K, n, rank = 20, 3, 200, 4
    decay, own = torch.logspace(0, -3, d, dtype=D), 0.5 + randn(3, d).abs()
    inputs, B = randn(1, n, d) * decay @ torch.linalg.qr(randn(2, d, d))[0], torch.eye(K, dtype=D).expand(n, K, K)
    P = KroneckerPreconditioner([inputs], samples_last([B]), torch.arange(d * K).view(d, K), own.repeat_interleave(K), rank)
    values, V = torch.linalg.eigh(inputs.mT @ inputs / (own.sqrt() * own[:, None].sqrt()))
    found, true = torch.linalg.qr(own.sqrt()[:, None] * P.Z)[0], V[:, -rank:]
    assert float(torch.linalg.svdvals(true.mT @ found)[-1]) > 0.99


def test_the_kronecker_preconditioner_is_exact_where_samples_share_their_output_hessian(monkeypatch):
    monkeypatch.setattr(kronecker, "WIDTH", 1.0)
    monkeypatch.setattr(kronecker, "GROUPS", 1e9)
    d, K, n = 4, 3, 9
    B = randn(1, K, K)
    B = B @ B.mT
    weights = randn(2, n) ** 2
    index, diagonal = torch.arange(d * K).view(d, K), (0.1 + randn(3, d) ** 2).repeat_interleave(K)
    inputs, blocks = [randn(4, n, d)], [weights[:, None, None] * B]
    P = KroneckerPreconditioner(inputs, samples_last(blocks), index, diagonal, 0)
    torch.testing.assert_close(P(torch.eye(d * K, dtype=D)), torch.linalg.inv(assembled(inputs, blocks, index, diagonal)))


@pytest.mark.parametrize("what", ["no curvature", "NaN in B", "NaN in D", "NaN in X", "inf in X", "negative"])
def test_what_cannot_be_inverted_is_no_preconditioner(what):
    d, K, n = 4, 3, 9
    inputs, blocks, diagonal = randn(4, n, d), torch.eye(K, dtype=D).expand(n, K, K).clone(), torch.ones(d * K, dtype=D)
    if what == "no curvature":
        blocks.zero_()
    elif what == "negative":
        blocks *= -1
    else:
        {"B": blocks, "D": diagonal, "X": inputs}[what[-1]].view(-1)[1] = float(what[:3])
    assert not KroneckerPreconditioner([inputs], samples_last([blocks]), torch.arange(d * K).view(d, K), diagonal, 2).ok


@pytest.mark.parametrize(
    ("curvature", "groups"),
    [
        ([0.0, 1e3, 2e3, 5e3], [(0, 1), (1, 4)]),  # a softmax: the shift of all logits apart
        ([0.0, 0.1, 0.5, 2.0], [(0, 4)]),  # flat against the regulariser
        ([1.0, 5.0, 7.0, 40.0], [(0, 2), (2, 4)]),
        ([2.0], [(0, 1)]),
    ],
)
def test_outputs_of_like_curvature_share_a_factor(curvature, groups):
    assert kronecker._grouped(torch.tensor(curvature)) == groups


def test_the_number_of_factors_is_bounded():
    groups = kronecker._grouped(torch.logspace(0, 9, 40))
    assert len(groups) <= kronecker.GROUPS + 1
    assert [a for a, _ in groups] == [0] + [b for _, b in groups[:-1]]
    assert groups[-1][1] == 40


@pytest.mark.parametrize("regularised", [False, True])
def test_features_without_regulariser_have_a_preconditioner_where_the_data_curves_them(regularised):
    """A bias is seldom regularised."""
    d, K, n = 4, 3, 30
    R = randn(1, n, K, K)
    diagonal = torch.zeros(d, K, dtype=D)
    diagonal[1:] = 0.1 if regularised else 0.0
    index = torch.arange(d * K).view(d, K)
    P = KroneckerPreconditioner([randn(4, n, d)], samples_last([R @ R.mT]), index, diagonal.reshape(-1), 2)
    assert P.ok
    assert float(torch.linalg.eigvalsh(P(torch.eye(d * K, dtype=D)))[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_without_regulariser_has_no_preconditioner_and_is_solved_without(dtype, large):
    """Its logits may be shifted alike: a direction without curvature, along which the gradients are zero up to rounding."""

    def g(x, y):
        return (x.sigmoid() * ce(F.linear(X.to(y), y.view(CLASSES, FEATURES)))).mean()

    p = problem(g, N, CLASSES * FEATURES, dtype=dtype)
    at = recorded(p, lower=1.0)
    assert not found(at).preconditioner(1).ok
    b, systems = at.yy(p.y), LowerSystems()
    for _ in range(3):
        assert systems.solve(at, b, tol=1e-4).ok


def test_a_small_regulariser_is_enough_in_float32():
    """The shift of all logits has 1e-5 of the largest curvature, a hundred times float32's rounding."""
    n, d, K = 60, 12, 5
    A, t = randn(1, n, d).float(), torch.arange(n) % K

    def g(x, y):
        return F.cross_entropy(A @ y.view(d, K), t) + x.exp().sum() * (y * y).sum()

    p = tb.BilevelProblem.from_functions(lambda x, y: f(x[:1], y), g, torch.full((1,), -13.0), 0.1 * randn(2, d * K).float())
    at = recorded(p, lower=1.0)
    P = found(at).preconditioner(6)
    assert P.ok
    H = at.yy(torch.eye(d * K))
    condition = torch.linalg.cond(H.double())
    assert condition > 3e4
    values = torch.linalg.eigvals(P(H).double()).real
    assert float(values.max() / values.min()) < 30


def test_what_is_not_positive_definite_is_no_preconditioner():
    def g(x, y):
        return (x.sigmoid() * ce(F.linear(X.to(y), y.view(CLASSES, FEATURES)))).mean() - (y * y).sum()

    o = found(recorded(problem(g, N, CLASSES * FEATURES), lower=1.0))
    assert not o.preconditioner(1).ok
    assert o.preconditioner(1, damping=10.0).ok


@pytest.fixture
def large(monkeypatch):
    """Learners of a test's size count as large: preconditioned CG, not a factor at once."""
    monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 10)
    monkeypatch.setattr(prices, "CORNERS", (10, 25))


def test_the_ladder_goes_by_the_kronecker_preconditioner(large, monkeypatch):
    """It is made once CG has cost as much, and renewed as it ages."""
    monkeypatch.setattr(kept, "FORESEEN", 0)
    p, systems, kinds = badly_scaled(), LowerSystems(), []
    h = Objective(p, lower=1.0, counts=OracleCounts())
    for seed in range(40):
        at = h.linearise(p.x + 0.2 * seed, p.y, "y")
        b = randn(seed, p.dy)
        solution = systems.solve(at, b, tol=1e-8)
        assert solution.ok
        assert torch.linalg.vector_norm(at.yy(solution.x) - b) <= 1e-7 * torch.linalg.vector_norm(b)
        kinds.append(type(systems.factor).__name__)
    assert kinds[0] == "NoneType"
    assert "KroneckerPreconditioner" in kinds
    assert "NystromPreconditioner" not in kinds
    assert h.counts.factorisations >= 2
    assert "Kronecker preconditioner, its corner of" in systems.describe() or "Cholesky" in systems.describe()


@pytest.mark.parametrize("method", ["lbfgs", "auto", "dlcrn", "lfsba", "slcrn", "lazy_slcrn"])
@pytest.mark.parametrize("size", ["factors", "preconditioners", "float32"])
def test_resume_is_the_uninterrupted_run(method, size, tmp_path, monkeypatch):
    if size == "float32":
        monkeypatch.setattr(prices, "WORTH_SINGLE", 0)
    if size != "factors":
        monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 10)
        monkeypatch.setattr(prices, "CORNERS", (2, 4))

    def go(steps, **options):
        return tb.minimize(cleaning_problem()[1], method, max_steps=steps, gradient_tol=1e-12, **options)

    whole = go(8)
    go(4, checkpoint=tmp_path / "run.pt")
    resumed = go(8, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(resumed.x, whole.x)
    assert resumed.counts.as_dict() == whole.counts.as_dict()


@pytest.mark.parametrize("method", ["auto", "dlcrn", "lfsba", "lazy_slcrn"])
def test_same_points_with_and_without(method, monkeypatch):
    """The accelerator on and off: second-order stationary points of the same quality."""
    r, _ = cleaning_problem()

    def upper(x, y):
        return r.f(x, y) + 1e-3 * (x * x).mean()

    values = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(calls, "SMALL", 10**9)
        p = tb.BilevelProblem.from_functions(upper, r.g, r.x, r.y0)
        result = tb.minimize(p, method, max_steps=150, gradient_tol=1e-6)
        assert result.status is tb.Status.SECOND_ORDER
        exact = Reference(upper, r.g, r.x, r.y0).implicit(result.x)
        assert float(exact.gradient.norm()) <= 1e-5
        assert float(torch.linalg.eigvalsh(exact.hessian)[0]) >= -1e-5
        values.append(float(exact.value))
    assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("quadrature", [False, True])
def test_the_dense_hessian_of_the_penalty_surrogates(scheme, quadrature):
    _, p = cleaning_problem(samples=40)
    ev = tb.PenaltyOracle(p, 100.0, scheme, quadrature=quadrature).evaluate()
    assert ev.hessian._by_outputs()
    H = ev.hessian.to_dense()
    torch.testing.assert_close(H, LinearOperator.to_dense(ev.hessian), rtol=1e-6, atol=1e-8)
    assert torch.equal(H, H.mT)


def test_an_upper_loss_with_a_full_hessian_in_x():
    """Q_xx is then formed by products."""
    r, _ = cleaning_problem(samples=40)
    B = randn(20, 40, 40) / 40

    def upper(x, y):
        return r.f(x, y) + torch.cos(B @ x).sum()

    p = tb.BilevelProblem.from_functions(upper, r.g, r.x, r.y0)
    ev = tb.ImplicitOracle(p).evaluate()
    assert ev.hessian._by_outputs()
    H = ev.hessian.to_dense()
    torch.testing.assert_close(H, Reference(upper, r.g, p.x, p.y).implicit().hessian, rtol=1e-8, atol=1e-9)
    assert torch.equal(H, H.mT)


def test_a_matrix_is_chosen_where_it_costs_little_beside_a_krylov_model(monkeypatch):
    """Above the size that is always dense: where it is had by outputs and its eigenvectors are not too dear."""
    monkeypatch.setattr(model, "MAX_DENSE", 5)

    def kind() -> str:
        result = tb.minimize(cleaning_problem()[1], "dlcrn", max_steps=4)
        return result.choices["hyper-Hessian"].split(",")[0]

    assert kind() == "dense"
    monkeypatch.setattr(prices, "EIGENVECTORS", 1e9)
    assert kind() == "krylov"
    monkeypatch.setattr(prices, "EIGENVECTORS", 10)
    monkeypatch.setattr(calls, "SMALL", 10**9)
    assert kind() == "krylov"


def test_products_go_by_few_outputs_only(monkeypatch):
    """B (n, K, K) is read at every product: with many outputs the recorded graph is cheaper. Both count and agree."""
    _, p = cleaning_problem()
    at = recorded(p, lower=1.0)
    systems = LowerSystems()
    A, v = systems.operator(at), randn(3, p.dy)
    assert systems.outputs(at) is not None
    by, recorded_yy = [], at.yy
    monkeypatch.setattr(at, "yy", lambda w: by.append("recorded") or recorded_yy(w))
    few = A.matvec(v)
    monkeypatch.setattr(prices, "FEW_OUTPUTS", 1)
    counts = at.objective.counts.lower_products
    many = A.matvec(v)
    assert by == ["recorded"]
    assert at.objective.counts.lower_products == counts + 1
    torch.testing.assert_close(many, few)


def test_the_kronecker_preconditioner_on_each_device(device):
    """Applied to a vector and to columns, and within CG on the stream where steps are replayed."""
    n, d, K = 40, 12, 4
    A, t = randn(1, n, d).to(device), torch.arange(n, device=device) % K

    def g(x, y):
        return (x.sigmoid() * F.cross_entropy(A @ y.view(d, K), t, reduction="none")).mean() + 0.01 * (y * y).sum()

    p = tb.BilevelProblem.from_functions(lambda x, y: y.square().sum() + 0 * x.sum(), g, randn(2, n).to(device),
                                         randn(3, d * K).to(device), check=False)  # fmt: skip
    with own_stream(torch.device(device)):
        at = Objective(p, lower=1.0, counts=OracleCounts()).linearise(p.x, p.y, "y")
        P, b = found(at).preconditioner(3), randn(4, d * K).to(device)
        solution = cg(LowerSystems().operator(at), b, tol=1e-9, preconditioner=P, reorthogonalise=True)
    assert solution.ok
    assert P(b).device == b.device
    inverse = P(torch.eye(d * K, dtype=D, device=device))
    torch.testing.assert_close(P(b), inverse @ b)
    assert torch.linalg.vector_norm(at.yy(solution.x) - b) <= 1e-8 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("here", [False, True])
def test_a_preconditioner_that_is_of_no_use_is_made_anew_or_given_up(here, large):
    """As one that a step which was taken back has left, from weights of exp(+-30)."""
    p, systems = badly_scaled(), LowerSystems()
    h = Objective(p, lower=1.0, counts=OracleCounts())
    at, b = h.linearise(p.x + 0.5, p.y, "y"), randn(1, p.dy)
    there = at if here else h.linearise(p.x, p.y, "y")
    made = systems.kept.make(10, systems.operator(there), there)
    made.U = made.U * torch.logspace(-40, 40, len(made.U), dtype=D)[:, None]
    solution = systems.solve(at, b, tol=1e-8)
    assert solution.ok
    assert torch.linalg.vector_norm(at.yy(solution.x) - b) <= 1e-7 * torch.linalg.vector_norm(b)
    assert systems.factor is not made
    assert (systems.factor is None) == here


@pytest.fixture
def mixed(large, monkeypatch):
    """Float64 systems of a test's size count as dear enough for float32 recursions."""
    monkeypatch.setattr(prices, "WORTH_SINGLE", 0)


def test_float64_systems_are_solved_by_float32_products(mixed):
    _, p = cleaning_problem()
    systems, at = LowerSystems(), recorded(p, lower=1.0)
    dense = at.yy(torch.eye(p.dy, dtype=D))
    for b in (randn(5, p.dy), randn(6, p.dy, 3)):
        before = at.objective.counts.lower_products
        found = systems.solve(at, b, tol=1e-10)
        assert found.ok
        torch.testing.assert_close(found.x, torch.linalg.solve(dense, b), rtol=1e-7, atol=1e-7)
        assert at.objective.counts.lower_products - before >= found.products
    assert systems._single
    assert at.outputs.single.calls[0].X.dtype is torch.float32
    assert at.outputs.calls[0].single is at.outputs.calls[0].single  # kept
    if systems.factor is not None:
        assert systems.factor.Z.dtype is torch.float32


def test_a_preconditioner_from_elsewhere_is_suspected_before_float32(mixed):
    p, systems = cleaning_problem()[1], LowerSystems()
    h = Objective(p, lower=1.0, counts=OracleCounts())
    there, at = h.linearise(p.x + 1.0, p.y, "y"), h.linearise(p.x, p.y, "y")
    made = systems.kept.make(systems.ladder(there).kronecker[0], systems.operator(there), there)
    made.U = made.U * torch.logspace(-9, 9, len(made.U))[:, None]
    assert systems.solve(at, randn(1, p.dy), tol=1e-8).ok
    assert systems.factor is not made
    assert systems.kept.is_born_at(at)
    assert systems._single


def test_where_float32_is_too_rough_float64_takes_over_for_good(mixed, monkeypatch):
    monkeypatch.setattr(kept, "FORESEEN", 0)
    p = badly_scaled(-6, 3)
    systems, at, b = LowerSystems(), recorded(p, lower=1.0), randn(7, p.dy)
    found = systems.solve(at, b, tol=1e-11)
    assert found.ok
    assert not systems._single
    assert torch.linalg.vector_norm(at.yy(found.x) - b) <= 1e-11 * torch.linalg.vector_norm(b)


@pytest.fixture
def factored(monkeypatch):
    """Float64 Hessians of a test's size count as dear enough for float32 factors."""
    monkeypatch.setattr(prices, "WORTH_SINGLE_FACTOR", 0)


def test_a_factor_that_only_preconditions_is_made_in_float32(factored):
    """Solves are as good as ever; for the many of a hyper-Hessian there is one in float64, at the point itself."""
    _, p = cleaning_problem()
    systems, at, b = LowerSystems(), recorded(p, lower=1.0), randn(5, p.dy)
    dense = at.yy(torch.eye(p.dy, dtype=D))
    found = systems.solve(at, b, tol=1e-10)
    assert found.ok
    torch.testing.assert_close(found.x, torch.linalg.solve(dense, b), rtol=1e-8, atol=1e-8)
    assert systems.factor.dtype is torch.float32
    assert at.factor is None
    assert 1 <= found.iterations <= 3
    L = systems.factor.L.double()
    torch.testing.assert_close(L @ L.mT, dense, rtol=1e-5, atol=1e-5)
    systems.prepare(at)
    assert systems.factor.dtype is D
    assert at.factor is systems.factor
    exact = systems.solve(at, b, tol=1e-10)
    assert (exact.iterations, exact.ok) == (0, True)


def test_a_float32_factor_is_cheaper_in_the_ladder_and_survives_a_checkpoint(factored):
    _, p = cleaning_problem()
    systems, at = LowerSystems(), recorded(p, lower=1.0)
    assert systems.ladder(at).prices[p.dy] < systems.ladder(at, attach=True).prices[p.dy]
    systems.solve(at, randn(5, p.dy), tol=1e-10)
    other = LowerSystems()
    other.load_state_dict(systems.state_dict(), p)
    assert torch.equal(other.factor.L, systems.factor.L)
    assert other.kept.is_born_at(at)


@pytest.mark.parametrize(("sizes", "trusted"), [((0.0, 0.0), True), ((-18.0, 18.0), False)])
def test_where_a_float32_factor_fails_there_is_one_in_float64(factored, monkeypatch, sizes, trusted):
    """Not positive definite in float32; positive definite, but of no use: then float32 is tried no more."""
    p, real = cleaning_problem()[1], OutputHessian.dense_yy

    def spoilt(self):
        A = real(self)
        sign = -1.0 if trusted else 1.0
        return A if A.dtype is D else torch.diag(sign * torch.logspace(*sizes, len(A)))

    monkeypatch.setattr(OutputHessian, "dense_yy", spoilt)
    systems, at, b = LowerSystems(), recorded(p, lower=1.0), randn(5, p.dy)
    found = systems.solve(at, b, tol=1e-10)
    assert found.ok
    assert torch.linalg.vector_norm(at.yy(found.x) - b) <= 1e-9 * torch.linalg.vector_norm(b)
    assert systems._single == trusted
    assert systems.factor.dtype is D
    assert (at.factor is systems.factor) == (not trusted)


def test_a_hessian_that_is_not_positive_definite_is_refused_by_its_eigenvalue(factored, monkeypatch):
    """As without float32: by one factorisation in float64, with what it found, once a point."""
    p, made = cleaning_problem()[1], []

    def indefinite(self):
        made.append(self.diagonal.dtype)
        return torch.diag(torch.linspace(-2.0, 1.0, p.dy, dtype=self.diagonal.dtype))

    monkeypatch.setattr(OutputHessian, "dense_yy", indefinite)
    systems, at = LowerSystems(), recorded(p, lower=1.0)
    for _ in range(2):
        found = systems.solve(at, randn(5, p.dy), tol=1e-10)
        assert found.status is SolveStatus.NOT_POSITIVE_DEFINITE
        assert float(found.curvature) == pytest.approx(-2.0)
    assert made == [torch.float32, D]
