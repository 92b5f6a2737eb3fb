"""Traced and compiled losses: against the dense reference, on other data, and what they must refuse."""

from __future__ import annotations

import copy
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import fake_tensor

import torch_bilevel as tb
from tests.objectives import check_derivatives, close, objective, randn
from tests.reference import blocks
from tests.test_outputs import LOSSES
from tests.test_outputs import f as upper
from tests.test_outputs import problem as outputs_problem
from torch_bilevel import derivatives
from torch_bilevel.errors import ProblemError
from torch_bilevel.linalg import own_stream
from torch_bilevel.lower import LowerSystems
from torch_bilevel.outputs import OutputHessian
from torch_bilevel.recorded import Compiled, Graph, Phi, calls, trace

D = torch.float64
N, D_IN, K = 12, 5, 3
INPUTS = randn(0, N, D_IN)


def hidden(x, y):
    """A hidden layer: not by the outputs of linear calls."""
    W, V = y[: 4 * D_IN].view(4, D_IN), y[4 * D_IN :].view(K, 4)
    loss = F.cross_entropy(torch.tanh(INPUTS.to(y) @ W.T) @ V.T, torch.arange(N, device=y.device) % K, reduction="none")
    return (x.sigmoid() * loss).mean() + 0.1 * (y * y).sum()


def written_to(x, y):
    """Operations in place, and a part that does not depend on x."""
    z = (INPUTS.to(y) @ y).sin()
    z[:3] *= x[:3] ** 2
    z[3:].add_(x[3:].sin())
    return (z * z).sum() + y.cosh().sum()


#: of those that go by the outputs of linear calls; the others differ in how the calls are written, which is found out before
OUTPUTS = {name: LOSSES[name] for name in ("linear_layer", "scalar_bias", "per_feature", "two_tasks", "several_outputs")}
ALL = {**OUTPUTS, "hidden": (hidden, N, 4 * (D_IN + K), True), "written_to": (written_to, N, D_IN, False)}


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs are cut, but run as they are, for compiling takes seconds; nor is the stack of every operation noted."""
    monkeypatch.setattr(trace, "compiled", lambda module, arguments: module)
    monkeypatch.setattr(fake_tensor, "traceback", SimpleNamespace(extract_stack=list, format_list=list))


@pytest.fixture
def compiler():
    """Of C++, with which programs for a CPU are compiled."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        pytest.skip("no C++ compiler here")


@pytest.fixture
def small(monkeypatch):
    """Learners of a test's size are worth going by their outputs."""
    monkeypatch.setattr(calls, "SMALL", 0)
    monkeypatch.setattr(calls, "PROBES", -100)


def problem(g, dx, dy):
    return outputs_problem(g, dx, dy, compile=True)


@pytest.mark.parametrize("name", ALL)
def test_programs_give_the_gradients_and_products_of_the_reference(name, small, uncompiled, monkeypatch):
    g, dx, dy, _ = ALL[name]
    kinds = [(given, wanted) for given in ("x", "y", "xy") for wanted in ("x", "y", "xy")]
    monkeypatch.setattr(derivatives, "USUAL", {})
    monkeypatch.setattr(derivatives, "OTHERS", kinds)  # else traced one after the other
    p = problem(g, dx, dy)
    at = check_derivatives(objective(p, lower=1.0), g, Compiled)
    assert (at._graph.by_outputs is None) == (name == "hidden")
    assert isinstance(at._graph.plain, Graph if name == "hidden" else Phi)
    v = randn(7, dy)

    def lagrangian(x, y):
        return 2 * upper(x, y) - 3 * torch.dot(torch.func.grad(g, argnums=1)(x, y), v)

    check_derivatives(objective(p, upper=2.0, tangent=v, tangent_weight=-3.0), lagrangian, Compiled)
    check_derivatives(objective(p, upper=1.0, lower=5.0), lambda x, y: upper(x, y) + 5 * g(x, y), Compiled)
    other = objective(p, upper=1.0, tangent=2 * v)  # another v, another point: the same programs
    close(other.gradient(p.x + 1, p.y)[1], torch.func.grad(lambda x, y: upper(x, y) + 2 * torch.dot(
        torch.func.grad(g, argnums=1)(x, y), v))(p.x + 1, p.y))  # fmt: skip
    assert len(p.seen.programs) == 3


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_outputs_hessian_is_found_by_programs(name, small, uncompiled, monkeypatch):
    """Of g alone, of L, and of a sum in which two terms see the same outputs; nothing is recorded beside the programs."""
    g, dx, dy, own = LOSSES[name]
    p, v = problem(g, dx, dy), randn(7, dy)
    monkeypatch.setattr(Compiled, "plain", property(lambda self: pytest.fail("recorded")))
    for terms in ({"lower": 1.0}, {"upper": 1.0, "tangent": v, "tangent_weight": -2.0}, {"lower": 2.0, "tangent": v}):
        if "upper" in terms:
            p._functions["upper"] = lambda x, y: g(x + 1, y)

        def h(x, y, terms=terms):
            total = terms.get("lower", 0) * g(x, y) + terms.get("upper", 0) * g(x + 1, y)
            if "tangent" in terms:
                total = total + terms.get("tangent_weight", 1) * torch.dot(torch.func.grad(g, argnums=1)(x, y), v)
            return total

        at = objective(p, **terms).linearise(p.x, p.y)
        outputs = OutputHessian.of(at)
        xx, xy, yx, yy = blocks(h, p.x, p.y)
        close(outputs.dense_yy(), yy)
        if own and name != "two_tasks" and "upper" not in terms:
            close(outputs.dense_yx(), yx)
        close(outputs.xx, xx.diagonal())


def test_a_product_nobody_expected_is_traced_when_it_is_asked_for(uncompiled):
    p = problem(hidden, N, 4 * (D_IN + K))
    xx, xy, _, yy = blocks(hidden, p.x, p.y)
    h, u, w = objective(p, lower=1.0), randn(5, p.dx), randn(6, p.dy)
    one, other = h.linearise(p.x, p.y), h.linearise(p.x, p.y)
    close(one.yy(w), yy @ w)
    close(one.x_part(u, w), xx @ u + xy @ w)
    close(one.yy(w), yy @ w)
    close(other.yy(w), yy @ w)  # as it was begun, before


def test_a_new_trace_compiles_no_product_a_second_time(uncompiled, monkeypatch):
    """The same operations on tensors of the same kind are one program, whatever a trace calls them; others are others."""
    made = []
    monkeypatch.setattr(trace, "compiled", lambda module, arguments: made.append(module) or module)
    p = problem(hidden, N, 4 * (D_IN + K))
    xx, xy, _, yy = blocks(hidden, p.x, p.y)
    h, u, w = objective(p, lower=1.0), randn(5, p.dx), randn(6, p.dy)
    close(h.linearise(p.x, p.y).yy(w), yy @ w)
    assert len(made) == 2  # the point, the product
    close(h.linearise(p.x, p.y).x_part(u, w), xx @ u + xy @ w)  # nobody expected it
    before = len(made)
    later = h.linearise(p.x + 1, p.y)
    xx, xy, _, yy = blocks(hidden, p.x + 1, p.y)
    for _ in range(2):
        close(later.yy(w), yy @ w)
        close(later.x_part(u, w), xx @ u + xy @ w)
    assert len(made) == before


@pytest.mark.parametrize("name", ["linear_layer", "hidden"])
def test_compiled_programs_give_the_same(name, small, compiler):
    g, dx, dy, _ = ALL[name]
    p = problem(g, dx, dy)
    x, y, w = p.x, p.y, randn(6, dy)
    at = objective(p, lower=1.0).linearise(x, y)
    xx, xy, yx, yy = blocks(g, x, y)
    gx, gy = torch.func.grad(g, argnums=(0, 1))(x, y)
    for found, true in ((at.value, g(x, y)), (at.gx, gx), (at.gy, gy), (at.yy(w), yy @ w), (at.yy(3 * w), 3 * yy @ w)):
        close(found, true)
    close(at.xy(w), xy @ w)


class Weighted:
    """A loss of a module, a batch and a tensor from elsewhere."""

    def __init__(self, compile, learner=None):
        self.scale = torch.tensor([1.0, 2.0], dtype=D)
        self.learner = nn.Linear(D_IN, K, dtype=D) if learner is None else learner
        X, t = randn(0, N, D_IN), torch.arange(N) % K
        self.problem = tb.BilevelProblem(
            self.learner, {"w": randn(1, N)}, self.lower, self.upper, {"X": X, "t": t, "power": 2}, (X[:6] + 0.5, t[:6]),
            compile=compile,
        )  # fmt: skip

    def lower(self, learner, hyper, batch):
        loss = F.cross_entropy(learner(batch["X"]), batch["t"], reduction="none")
        decay = sum((p ** batch["power"]).sum() for p in learner.parameters())
        return (hyper["w"].sigmoid() * loss).mean() * self.scale[1] + 0.05 * decay

    def upper(self, learner, hyper, batch):
        return F.cross_entropy(learner(batch[0]), batch[1])


def both(learner=None):
    torch.manual_seed(0)
    learner = nn.Linear(D_IN, K, dtype=D) if learner is None else learner
    return Weighted(False, copy.deepcopy(learner)), Weighted(True, learner)


def same(a, b, lower=1.0):
    w = randn(3, a.dy)
    for p, q in zip(*(  # value, gradients and a product
        (*h.gradient(a.x, a.y), h.linearise(a.x, a.y).yy(w)) for h in (objective(p, lower=lower, upper=1.0) for p in (a, b))
    )):  # fmt: skip
        close(q, p)


def test_other_data_of_the_same_shapes_are_served_by_the_same_programs(small, uncompiled):
    plain, compiled = both()
    same(plain.problem, compiled.problem)
    made = dict(compiled.problem.seen.programs)
    X, t = randn(5, N, D_IN), (torch.arange(N) + 1) % K
    for batches in ([{"X": X, "t": t, "power": 2}], [{"X": X, "t": t, "power": 2}, (X[:6], t[:6])]):
        same(plain.problem.at(*batches), compiled.problem.at(*batches))
        assert compiled.problem.seen.programs == made
    same(plain.problem, compiled.problem)
    for batch in ({"X": X, "t": t, "power": 4}, {"X": X[:7], "t": t[:7], "power": 2}):  # another number, another shape
        if len(batch["X"]) == N:
            same(plain.problem.at(batch), compiled.problem.at(batch))
            assert len(compiled.problem.seen.programs) > len(made)
    one = (X[:6], t[:6])
    first = [p.at({"X": one[0].repeat(2, 1), "t": one[1].repeat(2), "power": 2}, one) for p in (plain.problem, compiled.problem)]
    same(*first)
    same(*(p.at(None, (X[6:], t[6:])) for p in first))  # upper data that were the lower ones' as well


def test_tensors_from_elsewhere_are_read_anew(compiler):
    """Even small ones, which a compiler would put into its code."""
    plain, compiled = both()
    same(plain.problem, compiled.problem)
    for weighted in (plain, compiled):
        weighted.scale.mul_(3)
    same(plain.problem, compiled.problem)


def test_modes_of_modules_are_followed(uncompiled):
    learner = nn.Sequential(nn.Linear(D_IN, 4, dtype=D), nn.BatchNorm1d(4, dtype=D), nn.Tanh(), nn.Linear(4, K, dtype=D))
    learner[1].running_mean.copy_(randn(9, 4))
    plain, compiled = both(learner=learner)
    values = []
    for mode in (True, False, True):
        for weighted in (plain, compiled):
            weighted.learner.train(mode)
        same(plain.problem, compiled.problem)
        values.append(objective(compiled.problem, lower=1.0).value(plain.problem.x, plain.problem.y))
    assert values[0] == values[2] != values[1]
    for weighted in (plain, compiled):
        weighted.learner[1].running_mean.add_(1)  # a buffer, changed in place
        weighted.learner.eval()
    same(plain.problem, compiled.problem)


@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_that_change_in_place_are_looked_at_again(frozen, small, uncompiled):
    """The batch, and what a frozen layer makes of it, are the inputs of the outputs' Hessian as well."""
    torch.manual_seed(0)
    body = nn.Linear(D_IN, D_IN, dtype=D).requires_grad_(False)
    pair = both(nn.Sequential(body, nn.Tanh(), nn.Linear(D_IN, K, dtype=D)) if frozen else None)
    seen = []
    for change in (False, True):
        for weighted in pair if change else ():
            if frozen:
                weighted.learner[0].weight.mul_(2)
            else:
                weighted.problem.batch("lower")["X"].mul_(2)
        found = []
        for p in (weighted.problem for weighted in pair):
            at = objective(p, lower=1.0).linearise(p.x, p.y)
            found.append(OutputHessian.of(at).dense_yy())
            close(found[-1], at.yy(torch.eye(p.dy, dtype=D)))
        close(found[1], found[0])
        seen.append(found[1])
    assert (seen[0] - seen[1]).norm() > 1e-3


def test_a_loader_is_not_compiled():
    p = both()[1].problem
    chunks = [{"X": randn(i, N, D_IN), "t": torch.arange(N) % K, "power": 2} for i in range(2)]

    class Loader:
        def __iter__(self):
            return iter(chunks)

    by_chunks = objective(p.at(Loader()), lower=1.0)
    one_by_one = [objective(p.at(chunk), lower=1.0) for chunk in chunks]
    for h in one_by_one:
        h.problem.compile = False
    assert not by_chunks.is_compiled
    close(by_chunks.gradient(p.x, p.y)[2], sum(h.gradient(p.x, p.y)[2] for h in one_by_one) / 2)


def by_value(x, y):
    return (y * y).sum() * (2 if x.sum() > 0 else 1)


def at_random(x, y):
    return (y * y * torch.rand_like(y).add(1)).sum() + (x * y[0]).sum()


@pytest.mark.parametrize(("g", "words"), [(by_value, "cannot be traced.*compile=False"), (at_random, "random numbers.*False")])
def test_what_cannot_be_traced_is_refused(g, words, uncompiled):
    p = problem(g, 3, 4)
    with pytest.raises(ProblemError, match=words):
        objective(p, lower=1.0).gradient(p.x, p.y)


def test_sparse_data_are_refused():
    weighted = Weighted(True)
    with pytest.raises(ProblemError, match="SparseMatrix; pass compile=False"):
        weighted.problem.at((tb.SparseMatrix(INPUTS), torch.arange(N) % K))


def test_a_copy_of_a_problem_reads_its_own_tensors(uncompiled):
    """A deep copy has other buffers than the one whose losses were traced."""
    learner = nn.Sequential(nn.BatchNorm1d(D_IN, dtype=D), nn.Linear(D_IN, K, dtype=D)).eval()
    p = Weighted(True, learner).problem
    value = objective(p, lower=1.0).gradient(p.x, p.y)[0]
    other = copy.deepcopy(p)
    other.learner[0].running_mean.add_(1)
    assert objective(other, lower=1.0).gradient(p.x, p.y)[0] != value
    assert objective(p, lower=1.0).gradient(p.x, p.y)[0] == value


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(3, 4, batch_first=True, dtype=D), nn.Linear(4, K, dtype=D)

    def forward(self, X):
        return self.head(self.body(X)[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=D)
        self.head = nn.Linear(4, K, dtype=D)

    def forward(self, X):
        return self.head(self.body(X).mean(1))


def convolution():
    layers = nn.Conv2d(1, 2, 3, dtype=D), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, K, dtype=D)
    return nn.Sequential(*layers), randn(0, N, 1, 6, 6)


def embedding():
    layers = nn.Embedding(5, 4, dtype=D), nn.Flatten(), nn.LayerNorm(8, dtype=D), nn.GELU(), nn.Linear(8, K, dtype=D)
    return nn.Sequential(*layers), torch.arange(2 * N).view(N, 2) % 5


NETWORKS = {
    "convolution": convolution,
    "embedding": embedding,
    "recurrent": lambda: (Recurrent(), randn(0, N, 5, 3)),
    "attention": lambda: (Attending(), randn(0, N, 5, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_usual_networks_can_be_traced(name, uncompiled):
    torch.manual_seed(0)
    learner, inputs = NETWORKS[name]()
    batch = {"X": inputs, "t": torch.arange(N) % K, "power": 2}
    found = []
    for compile in (False, True):
        weighted = Weighted(compile)

        def upper(learner, hyper, batch):
            return F.cross_entropy(learner(batch["X"]), batch["t"])

        p = tb.BilevelProblem(learner, {"w": randn(1, N)}, weighted.lower, upper, batch, batch, compile=compile)
        v, w = randn(2, p.dy), randn(3, p.dy)
        g = objective(p, lower=1.0).linearise(p.x, p.y)
        L = objective(p, upper=1.0, tangent=v).linearise(p.x, p.y)
        found.append((g.value, g.gx, g.gy, g.yy(w), g.xy(w), L.gx, L.gy, *L.joint(p.x, w)))
    for mine, true in zip(found[1], found[0]):
        close(mine, true)


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    def fails(module, arguments):
        raise RuntimeError("no C++ compiler was found\nand much more")

    monkeypatch.setattr(trace, "compiled", fails)
    p = problem(hidden, N, 4 * (D_IN + K))
    with pytest.raises(ProblemError, match="cannot be compiled .RuntimeError: no C.. compiler was found"):
        objective(p, lower=1.0).gradient(p.x, p.y)


@pytest.mark.parametrize("method", ["auto", "dlcrn", "lfsba", "slcrn"])
def test_a_method_takes_the_same_steps(method, small, uncompiled):
    results = [tb.minimize(weighted.problem, method=method, max_steps=4, progress=False) for weighted in both()]
    torch.testing.assert_close(results[1].x, results[0].x, rtol=1e-6, atol=1e-8)
    assert results[1].counts == results[0].counts


def test_the_optimizer_hands_it_on(uncompiled):
    learner = nn.Linear(D_IN, K, dtype=D)
    w, X, t = {"w": torch.zeros(N, dtype=D)}, randn(0, N, D_IN), torch.arange(N) % K
    weighted = Weighted(False)
    opt = tb.BilevelOptimizer(learner, w, lower_loss=weighted.lower, upper_loss=weighted.upper, method="dlcrn", compile=True)
    for seed in range(2):
        report = opt.step({"X": X + seed, "t": t, "power": 2}, (X[:6], t[:6]))
    assert report.step_norm > 0
    assert len(opt.problem.seen.programs) >= 2

    def loss(player, attack, batch):
        return ((batch[0] @ player + attack).square()).mean() - attack.square().sum()

    player = torch.ones(D_IN, dtype=D)
    opt = tb.MinimaxOptimizer(player, torch.zeros(N, dtype=D), loss, method="lmcn", compile=True)
    assert opt.step((X,)).step_norm > 0
    assert opt.problem.seen.programs


@pytest.mark.gpu
def test_compiled_programs_give_the_same_on_a_gpu(small):
    """Also within a stream of its own, where the steps of CG are replayed."""
    g, dx, dy, _ = ALL["hidden"]
    plain = tb.BilevelProblem.from_functions(upper, g, (randn(1, dx) / 2).cuda(), (randn(2, dy) / 4).cuda(), check=False)
    p = copy.copy(plain)
    p.compile = True
    found = []
    for each in (plain, p):
        with own_stream(each.device):
            at = objective(each, lower=1.0).linearise(each.x, each.y)
            solution = LowerSystems(solver="cg", tol=1e-10).solve(at, at.gy)
            found.append((at.value, at.gx, at.gy, at.xy(solution.x), solution.x))
    for mine, true in zip(found[1], found[0]):
        close(mine, true)


def test_graphs_with_tensors_of_their_own_share_no_program():
    """They go by names, and another trace may call another tensor so."""

    def signature(held):
        class Shift(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("held", held)

            def forward(self, x):
                return x + self.held if held is not None else x + 1.0

        return trace._signature(torch.fx.symbolic_trace(Shift()).graph, [torch.ones(2)])

    assert signature(None) == signature(None)
    assert signature(torch.ones(2)) != signature(torch.zeros(2))
