"""The Chebyshev expansion of the inverse: a fixed polynomial in A in place of a Krylov method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .lanczos import affordable_basis, lanczos_extreme
from .operator import LinearOperator, as_operator
from .refinement import CONVERGED, NON_FINITE, RUNNING, Cycle, column_norms, refine
from .solution import Solution, SolveStatus

#: terms of one expansion, at most; reached at a condition number of about 1e8.
MAX_ORDER = 200_000


@dataclass(frozen=True)
class Spectrum:
    """An interval [lowest, largest] that holds the spectrum of a positive definite matrix.

    Attributes:
        status: CONVERGED; NEGATIVE_CURVATURE or NOT_POSITIVE_DEFINITE where ``lowest`` is not positive; NON_FINITE.
        products: what the estimate cost.
        direction, curvature: (n,) unit d and () d'Ad of the lowest Ritz pair of a matrix that is not positive definite.
    """

    lowest: float
    largest: float
    products: int = 0
    status: SolveStatus = SolveStatus.CONVERGED
    direction: Tensor | None = None
    curvature: Tensor | None = None


def estimate_spectrum(A: LinearOperator | Tensor, seed: int = 0) -> Spectrum:
    """Bounds of the spectrum by two Lanczos runs: 1.02 (theta + bound) above, theta - min(bound, theta / 2) below.

    An upper end that is too low would make the expansion grow, one that is too high costs little; a lower end that is
    too high only leaves those components for another cycle of refinement. So only the upper end gets a margin.

    Cost: 5 to 40 products for condition numbers up to 100, at most a few hundred; ``LowerSystems`` makes it once.
    """
    A = as_operator(A)
    generator = torch.Generator().manual_seed(seed)
    high = lanczos_extreme(A, which="max", tol=2e-2, generator=generator, max_basis=affordable_basis(A.n, A.dtype, 60))
    products, bad = high.products, high.status is SolveStatus.NON_FINITE
    low = high
    for tol in (1e-2, 1e-5):
        if bad:
            break
        low = lanczos_extreme(
            A, which="min", tol=tol, generator=generator, max_basis=affordable_basis(A.n, A.dtype, 150), max_iterations=300
        )
        products, bad = products + low.products, low.status is SolveStatus.NON_FINITE
        if not bad and abs(float(low.value)) > float(low.error_bound):
            break
    if bad:
        return Spectrum(math.nan, math.nan, products, SolveStatus.NON_FINITE)
    theta, bound, largest = float(low.value), float(low.error_bound), float(high.value + high.error_bound)
    rounding = 10 * A.n**0.5 * torch.finfo(A.dtype).eps * max(abs(largest), abs(theta))
    if not theta > rounding:
        status = SolveStatus.NEGATIVE_CURVATURE if theta < -rounding else SolveStatus.NOT_POSITIVE_DEFINITE
        return Spectrum(theta, largest, products, status, low.vector, low.value)
    margin = 1.02 if float(high.error_bound) > rounding else 1.0  # an invariant subspace has told everything
    return Spectrum(theta - min(bound, 0.5 * theta), margin * max(largest, theta), products)


def chebyshev_order(kappa: float, tol: float) -> int:
    """Smallest K with 2 sqrt(kappa) q^(K+1) / (1 - q) <= tol, q = (sqrt kappa - 1) / (sqrt kappa + 1)."""
    q = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    if not q > 0:
        return 0
    wanted = math.log(tol * (1 - q) / (2 * math.sqrt(kappa))) / math.log(q) - 1
    return min(max(math.ceil(wanted), 0), MAX_ORDER)


def expand_inverse(A: LinearOperator, B: Tensor, lowest: float, largest: float, order: int) -> Tensor:
    """p_K(A) B with p_K the Chebyshev expansion of 1/x on [lowest, largest] up to T_K: (n, k) -> (n, k).

    With x = c + h t, c = (largest + lowest) / 2, h = (largest - lowest) / 2 and q as above,
        1/x = (lowest largest)^(-1/2) [1 + 2 sum_k (-q)^k T_k(t)],    T_{k+1} = 2 t T_k - T_{k-1}.

    Cost: ``order`` products per column; memory: 4 blocks of B's size.
    """
    centre, half = 0.5 * (largest + lowest), 0.5 * (largest - lowest)
    if not half > 20 * torch.finfo(B.dtype).eps * centre:
        return B / centre
    scale, root = 1.0 / math.sqrt(lowest * largest), math.sqrt(largest / lowest)
    q = (root - 1) / (root + 1)
    previous, current = B, B
    total = scale * B
    for k in range(1, order + 1):
        shifted = (A.apply(current) - centre * current) / half
        previous, current = current, (shifted if k == 1 else 2 * shifted - previous)
        total = total + (2 * scale * (-q) ** k) * current
    return total


def chebyshev(
    A: LinearOperator | Tensor,
    b: Tensor,
    *,
    spectrum: Spectrum | tuple[float, float] | None = None,
    order: int | None = None,
    tol: float | None = 1e-6,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
) -> Solution:
    """Solve A x = b by the Chebyshev expansion of the inverse on [mu, L], A symmetric positive definite.

    x = p_K(A) b with |1 - z p_K(z)| <= 2 sqrt(kappa) q^(K+1) / (1 - q) on the interval, and so for the relative
    residual. Unlike a Krylov method it takes no inner products and is linear in b, which is what IMCN and IFSBA
    want of it; it needs more products than ``cg``.

    Args:
        A: operator or (n, n) matrix. b: (n,) or (n, k).
        spectrum: (mu, L); None: estimated (``estimate_spectrum``).
        order: K; None: from kappa and ``tol``.
        tol: on |A x - b| / |b|. Another expansion is applied to the true residual while it misses this and at least
            halves. None with an order: one expansion, as published, whatever its accuracy; CONVERGED then says
            only that the residual is below 1.
        max_iterations: terms in all; default 200,000, or ``order`` with tol=None.
        x0: start of b's shape.

    Returns:
        A ``Solution`` with its recomputed residual; NEGATIVE_CURVATURE or NOT_POSITIVE_DEFINITE where the estimated
        spectrum is not positive; STAGNATION where the interval does not hold the spectrum.

    Raises:
        ValueError: mu and L not 0 < mu <= L, or tol=None without an order.

    Cost: K products per column, one for the residual, those of the estimate. Memory: 4 blocks of b's size.

    References: Luo, Li, Chen, NeurIPS 2022 (IMCN), lemma on the inverse; Mason and Handscomb, Chebyshev Polynomials, 5.

    Example:
        >>> import torch
        >>> chebyshev(torch.tensor([[2.0]]), torch.tensor([3.0])).x
        tensor([1.5000])
    """
    A = as_operator(A)
    if tol is None and order is None:
        raise ValueError("tol: expected a number, got None; only an expansion of a given order may go without.")
    if order is not None and not (isinstance(order, int) and order >= 0):
        raise ValueError(f"order: expected an int >= 0 or None (from tol), got {order!r}.")
    estimate = 0
    if spectrum is None:
        spectrum = estimate_spectrum(A)
        estimate = spectrum.products
    if not isinstance(spectrum, Spectrum):
        spectrum = Spectrum(*map(float, spectrum))
        if not 0 < spectrum.lowest <= spectrum.largest < math.inf:
            raise ValueError(f"spectrum: expected 0 < mu <= L, got {(spectrum.lowest, spectrum.largest)}.")
    if spectrum.status is not SolveStatus.CONVERGED:
        return _without_answer(A, b, spectrum)
    low, high = spectrum.lowest, spectrum.largest

    def run(R: Tensor, target: Tensor, budget: int) -> Cycle:
        terms = chebyshev_order(high / low, float(target.min())) if order is None else order
        E = expand_inverse(A, R, low, high, min(terms, budget))
        code = torch.where(E.isfinite().all(0), CONVERGED if terms <= budget else RUNNING, NON_FINITE)
        E = torch.where(E.isfinite().all(0), E, torch.zeros_like(E))  # an overflowed expansion is not an answer
        return Cycle(E, code, max(1, min(terms, budget)), min(terms, budget) * R.shape[1])

    budget = max_iterations if max_iterations is not None else MAX_ORDER if tol is not None else max(1, order)
    goal = 1.0 - 1e-6 if tol is None else tol
    found = refine(A, b, run, solver="chebyshev", tol=goal, max_iterations=budget, x0=x0)
    return Solution(found.x, found.status, found.residual, found.iterations, found.products + estimate,
                    found.solver)  # fmt: skip


def _without_answer(A: LinearOperator, b: Tensor, spectrum: Spectrum) -> Solution:
    """x = 0 (exact for b = 0) and the reason why there is no expansion."""
    norms = column_norms(b.unsqueeze(1) if b.ndim == 1 else b)
    residual = (norms != 0).to(b.dtype)
    return Solution(torch.zeros_like(b), spectrum.status, residual[0] if b.ndim == 1 else residual, 0,
                    spectrum.products, "chebyshev", spectrum.direction, spectrum.curvature)  # fmt: skip
