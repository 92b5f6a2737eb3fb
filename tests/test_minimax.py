"""MinimaxProblem's forms, data and errors, and MinimaxOptimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torch_bilevel as tb
from tests.minimax_problems import saddle

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.tanh(X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))[:, None]


class Attack(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def objective(prediction, shift, T):
    return ((prediction - T) ** 2).mean() + shift.sum() - 5 * (shift**2).sum() - 0.1 * (shift**4).sum()


def module_loss(model, attack, batch):
    X, T = batch
    return objective(model(X + attack.shift), attack.shift, T)


def dict_loss(model, attack, batch):
    X, T = batch
    return objective((X + attack["shift"]) @ model["weight"].T + model["bias"], attack["shift"], T)


def tensor_loss(model, attack, batch):
    X, T = batch
    return objective(((X + attack) @ model[:3] + model[3])[:, None], attack, T)


def linear():
    layer = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -0.1, 0.2]]))
        layer.bias.fill_(0.05)
    return layer


def forms():
    layer = linear()
    tensors = {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}
    flat = torch.cat([layer.weight.detach().reshape(-1), layer.bias.detach()])
    shift = torch.zeros(3, dtype=torch.float64)
    return {
        "module": (layer, Attack(), module_loss),
        "dict": (tensors, {"shift": shift.clone()}, dict_loss),
        "tensor": (flat, shift.clone(), tensor_loss),
    }


@pytest.mark.parametrize("form", ["dict", "tensor"])
def test_modules_dicts_and_tensors_are_the_same_problem(form):
    problems = {name: tb.MinimaxProblem(*forms()[name], (X, T)) for name in ("module", form)}
    evaluations = [tb.MinimaxOracle(p).evaluate() for p in problems.values()]
    assert float(evaluations[0].value) == pytest.approx(float(evaluations[1].value), rel=1e-12)
    torch.testing.assert_close(evaluations[0].gradient, evaluations[1].gradient, rtol=1e-10, atol=1e-12)
    H = [ev.hessian.to_dense() for ev in evaluations]
    torch.testing.assert_close(*H, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["module", "dict", "tensor"])
def test_the_result_is_written_into_both_players(form):
    min_player, max_player, loss = forms()[form]
    result = tb.minimize(tb.MinimaxProblem(min_player, max_player, loss, (X, T)), "lmcn", gradient_tol=1e-8)
    assert result.status is tb.Status.SECOND_ORDER

    def flat(player):
        if isinstance(player, torch.Tensor):
            return player
        tensors = player.parameters() if isinstance(player, nn.Module) else player.values()
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    assert torch.equal(flat(min_player), result.x)
    assert torch.equal(flat(max_player), result.y)
    tensors = [t.detach().clone().requires_grad_(True) for t in (result.x, result.y)]
    gradients = torch.autograd.grad(tensor_loss(*tensors, (X, T)), tensors)
    assert max(float(g.norm()) for g in gradients) < 1e-7  # a stationary pair of f itself


def test_loader_is_the_full_batch():
    chunks = [(X[:10], T[:10]), (X[10:16], T[10:16]), (X[16:], T[16:])]

    class Loader:
        def __iter__(self):
            return iter(chunks)

    whole = tb.MinimaxOracle(tb.MinimaxProblem(*forms()["module"], (X, T))).evaluate()
    parts = tb.MinimaxOracle(tb.MinimaxProblem(*forms()["module"], Loader())).evaluate()
    torch.testing.assert_close(whole.gradient, parts.gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(whole.hessian.to_dense(), parts.hessian.to_dense(), rtol=1e-8, atol=1e-9)


def test_at_is_the_same_tensors_on_other_data():
    p = tb.MinimaxProblem(*forms()["module"], (X, T))
    other = p.at((X[:5], T[:5]))
    assert isinstance(other, tb.MinimaxProblem)
    assert float(tb.MinimaxOracle(other).evaluate().value) != float(tb.MinimaxOracle(p).evaluate().value)
    assert p.at() is not p
    with pytest.raises(tb.ProblemError, match="one batch"):
        p.at((X, T), (X[:3], T[:3]))


def test_errors_speak_of_players():
    model, attack, loss = forms()["module"]
    with pytest.raises(tb.ProblemError, match=r"the loss has no data: pass batch to MinimaxProblem"):
        tb.MinimaxOracle(tb.MinimaxProblem(model, attack, loss)).evaluate()
    with pytest.raises(tb.ProblemError, match="does not depend on the max_player"):
        tb.MinimaxProblem(model, attack, lambda m, a, batch: m.weight.sum(), ())
    with pytest.raises(tb.ProblemError, match="does not depend on the min_player"):
        tb.MinimaxProblem(model, attack, lambda m, a, batch: -(a.shift**2).sum(), ())
    with pytest.raises(tb.ProblemError, match="max_player.*got list"):
        tb.MinimaxProblem(model, [1.0], loss, (X, T))
    with pytest.raises(tb.ProblemError, match="max_player"):
        tb.MinimaxProblem(model, {"a": torch.arange(3)}, loss, (X, T))
    shared = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(tb.ProblemError, match=r"min_player\['hyper'\] and max_player"):
        tb.MinimaxProblem(shared, shared, lambda x, y, b: (x * y).sum() - (y**2).sum(), ())
    with pytest.raises(tb.NonFiniteError, match="the loss is nan"):
        tb.MinimaxProblem(model, attack, loss, (X * float("nan"), T))
    with pytest.raises(tb.ShapeError, match="the loss must return a scalar"):
        tb.MinimaxProblem(model, attack, lambda m, a, b: a.shift, ())
    with pytest.raises(tb.ProblemError, match="f: expected a function"):
        tb.MinimaxProblem.from_functions(3, torch.zeros(2), torch.zeros(2))


def test_doctor_sees_a_convex_max_player():
    x = y = torch.ones(2, dtype=torch.float64)
    p = tb.MinimaxProblem.from_functions(lambda x, y: (x * y).sum() + (y**2).sum(), x, y)
    assert "not strongly concave in y" in str(tb.doctor(p))
    good = tb.MinimaxProblem.from_functions(lambda x, y: (x * y).sum() - (y**2).sum(), x, y)
    assert str(tb.doctor(good)) == "doctor: nothing found"


# -- MinimaxOptimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lmcn", "mcn", "imcn", "dlcrn"])
def test_optimizer_reaches_what_minimize_reaches(method):
    model, attack, loss = forms()["module"]
    optimizer = tb.MinimaxOptimizer(model, attack, loss, method=method)
    reports = [optimizer.step((X, T)) for _ in range(8)]
    assert reports[-1].gradient_norm < 1e-6
    assert reports[-1].value < reports[0].value
    expected = tb.minimize(tb.MinimaxProblem(*forms()["module"], (X, T)), method)
    assert reports[-1].value == pytest.approx(expected.value, abs=1e-8)
    assert float(attack.shift.detach().abs().max()) > 1e-2  # the max player holds the maximiser


def test_optimizer_leaves_an_exact_saddle_and_gda_does_not():
    for method, leaves in (("lmcn", True), ("gda", False)):
        x, y = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        optimizer = tb.MinimaxOptimizer(x, y, lambda x, y, _: saddle(x, y), method=method, batch=())
        for _ in range(12):
            optimizer.step()
        assert (abs(float(x[2])) > 0.9) is leaves


def test_optimizer_lr_and_bounds():
    x, y = torch.full((1,), 3.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def f(x, y, _):
        return (x * y - y**2 / 2).sum()

    gda = tb.MinimaxOptimizer(x, y, f, method="gda", lr=0.05, ascent_lr=0.5, batch=())
    assert gda.param_groups[0]["lr"] == 0.05
    gda.step()
    assert float(x) == pytest.approx(3.0)  # y was 0
    gda.step()
    assert float(x) == pytest.approx(3.0 - 0.05 * 1.5)
    bounded = tb.MinimaxOptimizer(x, y, f, method="lmcn", bounds=(1.0, 4.0), batch=())
    for _ in range(8):
        bounded.step()
    assert float(x) == 1.0


def test_optimizer_without_writing_the_max_player():
    model, attack, loss = forms()["module"]
    tb.MinimaxOptimizer(model, attack, loss, write_max_player=False).step((X, T))
    assert float(attack.shift.detach().abs().max()) == 0.0


def test_optimizer_beside_an_external_max_player():
    model, attack, loss = forms()["module"]
    optimizer = tb.MinimaxOptimizer(model, attack, loss, method="lmcn", lower="external")
    ascent = torch.optim.SGD(attack.parameters(), lr=0.05, maximize=True)
    for _ in range(20):
        for _ in range(20):
            ascent.zero_grad()
            loss(model, attack, (X, T)).backward()
            ascent.step()
        report = optimizer.step((X, T))
    assert report.gradient_norm < 1e-4
    expected = tb.minimize(tb.MinimaxProblem(*forms()["module"], (X, T)), "mcn")
    assert report.value == pytest.approx(expected.value, abs=1e-5)


@pytest.mark.parametrize("method", ["lmcn", "imcn", "gda"])
def test_state_dict_resumes_bit_for_bit(method, tmp_path):
    def train(model, attack, optimizer, steps):
        return [optimizer.step((X, T)).value for _ in range(steps)]

    model, attack, loss = forms()["module"]
    whole = tb.MinimaxOptimizer(model, attack, loss, method=method)
    expected = train(model, attack, whole, 6)
    first = forms()["module"]
    optimizer = tb.MinimaxOptimizer(*first, method=method)
    train(*first[:2], optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = forms()["module"]
    restored = tb.MinimaxOptimizer(*second, method=method, batch=(X, T))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert train(*second[:2], restored, 3) == expected[3:]
    assert torch.equal(second[0].weight, model.weight)


def test_optimizer_errors():
    model, attack, loss = forms()["module"]
    with pytest.raises(tb.ConfigError, match="lr"):
        tb.MinimaxOptimizer(model, attack, loss, lr=-1.0)
    with pytest.raises(tb.ConfigError, match="lmcn"):
        tb.MinimaxOptimizer(model, attack, loss, method="lmcm")
    optimizer = tb.MinimaxOptimizer(model, attack, loss)
    with pytest.raises(tb.ProblemError, match="the loss has no data"):
        optimizer.step()
    with pytest.raises(tb.ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TypeError, match="MinimaxOptimizer"):
        copy.deepcopy(optimizer)
    with pytest.raises(tb.ConfigError, match="MinimaxOptimizer"):
        optimizer.load_state_dict({"version": 99})
