"""Every solver on every kind of system, judged by dense linear algebra in float64."""

from __future__ import annotations

import pytest
import torch

from torch_bilevel.linalg import SolveStatus, cg, cholesky, minres, solve

SOLVERS = {
    "auto": {"solver": "auto"},
    "cholesky": {"solver": "cholesky"},
    "cg": {"solver": "cg"},
    "cg-reorthogonalised": {"solver": "cg", "reorthogonalise": True},
    "cg-preconditioned": {"solver": "cg", "preconditioner": lambda R: 0.5 * R},
    "cg-reorthogonalised-preconditioned": {
        "solver": "cg",
        "reorthogonalise": True,
        "preconditioner": lambda R: 0.5 * R,
    },  # fmt: skip
    "chebyshev": {"solver": "chebyshev"},
    "minres": {"solver": "minres"},
    "minres-preconditioned": {"solver": "minres", "preconditioner": lambda R: 0.5 * R},
}
ITERATIVE = {name: options for name, options in SOLVERS.items() if options["solver"] in ("cg", "minres")}
n = 40


@pytest.fixture(params=SOLVERS, ids=str)
def options(request):
    return dict(SOLVERS[request.param])


@pytest.fixture(params=ITERATIVE, ids=str)
def iterative(request):
    return dict(ITERATIVE[request.param])


def relative_residual(A, x, b):
    """|A x - b| / |b| per column in float64 on the CPU."""
    A, x, b = (t.detach().to("cpu", torch.float64) for t in (A, x, b))
    scale = b.abs().amax(0).clamp_min(1e-300)
    return torch.linalg.vector_norm(A @ (x / scale) - b / scale, dim=0) / torch.linalg.vector_norm(
        b / scale, dim=0
    )


def check(A, b, solution, tol):
    """Converged, of the right kind, and honest about its residual."""
    assert solution.ok, solution.describe()
    assert solution.x.shape == b.shape
    assert solution.x.dtype == b.dtype
    assert solution.x.device == b.device
    assert solution.residual.shape == b.shape[1:]
    nonzero = (b.abs().amax(0) > 0).cpu()
    true = relative_residual(A, solution.x, b)
    eps = torch.finfo(b.dtype).eps
    assert bool((true[nonzero] <= tol + 20 * eps).all())
    reported = solution.residual.to("cpu", torch.float64)
    assert bool(((reported - true)[nonzero].abs() <= 0.01 * tol + 20 * eps).all())


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("columns", [None, 1, 5])
def test_well_conditioned(options, device, symmetric, gaussian, dtype, tol, columns):
    A64 = symmetric(torch.linspace(1, 10, n))
    b64 = gaussian(n) if columns is None else gaussian(n, columns)
    A, b = A64.to(device, dtype), b64.to(device, dtype)
    solution = solve(A, b, **options)
    check(A, b, solution, tol)
    expected = torch.linalg.solve(A64, b64)
    error = torch.linalg.norm(solution.x.to("cpu", torch.float64) - expected) / torch.linalg.norm(expected)
    assert float(error) < 10 * tol  # condition number 10


def test_ill_conditioned(options, device, symmetric, gaussian):
    A = symmetric([*torch.logspace(0, -6, 10, dtype=torch.float64).tolist(), *[1.0] * 30]).to(device)
    b = gaussian(n).to(device)
    check(A, b, solve(A, b, tol=1e-8, **options), 1e-8)


def test_one_by_one(options, device):
    A = torch.tensor([[2.0]], dtype=torch.float64, device=device)
    b = torch.tensor([3.0], dtype=torch.float64, device=device)
    solution = solve(A, b, **options)
    check(A, b, solution, 1e-12)
    assert float(solution.x) == pytest.approx(1.5, rel=1e-15)


def test_multiple_of_identity(options, device):
    """2x = [3, 4]: one step reaches the solution, and that step is taken."""
    A = 2 * torch.eye(2, dtype=torch.float64, device=device)
    b = torch.tensor([3.0, 4.0], dtype=torch.float64, device=device)
    solution = solve(A, b, **options)
    check(A, b, solution, 1e-12)
    torch.testing.assert_close(
        solution.x.cpu(), torch.tensor([1.5, 2.0], dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("shape", [(n,), (n, 3)])
def test_zero_right_hand_side(options, device, symmetric, gaussian, shape):
    A = symmetric(torch.linspace(1, 10, n)).to(device)
    b = torch.zeros(shape, dtype=torch.float64, device=device)
    for x0 in (None, gaussian(*shape).to(device)):
        solution = solve(A, b, x0=x0, **options)
        assert solution.ok
        assert bool((solution.x == 0).all())
        assert bool((solution.residual == 0).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_scale_of_right_hand_side(options, device, symmetric, gaussian, scale, dtype, tol):
    A = symmetric(torch.linspace(1, 10, n)).to(device, dtype)
    b = (gaussian(n) * scale).to(device, dtype)
    check(A, b, solve(A, b, **options), tol)


def test_start_at_the_solution(iterative, device, symmetric, gaussian, counter):
    A = symmetric(torch.linspace(1, 10, n)).to(device)
    b = gaussian(n).to(device)
    x0 = torch.linalg.solve(A, b)
    operator = counter(A)
    solution = solve(operator, b, x0=x0, **iterative)
    check(A, b, solution, 1e-10)
    assert solution.iterations == 0
    assert solution.products == operator.count == 1
    assert bool((solution.x == x0).all())


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_random_start(iterative, device, symmetric, gaussian, size):
    A = symmetric(torch.linspace(1, 10, n)).to(device)
    b, x0 = gaussian(n).to(device), size * gaussian(n, seed=1).to(device)
    kept = x0.clone()
    check(A, b, solve(A, b, x0=x0, **iterative), 1e-10)
    assert bool((x0 == kept).all())


def test_columns_of_different_difficulty(options, device, symmetric, gaussian, counter):
    A = symmetric(torch.linspace(1, 1000, n)).to(device)
    eigenvectors = torch.linalg.eigh(A).eigenvectors
    b = torch.stack([
        torch.zeros(n, dtype=torch.float64, device=device),
        eigenvectors[:, 3],
        gaussian(n).to(device),
        1e-20 * eigenvectors[:, :3].sum(1),
        1e10 * gaussian(n, seed=1).to(device),
    ], dim=1)  # fmt: skip
    operator = counter(A)
    solution = solve(operator, b, tol=1e-9, **options)
    check(A, b, solution, 1e-9)
    assert bool((solution.x[:, 0] == 0).all())
    assert float(solution.residual[0]) == 0
    assert solution.products == operator.count
    if (
        options["solver"] in ("cg", "minres") and device.type == "cpu"
    ):  # on CUDA a stopped column waits for the check
        alone = sum(solve(A, b[:, j], tol=1e-9, **options).products for j in range(5))
        assert abs(solution.products - alone) <= 8  # blocked products round differently: a step more or less


def test_no_columns(options, device):
    A = torch.eye(3, dtype=torch.float64, device=device)
    solution = solve(A, torch.zeros(3, 0, dtype=torch.float64, device=device), **options)
    assert solution.ok
    assert solution.x.shape == (3, 0)
    assert solution.residual.shape == (0,)
    assert solution.describe()


def test_singular_consistent(iterative, device, symmetric, gaussian):
    A = symmetric([0.0] * 5 + torch.linspace(1, 10, n - 5).tolist()).to(device)
    b = A @ gaussian(n).to(device)
    check(A, b, solve(A, b, **iterative), 1e-10)


@pytest.mark.parametrize("spectrum", [[0.0] * 5, [0.0]])
def test_singular_inconsistent_is_not_success(options, device, symmetric, gaussian, spectrum):
    A = symmetric(spectrum + torch.linspace(1, 10, n - len(spectrum)).tolist()).to(device)
    b = gaussian(n).to(device)
    solution = solve(A, b, **options)
    assert not solution.ok
    assert solution.status is not SolveStatus.NON_FINITE
    assert bool(solution.x.isfinite().all())
    true = relative_residual(A, solution.x, b)
    if solution.x.abs().max() > 0:
        # x is large here, and a GPU rounds otherwise than the CPU that judges it
        rounding = 0.0 if device.type == "cpu" else 100 * torch.finfo(b.dtype).eps * float(solution.x.norm() / b.norm())
        assert float(solution.residual) == pytest.approx(float(true), rel=1e-3, abs=rounding)
    if options["solver"] == "minres":  # the least-squares residual: the part of b in the null space
        values, vectors = torch.linalg.eigh(A)
        null = vectors[:, values.abs() < 1e-8]
        least = torch.linalg.norm(null.mT @ b) / torch.linalg.norm(b)
        assert float(true) == pytest.approx(float(least), rel=0.1)


def test_indefinite(options, device, symmetric, gaussian):
    A = symmetric([-3.0, -1.0] + torch.linspace(1, 10, n - 2).tolist()).to(device)
    b = gaussian(n).to(device)
    solution = solve(A, b, **options)
    if options["solver"] == "minres":
        check(A, b, solution, 1e-10)
        return
    assert not solution.ok
    assert solution.status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NOT_POSITIVE_DEFINITE)
    assert bool(solution.x.isfinite().all())
    if options["solver"] in ("cg", "chebyshev"):
        d = solution.direction
        assert solution.status is SolveStatus.NEGATIVE_CURVATURE
        assert d.shape == (n,)
        curvature = (d @ A @ d) / (d @ d)
        assert -3 <= float(curvature) < 0
        assert float(solution.curvature) == pytest.approx(float(curvature), rel=1e-8)
    else:
        assert float(solution.curvature) == pytest.approx(-3.0, rel=1e-8)


@pytest.mark.parametrize("place", ["corner", "everywhere"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrix(options, device, symmetric, gaussian, place, bad):
    A = symmetric(torch.linspace(1, 10, n)).to(device)
    if place == "corner":
        A[0, 0] = bad
    else:
        A[:] = bad
    for b in (gaussian(n).to(device), gaussian(n, 3).to(device)):
        solution = solve(A, b, **options)
        assert solution.status is SolveStatus.NON_FINITE, solution.describe()
        assert bool(solution.x.isfinite().all())


def test_right_hand_side_must_be_finite(options, device):
    b = torch.tensor([1.0, float("nan")], device=device)
    with pytest.raises(ValueError, match="b: expected finite entries, got 1"):
        solve(torch.eye(2, device=device), b, **options)


def test_iteration_limit(iterative, symmetric, gaussian):
    A, b = symmetric(torch.linspace(1, 1000, n)), gaussian(n)
    solution = solve(A, b, max_iterations=3, **iterative)
    assert solution.status is SolveStatus.MAX_ITERATIONS
    assert solution.iterations == 3
    assert solution.products == 4
    assert float(solution.residual) == pytest.approx(float(relative_residual(A, solution.x, b)), rel=1e-10)


def test_tolerance_below_rounding_is_not_success(iterative, symmetric, gaussian):
    A, b = symmetric(torch.linspace(1, 1000, n)).float(), gaussian(n).float()
    solution = solve(A, b, tol=1e-12, **iterative)
    assert solution.status is SolveStatus.STAGNATION
    assert 1e-12 < float(relative_residual(A, solution.x, b)) < 1e-5


@pytest.mark.parametrize("solver", [cg, minres])
def test_absolute_tolerance(solver, symmetric, gaussian):
    A, b = symmetric(torch.linspace(1, 1000, n)), 1e-3 * gaussian(n, 2)
    solution = solver(A, b, tol=0.0, atol=1e-7)
    residual = torch.linalg.vector_norm(A @ solution.x - b, dim=0)
    assert solution.ok
    assert bool((residual <= 1e-7).all())
    assert bool((residual > 1e-12).any())
    assert solver(A, 1e-9 * b, tol=0.0, atol=1e-7).products == 0


@pytest.mark.parametrize("solver", [cg, minres])
def test_products_are_counted(solver, symmetric, gaussian, counter):
    A = symmetric(torch.linspace(1, 10, n))
    operator = counter(A)
    solution = solver(operator, gaussian(n), tol=1e-8)
    assert solution.products == operator.count == solution.iterations + 1  # one for the true residual
    # The Chebyshev bound for condition number 10: 2 ((sqrt 10 - 1) / (sqrt 10 + 1))^k <= 1e-8 sqrt(1/10) at k
    # = 32.
    assert solution.iterations <= 32


def test_cholesky_counts_its_products(symmetric, gaussian, counter):
    operator = counter(symmetric(torch.linspace(1, 10, n)), block_size=7)
    solution = solve(operator, gaussian(n, 3), solver="cholesky")
    assert solution.products == operator.count == n + 3


def test_block_size_is_respected(iterative, symmetric, gaussian, counter):
    operator = counter(symmetric(torch.linspace(1, 10, n)), block_size=2)  # asserts the width of its blocks
    b = gaussian(n, 5)
    check(operator.to_dense(), b, solve(operator, b, **iterative), 1e-10)


@pytest.mark.parametrize("name", ITERATIVE)
def test_check_every_only_delays_the_end(name, symmetric, gaussian):
    """What runs on a GPU: masked columns between looks give the same answer to rounding."""
    A, b = symmetric(torch.linspace(1, 100, n)), gaussian(n, 4)
    b[:, 1] = torch.linalg.eigh(A).eigenvectors[:, 0]
    options = dict(ITERATIVE[name])
    solver = {"cg": cg, "minres": minres}[options.pop("solver")]
    each, seldom = (solver(A, b, tol=1e-9, check_every=every, **options) for every in (1, 10))
    check(A, b, seldom, 1e-9)
    torch.testing.assert_close(each.x, seldom.x, rtol=0, atol=1e-9)
    assert seldom.iterations - each.iterations < 10


def test_factor_as_preconditioner(symmetric, gaussian):
    A = symmetric(torch.logspace(0, -4, n, dtype=torch.float64))
    near = A + 1e-6 * symmetric(torch.linspace(0, 1, n), seed=1)
    b = gaussian(n, 2)
    factor = cholesky(near)
    for solver in (cg, minres):
        solution = solver(A, b, tol=1e-9, preconditioner=factor)
        check(A, b, solution, 1e-9)
        assert solution.iterations <= 6 < solver(A, b, tol=1e-9).iterations


@pytest.mark.parametrize("solver", [cg, minres])
def test_indefinite_preconditioner_is_reported(solver, symmetric, gaussian):
    A, b = symmetric(torch.linspace(1, 10, n)), gaussian(n)
    solution = solver(A, b, preconditioner=lambda R: -R)
    assert solution.status is SolveStatus.NOT_POSITIVE_DEFINITE
    assert "preconditioner" in solution.describe()
    solution = solver(A, b, preconditioner=lambda R: R * float("nan"))
    assert solution.status is SolveStatus.NON_FINITE
    assert bool(solution.x.isfinite().all())
