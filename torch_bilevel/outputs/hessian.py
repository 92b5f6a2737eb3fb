"""OutputHessian: h_yy, h_yx and h_xx of a recorded objective, assembled from the Hessians of the outputs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..folding import multiply
from ..recorded import LinearCall
from .finding import apply_block, find
from .kronecker import KroneckerPreconditioner
from .pairs import add_pairs
from .prices import products_to_find, times_multiplications

if TYPE_CHECKING:
    from ..derivatives import Linearisation

#: numbers of all outputs of a block of products: bounds memory
COLUMN_NUMBERS = 2**23


class OutputHessian:
    """h_yy, h_yx and h_xx of one recorded objective, from Hessians with respect to the learner's outputs.

    Attributes:
        calls: the linear maps; each with its B (K, K, n) in ``blocks``.
        diagonal: d (dy,).
        cross: C (n, K) and its call where x_i meets the i-th sample only, else None.
        xx: the diagonal (dx,) of h_xx where that is a diagonal matrix, else None.
    """

    def __init__(self, calls: list[LinearCall], blocks: list[Tensor], diagonal: Tensor):
        self.calls, self.blocks, self.diagonal = calls, blocks, diagonal
        self.cross: tuple[LinearCall, Tensor] | None = None
        self.xx: Tensor | None = None

    @classmethod
    def of(cls, at: Linearisation) -> OutputHessian | None:
        """That of ``at``, whose objective makes these calls, or None where it is not of this kind.

        Cost: an evaluation with its graph; max K products with the outputs' Hessian and two, or four, to test it.
        """
        phi = at.phi
        at.objective._count("products", products_to_find(phi.calls, "x" in at.wrt))
        found = find(phi) if phi.is_gradient(at.gy) else None
        if found is None:
            return None
        self = cls(phi.calls, found.blocks, found.diagonal)
        self.cross, self.xx = found.cross, found.xx
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
            call.add_adjoint(out, apply_block(B, call.outputs(V)))
        return out.view(v.shape)

    def yx(self, u: Tensor) -> Tensor:
        """h_yx u, (dy,), from ``cross``."""
        call, C = self.cross
        return call.add_adjoint(u.new_zeros(len(self.diagonal), 1), (C * u[:, None]).mT.unsqueeze(1))[:, 0]

    def dense_yy(self) -> Tensor:
        """(dy, dy). Cost: sum over the calls of n d^2 K (K + 1) / 2 multiplications, two thirds of that where d >= 128; memory:
        n d K numbers beside it."""
        dy, rest = len(self.diagonal), list(zip(self.calls, self.blocks))
        H = torch.diag(self.diagonal)
        while rest:
            index = rest[0][0].index
            group = [(call.inputs, B) for call, B in rest if torch.equal(call.index, index)]
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
        inputs, index = [call.inputs for call in self.calls], self.calls[0].index
        return KroneckerPreconditioner(inputs, self.blocks, index, self.diagonal + damping, rank)

    def dense_yx(self) -> Tensor:
        """(dy, dx), from ``cross``. Cost: n d K multiplications."""
        call, C = self.cross
        G = torch.zeros(len(self.diagonal), len(C), dtype=C.dtype, device=C.device)
        for k in range(C.shape[1]):
            G[call.index[:, k]] = (C[:, k, None] * call.inputs).mT
        return G
