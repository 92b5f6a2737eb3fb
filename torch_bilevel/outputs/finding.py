"""The form of a Hessian in the learner's outputs: blocks of samples, and a diagonal of y; found, and tested."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recorded import LinearCall, Phi
from ..recorded.phi import ROUNDING


@dataclass
class Found:
    """Hess phi = diag(d) in y, blocks B (K, K, n) in z, nothing between y and z; and, with x, as ``OutputHessian`` has it."""

    blocks: list[Tensor]
    diagonal: Tensor
    cross: tuple[LinearCall, Tensor] | None = None
    xx: Tensor | None = None


def find(phi: Phi) -> Found | None:
    """Hess phi, or None where it has another form, which is tested by random vectors.

    Cost: a pass for a block of a column an output and two more; one for two columns of x.
    """
    y, zs, calls, random = phi.y, phi.zs, phi.calls, torch.Generator().manual_seed(0)
    r, *rz = (_randn(leaf, random) for leaf in (y, *zs))
    Y, R = torch.stack([torch.ones_like(r), r]), [call.by_outputs(v) for call, v in zip(calls, rz)]
    if not phi.complete:  # a hidden layer, say: before blocks are made of its many outputs
        on_y, _ = _products(phi, {y: Y} | {z: call.as_called(_units(v, 0)) for call, z, v in zip(calls, zs, R)})
        if not _same(on_y[0] * r, on_y[1]):
            return None
    K = max(len(v) for v in R)
    given = {y: torch.cat([Y, Y.new_zeros(K, len(r))])}
    given |= {z: call.as_called(_units(v, K)) for call, z, v in zip(calls, zs, R)}
    on_y, on_zs = _products(phi, given)
    diagonal = on_y[0]
    direct = diagonal * r
    if not _same(direct, on_y[1]):
        return None
    blocks = [Z[:, 2 : 2 + len(Z)].contiguous() for Z in on_zs]
    for call, B, Z, v in zip(calls, blocks, on_zs, R):
        if not _same(apply_block(B, v)[:, 0], Z[:, 1], beside=direct.norm() * call.share):
            return None
    found = Found(blocks, diagonal)
    if "x" in phi.wrt:
        u = _randn(phi.x, random)
        on_y, on_zs, on_x = _products(phi, {phi.x: torch.stack([torch.ones_like(u), u])}, phi.x)
        if _same(on_x[0] * u, on_x[1]):
            found.xx = on_x[0]
        own = [(call, *Z.unbind(1)) for call, Z in zip(calls, on_zs) if bool(Z[:, 1].any())]
        if len(own) == 1 and len(own[0][0].X) == len(u) and not bool(on_y[1].any()):
            call, c, true = own[0]
            if _same(c * u, true):
                found.cross = call, c.mT
    return found


def _units(v: Tensor, K: int) -> Tensor:
    """Columns for the outputs of a call, (k, 1, n) -> (k, 2 + K, n): zero, v, and every output by itself."""
    k, _, n = v.shape
    Z = v.new_zeros(k, 2 + K, n)
    Z[:, 1] = v[:, 0]
    for i in range(min(k, K)):
        Z[i, 2 + i] = 1
    return Z


def _products(phi: Phi, given: dict[Tensor, Tensor], *also: Tensor) -> list:
    """Hess phi times columns by their leaves: at y (m, dy), at the outputs of every call (K, m, n), and at others (m, ...)."""
    leaves, m = [phi.y, *phi.zs, *also], len(next(iter(given.values())))
    try:
        parts = phi.second(given, leaves, batched=True)
    except RuntimeError:  # an operation without a vmap rule
        columns = [phi.second({leaf: v[j : j + 1] for leaf, v in given.items()}, leaves) for j in range(m)]
        parts = [None if part[0] is None else torch.stack(part) for part in zip(*columns)]
    on_y, *rest = [leaf.new_zeros(m, *leaf.shape) if part is None else part for part, leaf in zip(parts, leaves)]
    return [on_y, [call.by_outputs(part) for call, part in zip(phi.calls, rest)], *rest[len(phi.calls) :]]


def apply_block(B: Tensor, Z: Tensor) -> Tensor:
    """sum_l B_kl Z_l for every sample: (K, K, n), (K, c, n) -> (K, c, n)."""
    out = B[:, 0, None] * Z[0]
    for column, z in zip(B.unbind(1)[1:], Z[1:]):
        out.addcmul_(column[:, None], z)
    return out


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _same(mine: Tensor, true: Tensor, beside: Tensor | float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, of their entries or of a term of this size beside them."""
    size = torch.linalg.vector_norm(mine) + beside
    return bool(torch.linalg.vector_norm(mine - true) <= ROUNDING * torch.finfo(true.dtype).eps * size)
