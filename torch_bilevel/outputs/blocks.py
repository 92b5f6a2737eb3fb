"""A preconditioner for h_yy from the Hessians of the outputs."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockPreconditioner:
    """The inverse of h_yy as if, in a basis of the outputs that the samples share on average, they did not meet.

    With U the eigenvectors of the mean of the B, output a of the basis has the block X' diag((U'BU)_aa) X + its part of
    the diagonal. For softmax one of them is the shift of all logits, which blocks of the classes themselves would miss.

    Args:
        blocks: (K, d, d). U: (K, K). index: (d, K), the entries of y. diagonal: (dy,), for the entries that are not there.

    Attributes:
        ok: whether it is positive definite.

    Cost: K d^2 multiplications an application, as many numbers; (K n d^2 + K d^3) multiplications to make.
    """

    def __init__(self, blocks: Tensor, U: Tensor, index: Tensor, diagonal: Tensor):
        self.U, self.index = U, index
        L, info = torch.linalg.cholesky_ex(blocks)
        rest = torch.ones_like(diagonal, dtype=torch.bool).index_fill_(0, index.reshape(-1), False)
        self.ok = not bool(info.any()) and bool((diagonal[rest] > 0).all())
        if self.ok:
            self.inverses = torch.cholesky_inverse(L)
            self.diagonal = torch.where(rest, diagonal, torch.ones_like(diagonal))

    @classmethod
    def none(cls) -> BlockPreconditioner:
        """One that is not ``ok``."""
        self = cls.__new__(cls)
        self.ok = False
        return self

    def __call__(self, R: Tensor) -> Tensor:
        """P^{-1} R: (dy,) or (dy, k) -> same shape."""
        columns = R.reshape(len(R), -1)
        out = columns / self.diagonal[:, None]
        Z = torch.einsum("dkc,ka->adc", columns[self.index], self.U)
        out[self.index] = torch.einsum("adc,ka->dkc", torch.bmm(self.inverses, Z), self.U)
        return out.reshape(R.shape)
