"""What keeps large problems within memory: bounded bases, histories and blocks, and columns that go one by one."""

from __future__ import annotations

import sys

import pytest
import torch

import torch_bilevel as tb
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import cg
from torch_bilevel.linalg.history import History
from torch_bilevel.linalg.lanczos import affordable_basis, lanczos_extreme
from torch_bilevel.oracles import hessian as hessian_module
from torch_bilevel.recorded import graph


def smooth_problem(dtype: torch.dtype = torch.float64) -> tb.BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))

    def f(x, y):
        return (A @ x - y).square().sum() + (y * y).cos().sum()

    def g(x, y):
        return (x.exp().sum() + 1) * y.square().sum() + (B @ x * y).sin().sum() + torch.logsumexp(y, 0)

    return tb.BilevelProblem.from_functions(
        f, g, torch.linspace(-0.5, 0.5, 4, dtype=dtype), torch.zeros(6, dtype=dtype)
    )


def test_bases_of_long_vectors_take_a_gigabyte() -> None:
    assert affordable_basis(1000, torch.float64, 200) == 200
    assert affordable_basis(5, torch.float64, 200) == 5
    assert affordable_basis(2_602_140, torch.float32, 200) == 96
    assert affordable_basis(10**9, torch.float32, 200) == 20
    A = torch.diag(torch.linspace(1.0, 9.0, 40, dtype=torch.float64))
    assert float(lanczos_extreme(A, which="max", max_basis=20).value) == pytest.approx(9.0, abs=1e-2)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_reorthogonalised_cg_keeps_what_fits(preconditioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[History.__module__]  # `linalg.cg` is the function
    held = []
    append = History.append

    def watch(self, *vectors):
        append(self, *vectors)
        held.append((self.count, self.R.shape[1]))

    monkeypatch.setattr(History, "append", watch)
    A = torch.diag(torch.logspace(0, 3, 200))
    b = torch.ones(200)
    options = {"tol": 1e-4, "reorthogonalise": True, "preconditioner": (lambda R: R / 2) if preconditioned else None}
    free = cg(A, b, **options)
    most = max(held)
    monkeypatch.setattr(module, "HISTORY_BYTES", 40 * 200 * 4 * (2 if preconditioned else 1))
    held.clear()
    bounded = cg(A, b, **options)
    assert free.ok
    assert bounded.ok
    assert most[0] > 40 >= max(count for count, _ in held)
    assert max(rows for _, rows in held) == 40
    torch.testing.assert_close(bounded.x, b / A.diagonal(), rtol=1e-3, atol=1e-5)


def test_columns_of_large_problems_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = smooth_problem()
    at = Objective(problem, lower=1.0, upper=0.1, counts=OracleCounts()).linearise(problem.x, problem.y)
    batched = []
    original = torch.autograd.grad

    def watch(*args, is_grads_batched: bool = False, **kwargs):
        batched.append(is_grads_batched)
        return original(*args, is_grads_batched=is_grads_batched, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watch)
    block = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = at.to_x(block)
    assert batched == [True]
    monkeypatch.setattr(graph, "LARGE", 10)
    alone = at.to_x(block)
    assert batched == [True, False, False, False]
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_blocks_of_hyper_hessian_products_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tb.ImplicitOracle(smooth_problem()).evaluate().hessian
    assert expected.block_size == 256
    monkeypatch.setattr(hessian_module, "BLOCK_NUMBERS", 25)  # of 4 + 6 rows: two columns
    bounded = tb.ImplicitOracle(smooth_problem()).evaluate().hessian
    assert bounded.block_size == 2
    torch.testing.assert_close(bounded.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-11)


def test_loose_tolerances_are_meant_for_the_penalised_level_too() -> None:
    spent = {}
    for tol in (None, 0.1):
        oracle = tb.PenaltyOracle(smooth_problem(torch.float32), 100.0, solver="cg", lower_tol=tol, linear_tol=tol)
        gradient = oracle.evaluate().gradient
        spent[tol] = oracle.counts.lower_products + oracle.counts.upper_products
        if tol is None:
            exact = gradient
    assert spent[0.1] < 0.7 * spent[None]
    torch.testing.assert_close(gradient, exact, rtol=0.3, atol=0.3 * float(exact.norm()))
