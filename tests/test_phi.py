"""Evaluation by the outputs of linear calls: gradients and products against the dense reference; what must not go by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_bilevel as tb
from tests.objectives import check_derivatives, close, objective, randn
from tests.reference import blocks
from tests.test_outputs import LOSSES, D, f, problem
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.doctor import refuse_third_derivatives
from torch_bilevel.recorded import Graph, Phi, calls, losses

N, D_IN, K = 9, 7, 3
X, LABELS = randn(0, N, D_IN), torch.arange(N) % K


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Learners of a test's size are worth it."""
    monkeypatch.setattr(calls, "SMALL", 0)
    monkeypatch.setattr(calls, "PROBES", -100)
    monkeypatch.setattr(losses, "WORTH", 0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_products_are_those_of_the_reference(name):
    g, dx, dy, _ = LOSSES[name]
    check_derivatives(objective(problem(g, dx, dy), lower=1.0), g, Phi)


@pytest.mark.parametrize("name", ["linear_layer", "added_bias", "two_tasks", "several_outputs"])
def test_the_lagrangian_by_third_derivatives(name):
    g, dx, dy, _ = LOSSES[name]
    v = randn(7, dy)

    def L(x, y):
        return 0.5 * f(x, y) - 1.5 * torch.func.grad(g, argnums=1)(x, y) @ v

    h = objective(problem(g, dx, dy), upper=0.5, tangent=v, tangent_weight=-1.5)
    x, y = h.problem.x, h.problem.y
    at = h.linearise(x, y)
    assert isinstance(at._graph, Phi)
    xx, _, yx, yy = blocks(L, x, y)
    close(at.gx, torch.func.grad(L)(x, y))
    close(at.gy, torch.func.grad(L, argnums=1)(x, y))
    close(at.yy(torch.eye(dy, dtype=D)), yy)
    close(at.yx(torch.eye(dx, dtype=D)), yx)
    close(at.xx(torch.eye(dx, dtype=D)), xx)


def test_a_derivative_that_is_not_recorded_is_refused():
    p = problem(*LOSSES["linear_layer"][:3])
    at = objective(p, lower=1.0).linearise(p.x, p.y, "y")
    assert isinstance(at._graph, Phi)
    with pytest.raises(RuntimeError, match="no derivative in x"):
        at.yx(p.x)


def normalised_outputs(x, y):
    z = F.layer_norm(X @ y[: D_IN * K].view(D_IN, K), (K,))
    return F.cross_entropy(z + y[D_IN * K :], LABELS) + (x.exp().sum() + 1) * (y * y).sum()


def test_wrong_third_derivatives_are_seen_in_what_is_recorded(monkeypatch):
    """Without another evaluation of the loss; a recording that does not show them asks for one."""
    p = problem(normalised_outputs, D_IN, (D_IN + 1) * K)
    for at in (objective(p, lower=1.0).linearise(p.x, p.y), objective(p, lower=1.0, tangent=p.y).linearise(p.x, p.y)):
        assert isinstance(at._graph, Phi)
        with monkeypatch.context() as context:
            context.setattr(tb.BilevelProblem, "pieces", lambda *_: pytest.fail("evaluated again"))
            with pytest.raises(tb.UnsupportedLayerError, match="LayerNorm"):
                refuse_third_derivatives(at)
    monkeypatch.setattr(calls, "SMALL", 10**9)
    at = objective(problem(normalised_outputs, D_IN, (D_IN + 1) * K), lower=1.0).linearise(p.x, p.y)
    assert isinstance(at._graph, Graph)
    with pytest.raises(tb.UnsupportedLayerError, match="LayerNorm"):
        refuse_third_derivatives(at)


def output_used_twice(x, y):
    z = X @ y[: D_IN * K].view(D_IN, K)
    return F.cross_entropy(z + y[D_IN * K :], LABELS) + z.square().sum() + (y * y).sum()


def two_biases(x, y):
    z = X @ y[: D_IN * K].view(D_IN, K)
    return (z + y[D_IN * K :]).square().sum() + (z + y[:K]).exp().sum() + (y * y).sum()


def bias_in_place(x, y):
    z = X @ y[: D_IN * K].view(D_IN, K)
    return z.add_(y[D_IN * K :]).square().sum() + (y * y).sum()


def flattened_by_view(x, y):
    """Outputs lie in memory as nobody expects who flattens them by ``view``."""
    z = X @ y[: D_IN * K].view(D_IN, K)
    return (z + y[D_IN * K :]).exp().view(-1).view(torch.float64).square().sum() + (y * y).sum()


def weights_made_of_weights(x, y):
    return (X @ (y[: D_IN * K] * 2).view(D_IN, K)).square().sum() + (y * y).sum()


def a_hidden_layer(x, y):
    return ((X @ y[: D_IN * K].view(D_IN, K)).tanh() @ y[D_IN * K :]).square().sum() + (y * y).sum()


def a_hidden_layer_by_einsum(x, y):
    hidden = (X @ y[: D_IN * K].view(D_IN, K)).tanh()
    return torch.einsum("nk,k->n", hidden, y[D_IN * K :]).square().sum() + (y * y).sum()


def inputs_of_x(x, y):
    return ((X * x.exp()) @ y[: D_IN * K].view(D_IN, K)).square().sum() + (y * y).sum()


@pytest.mark.parametrize(
    "g", [output_used_twice, two_biases, bias_in_place, flattened_by_view, weights_made_of_weights, a_hidden_layer,
          a_hidden_layer_by_einsum, inputs_of_x]
)
def test_right_whether_it_goes_by_outputs_or_not(g):
    p = problem(g, D_IN, (D_IN + 1) * K)
    at = objective(p, lower=1.0).linearise(p.x, p.y)
    assert isinstance(at._graph, Phi if g in (bias_in_place, flattened_by_view) else Graph)
    gx, gy = torch.func.grad(g, argnums=(0, 1))(p.x, p.y)
    close(at.gx, gx)
    close(at.gy, gy)
    close(at.yy(torch.eye(p.dy, dtype=D)), blocks(g, p.x, p.y)[3])


def detached_weights(x, y):
    """A step back to where one is: the gradient of the second term is zero wherever it is taken, its Hessian is not."""
    W = y.view(D_IN, K)
    return F.cross_entropy(X @ W, LABELS) + (X @ W - X @ W.detach()).square().sum() + x.exp().sum() * (y * y).sum()


def weights_without_gradient(x, y):
    W = y.view(D_IN, K)
    with torch.no_grad():
        anchor = X @ y.view(D_IN, K)
    return F.cross_entropy(X @ W, LABELS) + (X @ W - anchor).square().sum() + x.exp().sum() * (y * y).sum()


@pytest.mark.parametrize("g", [detached_weights, weights_without_gradient])
def test_what_is_held_constant_stays_so(g):
    p = problem(g, D_IN, D_IN * K)
    at = objective(p, lower=1.0).linearise(p.x, p.y)
    assert isinstance(at._graph, Phi)
    assert len(at.phi.calls) == 2  # X W, twice
    at_torch = Graph(g, p.x, p.y, "xy")
    identity = torch.eye(p.dy, dtype=D)
    close(at.gy, at_torch.gy)
    close(at.yy(identity), at_torch.apply(None, identity, "y")[1])
    assert float((at.yy(identity) - at.yy(identity).diag().diag()).norm()) > 1


def test_which_entries_a_view_shows():
    y = torch.arange(12.0, requires_grad=True)
    views = [y, y[2:8].view(2, 3), y[2:8].view(3, 2).T, y[1::3], y[5], y.view(3, 4)[:, 1:3]]
    with calls.Watch(y, tb.problem.Seen(), "lower") as watch:
        pass
    for view in views:
        assert torch.equal(watch._index(view), view.detach().long())
    twice = y[:6].as_strided((5, 2), (1, 1))
    for other in (twice, y[:3].expand(2, 3), y.detach(), y.view(3, 2, 2), y * 1, torch.ones(3, requires_grad=True), 1.0):
        assert watch._index(other) is None


def mapped(x, y):
    """Sample by sample, with weights that are plain views of y."""
    W = y.view(K, D_IN)
    losses_of = torch.vmap(lambda a, label: F.cross_entropy((F.linear(a, W))[None], label[None]))(X, LABELS)
    return losses_of.mean() + x.exp().sum() * (y * y).sum()


def differentiated(x, y):
    """With a gradient of its own, in which the weights are wrapped, and one call that is watched."""
    slope = torch.func.grad(lambda V: (X @ V).square().sum())(y.view(D_IN, K))
    return F.cross_entropy(X @ y.view(D_IN, K), LABELS) + 0.1 * slope.square().sum() + x.exp().sum() * (y * y).sum()


@pytest.mark.parametrize("g", [mapped, differentiated])
def test_a_loss_may_use_transforms_of_its_own(g):
    p = problem(g, D_IN, D_IN * K)
    at, by_torch = objective(p, lower=1.0).linearise(p.x, p.y), Graph(g, p.x, p.y, "xy")
    assert isinstance(at._graph, Graph)
    identity = torch.eye(p.dy, dtype=D)
    close(at.gy, by_torch.gy)
    close(at.yy(identity), torch.stack([by_torch.product(None, e, "y")[1] for e in identity], dim=1))


def test_what_is_compiled_runs_eagerly_where_it_is_watched():
    def g(x, y):
        logits = torch.compile(lambda a: F.linear(a, y.view(K, D_IN)), backend="eager")(X)
        return F.cross_entropy(logits, LABELS) + x.exp().sum() * (y * y).sum()

    def plain(x, y):
        return F.cross_entropy(F.linear(X, y.view(K, D_IN)), LABELS) + x.exp().sum() * (y * y).sum()

    p = problem(g, D_IN, D_IN * K)
    at = objective(p, lower=1.0).linearise(p.x, p.y)
    assert isinstance(at._graph, Phi)
    close(at.yy(torch.eye(p.dy, dtype=D)), blocks(plain, p.x, p.y)[3])


def test_an_objective_is_tried_once():
    tried = []

    def g(x, y):
        tried.append(1)
        return output_used_twice(x, y)

    p = problem(g, D_IN, (D_IN + 1) * K)
    h = objective(p, lower=1.0)
    counts = []
    for _ in range(3):
        tried.clear()
        h.gradient(p.x, p.y)
        counts.append(len(tried))
    assert counts[0] > 1
    assert counts[1:] == [1, 1]
    assert h.counts.as_dict()["lower_gradients"] == 3


def learner_problem(data):
    def loss(learner, hyper, batch):
        inputs, labels = batch
        return F.cross_entropy(learner(inputs), labels) + (hyper["log_l2"].exp() * learner.weight**2).sum()

    torch.manual_seed(0)
    learner = nn.Linear(D_IN, K).to(D)
    return tb.BilevelProblem(learner, {"log_l2": torch.zeros(D_IN, dtype=D)}, loss, loss, data, data)


def test_other_data_are_seen():
    p = learner_problem((X, LABELS))
    other = (randn(3, N + 2, D_IN), torch.arange(N + 2) % K)
    true = learner_problem(other)
    for inner in (p, p.at(lower_batch=other)):
        h = objective(inner, lower=1.0)
        at = h.linearise(p.x, p.y)
        assert isinstance(at._graph, Phi)
    for w in (randn(4, p.dy), randn(4, p.dy, 3)):
        close(at.yy(w), Objective(true, lower=1.0, counts=OracleCounts()).linearise(p.x, p.y).yy(w))
    close(objective(p, lower=1.0).gradient(p.x, p.y)[2], objective(learner_problem((X, LABELS)), lower=1.0).gradient(p.x, p.y)[2])


def test_the_other_batch_of_a_minimax_problem_is_seen():
    def loss(learner, player, batch):
        return F.cross_entropy(learner(batch), LABELS) - (player.weight**2).sum()

    torch.manual_seed(0)
    p = tb.MinimaxProblem(nn.Linear(D_IN, K).to(D), nn.Linear(D_IN, K).to(D), loss, X, check=False)
    look = objective(p, lower=1.0)
    look.calls(p.x, p.y)
    assert "lower" in p.seen.calls
    assert not p.at(X + 1).seen.calls


def test_data_that_were_written_to_are_seen():
    inputs = X.clone()
    p = learner_problem((inputs, LABELS))
    h = objective(p, lower=1.0)
    first = h.linearise(p.x, p.y).phi.calls[0]
    assert h.linearise(p.x, p.y).phi.calls[0] is first  # and what is kept of it
    p.batch("lower")[0].mul_(2)
    at = h.linearise(p.x, p.y)
    assert at.phi.calls[0] is not first
    torch.testing.assert_close(at.phi.calls[0].norm, torch.linalg.vector_norm(torch.cat([2 * X, torch.ones(N, 1)], dim=1)))
    close(at.gy, objective(learner_problem((2 * X, LABELS)), lower=1.0).gradient(p.x, p.y)[2])


def test_inputs_that_are_made_anew_at_every_evaluation():
    def g(x, y):
        return ((X * 2).sin() @ y).exp().sum() + x.sum() * (y * y).sum()

    p = problem(g, 2, D_IN)
    h = objective(p, lower=1.0)
    for _ in range(3):
        at = h.linearise(p.x, p.y)
        assert isinstance(at._graph, Phi)
        close(at.yy(torch.eye(D_IN, dtype=D)), blocks(g, p.x, p.y)[3])


@pytest.mark.parametrize("shape", [(9, 3), (1, 1), (6, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_fast_losses_are_those_of_torch_to_third_derivatives(shape, dtype):
    z, labels = (3 * randn(1, *shape)).to(dtype), torch.arange(shape[0]) % shape[1]
    pairs = [(losses.log_softmax, F.log_softmax, {"dim": dim}) for dim in (1, -1)]
    pairs += [(lambda z, reduction: losses.cross_entropy(z, labels, reduction=reduction),
               lambda z, reduction: F.cross_entropy(z, labels, reduction=reduction), {"reduction": reduction})
              for reduction in ("mean", "sum", "none")]  # fmt: skip
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for mine, theirs, options in pairs:
        found, true = _derivatives(mine, options, z), _derivatives(theirs, options, z)
        for a, b in zip(found, true):
            torch.testing.assert_close(a, b, **tolerance)


def _derivatives(function, options, z):
    z = z.clone().requires_grad_(True)
    out = [function(z, **options)]
    for seed in range(3):
        direction = torch.randn(out[-1].shape, generator=torch.Generator().manual_seed(seed)).to(z)
        slope = (out[-1] * direction).sum()
        out += torch.autograd.grad(slope, z, create_graph=True, allow_unused=True, materialize_grads=True)
    return out


def test_fast_losses_do_not_overflow():
    z, labels = torch.tensor([[1e4, -1e4, 0.0], [-500.0, -501.0, -502.0]]), torch.tensor([1, 0])
    torch.testing.assert_close(losses.cross_entropy(z, labels), F.cross_entropy(z, labels))
    torch.testing.assert_close(losses.log_softmax(z, 1), F.log_softmax(z, 1))


Z = randn(1, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((Z, torch.tensor([0, 1, -100, 2])), {}),  # a sample that is left out
        ((Z, torch.tensor([0, 1, 3, 2])), {}),  # no such class: PyTorch's error
        ((Z, Z.softmax(1)), {}),
        ((Z, torch.tensor([0, 1, 1, 2])), {"weight": torch.ones(3, dtype=D)}),
        ((Z, torch.tensor([0, 1, 1, 2])), {"label_smoothing": 0.1}),
        ((Z, torch.tensor([0, 1, 1, 2])), {"ignore_index": 1}),
        ((Z[0], torch.tensor(1)), {}),
        ((Z[None].mT, torch.tensor([[0, 1, 1, 2]])), {}),
        ((Z.bfloat16(), torch.tensor([0, 1, 1, 2])), {}),
        ((Z[:0], torch.tensor([], dtype=torch.int64)), {}),
    ],
)
def test_other_cross_entropies_are_left_to_torch(arguments, options):
    assert losses.cross_entropy(*arguments, **options) is None


def test_small_cross_entropies_are_left_to_torch(monkeypatch):
    assert losses.cross_entropy(Z, torch.tensor([0, 1, 1, 2])) is not None
    monkeypatch.setattr(losses, "WORTH", Z.numel() + 1)
    assert losses.cross_entropy(Z, torch.tensor([0, 1, 1, 2])) is None


def test_other_log_softmaxes_are_left_to_torch():
    assert losses.log_softmax(Z, 0) is None
    assert losses.log_softmax(Z, 1, dtype=torch.float32) is None
    assert losses.log_softmax(Z[0], -1) is None
