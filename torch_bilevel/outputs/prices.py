"""What Hessians by outputs cost, from the calls alone, in products of h_yy with one vector."""

from __future__ import annotations

import torch

from ..folding import bands
from ..recorded import LinearCall
from ..recorded.calls import PROBES

#: a multiplication inside a large matrix product over one inside a product with a vector, in time, by kind of device
GEMM = {"cpu": 0.6, "cuda": 0.15}
#: multiplications of a product with a vector that take as long as the calls it is made of
LEAST = {"cpu": 1_000_000, "cuda": 400_000_000}
#: the same of what is done to one output of one sample beside the product, exponentials and sums
OUTPUT = {"cpu": 300, "cuda": 0}
#: multiplications of all eigenvectors of an (n, n) matrix over n^3, and how many take as long as one of its n steps at least
EIGENVECTORS, STEP = 10, {"cpu": 0, "cuda": 500_000_000}
#: the same of the inverse of a positive definite matrix
INVERSE = 2
#: multiplications of a product with a vector that take as long as reading a number of a factor that no cache holds
READ = {"cpu": 8, "cuda": 1.5}
#: the same of one that a cache holds, up to so many rows
CACHED, CACHED_ROWS = 1.5, 2000
#: outputs up to which a product by B (K, K, n) is cheaper than the recorded one, on a CPU
FEW_OUTPUTS = 16
#: multiplications of a product from which float32 in its place pays for finding B, on a CPU
WORTH_SINGLE = 20_000_000
#: multiplications of h_yy from which a factor that only preconditions is made in float32, on a CPU, and their time over float64's
WORTH_SINGLE_FACTOR, SINGLE = 50_000_000, 0.4
#: rows of the corner of a ``KroneckerPreconditioner``: made soon, and for many solves
CORNERS = (400, 1600)
#: bands of rows of a symmetric block X' D X, from so many columns of X on
BANDS, WIDE = 4, 128


def vector_multiplications(calls: list[LinearCall]) -> int:
    """Of a product with h_yy, with one vector."""
    return sum(2 * len(call.X) * call.index.numel() for call in calls)


def in_products(calls: list[LinearCall], multiplications: float) -> float:
    """The time of these multiplications, in large matrix products, in products of h_yy with one vector."""
    return GEMM[_kind(calls)] * multiplications / one_product(calls)


def _kind(calls: list[LinearCall]) -> str:
    """Of device; those not measured count as a GPU."""
    return "cpu" if calls[0].X.device.type == "cpu" else "cuda"


def products_to_find(calls: list[LinearCall], with_x: bool = False) -> int:
    """Products that are counted where the outputs' Hessian is found: one an output, and those that test it."""
    return max(call.index.shape[1] for call in calls) + (2 * PROBES if with_x else PROBES)


def finding_price(calls: list[LinearCall]) -> float:
    """The time of finding the outputs' Hessian, in products with a vector: what is done to outputs, at least one product."""
    return max(1.0, products_to_find(calls) * OUTPUT[_kind(calls)] * _outputs(calls) / one_product(calls))


def _outputs(calls: list[LinearCall]) -> int:
    """Numbers that come out of them."""
    return sum(len(call.X) * call.index.shape[1] for call in calls)


def one_product(calls: list[LinearCall]) -> float:
    """Multiplications that take as long as a product with h_yy, with what is done to the outputs and at least its calls."""
    kind = _kind(calls)
    return max(LEAST[kind], vector_multiplications(calls) + OUTPUT[kind] * _outputs(calls))


def products_pay(calls: list[LinearCall]) -> bool:
    """Whether a product with one vector by the outputs' Hessian, once that is known, is cheaper than a recorded one."""
    return max(call.index.shape[1] for call in calls) <= FEW_OUTPUTS


def single_pays(calls: list[LinearCall]) -> bool:
    """Whether products by the outputs' Hessian in float32, once that is known, are much cheaper than recorded float64 ones."""
    X = calls[0].X
    large = vector_multiplications(calls) >= WORTH_SINGLE
    return X.dtype is torch.float64 and X.device.type == "cpu" and large and products_pay(calls)


def dense_multiplications(calls: list[LinearCall]) -> float:
    """Of h_yy."""
    sizes = [(len(c.X), *c.index.shape) for c in calls]
    return sum(n * banded(d) * K * (K + 1) / 2 for n, d, K in sizes)


def block_bands(d: int) -> list[tuple[int, int]]:
    """Of rows, in which a symmetric (d, d) block is formed, each from its diagonal on."""
    return bands(d, BANDS if d >= WIDE else 1)


def banded(d: int) -> int:
    """Entries of the block that are formed."""
    return sum((b - a) * (d - a) for a, b in block_bands(d))


def times_multiplications(calls: list[LinearCall], dy: int, columns: int) -> tuple[float, bool]:
    """Of h_yy W with so many columns, and whether by the matrix, which is then cheaper than blocks of products."""
    by_matrix = dense_multiplications(calls) + dy**2 * columns
    by_products = vector_multiplications(calls) * columns
    return min(by_matrix, by_products), by_matrix < by_products


def price(calls: list[LinearCall], more: float = 0.0, single: bool = False) -> float:
    """The time of h_yy by these calls and of ``more`` multiplications in large matrix products, in products with a vector;
    ``single``: in float32, where products are in float64."""
    return finding_price(calls) + (SINGLE if single else 1.0) * in_products(calls, dense_multiplications(calls) + more)


def single_factor_pays(calls: list[LinearCall]) -> bool:
    """Whether a factor in float32, where products are in float64, is so much cheaper that it may need a step more."""
    X = calls[0].X
    return X.dtype is torch.float64 and X.device.type == "cpu" and dense_multiplications(calls) >= WORTH_SINGLE_FACTOR


def eigenvectors(calls: list[LinearCall], n: int) -> float:
    """Multiplications in large matrix products that take as long as all eigenvectors of an (n, n) matrix."""
    return EIGENVECTORS * n**3 + STEP[_kind(calls)] * n


def corner_ranks(calls: list[LinearCall]) -> dict[int, int]:
    """Rows of the corner, 1 for none -> its inputs r, of the ``KroneckerPreconditioner`` that may be made, ascending; empty
    where the calls do not share their weights, or have one output only."""
    index = calls[0].index
    d, K = index.shape
    if K == 1 or not all(torch.equal(call.index, index) for call in calls[1:]):
        return {}
    return {max(1, r * K): r for r in (min(d, rows // K) for rows in CORNERS)}


def kronecker_price(calls: list[LinearCall], r: int) -> float:
    """The time of a ``KroneckerPreconditioner`` with a corner of r inputs, in products with a vector."""
    (d, K), n = calls[0].index.shape, sum(len(call.X) for call in calls)
    made = n * (banded(d) + d * r + banded(r) * K * (K + 1) / 2) + INVERSE * (d**3 + (r * K) ** 3)
    return finding_price(calls) + in_products(calls, made)


def kronecker_application(calls: list[LinearCall], rows: int) -> float:
    """The time of applying a ``KroneckerPreconditioner`` with a corner of so many rows, in products with a vector."""
    d, K = calls[0].index.shape
    return (d**2 * K + 2 * d * rows + CACHED * rows**2) / one_product(calls)


def factor_application(calls: list[LinearCall], n: int) -> float:
    """The time of applying a Cholesky factor of size n, in products with a vector."""
    return (CACHED if n <= CACHED_ROWS else READ[_kind(calls)]) * n**2 / one_product(calls)
