"""A preconditioner for h_yy from the Hessians of the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..folding import multiply
from .pairs import add_pairs


class KroneckerPreconditioner:
    """The inverse of h_yy as if inputs and outputs did not know of each other, but for the leading inputs, where they do.

    H = sum_i B_i (x) x_i x_i' + diag(D) is seen in the basis U of the outputs that diagonalises the mean of the B_i, and in a
    basis Q of the inputs that diagonalises both G = sum_i tr(B_i) x_i x_i' / K, Q'GQ = diag(gamma), and the mean M of D over the
    outputs, Q'MQ = I. There it is taken to be diagonal,

        S_ja = gamma_j lambda_a / mean(lambda) + sum_ik Q_ij^2 D_ik U_ka^2,    lambda: of the mean of the B_i,

    but for the r leading columns of Q with all outputs: that (r K, r K) corner is exact. For softmax one of the U is the shift of
    all logits, along which only the regulariser is curved.

    Args:
        inputs: X (n, d) of every call. blocks: its B (n, K, K).
        index: (d, K), the entries of y that they share.
        diagonal: (dy,), D and what belongs to no call.
        rank: r, from 0 to d.

    Attributes:
        ok: whether it is positive definite, by more than rounding.

    Cost: n (d^2 + (r K)^2) / 2 + n d r multiplications, the eigenvectors of a (d, d) and the inverse of a (r K, r K) matrix;
        an application 2 d^2 K + (r K)^2. Memory: d^2 + (r K)^2 numbers.

    References: Martens and Grosse 2015 (K-FAC, of which this is the Hessian's, with a regulariser that has a weight for every
        feature); the corner is ours.
    """

    def __init__(self, inputs: list[Tensor], blocks: list[Tensor], index: Tensor, diagonal: Tensor, rank: int):
        self.rank, self.index, K = rank, index, index.shape[1]
        rest = torch.ones_like(diagonal, dtype=torch.bool).index_fill_(0, index.reshape(-1), False)
        self.diagonal = torch.where(rest, diagonal, torch.ones_like(diagonal))
        own = diagonal[index]
        spread, self.U = torch.linalg.eigh(torch.cat(blocks).mean(0))
        spread = spread.clamp(min=0)  # below is rounding, or a loss without convexity, which CG will find
        gamma, self.Q = _basis(inputs, [B.diagonal(dim1=1, dim2=2).mean(1) for B in blocks], own.mean(1))
        S = gamma[:, None] * (spread / spread.mean()) + (self.Q**2).mT @ own @ self.U**2
        rounding = 10 * torch.finfo(S.dtype).eps * S.abs().amax(1, keepdim=True)
        self.ok = bool(((S > rounding) & S.isfinite()).all() & (self.diagonal > 0).all())
        if not self.ok:
            return
        self.scale = S.rsqrt().unsqueeze(1)  # (d, 1, K)
        Q = self.Q[:, :rank].contiguous()
        group = [(multiply(X, Q), self.U.mT @ B @ self.U) for X, B in zip(inputs, blocks)]
        corner = add_pairs(Q.new_zeros(K * rank, K * rank), group, rank, K).view(K, rank, K, rank)
        direct = Q.mT @ (own.mT[:, :, None] * Q)  # (K, r, r): Q' diag(own) Q for every output, to be turned by U
        turns = (self.U[:, :, None] * self.U[:, None, :]).view(K, K * K)
        corner += (turns.mT @ direct.view(K, rank * rank)).view(K, K, rank, rank).transpose(1, 2)
        scale = self.scale[:rank].permute(2, 0, 1).reshape(-1)
        corner = scale[:, None] * corner.reshape(len(scale), len(scale)) * scale  # ones or so on its diagonal
        L, info = torch.linalg.cholesky_ex(corner)
        self.corner = torch.cholesky_inverse(L)
        self.ok = not bool(info)

    @classmethod
    def none(cls) -> KroneckerPreconditioner:
        """One that is not ``ok``."""
        self = cls.__new__(cls)
        self.ok = False
        return self

    def __call__(self, R: Tensor) -> Tensor:
        """P^{-1} R: (dy,) or (dy, k) -> same shape and dtype; it is worked out in that of the inputs."""
        (d, K), r, columns = self.index.shape, self.rank, R.reshape(len(R), -1).to(self.Q.dtype)
        k = columns.shape[1]
        V = (columns[self.index].mT @ self.U).reshape(d, k * K)
        V = multiply(self.Q.mT, V).view(d, k, K) * self.scale
        leading = V[:r].permute(2, 0, 1).reshape(K * r, k)
        V[:r] = (self.corner @ leading).view(K, r, k).permute(1, 2, 0)
        V = multiply(self.Q, (V * self.scale).view(d, k * K)).view(d, k, K)
        out = columns / self.diagonal[:, None]
        out[self.index] = (V @ self.U.mT).mT
        return out.view(R.shape).to(R.dtype)


def _basis(inputs: list[Tensor], weights: list[Tensor], diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """(gamma, Q), the largest first, with Q' (sum of X' diag(w) X) Q = diag(gamma) and Q' diag(diagonal) Q = I.

    Entries of the diagonal that are not positive count as the mean of the others.
    """
    positive = diagonal > 0
    usual = diagonal[positive].mean() if bool(positive.any()) else diagonal.new_ones(())
    root = torch.where(positive, diagonal, usual).rsqrt()
    d = len(root)
    G = add_pairs(root.new_zeros(d, d), [(X * root, w[:, None, None]) for X, w in zip(inputs, weights)], d, 1)
    gamma, E = torch.linalg.eigh(G)
    return gamma.flip(0).clamp(min=0), root[:, None] * E.flip(1)
