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
    """Hess phi, or None where it has another form, which is tested by a random vector."""
    y, zs, calls = phi.y, phi.zs, phi.calls
    diagonal = _zeros(phi.second({y: torch.ones_like(y)[None]}, [y]), [y])[0]
    random = torch.Generator().manual_seed(0)
    r, *rz = (_randn(leaf, random) for leaf in (y, *zs))
    given = {leaf: v[None] for leaf, v in zip((y, *zs), (r, *rz))}
    on_y, *on_z = _zeros(phi.second(given, [y, *zs]), [y, *zs])
    direct = diagonal * r
    if not _same(direct, on_y):  # a hidden layer, say: before blocks are made of its many outputs
        return None
    blocks = [_block(phi, z, call) for z, call in zip(zs, calls)]
    for call, B, v, true in zip(calls, blocks, rz, on_z):
        if not _same(apply_block(B, call.by_outputs(v)), call.by_outputs(true), beside=direct.norm() * call.share):
            return None
    found = Found(blocks, diagonal)
    if "x" in phi.wrt:
        u, leaves = _randn(phi.x, random), [phi.x, y, *zs]
        xx, _, *C = _zeros(phi.second({phi.x: torch.ones_like(u)[None]}, leaves), leaves)
        on_x, on_y, *on_z = _zeros(phi.second({phi.x: u[None]}, leaves), leaves)
        if _same(xx * u, on_x):
            found.xx = xx
        own = [(call, c, z) for call, c, z in zip(calls, C, on_z) if bool(z.any())]
        if len(own) == 1 and len(own[0][0].X) == len(u) and not bool(on_y.any()):
            call, c, z = own[0]
            c = c.reshape(len(u), -1)
            if _same(c * u[:, None], z.reshape(c.shape)):
                found.cross = call, c
    return found


def apply_block(B: Tensor, Z: Tensor) -> Tensor:
    """sum_l B_kl Z_l for every sample: (K, K, n), (K, c, n) -> (K, c, n)."""
    out = B[:, 0, None] * Z[0]
    for column, z in zip(B.unbind(1)[1:], Z[1:]):
        out.addcmul_(column[:, None], z)
    return out


def _block(phi: Phi, z: Tensor, call: LinearCall) -> Tensor:
    """Of the Hessian in the outputs of one call, were each sample on its own: (K, K, n). By a vector of ones an output."""
    K, n = call.index.shape[1], len(call.X)
    ones = call.as_called(torch.eye(K, dtype=z.dtype, device=z.device)[:, :, None].repeat(1, 1, n))
    try:
        (rows,) = phi.second({z: ones}, [z], batched=True)
    except RuntimeError:  # an operation without a vmap rule
        parts = [phi.second({z: one[None]}, [z])[0] for one in ones]
        rows = None if parts[0] is None else torch.stack(parts)
    return z.new_zeros(K, K, n) if rows is None else rows.reshape(K, n, K).mT.contiguous()


def _zeros(parts: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(parts, leaves)]


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _same(mine: Tensor, true: Tensor, beside: Tensor | float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, of their entries or of a term of this size beside them."""
    size = torch.linalg.vector_norm(mine) + beside
    return bool(torch.linalg.vector_norm(mine - true) <= ROUNDING * torch.finfo(true.dtype).eps * size)
