"""X' diag(B_kl) X for all pairs of outputs (k, l): the work of every matrix that is put together from outputs."""

from __future__ import annotations

from torch import Tensor

from ..folding import multiply
from .prices import block_bands


def add_pairs(G: Tensor, group: list[tuple[Tensor, Tensor]], d: int, K: int) -> Tensor:
    """G + sum of X' diag(B_kl) X over the (X, B) of the group, at rows k d and columns l d of G (K d, K d); in place.

    Each block is symmetric, like the whole: bands of its rows are formed from the diagonal on, the rest is a copy.
    """
    bands = block_bands(d)
    step = K if len(bands) == 1 else 1
    group = [(X.mT.contiguous(), B) for X, B in group]
    for k in range(K):
        for start in range(k, K, step):
            stop = min(K, start + step)
            for X_t, B in group:
                scaled = (B[k, start:stop, None] * X_t[None]).view(-1, X_t.shape[1])  # laid out as X_t, for any K
                for a, b in bands:
                    G[k * d + a : k * d + b, start * d + a : stop * d] += multiply(X_t[a:b], scaled[a:].mT)
            for a, b in bands[:-1]:
                G[k * d + b : (k + 1) * d, start * d + a : start * d + b] = G[k * d + a : k * d + b, start * d + b : stop * d].mT
        here = slice(k * d, (k + 1) * d)
        G[(k + 1) * d :, here] = G[here, (k + 1) * d :].mT
    return G
