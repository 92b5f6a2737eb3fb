"""KeptFactor: what is kept, when it is made, climbed or renewed, and that it survives a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_bilevel as tb
from tests.problems import hyper_cleaning
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import CholeskyFactor, NystromPreconditioner, Solution, SolveStatus
from torch_bilevel.lower import LowerSystems, kept
from torch_bilevel.lower.kept import KeptFactor, Ladder
from torch_bilevel.recorded import calls

N = 400


@pytest.fixture
def decaying(monkeypatch) -> Objective:
    """g with a fixed Hessian of condition 1e5 and fast decay, which counts as large (sketches first)."""
    monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 100)
    Q, _ = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    A = Q @ torch.diag(1e3 / torch.arange(1, N + 1, dtype=torch.float64) ** 2 + 1e-2) @ Q.T

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (1 + x[0] ** 2) * (y @ (A @ y)) / 2 - y.sum()

    problem = tb.BilevelProblem.from_functions(lambda x, y: (y * y).sum(), g, torch.zeros(1, dtype=torch.float64),
                                               torch.zeros(N, dtype=torch.float64))  # fmt: skip
    return Objective(problem, lower=1.0, counts=OracleCounts())


def solve(systems: LowerSystems, objective: Objective, seed: int, x: float = 0.0) -> Solution:
    problem = objective.problem
    at = objective.linearise(problem.x + x, problem.y, "y")
    b = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    solution = systems.solve(at, b, tol=1e-8)
    assert solution.ok
    assert torch.linalg.vector_norm(at.yy(solution.x) - b) <= 1e-7 * torch.linalg.vector_norm(b)
    return solution


def test_levels_fit_the_size_and_the_memory():
    assert KeptFactor.levels(2000, torch.float64) == [2000]
    assert KeptFactor.levels(8000, torch.float32) == [500, 1000, 8000]
    assert KeptFactor.levels(100_000, torch.float32) == [750]  # 300 MB
    assert KeptFactor.levels(10_000_000, torch.float32) == []


def test_climbs_from_cg_to_a_sketch_to_a_factor_as_they_pay(decaying):
    systems, kinds, iterations = LowerSystems(), [], []
    for seed in range(12):
        iterations.append(solve(systems, decaying, seed).iterations)
        kinds.append((type(systems.factor), systems.kept.level))
    order = list(dict.fromkeys(kinds))
    assert order[0] == (NystromPreconditioner, 0)  # the Ritz vectors of the first solve
    assert (NystromPreconditioner, N // 16) in order
    assert kinds[-1] == (CholeskyFactor, N)
    assert iterations[-1] <= 2 < iterations[0]
    assert decaying.counts.factorisations == len([kind for kind in order if kind[1]])


def test_a_making_never_costs_more_than_what_was_spent_before_it(decaying):
    systems, spent = LowerSystems(), 0.0
    for seed in range(12):
        level = systems.kept.level
        before = systems.kept.missed
        solve(systems, decaying, seed)
        if systems.kept.level != level:
            assert before * kept.BLOCK_DISCOUNT > systems.kept.level
            spent += before
    assert spent > 0


def test_an_aged_sketch_is_renewed_at_its_level(decaying, monkeypatch):
    monkeypatch.setattr(KeptFactor, "levels", staticmethod(lambda n, dtype: [100]))
    keeper, ladder = KeptFactor(), Ladder.of(N, torch.float64, [])
    at = decaying.linearise(decaying.problem.x, decaying.problem.y, "y")
    keeper.make(100, LowerSystems().operator(at), at)

    def seen(iterations: int) -> None:
        keeper.observe(Solution(x=at.gy, status=SolveStatus.CONVERGED, residual=at.value, iterations=iterations,
                                products=0, solver="cg"), 1e-4, 1, ladder)  # fmt: skip

    for _ in range(kept.FRESH_SOLVES):
        seen(20)
    for _ in range(10):
        seen(20)
    assert keeper.due(ladder, 1e-4) is None  # nothing above it, and it has not aged
    seen(45)
    seen(45)
    assert keeper.due(ladder, 1e-4) is None  # 50 iterations more than when new: the price of 100 block products
    seen(21)
    assert keeper.due(ladder, 1e-4) == 100


def test_a_model_asks_for_a_factor_only_where_its_solves_pay(decaying):
    keeper, ladder = KeptFactor(), Ladder.of(N, torch.float64, [])
    assert keeper.due_for_model(Ladder.of(50, torch.float64, []), 1e-3) == 50  # small: always
    at = decaying.linearise(decaying.problem.x, decaying.problem.y, "y")
    keeper.make(N, LowerSystems().operator(at), at)

    def rate(iterations: int) -> None:
        keeper.observe(Solution(x=at.gy, status=SolveStatus.CONVERGED, residual=at.value, iterations=iterations,
                                products=0, solver="cg"), 1e-3, 1, ladder)  # fmt: skip

    rate(3)
    assert keeper.due_for_model(ladder, 1e-3) is None  # 60 solves save 60 iterations, a factor costs 200
    rate(8)
    assert keeper.due_for_model(ladder, 1e-3) == N


def test_negative_curvature_leaves_no_sketch():
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y * y).sum(), lambda x, y: (torch.linspace(-5, 1, N, dtype=y.dtype) * y * y).sum() / 2 + 0 * x.sum(),
        torch.zeros(1, dtype=torch.float64), torch.ones(N, dtype=torch.float64), check=False)  # fmt: skip
    at = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(problem.x, problem.y, "y")
    keeper = KeptFactor()
    made = keeper.make(100, LowerSystems().operator(at), at)
    assert not made.ok
    assert keeper.factor is None


@pytest.mark.parametrize("small", [0, 100])
@pytest.mark.parametrize("method", ["lfsba", "lbfgs", "auto"])
def test_resume_with_a_sketch_is_the_uninterrupted_run(monkeypatch, tmp_path, method, small):
    """Of a learner that goes by its outputs, and of one that does not."""
    monkeypatch.setattr(calls, "SMALL", small)
    monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 4)
    monkeypatch.setattr(KeptFactor, "levels", staticmethod(lambda n, dtype: [3, 6]))

    def go(steps, **options):
        krylov = {} if method == "lbfgs" else {"hessian": "krylov"}  # a dense hyper-Hessian would be formed by factors
        return tb.minimize(hyper_cleaning().problem(), method, max_steps=steps, gradient_tol=1e-12, **krylov, **options)

    whole = go(6)
    assert whole.counts.factorisations >= 1
    go(3, checkpoint=tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["run"]
    state = (saved["active"] if method == "auto" else saved)["oracle"]["systems"]["kept"]
    assert state["level"] in (3, 6)
    resumed = go(6, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(resumed.x, whole.x)
    assert resumed.counts.as_dict() == whole.counts.as_dict()


def test_an_aged_factor_gives_way_to_the_kronecker_preconditioner_that_was_cheaper(decaying):
    ladder = Ladder(N, {40: 10.0, N: 1000.0}, kronecker=(40,), applying={N: 3.0})
    keeper = KeptFactor()
    at = decaying.linearise(decaying.problem.x, decaying.problem.y, "y")

    def seen(iterations: int) -> None:
        keeper.observe(Solution(x=at.gy, status=SolveStatus.CONVERGED, residual=at.value, iterations=iterations,
                                products=0, solver="cg"), 1e-4, 1, ladder)  # fmt: skip

    keeper.level = 40  # a preconditioner with which it takes 20 iterations
    for _ in range(kept.FRESH_SOLVES):
        seen(20)
    keeper.make(N, LowerSystems().operator(at), at)
    for _ in range(5):
        seen(5)  # 5 (1 + 3) = 20: no dearer
    assert keeper.due(ladder, 1e-4) is None
    seen(7)  # 28 against 20
    assert keeper.due(ladder, 1e-4) is None  # 8 lost, its price is 10
    seen(7)
    assert keeper.due(ladder, 1e-4) == 40


def test_the_kronecker_preconditioner_is_made_before_a_solve_that_it_would_serve_well():
    """At once where four solves of that length save its price, at 20 iterations a decade as long as none was seen; once only."""
    keeper, cheap, dear = KeptFactor(), Ladder(5000, {40: 100.0, 5000: 1e4}, (40,)), Ladder(5000, {40: 1000.0, 5000: 1e4}, (40,))
    assert keeper.due(cheap, 1e-4) == 40  # 4 solves that save half of 80 iterations
    assert keeper.due(cheap, 1e-2) is None
    assert keeper.due(dear, 1e-4) is None
    assert keeper.due(Ladder(5000, {40: 100.0}), 1e-4) is None  # a sketch
    keeper.missed = 30.0
    assert keeper.due(cheap, 1e-2) == 40
    keeper.level = 40  # made, and not positive definite
    keeper.missed = 0.0
    assert keeper.due(cheap, 1e-4) is None
    keeper = KeptFactor()
    keeper.rate = 3.0
    assert keeper.due(cheap, 1e-4) is None  # such solves are short


def test_ritz_vectors_of_a_solve_serve_the_next_ones(decaying, monkeypatch):
    monkeypatch.setattr(KeptFactor, "levels", staticmethod(lambda n, dtype: []))
    systems, plain = LowerSystems(), LowerSystems(solver="cg")
    first = solve(systems, decaying, 0)
    assert systems.kept.is_recycled()
    assert systems.factor.U.shape == (N, min(kept.RITZ, first.iterations // 2))
    assert f"{systems.factor.U.shape[1]} Ritz vectors" in systems.describe()
    for seed in (1, 2):
        assert solve(systems, decaying, seed, 0.05).iterations <= 0.75 * solve(plain, decaying, seed, 0.05).iterations
    assert decaying.counts.factorisations == 0  # they cost nothing


def test_ritz_vectors_are_given_up_when_they_no_longer_help(decaying, monkeypatch):
    monkeypatch.setattr(KeptFactor, "levels", staticmethod(lambda n, dtype: []))
    systems = LowerSystems()
    solve(systems, decaying, 0)
    for seed in range(1, 5):
        solve(systems, decaying, seed)
    assert systems.kept.is_recycled()
    fresh = systems.kept._fresh
    at = decaying.linearise(decaying.problem.x, decaying.problem.y, "y")
    slow = Solution(at.y, SolveStatus.CONVERGED, torch.zeros(()), int(kept.WORN * 8 * fresh) + 1, 1, "cg")
    systems.kept.observe(slow, 1e-8, 1, systems.ladder(at))
    assert systems.factor is None
    solve(systems, decaying, 9)
    assert systems.kept.is_recycled()  # and others took their place
    longer = Solution(at.y, SolveStatus.CONVERGED, torch.zeros(()), int(kept.OUTGROWN * systems.kept._ritz_steps) + 1, 1, "cg")
    systems.kept.observe(longer, 1e-16, 1, systems.ladder(at))
    assert systems.factor is None  # those of too short a solve


def test_bad_ritz_vectors_are_dropped_and_the_system_is_solved(decaying, monkeypatch):
    monkeypatch.setattr(KeptFactor, "levels", staticmethod(lambda n, dtype: []))
    systems = LowerSystems(max_iterations=400)
    solve(systems, decaying, 0)
    ritz = systems.factor
    worse = NystromPreconditioner(ritz.U, torch.logspace(8, -8, len(ritz.eigenvalues), dtype=torch.float64))
    systems.kept.factor = worse
    solve(systems, decaying, 1)
    assert systems.factor is not worse


def test_ritz_vectors_survive_a_checkpoint(decaying, monkeypatch):
    monkeypatch.setattr(KeptFactor, "levels", staticmethod(lambda n, dtype: []))
    systems, other = LowerSystems(), LowerSystems()
    solve(systems, decaying, 0)
    other.load_state_dict(systems.state_dict(), decaying.problem)
    assert torch.equal(other.factor.U, systems.factor.U)
    for seed in (1, 2, 3):
        a, b = solve(systems, decaying, seed, 0.1), solve(other, decaying, seed, 0.1)
        assert torch.equal(a.x, b.x)
        assert a.iterations == b.iterations


def test_no_ritz_vectors_where_something_is_kept_or_a_factor_is_made_at_once():
    assert KeptFactor().ritz_wanted(2000, torch.float64) == 0
    assert KeptFactor().ritz_wanted(2001, torch.float64) == kept.RITZ
    assert KeptFactor().ritz_wanted(1_000_000, torch.float32) == 16  # 64 MB
    keeper = KeptFactor()
    keeper.factor = NystromPreconditioner(torch.eye(3, 1), torch.ones(1))
    assert keeper.ritz_wanted(5000, torch.float32) == 0


def test_a_small_factor_is_made_for_a_model_where_stale_solves_would_take_more():
    """At its own point it solves without a product: what is saved are all iterations and the check of the residual."""
    keeper, ladder = KeptFactor(), Ladder.of(50, torch.float64, [])
    keeper.factor, keeper.level, keeper.rate, keeper._fresh = CholeskyFactor(torch.eye(50)), 50, 0.1, 0.1
    assert keeper.due_for_model(ladder, 1e-3) == 50  # 60 times 1.3 against 25
    keeper.rate = 0.0
    assert keeper.due_for_model(Ladder(50, {50: 61.0}), 1e-3) is None
