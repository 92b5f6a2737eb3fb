"""Cholesky factors: exact solves, and failures that say so."""

from __future__ import annotations

import pytest
import torch

from torch_bilevel.linalg import CholeskyFactor, DenseOperator, ShiftedOperator, SolveStatus, cholesky, solve


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_solve(device, symmetric, gaussian, dtype, tol, overwrite):
    A64 = symmetric(torch.linspace(1, 10, 30))
    A = A64.to(device, dtype, copy=True)
    kept = A.clone()
    factor = CholeskyFactor(A, overwrite=overwrite)
    assert factor.ok
    assert factor.factor_status is SolveStatus.CONVERGED
    assert factor.n == 30
    assert torch.equal(A, kept) is not (overwrite and device.type == "cpu")  # a GPU has no factorisation in place
    for B64 in (gaussian(30), gaussian(30, 4), gaussian(30, 1)):
        X = factor.solve(B64.to(device, dtype))
        assert X.shape == B64.shape
        assert X.dtype == dtype
        assert X.device == A.device
        expected = torch.linalg.solve(A64, B64)
        assert float((X.to("cpu", torch.float64) - expected).abs().max()) < 10 * tol
        assert torch.equal(factor(B64.to(device, dtype)), X)


def test_operators_are_materialised_once_per_column(symmetric, counter):
    operator = counter(symmetric(torch.linspace(1, 10, 30)), block_size=8)
    factor = cholesky(operator)
    assert factor.ok
    assert factor.products == operator.count == 30
    assert operator.calls == 4


def test_a_matrix_is_not_overwritten(symmetric):
    A = symmetric(torch.linspace(1, 10, 30))
    kept = A.clone()
    assert cholesky(A).ok
    assert cholesky(A).products == 0
    assert torch.equal(A, kept)


@pytest.mark.parametrize(
    ("spectrum", "smallest"), [([-0.5, 1, 2], -0.5), ([0.0, 0.0, 0.0], 0.0), ([-1e-9, 1, 2], -1e-9)]
)
def test_not_positive_definite_is_said_with_the_smallest_eigenvalue(device, symmetric, spectrum, smallest):
    A = symmetric(spectrum).to(device)
    factor = cholesky(A)
    assert not factor.ok
    assert factor.factor_status is SolveStatus.NOT_POSITIVE_DEFINITE
    assert float(factor.min_eigenvalue) == pytest.approx(smallest, abs=1e-12)
    assert "Smallest eigenvalue" in factor.describe()
    with pytest.raises(RuntimeError, match="not positive definite"):
        factor.solve(torch.ones(3, dtype=A.dtype, device=device))
    assert cholesky(ShiftedOperator(DenseOperator(A), 1.0)).ok


def test_no_jitter(symmetric):
    """A solve near singularity is the exact one, not that of a shifted matrix."""
    A = symmetric([1e-9, 1.0, 2.0])
    b = A @ torch.ones(3, dtype=A.dtype)
    x = cholesky(A).solve(b)
    torch.testing.assert_close(
        x, torch.ones_like(x), rtol=0, atol=1e-5
    )  # 1e9 times the rounding unit, and margin


def test_from_lower(symmetric, gaussian):
    A, b = symmetric(torch.linspace(1, 10, 30)), gaussian(30)
    factor = cholesky(A)
    again = CholeskyFactor.from_lower(factor.L)
    assert again.ok
    assert again.n == 30
    assert torch.equal(again.solve(b), factor.solve(b))


def test_non_finite(device):
    A = torch.eye(3, device=device)
    A[1, 1] = float("nan")
    assert CholeskyFactor(A).factor_status is SolveStatus.NON_FINITE
    assert solve(A, torch.ones(3, device=device), solver="cholesky").status is SolveStatus.NON_FINITE


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="square"):
        CholeskyFactor(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"B: expected \(2,\) or \(2, k\), got \(3,\)"):
        CholeskyFactor(torch.eye(2)).solve(torch.ones(3))


@pytest.mark.parametrize("columns", [None, 3])
def test_preconditioner(device, symmetric, gaussian, columns):
    """The inverse's product on CUDA, the solves elsewhere: the same answer."""
    A = symmetric(torch.linspace(1, 10, 30)).to(device)
    b = (gaussian(30) if columns is None else gaussian(30, columns)).to(device)
    for factor in (CholeskyFactor(A), CholeskyFactor.from_lower(torch.linalg.cholesky(A))):
        for _ in range(2):
            torch.testing.assert_close(factor.preconditioner()(b), torch.linalg.solve(A, b), rtol=0, atol=1e-12)


def test_preconditioner_of_no_factor_says_so(symmetric):
    factor = CholeskyFactor(symmetric([-1.0, 1.0]))
    with pytest.raises(RuntimeError, match="not positive definite"):
        factor.preconditioner()(torch.ones(2, dtype=torch.float64))
