"""OutputHessian: h_yy, h_yx and h_xx of a recorded objective, assembled from the Hessians of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..derivatives import fast_products
from ..folding import multiply
from .calls import LinearCall, Watch
from .kronecker import KroneckerPreconditioner
from .pairs import add_pairs
from .prices import times_multiplications

if TYPE_CHECKING:
    from ..derivatives import Linearisation

#: numbers of all outputs of a block of products: bounds memory
COLUMN_NUMBERS = 2**23
#: |A' B A v + d v - h_yy v| over the norms of its terms that counts as rounding, in units of eps
ROUNDING = 200


class OutputHessian:
    """h_yy, h_yx and h_xx of one recorded objective, from Hessians with respect to the learner's outputs.

    Attributes:
        calls: the linear maps; each with its B (n, K, K) in ``blocks``.
        diagonal: d (dy,).
        cross: C (n, K) and its call where x_i meets the i-th sample only, else None.
        xx: the diagonal (dx,) of h_xx where that is a diagonal matrix, else None.
    """

    def __init__(self, calls: list[LinearCall], blocks: list[Tensor], diagonal: Tensor):
        self.calls, self.blocks, self.diagonal = calls, blocks, diagonal
        self.cross: tuple[LinearCall, Tensor] | None = None
        self.xx: Tensor | None = None

    @classmethod
    def of(cls, at: Linearisation, calls: list[LinearCall]) -> OutputHessian | None:
        """That of ``at``, whose objective makes these calls, or None where it is not of this kind.

        Cost: one pass with its graph; max K products with the outputs' Hessian and two or four with the whole one.
        """
        h, x, y = at.objective, at.x, at.y
        blocks, cross = output_blocks(next(iter(h.functions())), x, y, calls)
        h._count("products", max(B.shape[1] for B in blocks))
        self = cls(calls, blocks, torch.zeros_like(y))
        w = _probes(y)
        first, second = self.yy(w).T
        ones, random = at.yy(w).T
        self.diagonal = ones - first
        direct = self.diagonal * w[:, 1]
        if not _same(second + direct, random, second, direct):
            return None
        if "x" in at.wrt:
            u = _probes(x)
            on_x, on_y = at.joint(u, None)
            self.cross = cross
            if cross is not None and not _same(self.yx(u[:, 1]), on_y[:, 1], on_y[:, 1]):
                self.cross = None
            if _same(on_x[:, 0] * u[:, 1], on_x[:, 1], on_x[:, 1]):
                self.xx = on_x[:, 0]
        return self

    @cached_property
    def single(self) -> OutputHessian:
        """h_yy in float32, kept: without ``cross`` and ``xx``."""
        return OutputHessian([call.single for call in self.calls], [B.float() for B in self.blocks], self.diagonal.float())

    def yy(self, v: Tensor) -> Tensor:
        """h_yy v for (dy,) or (dy, k)."""
        V = v.reshape(len(v), -1)
        out = self.diagonal[:, None] * V
        for call, B in zip(self.calls, self.blocks):
            X, entries = call.X, call.index.reshape(-1)
            Z = multiply(X, V[entries].view(X.shape[1], -1)).view(len(X), B.shape[1], -1)
            back = multiply(X.mT, torch.bmm(B, Z).view(len(X), -1))
            out.index_add_(0, entries, back.view(len(entries), -1))
        return out.view(v.shape)

    def yx(self, u: Tensor) -> Tensor:
        """h_yx u, (dy,), from ``cross``."""
        call, C = self.cross
        return u.new_zeros(len(self.diagonal)).index_add(0, call.index.reshape(-1), (call.X.mT @ (C * u[:, None])).reshape(-1))

    def dense_yy(self) -> Tensor:
        """(dy, dy). Cost: sum over the calls of n d^2 K (K + 1) / 2 multiplications, two thirds of that where d >= 128; memory:
        n d K numbers beside it."""
        dy, rest = len(self.diagonal), list(zip(self.calls, self.blocks))
        H = torch.diag(self.diagonal)
        while rest:
            index = rest[0][0].index
            group = [(call.X, B) for call, B in rest if torch.equal(call.index, index)]
            rest = [(call, B) for call, B in rest if not torch.equal(call.index, index)]
            place = index.T.reshape(-1)
            G = add_pairs(H.new_zeros(len(place), len(place)), group, *index.shape)
            if len(place) == dy:  # all of y, in another order
                back = torch.argsort(place)
                H += G[back[:, None], back]
            else:
                H[place[:, None], place] += G
        return H

    def times(self, W: Tensor) -> Tensor:
        """h_yy W for (dy, k) with many columns: by the matrix where that is cheaper, else by blocks of products."""
        if times_multiplications(self.calls, *W.shape)[1]:
            return multiply(self.dense_yy(), W)
        step = max(1, COLUMN_NUMBERS // max(len(c.X) * c.index.shape[1] for c in self.calls))
        return torch.cat([self.yy(block) for block in W.split(step, dim=1)], dim=1)

    def preconditioner(self, rank: int, damping: float = 0.0) -> KroneckerPreconditioner:
        """For h_yy + damping I, with a corner of ``rank`` inputs. Calls must share their weights. Look at ``.ok``."""
        inputs, index = [call.X for call in self.calls], self.calls[0].index
        return KroneckerPreconditioner(inputs, self.blocks, index, self.diagonal + damping, rank)

    def dense_yx(self) -> Tensor:
        """(dy, dx), from ``cross``. Cost: n d K multiplications."""
        call, C = self.cross
        G = torch.zeros(len(self.diagonal), len(C), dtype=C.dtype, device=C.device)
        for k in range(C.shape[1]):
            G[call.index[:, k]] = (C[:, k, None] * call.X).mT
        return G


def output_blocks(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, calls: list[LinearCall]
) -> tuple[list[Tensor], tuple[LinearCall, Tensor] | None]:
    """The (n, K, K) Hessians of a loss in the outputs of its calls, were each sample on its own; C likewise, with its call.

    B = h_zz and C = h_zx are read off products with ones: right if no sample's output meets another's, or another's x.
    """
    x = x.clone().requires_grad_(True)
    shifts = {c.number: torch.zeros(c.shape, dtype=y.dtype, device=y.device, requires_grad=True) for c in calls}
    outputs = list(shifts.values())
    with torch.enable_grad(), fast_products(x, y), Watch(shifts=shifts):
        h = function(x, y)
    gx, *gradients = torch.autograd.grad(h, [x, *outputs], create_graph=True, allow_unused=True)
    blocks = []
    for call, z, gradient in zip(calls, outputs, gradients):
        K = call.index.shape[1]
        B = z.new_zeros(K, z.numel() // K, K)
        if gradient is not None and gradient.requires_grad:
            ones = torch.eye(K, dtype=z.dtype, device=z.device)[:, None, :].expand(K, z.numel() // K, K)
            B = _rows(gradient, z, ones.reshape(K, *z.shape)).reshape(K, -1, K)
        blocks.append(B.permute(1, 2, 0).contiguous())
    cross = None
    if gx is not None and gx.requires_grad:
        own = torch.autograd.grad(gx, outputs, torch.ones_like(gx), allow_unused=True)
        found = [(call, C.reshape(len(x), -1)) for call, C in zip(calls, own)
                 if C is not None and len(call.X) == len(x) and bool(C.any())]  # fmt: skip
        cross = found[0] if len(found) == 1 else None
    return blocks, cross


def _rows(gradient: Tensor, z: Tensor, cotangents: Tensor) -> Tensor:
    """d<gradient, c>/dz for every cotangent c, stacked."""
    try:
        (rows,) = torch.autograd.grad(gradient, z, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True)
        return torch.zeros_like(cotangents) if rows is None else rows
    except RuntimeError:  # an operation without a vmap rule
        rows = [torch.autograd.grad(gradient, z, c, retain_graph=True, allow_unused=True)[0] for c in cotangents]
        return torch.stack([torch.zeros_like(z) if row is None else row for row in rows])


def _probes(like: Tensor) -> Tensor:
    """(n, 2): ones and a random vector."""
    random = torch.randn(len(like), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    return torch.stack([torch.ones_like(like), random], dim=1)


def _same(mine: Tensor, true: Tensor, *terms: Tensor) -> bool:
    """Whether two vectors are equal up to the rounding of the terms that ``mine`` is made of."""
    size = sum(torch.linalg.vector_norm(term) for term in terms)
    return bool(torch.linalg.vector_norm(mine - true) <= ROUNDING * torch.finfo(true.dtype).eps * size)
