"""The dense hyper-Hessian from its short side: the same matrix as column by column, for a count that follows dy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_bilevel as tb
from tests.reference import Reference
from torch_bilevel.linalg import LinearOperator

DX, DY = 40, 3
D = torch.float64


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def functions(diagonal: bool):
    """Per-sample weights; f also has a term in x whose Hessian is diagonal or full."""
    A, t, B = randn(0, DX, DY), randn(1, DX), randn(2, DX, DX) / DX**0.5

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (x.sigmoid() * torch.nn.functional.softplus(A.to(y) @ y - t.to(y))).sum() + (y * y).sum()

    def f(x: Tensor, y: Tensor) -> Tensor:
        return ((y - 1) ** 2).sum() + (torch.cos(x) if diagonal else torch.cos(B.to(x) @ x)).sum() / 10

    return f, g


ORACLES = {
    "implicit": lambda p: tb.ImplicitOracle(p),
    "central": lambda p: tb.PenaltyOracle(p, 1e3),
    "forward": lambda p: tb.PenaltyOracle(p, 1e3, "forward"),
    "cg": lambda p: tb.ImplicitOracle(p, solver="cg", hessian_tol=1e-12),
}


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("oracle", ORACLES)
def test_short_side_agrees_with_columns_and_with_the_reference(oracle, diagonal):
    f, g = functions(diagonal)
    x0, y0 = randn(3, DX) / 2, torch.zeros(DY, dtype=D)
    problem = tb.BilevelProblem.from_functions(f, g, x0, y0)
    H = ORACLES[oracle](problem).evaluate().hessian
    dense = H.to_dense()
    torch.testing.assert_close(dense, LinearOperator.to_dense(H), rtol=1e-7, atol=1e-8)
    assert torch.equal(dense, dense.mT)
    # the penalty surrogates differ from phi by their bias
    tol = {"implicit": 1e-8, "cg": 1e-7, "central": 1e-4, "forward": 2e-2}[oracle]
    torch.testing.assert_close(dense, Reference(f, g, x0, y0).implicit().hessian, rtol=tol, atol=tol)


def test_the_count_follows_the_short_side():
    for diagonal, least, most in ((True, 0, 8 * DY + 12), (False, DX, DX + 8 * DY + 12)):
        f, g = functions(diagonal)
        ev = tb.ImplicitOracle(
            tb.BilevelProblem.from_functions(f, g, randn(3, DX) / 2, torch.zeros(DY, dtype=D))
        ).evaluate()
        H = ev.hessian
        before = ev.counts.lower_products
        H.to_dense()
        assert least <= ev.counts.lower_products - before <= most


def test_an_almost_diagonal_block_is_not_taken_for_a_diagonal():
    def f(x: Tensor, y: Tensor) -> Tensor:
        return (y * y).sum() + (x * x).sum() + 1e-6 * x[0] * x[7]

    def g(x: Tensor, y: Tensor) -> Tensor:
        return ((y - x[:DY]) ** 2).sum()

    problem = tb.BilevelProblem.from_functions(f, g, randn(3, DX), torch.zeros(DY, dtype=D))
    H = tb.ImplicitOracle(problem).evaluate().hessian.to_dense()
    assert float(H[0, 7]) == pytest.approx(1e-6, rel=1e-6)
