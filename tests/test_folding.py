"""FoldedProducts: the same numbers as bmm, and as one matrix product where an operand is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_bilevel as tb
from torch_bilevel import derivatives, folding
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.folding import FoldedProducts, fold_left, fold_right


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_folds_agree_with_bmm(transposed):
    shared, batch = randn(5, 7), randn(4, 7, 3)
    torch.testing.assert_close(fold_right(shared, batch), torch.bmm(shared.expand(4, 5, 7), batch))
    left = randn(4, 3, 5) if not transposed else randn(4, 5, 3).mT
    torch.testing.assert_close(fold_left(left, shared), torch.bmm(left, shared.expand(4, 5, 7)))


def test_other_products_are_left_alone():
    a, b = randn(4, 5, 7), randn(4, 7, 3)
    with FoldedProducts():
        torch.testing.assert_close(torch.bmm(a, b), torch.stack([x @ y for x, y in zip(a, b)]))
        torch.testing.assert_close(torch.bmm(a[:1].expand(1, 5, 7), b[:1]), a[:1] @ b[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_of_a_large_problem_are_folded_and_agree_with_single_products(dtype, monkeypatch):
    monkeypatch.setattr(derivatives, "SMALL", 0)  # every problem counts as large
    X, t = randn(30, 6).to(dtype), torch.arange(30) % 3
    learner = torch.nn.Linear(6, 3, dtype=dtype)

    def lower(learner, hyper, batch):
        X, t = batch
        losses = torch.nn.functional.cross_entropy(learner(X), t, reduction="none")
        return (hyper.sigmoid() * losses).mean() + 0.1 * learner.weight.square().sum() + learner.bias.square().sum()

    def upper(learner, hyper, batch):
        return torch.nn.functional.cross_entropy(learner(batch[0]), batch[1])

    problem = tb.BilevelProblem(learner, torch.zeros(30, dtype=dtype), lower, upper, (X, t), (X, t))
    at = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(problem.x, problem.y)
    V = randn(problem.dy, 5).to(dtype)
    singles = torch.stack([at.yy(v) for v in V.unbind(1)], dim=1)
    folded = []
    for name in ("fold_right", "fold_left"):
        original = getattr(folding, name)
        monkeypatch.setattr(
            folding, name, lambda a, b, name=name, original=original: (folded.append(name), original(a, b))[1]
        )
    block = at.yy(V)
    torch.testing.assert_close(block, singles)
    torch.testing.assert_close(at.xy(V), torch.stack([at.xy(v) for v in V.unbind(1)], dim=1))
    assert set(folded) == {"fold_right", "fold_left"}  # X V and X' Z
