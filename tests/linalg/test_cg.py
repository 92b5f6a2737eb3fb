"""What is particular to conjugate gradients: optimality, reorthogonalisation, negative curvature."""

from __future__ import annotations

import pytest
import torch

from torch_bilevel.linalg import FunctionOperator, SolveStatus, cg, jacobi


def test_iterates_minimise_the_energy_over_the_krylov_space(symmetric, gaussian):
    A, b = symmetric(torch.linspace(1, 50, 12)), gaussian(12)
    krylov = [b]
    for k in range(1, 8):
        K = torch.linalg.qr(torch.stack(krylov, 1)).Q
        expected = K @ torch.linalg.solve(K.mT @ A @ K, K.mT @ b)
        solution = cg(A, b, tol=1e-14, max_iterations=k)
        torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-12)
        krylov.append(A @ krylov[-1] / torch.linalg.norm(krylov[-1]))


def test_as_many_steps_as_distinct_eigenvalues(symmetric, gaussian):
    A = symmetric([1.0] * 20 + [3.0] * 10 + [7.0] * 5)
    solution = cg(A, gaussian(35), tol=1e-12)
    assert solution.ok
    assert solution.iterations == 3


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_reorthogonalisation_saves_products_in_float32(symmetric, gaussian, counter, columns, preconditioned):
    n = 200
    A = symmetric([*torch.logspace(0, -3, 30, dtype=torch.float64).tolist(), *[1e-3] * (n - 30)]).float()
    b = (gaussian(n) if columns is None else gaussian(n, columns)).float()
    options = {"tol": 2e-4, "max_iterations": 2000}
    if preconditioned:
        options["preconditioner"] = jacobi(A.diagonal())
    spent = {}
    for keep in (False, True):
        operator = counter(A)
        solution = cg(operator, b, reorthogonalise=keep, **options)
        assert solution.ok, solution.describe()
        assert solution.products == operator.count
        true = torch.linalg.norm(A.double() @ solution.x.double() - b.double(), dim=0)
        assert bool((true <= 2.1e-4 * torch.linalg.norm(b.double(), dim=0)).all())
        spent[keep] = solution.products
    assert spent[True] < 0.7 * spent[False]  # about 28 against 54 per column


def test_reorthogonalised_reaches_the_dimension_bound(symmetric, gaussian):
    """In exact arithmetic n steps suffice; plain CG in floating point needs many more here."""
    n = 100
    A, b = symmetric(torch.logspace(0, -6, n, dtype=torch.float64)), gaussian(n)
    solution = cg(A, b, tol=1e-7, reorthogonalise=True)
    assert solution.ok
    assert solution.iterations <= n
    assert cg(A, b, tol=1e-7, max_iterations=2 * n).status is SolveStatus.MAX_ITERATIONS


def test_negative_curvature_in_one_column_leaves_the_others(symmetric):
    A = symmetric([-1.0, -4.0, *torch.linspace(1, 10, 18).tolist()])
    V = torch.linalg.eigh(A).eigenvectors  # ascending: -4, -1, 1, ...
    b = torch.stack([V[:, 5] + V[:, 9], V[:, 0] + 0.1 * V[:, 3], V[:, 2:].sum(1), V[:, 1]], dim=1)
    solution = cg(A, b, tol=1e-9)
    assert solution.status is SolveStatus.NEGATIVE_CURVATURE
    assert bool((solution.residual[[0, 2]] <= 1e-9).all())
    assert bool((solution.residual[[1, 3]] > 1e-9).all())
    d = solution.direction
    assert float(torch.linalg.norm(d)) == pytest.approx(1.0)
    assert float(d @ A @ d) == pytest.approx(float(solution.curvature))
    assert float(solution.curvature) < -3.5
    assert "minres" in solution.describe()
    assert "-3." in solution.describe()


def test_negative_curvature_of_the_first_direction(gaussian):
    b = gaussian(5)
    solution = cg(-torch.eye(5, dtype=b.dtype), b)
    assert solution.status is SolveStatus.NEGATIVE_CURVATURE
    assert solution.products <= 2
    assert bool((solution.x == 0).all())
    assert float(solution.curvature) == pytest.approx(-1.0)
    torch.testing.assert_close(solution.direction, b / torch.linalg.norm(b))


def test_zero_curvature_is_not_negative_curvature():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    solution = cg(A, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert solution.status is SolveStatus.STAGNATION
    assert solution.direction is None
    assert float(solution.residual) == 1.0


def test_jacobi_removes_a_bad_scaling(symmetric, gaussian):
    scale = torch.logspace(0, 3, 40, dtype=torch.float64)
    A = scale[:, None] * symmetric(torch.linspace(1, 3, 40)) * scale
    b = gaussian(40, 2)
    plain, scaled = cg(A, b, tol=1e-10), cg(A, b, tol=1e-10, preconditioner=jacobi(A.diagonal()))
    assert scaled.ok
    assert scaled.iterations < plain.iterations / 3


def test_jacobi_refuses_what_is_not_positive():
    for bad in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="diagonal: expected"):
            jacobi(bad)


def test_stopped_columns_cost_no_products(symmetric, gaussian, counter):
    A = symmetric(torch.logspace(0, 3, 60, dtype=torch.float64))
    V = torch.linalg.eigh(A).eigenvectors
    hard = gaussian(60)
    operator = counter(A)
    b = torch.cat([V[:, :10], hard[:, None]], dim=1)
    block = cg(operator, b, tol=1e-8)
    assert block.ok
    assert block.products == operator.count
    alone = cg(A, hard, tol=1e-8).products
    assert abs(block.products - alone - 10 * 2) <= 10 + 3  # a step or two each, one true residual each


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ritz_vectors_of_the_iteration(symmetric, gaussian, dtype):
    """The largest eigenvalues and their vectors, half as many as steps at most, without a product."""
    values = torch.cat([torch.linspace(50, 100, 5), torch.linspace(1, 2, 115)]).double()
    A, b = symmetric(values).to(dtype), gaussian(120).to(dtype)
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    plain = cg(A, b, tol=tol, reorthogonalise=True)
    found = cg(A, b, tol=tol, reorthogonalise=True, recycle=6)
    assert found.products == plain.products
    assert found.ritz.U.shape == (120, min(6, plain.iterations // 2))
    near = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.ritz.eigenvalues[:5], values[:5].flip(0).to(dtype), rtol=near, atol=0)
    U = found.ritz.U[:, :5]
    torch.testing.assert_close(A @ U, U * found.ritz.eigenvalues[:5], rtol=0, atol=1e3 * near)
    again = cg(A, gaussian(120, seed=1).to(dtype), tol=tol, preconditioner=found.ritz)
    assert again.ok
    assert again.iterations < cg(A, gaussian(120, seed=1).to(dtype), tol=tol).iterations


def test_ritz_vectors_are_for_one_plain_column(symmetric, gaussian):
    A = symmetric(torch.linspace(1, 100, 60))
    assert cg(A, gaussian(60), reorthogonalise=True).ritz is None
    assert cg(A, gaussian(60), recycle=4).ritz is None
    assert cg(A, gaussian(60, 2), reorthogonalise=True, recycle=4).ritz is None
    assert cg(A, gaussian(60), reorthogonalise=True, recycle=4, preconditioner=jacobi(A.diagonal())).ritz is None
    assert cg(A, A[:, 0] * 0, reorthogonalise=True, recycle=4).ritz is None


@pytest.mark.parametrize("columns", [None, 3])
def test_a_float32_recursion_answers_to_float64_accuracy(symmetric, gaussian, counter, columns):
    """Mixed-precision refinement: most products are rough, few are of A, and all are counted."""
    n = 60
    A = symmetric(torch.logspace(0, 3, n, dtype=torch.float64))
    b = gaussian(n) if columns is None else gaussian(n, columns)
    exact, rough = counter(A), FunctionOperator(n, lambda v: A.float() @ v, lambda V: A.float() @ V, dtype=torch.float32)
    preconditioner = jacobi(A.diagonal().float())
    for given in (None, preconditioner):
        exact.count = 0
        found = cg(exact, b, tol=1e-12, rough=rough, preconditioner=given, reorthogonalise=True)
        assert found.ok
        assert found.x.dtype is torch.float64
        torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
        assert exact.count <= 4 * (columns or 1)  # one a cycle and column
        assert found.products >= found.iterations + exact.count / (columns or 1)


def test_a_float32_recursion_that_cannot_help_says_so(symmetric, gaussian):
    n = 60
    A = symmetric(torch.logspace(0, 11, n, dtype=torch.float64))
    rough = FunctionOperator(n, lambda v: A.float() @ v, dtype=torch.float32)
    assert not cg(A, gaussian(n), tol=1e-6, rough=rough, reorthogonalise=True, max_iterations=300).ok


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("decades", [2, 6, 8])
def test_a_loose_float64_recursion_is_believed_and_right(symmetric, gaussian, counter, columns, decades):
    """No product for the residual, which is the true one all the same; a tight or a float32 one pays for it."""
    A = symmetric(torch.logspace(-decades, 0, 80, dtype=torch.float64))
    b = gaussian(80) if columns is None else gaussian(80, columns)
    k = columns or 1
    D, S = torch.float64, torch.float32
    for tol, dtype, more in ((1e-2, D, 0), (1e-4, D, 0), (1e-5, D, k), (1e-2, S, k)):
        if dtype is S and decades > 2:
            continue
        operator = counter(A.to(dtype))
        solution = cg(operator, b.to(dtype), tol=tol, max_iterations=20_000)
        assert solution.ok
        assert solution.products == operator.count
        if columns is None or decades == 2:  # else rounding decides how many steps a column takes in a block
            alone = [cg(A.to(dtype), column.to(dtype), tol=tol, max_iterations=20_000) for column in b.view(80, k).unbind(1)]
            assert operator.count == sum(one.iterations for one in alone) + more
        true = torch.linalg.vector_norm(A @ solution.x.double() - b, dim=0) / torch.linalg.vector_norm(b, dim=0)
        assert bool((true <= 1.01 * tol).all())
        assert bool(((solution.residual - true).abs() <= 0.01 * tol).all())


def test_what_is_left_of_a_warm_start_decides_too(symmetric, gaussian):
    """From a start as good as 1e-8 a tolerance of 1e-9 is loose for the recursion, but not for the residual it began with."""
    A, b = symmetric(torch.logspace(-3, 0, 60, dtype=torch.float64)), gaussian(60)
    exact = torch.linalg.solve(A, b)
    near, rough = exact * (1 + 1e-8), exact * (1 + 1e-3)
    for tol, start, more in ((1e-9, near, 2), (1e-2, None, 0), (1e-2, 1e4 * near, 2), (1e-6, rough, 1), (5e-8, rough, 2)):
        solution = cg(A, b, tol=tol, x0=start)
        assert solution.ok
        assert solution.products == solution.iterations + more
        assert torch.linalg.vector_norm(A @ solution.x - b) <= 1.01 * tol * torch.linalg.vector_norm(b)
