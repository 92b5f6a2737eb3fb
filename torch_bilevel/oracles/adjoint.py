"""The adjoint system g_yy v = f_y by a set number of products, as the first-order papers solve it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

ADJOINTS = ("cg", "neumann", "fixed_point")


def conjugate_gradient_steps(
    product: Product, b: Tensor, steps: int, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``steps`` iterations of conjugate gradients on A v = b from v (default 0), neither fewer nor more.

    Returns:
        v (n,) and the least Rayleigh quotient p'Ap / p'p met, (): a negative one shows that A is not positive
        definite.

    Cost: ``steps`` products, one more with a start. Nothing waits for the device.

    References: Hestenes and Stiefel 1952. ``linalg.cg`` is the solver to a tolerance; it also recomputes its
        residual.
    """
    r = b if v is None else b - product(v)
    v = torch.zeros_like(b) if v is None else v
    p, rr = r, torch.dot(r, r)
    solved = (0.01 * torch.finfo(b.dtype).eps) ** 2 * torch.dot(b, b)  # below it the recursion drifts on its own
    least = largest = None
    for _ in range(steps):
        Ap = product(p)
        pAp, pp = torch.dot(p, Ap), torch.dot(p, p)
        done = rr <= solved  # later steps change nothing
        quotient = torch.where(done, torch.full_like(rr, torch.inf), pAp / pp)
        least = quotient if least is None else torch.minimum(least, quotient)
        size = torch.where(done, torch.zeros_like(rr), quotient.abs())
        largest = size if largest is None else torch.maximum(largest, size)
        alpha = torch.where(done, torch.zeros_like(rr), rr / pAp)
        v, r = v + alpha * p, r - alpha * Ap
        new = torch.dot(r, r)
        p = r + torch.where(done, torch.zeros_like(rr), new / rr) * p
        rr = new
    if least is None:
        return v, b.new_tensor(torch.inf)
    rounding = 10 * torch.finfo(b.dtype).eps * largest
    return v, torch.where(least < -rounding, least, least.abs())


def fixed_point_steps(product: Product, b: Tensor, steps: int, lr: float, v: Tensor | None = None) -> Tensor:
    """v <- v - lr (A v - b), ``steps`` times: contracts when lr < 2 / |A|. Cost: ``steps`` products.

    References: Grazzi, Franceschi, Pontil, Salzo, ICML 2020 (the fixed-point method).
    """
    v = torch.zeros_like(b) if v is None else v
    for _ in range(steps):
        v = v - lr * (product(v) - b)
    return v


def neumann_series(product: Product, b: Tensor, steps: int, lr: float) -> Tensor:
    """lr sum_{k=0}^{K} (I - lr A)^k b, the partial sum of A^{-1} b with K = ``steps`` products.

    References: Lorraine, Vicol, Duvenaud, AISTATS 2020; Ji, Yang, Liang, ICML 2021.
    """
    term = total = b
    for _ in range(steps):
        term = term - lr * product(term)
        total = total + term
    return lr * total
