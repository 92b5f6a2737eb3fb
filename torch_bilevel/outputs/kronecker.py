"""A preconditioner for h_yy from the Hessians of the outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..folding import multiply
from .pairs import add_pairs

#: eigenvalues of the mean of the B_i within this factor of each other share a factor, and how many of those are made
WIDTH, GROUPS = 6.0, 4
#: products with G that find its leading inputs
POWERS = 3


class KroneckerPreconditioner:
    """The inverse of h_yy as if inputs and outputs did not know of each other, but for the leading inputs, where they do.

    H = sum_i B_i (x) x_i x_i' + diag(D) is seen in the basis U of the outputs that diagonalises the mean of the B_i, with
    eigenvalues lambda. There it is taken to be block diagonal, with groups of outputs whose lambda are alike,

        P_a = lambda_a / mean(lambda) G + diag(sum_k D_ik U_ka^2),    G = sum_i tr(B_i) x_i x_i' / K,

    both terms at their mean over the group (lambda: the geometric one), but for the r inputs Z in which G is largest, with all
    outputs: that (r K, r K) corner C is exact,

        P^{-1} + (I (x) Z) (C^{-1} - E^{-1}) (I (x) Z)',    E: what P is there.

    For softmax one of the U is the shift of all logits, along which only the regulariser is curved: a group of its own.

    Args:
        inputs: X (n, d) of every call. blocks: its B (K, K, n).
        index: (d, K), the entries of y that they share.
        diagonal: (dy,), D and what belongs to no call.
        rank: r, from 0 to d.

    Attributes:
        ok: whether it is positive definite, by more than rounding.

    Cost: n (d^2 + (r K)^2) / 2 + n d r multiplications, and the inverse of a (d, d) matrix for each group (of which there is
        one or two as a rule) and of an (r K, r K) one; an application d^2 K + 2 d r K + (r K)^2. Memory: d^2 numbers a group and
        (r K)^2.

    References: Martens and Grosse 2015 (K-FAC, of which this is the Hessian's, with a regulariser that has a weight for every
        feature); the groups and the corner are ours.
    """

    def __init__(self, inputs: list[Tensor], blocks: list[Tensor], index: Tensor, diagonal: Tensor, rank: int):
        self.index = index
        rest = torch.ones_like(diagonal, dtype=torch.bool).index_fill_(0, index.reshape(-1), False)
        self.diagonal = torch.where(rest, diagonal, torch.ones_like(diagonal))
        own, mean = diagonal[index], torch.cat(blocks, dim=2).mean(2)
        self.ok = bool((self.diagonal > 0).all() & mean.isfinite().all() & mean.any())
        if not self.ok:
            return
        spread, self.U = torch.linalg.eigh(mean)
        spread = spread.clamp(min=0)  # below is rounding, or a loss without convexity, which CG will find
        G = _gram(inputs, [B.diagonal(dim1=0, dim2=1).mean(1) for B in blocks])
        root = _positive(own.mean(1), 10 * torch.finfo(G.dtype).eps * G.diagonal().mean()).rsqrt()
        G *= root[:, None] * root
        Z, largest = _leading(G, rank)
        curvature = spread / spread.mean()
        self.ok = bool((curvature * largest).isfinite().all())
        if not self.ok:
            return
        regulariser = (own * root[:, None] ** 2) @ self.U**2
        self.groups: list[tuple[int, int, Tensor]] = []  # outputs from, to, their P^{-1}: (d, d), or (d, 1) its diagonal
        E, rounding = [], 10 * torch.finfo(G.dtype).eps * curvature[-1] * G.diagonal()  # E: its inverse, for every output
        for a, b in _grouped(curvature * largest):
            mean, direct = curvature[a:b].log().mean().exp(), regulariser[:, a:b].mean(1)
            if bool(mean * largest <= 1):  # flat against the regulariser
                P = mean * G.diagonal() + direct
                inverse, PZ, pivots, info = (root / P)[:, None], P[:, None] * Z, P, 0
            else:
                P = mean * G + torch.diag(direct)
                L, info = torch.linalg.cholesky_ex(P)
                inverse, PZ, pivots = torch.cholesky_inverse(L) * root, multiply(P, Z), L.diagonal() ** 2
            self.ok = not int(info) and bool((pivots > rounding).all())
            if not self.ok:
                return
            self.groups.append((a, b, root[:, None] * inverse))
            E += [torch.cholesky_inverse(torch.linalg.cholesky_ex(Z.mT @ PZ)[0])] * (b - a)
        self.Z = root[:, None] * Z
        self.ok = self._add_corner(inputs, blocks, own, E)

    def _add_corner(self, inputs: list[Tensor], blocks: list[Tensor], own: Tensor, E: list[Tensor]) -> bool:
        """``corner`` (K r, K r), C^{-1} - E^{-1}; whether C is positive definite."""
        U, Z, (K, r) = self.U, self.Z, (len(self.U), self.Z.shape[1])
        group = [(multiply(X, Z), _turned(B, U)) for X, B in zip(inputs, blocks)]
        C = add_pairs(Z.new_zeros(K * r, K * r), group, r, K)
        direct = Z.mT @ (own.mT[:, :, None] * Z)  # (K, r, r): Z' diag(own) Z for every output, to be turned by U
        turns = (U[:, :, None] * U[:, None, :]).view(K, K * K)
        C.view(K, r, K, r).add_((turns.mT @ direct.view(K, r * r)).view(K, K, r, r).transpose(1, 2))
        L, info = torch.linalg.cholesky_ex(C)
        self.corner = torch.cholesky_inverse(L)
        for a, inverse in enumerate(E):
            self.corner[a * r : (a + 1) * r, a * r : (a + 1) * r] -= inverse
        return not bool(info) and bool(self.corner.isfinite().all())

    @classmethod
    def none(cls) -> KroneckerPreconditioner:
        """One that is not ``ok``."""
        self = cls.__new__(cls)
        self.ok = False
        return self

    def __call__(self, R: Tensor) -> Tensor:
        """P^{-1} R: (dy,) or (dy, k) -> same shape and dtype; it is worked out in that of the inputs."""
        columns = R.reshape(len(R), -1).to(self.Z.dtype)
        (d, K), r, k = self.index.shape, self.Z.shape[1], columns.shape[1]
        V = (columns[self.index].mT @ self.U).permute(0, 2, 1).reshape(d, K * k)
        leading = multiply(self.Z.mT, V).view(r, K, k).transpose(0, 1).reshape(K * r, k)
        leading = (self.corner @ leading).view(K, r, k).transpose(0, 1).reshape(r, K * k)
        parts = [(V[:, a * k : b * k], inverse) for a, b, inverse in self.groups]
        W = torch.cat([inverse * part if inverse.shape[1] == 1 else multiply(inverse, part) for part, inverse in parts], dim=1)
        W += multiply(self.Z, leading)
        out = columns / self.diagonal[:, None]
        out[self.index] = (W.view(d, K, k).mT @ self.U.mT).mT
        return out.view(R.shape).to(R.dtype)


def _turned(B: Tensor, U: Tensor) -> Tensor:
    """U' B_i U for every sample: (K, K, n)."""
    K = len(U)
    half = multiply(U.mT, B.reshape(K, -1)).view(B.shape)
    return multiply(U.mT, half.transpose(0, 1).reshape(K, -1)).view(B.shape)  # B is symmetric, so are these


def _positive(diagonal: Tensor, least: Tensor) -> Tensor:
    """Entries that are not positive count as the mean of the others, or where there are none, as ``least``."""
    positive = diagonal > 0
    usual = diagonal[positive].mean() if bool(positive.any()) else least
    return torch.where(positive, diagonal, usual)


def _gram(inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """sum of X' diag(w) X, (d, d)."""
    d = inputs[0].shape[1]
    return add_pairs(inputs[0].new_zeros(d, d), [(X, w[None, None]) for X, w in zip(inputs, weights)], d, 1)


def _leading(G: Tensor, rank: int) -> tuple[Tensor, float]:
    """(Z (d, rank), orthonormal, about the leading eigenvectors of G, about the largest eigenvalue), by subspace iteration."""
    d = len(G)
    Z = torch.randn(d, max(1, rank), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(G)
    for _ in range(POWERS):
        Z, _ = torch.linalg.qr(multiply(G, Z))
    largest = float(torch.linalg.vector_norm(G @ Z[:, 0]))
    return (torch.eye(d, dtype=G.dtype, device=G.device) if rank >= d else Z[:, :rank]), largest


def _grouped(curvature: Tensor) -> list[tuple[int, int]]:
    """Of ascending numbers, (first, last + 1) of neighbours within a factor; where they are below one, they are alike."""
    logs = [math.log(max(float(c), 1.0)) for c in curvature]
    width = max(math.log(WIDTH), (logs[-1] - logs[0]) / GROUPS)
    groups, end = [], len(logs)
    while end > 0:
        start = next(i for i in range(end) if logs[i] >= logs[end - 1] - width * (1 + 1e-9))
        groups.append((start, end))
        end = start
    return groups[::-1]
