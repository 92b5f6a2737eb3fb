"""FoldedProducts: the same numbers as bmm, and as one matrix product where an operand is shared."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import torch_bilevel as tb
from torch_bilevel import folding
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.folding import FoldedProducts, fold_left, fold_right, multiply
from torch_bilevel.linalg import CholeskyFactor, SolveStatus
from torch_bilevel.linalg.cholesky import factor_by_halves, solve_triangular
from torch_bilevel.recorded import calls


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
    monkeypatch.setattr(folding, "SMALL", 0)  # every problem counts as large
    monkeypatch.setattr(calls, "SMALL", 1000)  # and is not evaluated by its outputs
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


# -- by oneDNN -----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.mT.contiguous().mT,
    "part of rows": lambda t: torch.cat([t.new_zeros(len(t), 3), t], dim=1)[:, 3:],
    "part of columns": lambda t: torch.cat([t.new_zeros(3, t.shape[1]), t]).mT.contiguous().mT[3:],
}


@pytest.fixture
def onednn(monkeypatch):
    """Every float32 product on a CPU goes to oneDNN; the operands as they were given to it."""
    if not folding.has_onednn():
        pytest.skip("this PyTorch is built without oneDNN's linear layer")
    monkeypatch.setattr(folding, "WORTH", 0)
    monkeypatch.setattr(folding, "mkl_is_held_back", lambda: True)
    given, original = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda a, b, *rest: given.append((a, b)) or original(a, b, *rest))
    return given


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("shape", [(30, 20, 10), (10, 20, 30), (200, 20, 10), (1, 7, 5), (5, 7, 1), (3, 1, 4)])
def test_products_by_onednn_are_right_in_every_layout_and_never_on_its_slow_path(shape, left, right, onednn):
    n, k, m = shape
    a, b = LAYOUTS[left](randn(n, k).float()), LAYOUTS[right](randn(k, m).float())
    found = multiply(a, b)
    torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()
    assert len(onednn) == 1
    weight = onednn[0][1]
    assert weight.is_contiguous() or weight.mT.is_contiguous()


def test_what_is_not_for_onednn_is_multiplied_by_torch(onednn, monkeypatch):
    for a, b in ((randn(6, 5), randn(5, 4)), (randn(6, 5).float(), randn(5, 4).to(torch.bfloat16).float())):
        torch.testing.assert_close(multiply(a, b), a @ b)
    assert len(onednn) == 1  # not the float64 one
    torch.testing.assert_close(multiply(a.to_sparse_csr(), b), a @ b)
    with torch.backends.mkldnn.flags(enabled=False):
        multiply(a, b)
    monkeypatch.setattr(folding, "WORTH", 1_000_000)
    multiply(a, b)
    monkeypatch.setattr(folding, "WORTH", 0)
    monkeypatch.setattr(folding, "mkl_is_held_back", lambda: False)
    multiply(a, b)
    assert len(onednn) == 1


@pytest.mark.parametrize(("is_linux", "made", "capability", "expected"), [
    (True, "vendor_id : AuthenticAMD", "AVX512", True), (True, "vendor_id : GenuineIntel", "AVX512", False),
    (True, "vendor_id : AuthenticAMD", "AVX2", False), (False, "AMD64 Family 26, AuthenticAMD", "AVX512", True),
    (False, "Intel64 Family 6, GenuineIntel", "AVX512", False),
])  # fmt: skip
def test_mkl_is_held_back_on_other_makers_avx512(is_linux, made, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(folding.platform, "processor", lambda: made)
    monkeypatch.setattr(folding.Path, "is_file", lambda self: is_linux)
    monkeypatch.setattr(folding.Path, "read_text", lambda self, encoding: made)
    monkeypatch.setattr(folding, "has_onednn", lambda: True)
    assert folding.mkl_is_held_back.__wrapped__() == expected
    monkeypatch.setattr(folding, "has_onednn", lambda: False)
    assert folding.mkl_is_held_back.__wrapped__() is False


def test_recorded_products_of_a_large_problem_go_to_onednn(onednn, monkeypatch):
    monkeypatch.setattr(folding, "SMALL", 0)
    monkeypatch.setattr(calls, "SMALL", 10**9)
    X, t = randn(30, 6).float(), torch.arange(30) % 3

    def lower(learner, hyper, batch):
        return (hyper.sigmoid() * torch.nn.functional.cross_entropy(learner(X), t, reduction="none")).mean()

    def upper(learner, hyper, batch):
        return torch.nn.functional.cross_entropy(learner(X), t)

    problem = tb.BilevelProblem(torch.nn.Linear(6, 3), torch.zeros(30), lower, upper, (X, t), (X, t))
    at, v = Objective(problem, lower=1.0, counts=OracleCounts()).linearise(problem.x, problem.y), randn(problem.dy).float()
    before, fast = len(onednn), at.yy(v)
    assert len(onednn) > before
    monkeypatch.setattr(folding, "mkl_is_held_back", lambda: False)
    torch.testing.assert_close(fast, at.yy(v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_triangular_systems_by_halves(layout, upper, columns, onednn, monkeypatch):
    monkeypatch.setattr(sys.modules["torch_bilevel.linalg.cholesky"], "BLOCK", 8)
    T = 0.1 * randn(37, 37).float() + 3 * torch.eye(37)
    T, B = LAYOUTS[layout](T.triu() if upper else T.tril()), randn(37, columns).float()
    found = solve_triangular(T, B, upper=upper)
    torch.testing.assert_close(found, torch.linalg.solve_triangular(T, B, upper=upper), rtol=1e-5, atol=1e-6)
    assert onednn


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_factorisation_by_halves_is_lapacks(overwrite, onednn, monkeypatch):
    monkeypatch.setattr(sys.modules["torch_bilevel.linalg.cholesky"], "BLOCK", 4)
    M = randn(61, 61).float()
    A = M @ M.mT / 61 + torch.eye(61)
    upper_is_not_read = A + torch.triu(torch.full_like(A, 7.0), 1)
    factor = CholeskyFactor(upper_is_not_read.clone(), overwrite=overwrite)
    torch.testing.assert_close(factor.L, torch.linalg.cholesky(A), rtol=1e-4, atol=1e-5)
    assert onednn
    for place in (3, 40):
        A[place, place] = -1.0
        info = factor_by_halves(A.clone())
        assert int(info) == int(torch.linalg.cholesky_ex(A)[1]) == place + 1
        assert CholeskyFactor(A.clone(), overwrite=overwrite).factor_status is SolveStatus.NOT_POSITIVE_DEFINITE
        A[place, place] = 3.0


@pytest.mark.parametrize("columns", [4, 5, 10, 12])
def test_thin_float64_products_are_filled_up_and_cut_again(columns):
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 64, generator=gen, dtype=torch.float64), torch.randn(64, columns, generator=gen, dtype=torch.float64)
    assert a.numel() * columns >= folding.WORTH
    for left, right in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
        found = folding.turn_over(left, right)
        torch.testing.assert_close(found, a @ b, rtol=1e-13, atol=1e-13)
        assert found.is_contiguous()
