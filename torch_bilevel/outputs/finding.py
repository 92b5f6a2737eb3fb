"""The Hessian of a recorded objective in the learner's outputs, where everything else of y is apart from them.

h(x, y) = phi(x, y, z) at z = A y: phi is the loss with the outputs of its calls in the place of what it makes of y. Its
derivatives cost what is done to the outputs, and no product with the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..derivatives import fast_products
from .calls import LinearCall, Replacement

if TYPE_CHECKING:
    from ..derivatives import Linearisation, Objective

#: difference over the size of the terms that counts as rounding, in units of eps
ROUNDING = 200


@dataclass
class Found:
    """Hess phi = diag(d) in y, blocks B (K, K, n) in z, nothing between y and z; and, with x, as ``OutputHessian`` has it."""

    blocks: list[Tensor]
    diagonal: Tensor
    cross: tuple[LinearCall, Tensor] | None = None
    xx: Tensor | None = None


def find(at: Linearisation, calls: list[LinearCall]) -> Found | None:
    """Hess phi, or None where it has another form, or where h is not phi(x, y, A y).

    The form is believed if the gradient of h is that of phi, by the chain rule, and a random vector is multiplied as by Hess phi.
    """
    phi = _Phi(at, calls)
    if not phi.has_gradient(at.gy):
        return None
    blocks = [phi.block(i) for i in range(len(calls))]
    diagonal = phi.product(y=torch.ones_like(at.y))[0]
    random = torch.Generator().manual_seed(0)
    r = _randn(at.y, random)
    rz = [_randn(z, random) for z in phi.zs]
    on_y, *on_z = phi.product(y=r, zs=rz)
    direct = diagonal * r
    if not _same(direct, on_y):
        return None
    for call, B, v, true in zip(calls, blocks, rz, on_z):
        if not _same(apply_block(B, call.by_outputs(v)), call.by_outputs(true), beside=direct.norm() * call.share):
            return None
    found = Found(blocks, diagonal)
    if "x" in at.wrt:
        u = _randn(at.x, random)
        (_, *C, xx), (on_y, *on_z, on_x) = phi.product(x=torch.ones_like(u)), phi.product(x=u)
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


class _Phi:
    """phi at one point, its gradient recorded."""

    def __init__(self, at: Linearisation, calls: list[LinearCall]):
        self.calls, has_x = calls, "x" in at.wrt
        self.x, self.y = at.x.clone().requires_grad_(has_x), at.y.clone().requires_grad_(True)
        self.zs = [torch.zeros(call.shape, dtype=at.y.dtype, device=at.y.device, requires_grad=True) for call in calls]
        self.leaves = [self.y, *self.zs, self.x] if has_x else [self.y, *self.zs]
        with torch.enable_grad(), fast_products(self.x, self.y):
            value = self._value(at.objective)
            self.gradients = torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True, materialize_grads=True)

    def _value(self, h: Objective) -> Tensor:
        """phi = a f + b g + b' <g_y, v>, where <g_y, v> = <phi_y, v> + <phi_z, A v> with the phi of g."""
        with Replacement(self.y, self.calls, self.zs):
            values = {level: next(iter(h.problem.pieces(level)))[1](self.x, self.y) for level, used in h.uses.items() if used}
        total = h.upper * values.get("upper", 0.0) + h.lower * values.get("lower", 0.0)
        if h.tangent is None:
            return total
        parts = torch.autograd.grad(values["lower"], [self.y, *self.zs], create_graph=True, allow_unused=True)
        directions = [h.tangent, *(call.outputs(h.tangent[:, None])[:, 0].mT.reshape(call.shape) for call in self.calls)]
        return total + h.tangent_weight * sum((p * v).sum() for p, v in zip(parts, directions) if p is not None)

    def has_gradient(self, gy: Tensor) -> bool:
        """Whether phi_y + A' phi_z is the gradient of h."""
        mine = self.gradients[0].detach().clone()[:, None]
        size = torch.linalg.vector_norm(mine)
        for call, g in zip(self.calls, self.gradients[1:]):
            call.add_adjoint(mine, call.by_outputs(g.detach()))
            size += call.norm * torch.linalg.vector_norm(g.detach())
        return bool(torch.linalg.vector_norm(mine[:, 0] - gy) <= ROUNDING * torch.finfo(gy.dtype).eps * size)

    def product(self, y: Tensor | None = None, zs: list[Tensor] | None = None, x: Tensor | None = None) -> list[Tensor]:
        """Hess phi (y, z, x) as [y-part, z-parts..., x-part]; None stands for zero."""
        directions = [y, *(zs or [None] * len(self.zs)), x]
        pairs = [(g, v) for g, v in zip(self.gradients, directions) if v is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        outputs, vectors = zip(*pairs)
        parts = torch.autograd.grad(outputs, self.leaves, vectors, retain_graph=True, allow_unused=True, materialize_grads=True)
        return list(parts)

    def block(self, i: int) -> Tensor:
        """Of the Hessian in the outputs of one call, were each sample on its own: (K, K, n). By a vector of ones an output."""
        z, g, K = self.zs[i], self.gradients[1 + i], self.calls[i].index.shape[1]
        n = z.numel() // K
        if not g.requires_grad:
            return z.new_zeros(K, K, n)
        ones = torch.eye(K, dtype=z.dtype, device=z.device)[:, None, :].expand(K, n, K).reshape(K, *z.shape)
        return _rows(g, z, ones).reshape(K, n, K).mT.contiguous()


def _rows(gradient: Tensor, z: Tensor, cotangents: Tensor) -> Tensor:
    """d<gradient, c>/dz for every cotangent c, stacked."""
    try:
        (rows,) = torch.autograd.grad(gradient, z, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True)
        return torch.zeros_like(cotangents) if rows is None else rows
    except RuntimeError:  # an operation without a vmap rule
        rows = [torch.autograd.grad(gradient, z, c, retain_graph=True, allow_unused=True)[0] for c in cotangents]
        return torch.stack([torch.zeros_like(z) if row is None else row for row in rows])


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _same(mine: Tensor, true: Tensor, beside: Tensor | float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, of their entries or of a term of this size beside them."""
    size = torch.linalg.vector_norm(mine) + beside
    return bool(torch.linalg.vector_norm(mine - true) <= ROUNDING * torch.finfo(true.dtype).eps * size)
