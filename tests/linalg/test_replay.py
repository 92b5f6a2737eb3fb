"""CG and Lanczos whose steps are replayed: the same answers, products counted, and a way back where nothing can be recorded."""

from __future__ import annotations

import sys

import pytest
import torch

import torch_bilevel as tb
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import CholeskyFactor, FunctionOperator, SolveStatus, cg, lanczos_extreme, own_stream
from torch_bilevel.linalg.replay import Replay, can_record
from torch_bilevel.lower import LowerSystems

N = 120


class Again:
    """In place of a CUDA graph: does the step by Python, uncounted by the recursion, as a replay is."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self):
        recursion = self.step.__self__
        before = recursion.products
        self.step()
        recursion.products = before
        self.calls += 1


@pytest.fixture
def recorded(monkeypatch):
    """Everything is recordable, and recordings are ``Again``; the list of them."""
    made = []

    def make(step, device):
        step()
        made.append(Again(step))
        return made[-1]

    for name in ("cg", "lanczos"):
        monkeypatch.setattr(sys.modules[f"torch_bilevel.linalg.{name}"], "can_record", lambda device: True)
    monkeypatch.setattr(Replay, "make", staticmethod(make))
    return made


def system(symmetric, gaussian, device, columns=None, lowest=1e-2):
    A = symmetric(torch.logspace(torch.log10(torch.tensor(lowest)).item(), 0, N)).to(device)
    b = gaussian(N) if columns is None else gaussian(N, columns)
    return A, b.to(device)


@pytest.mark.parametrize("columns", [None, 5])
@pytest.mark.parametrize("reorthogonalise", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_replayed_steps_are_the_same(recorded, counter, symmetric, gaussian, columns, reorthogonalise, preconditioned):
    A, b = system(symmetric, gaussian, "cpu", columns)
    P = CholeskyFactor(A + torch.diag(torch.logspace(-2, -1, N, dtype=A.dtype))) if preconditioned else None
    operator = counter(A)
    found = cg(operator, b, tol=1e-9, reorthogonalise=reorthogonalise, preconditioner=P)
    assert recorded, "no step was recorded"
    assert sum(r.calls for r in recorded) > 5
    assert found.ok
    assert found.products == operator.count
    plain = cg(A, b, tol=1e-9, reorthogonalise=reorthogonalise, preconditioner=P, check_every=10)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-6)
    assert abs(found.iterations - plain.iterations) <= 10


def test_rows_of_the_history_move(recorded, symmetric, gaussian):
    """More steps than the first 32 rows, and than there are rows at all."""
    A, b = system(symmetric, gaussian, "cpu", lowest=1e-6)
    found = cg(A, b, tol=1e-9, reorthogonalise=True)
    assert found.iterations > 64
    assert len(recorded) >= 2  # anew where they moved
    assert float(torch.linalg.vector_norm(A @ found.x - b) / b.norm()) <= 1.1e-9


def test_replayed_steps_leave_the_same_ritz_vectors(recorded, symmetric, gaussian):
    A, b = system(symmetric, gaussian, "cpu")
    found = cg(A, b, tol=1e-9, reorthogonalise=True, recycle=8)
    assert recorded
    plain = cg(A, b, tol=1e-9, reorthogonalise=True, recycle=8, check_every=1)
    torch.testing.assert_close(found.ritz.eigenvalues, plain.ritz.eigenvalues)


def test_few_columns_leave_and_many_are_dropped(recorded, counter, gaussian):
    """A column that has stopped costs on until half have; the others go on undisturbed."""
    A = torch.diag(torch.linspace(1, 100, N, dtype=torch.float64))
    b = gaussian(N, 8)
    b[:, :5] = torch.eye(N, dtype=torch.float64)[:, :5] + torch.eye(N, dtype=torch.float64)[:, 20:25]  # two steps each
    b[:, 5] = torch.eye(N, dtype=torch.float64)[:, :12].sum(1)  # twelve steps
    operator = counter(A)
    found = cg(operator, b, tol=1e-8)
    assert found.ok
    assert found.products == operator.count
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-8)


def test_negative_curvature_is_found_in_a_replay(recorded, symmetric, gaussian):
    A = symmetric(torch.cat([torch.tensor([-1e-3], dtype=torch.float64), torch.logspace(-1, 0, N - 1, dtype=torch.float64)]))
    found = cg(A, gaussian(N), tol=1e-12)
    assert found.status is SolveStatus.NEGATIVE_CURVATURE
    assert recorded
    d = found.direction
    assert float(d @ A @ d) == pytest.approx(float(found.curvature), rel=1e-6)
    assert float(found.curvature) < 0


@pytest.mark.parametrize("done", ["not at all", "wholly"])
def test_what_cannot_be_recorded_goes_on(monkeypatch, counter, symmetric, gaussian, done):
    module = sys.modules["torch_bilevel.linalg.cg"]
    tried = []
    monkeypatch.setattr(module, "can_record", lambda device: True)

    def fail(step, device):
        tried.append(step)
        if done == "wholly":
            step()

    monkeypatch.setattr(module.Replay, "make", staticmethod(fail))
    A, b = system(symmetric, gaussian, "cpu", 3)
    operator = counter(A)
    for reorthogonalise in (False, True):
        found = cg(operator, b, tol=1e-9, reorthogonalise=reorthogonalise)
        torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-6)
        plain = cg(A, b, tol=1e-9, reorthogonalise=reorthogonalise, check_every=1)
        assert found.iterations == plain.iterations
    assert len(tried) == 2


@pytest.mark.parametrize("done", ["not at all", "wholly"])
def test_lanczos_goes_on_where_it_cannot_be_recorded(monkeypatch, symmetric, done):
    module = sys.modules["torch_bilevel.linalg.lanczos"]
    A = symmetric(torch.linspace(-1, 1, N, dtype=torch.float64) ** 3)
    plain = lanczos_extreme(A, tol=1e-8, check_every=10)
    monkeypatch.setattr(module, "can_record", lambda device: True)
    monkeypatch.setattr(module.Replay, "make", staticmethod(lambda step, device: step() if done == "wholly" else None))
    found = lanczos_extreme(A, tol=1e-8, check_every=10)
    assert found.iterations == plain.iterations
    torch.testing.assert_close(found.value, plain.value, rtol=0, atol=1e-12)


def test_nothing_is_recorded_on_a_cpu():
    with own_stream(torch.device("cpu")):
        assert not can_record(torch.device("cpu"))
        assert Replay.make(lambda: None, torch.device("cpu")) is None


def lower_point(device, dtype=torch.float32):
    """A recorded softmax lower gradient, 7 classes, and its systems."""
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(400, 30, generator=gen, dtype=torch.float64).to(device, dtype)
    t = torch.randint(0, 7, (400,), generator=gen).to(device)
    torch.manual_seed(0)
    learner = torch.nn.Linear(30, 7).to(device, dtype)

    def lower(learner, hyper, batch):
        loss = torch.nn.functional.cross_entropy(learner(batch[0]), batch[1], reduction="none")
        return (torch.sigmoid(hyper) * loss).mean() + 1e-2 * sum(p.square().sum() for p in learner.parameters())

    def upper(learner, hyper, batch):
        return torch.nn.functional.cross_entropy(learner(batch[0]), batch[1])

    problem = tb.BilevelProblem(learner, torch.zeros(400, device=device, dtype=dtype), lower, upper, (X, t), (X, t))
    return Objective(problem, lower=1.0, counts=OracleCounts()).linearise(problem.x, problem.y, "y")


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [None, 4])
@pytest.mark.parametrize("reorthogonalise", [False, True])
@pytest.mark.parametrize("by_outputs", [False, True])
def test_products_of_recorded_gradients(columns, reorthogonalise, by_outputs):
    """The product is a backward pass, or one by outputs; replayed it counts as on the default stream."""
    device = torch.device("cuda")
    b = torch.randn(217, *([] if columns is None else [columns]), generator=torch.Generator().manual_seed(1)).to(device)
    found = {}
    for stream in ("default", "own"):
        systems = LowerSystems(solver="cg")

        def solve(systems=systems):
            at = lower_point(device)
            if by_outputs:
                assert systems.outputs(at) is not None
            before = at.objective.counts.lower_products
            solution = cg(systems.operator(at), b, tol=1e-6, reorthogonalise=reorthogonalise)
            torch.cuda.synchronize()
            assert at.objective.counts.lower_products - before == solution.products
            return solution

        if stream == "own":
            with own_stream(device):
                assert can_record(device)
                found[stream] = solve()
        else:
            found[stream] = solve()
    assert found["own"].ok
    torch.testing.assert_close(found["own"].x, found["default"].x, rtol=1e-4, atol=1e-4)
    assert abs(found["own"].iterations - found["default"].iterations) <= 10


@pytest.mark.gpu
def test_a_host_synchronisation_is_found_before_it_spoils_a_recording(symmetric, gaussian):
    device = torch.device("cuda")
    A, b = system(symmetric, gaussian, device)
    operator = FunctionOperator(N, lambda v: A @ v * float(v.isfinite().all()), dtype=b.dtype, device=device)
    with own_stream(device):
        found = cg(operator, b, tol=1e-9)
        torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-6)
        replay = Replay.make(lambda: b.add_(0.0), device)  # and recording works after it
        assert replay is not None
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_a_replay_does_the_step_again():
    device = torch.device("cuda")
    with own_stream(device):
        v = torch.ones(3, device=device)
        replay = Replay.make(lambda: v.mul_(2), device)
        assert v.tolist() == [2.0] * 3  # once in earnest, not by recording
        replay()
        replay()
        assert v.tolist() == [8.0] * 3
    assert v.tolist() == [8.0] * 3


@pytest.mark.gpu
def test_columns_and_preconditioner_on_cuda(symmetric, gaussian):
    device = torch.device("cuda")
    A, b = system(symmetric, gaussian, device, 6)
    P = CholeskyFactor(A + torch.diag(torch.logspace(-2, -1, N, dtype=A.dtype, device=device)))
    for preconditioner in (None, P):
        for reorthogonalise in (False, True):
            with own_stream(device):
                found = cg(A, b, tol=1e-10, preconditioner=preconditioner, reorthogonalise=reorthogonalise)
            assert found.ok
            torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-7)


@pytest.mark.parametrize("which", ["min", "max"])
@pytest.mark.parametrize("max_basis", [None, 12])
def test_replayed_lanczos_is_the_same(recorded, counter, symmetric, which, max_basis):
    """Restarts included: rows that are dropped must not come back."""
    values = torch.linspace(-1, 1, N, dtype=torch.float64) ** 3
    A = symmetric(values)
    operator = counter(A)
    found = lanczos_extreme(operator, which=which, tol=1e-8, max_basis=max_basis)
    assert len(recorded) == 1
    assert recorded[0].calls > 5
    assert found.ok
    assert found.products == operator.count
    assert float(found.value) == pytest.approx(float(values.min() if which == "min" else values.max()), abs=1e-7)
    torch.testing.assert_close(A @ found.vector, found.value * found.vector, rtol=0, atol=1e-7)


def test_replayed_lanczos_finds_an_invariant_subspace_and_goes_on(recorded, symmetric):
    """A start within three eigenvectors breaks down, and the probe finds what is orthogonal to it."""
    A = torch.diag(torch.linspace(-2, 3, N, dtype=torch.float64))
    start = torch.zeros(N, dtype=torch.float64)
    start[[5, 50, 100]] = 1.0
    found = lanczos_extreme(A, start=start, tol=1e-8)
    assert recorded
    assert float(found.value) == pytest.approx(-2.0, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("max_basis", [None, 12])
def test_lanczos_on_cuda(symmetric, max_basis):
    device = torch.device("cuda")
    A = symmetric(torch.linspace(-1, 1, N, dtype=torch.float64) ** 3).to(device)
    with own_stream(device):
        found = lanczos_extreme(A, tol=1e-8, max_basis=max_basis)
    assert found.ok
    assert float(found.value) == pytest.approx(-1.0, abs=1e-7)
