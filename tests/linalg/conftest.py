"""Devices and matrices with a prescribed spectrum."""

from __future__ import annotations

import pytest
import torch

from torch_bilevel.linalg import FunctionOperator


class Counter(FunctionOperator):
    """A dense matrix that counts its products, one per vector."""

    def __init__(self, A, block_size=None):
        self.count = 0
        self.calls = 0

        def matvec(v):
            assert v.shape == (A.shape[0],)
            self.count += 1
            self.calls += 1
            return A @ v

        def matmat(V):
            assert V.ndim == 2
            assert block_size is None or V.shape[1] <= block_size
            self.count += V.shape[1]
            self.calls += 1
            return A @ V

        super().__init__(A.shape[0], matvec, matmat, dtype=A.dtype, device=A.device, block_size=block_size)


@pytest.fixture
def counter():
    return Counter


@pytest.fixture
def symmetric():
    """symmetric(eigenvalues, seed=0) -> float64 CPU matrix with that spectrum in random directions."""

    def build(eigenvalues, seed=0):
        eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        n = eigenvalues.numel()
        Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        A = (Q * eigenvalues) @ Q.mT
        return (A + A.mT) / 2

    return build


@pytest.fixture
def gaussian():
    """gaussian(*shape, seed=0) -> float64 CPU tensor."""

    def build(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)

    return build
