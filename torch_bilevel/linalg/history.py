"""The residuals that CG keeps to orthogonalise new ones against."""

from __future__ import annotations

import torch
from torch import Tensor

#: bytes that the residuals kept for reorthogonalisation may take
HISTORY_BYTES = 1e9


class History:
    """The residuals r_j and z_j = M^{-1} r_j, scaled to r_j'z_j = 1, as rows of (m, capacity, n); the first of them
    where all would take more than HISTORY_BYTES. Rows that are not used yet are zero."""

    def __init__(self, r: Tensor, z: Tensor, rho: Tensor, preconditioned: bool) -> None:
        n, m = r.shape
        self.count = 0
        self.next: Tensor | None = None  # the row that comes next, (1,), where the GPU counts by itself
        self.R = r.new_zeros(m, min(n, 32), n)
        self.Z = torch.zeros_like(self.R) if preconditioned else self.R
        self.limit = max(32, int(HISTORY_BYTES / (n * m * r.element_size() * (2 if preconditioned else 1))))
        self.full = False
        self.append(r, z, rho)

    @property
    def room(self) -> int | float:
        """Rows that can be added where they are."""
        return torch.inf if self.count >= self.limit else self.R.shape[1] - self.count

    def record(self) -> None:
        """From now on row numbers are the GPU's."""
        self.next = torch.tensor([self.count], device=self.R.device)

    def added(self, rows: int) -> None:
        """So many were added by a replay."""
        if self.count < self.limit:
            self.count += rows

    def drop(self, count: int) -> None:
        """Only the first rows stay; row numbers are Python's again."""
        self.R[:, count:].zero_()
        self.Z[:, count:].zero_()
        self.count, self.next = count, None

    def append(self, r: Tensor, z: Tensor, rho: Tensor) -> None:
        if self.count == r.shape[0]:
            self.full = True  # n + 1 orthogonal residuals do not exist: what is left is rounding
            return
        if self.count >= self.limit:
            return
        scale = rho.rsqrt()
        if self.next is not None:
            self.R.index_copy_(1, self.next, (r * scale).mT.unsqueeze(1))
            if self.Z is not self.R:
                self.Z.index_copy_(1, self.next, (z * scale).mT.unsqueeze(1))
            self.next.add_(1)
            return
        if self.count == self.R.shape[1]:
            same = self.Z is self.R
            self.R = self._grow(self.R)
            self.Z = self.R if same else self._grow(self.Z)
        torch.mul(r.mT, scale[:, None], out=self.R[:, self.count])  # an assignment of the product takes seven times as long
        if self.Z is not self.R:
            torch.mul(z.mT, scale[:, None], out=self.Z[:, self.count])
        self.count += 1

    def orthogonalise(self, r: Tensor) -> Tensor:
        """r - sum_j r_j (z_j'r), (n, m)."""
        used = self.count if self.next is None else self.R.shape[1]
        R, Z = self.R[:, :used], self.Z[:, :used]
        if len(R) == 1:
            return r - (R[0].mT @ (Z[0] @ r[:, 0])).unsqueeze(1)
        v = r.mT.unsqueeze(2)
        return (v - R.mT @ (Z @ v)).squeeze(2).mT

    def compress(self, keep: Tensor) -> None:
        same = self.Z is self.R
        self.R = self.R[keep]
        self.Z = self.R if same else self.Z[keep]

    def _grow(self, basis: Tensor) -> Tensor:
        m, capacity, n = basis.shape
        bigger = basis.new_zeros(m, min(2 * capacity, n, self.limit), n)
        bigger[:, :capacity] = basis
        return bigger
