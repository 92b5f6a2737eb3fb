"""Batched matrix products that share an operand, as one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FoldedProducts(TorchDispatchMode):
    """Under it, ``bmm`` with one operand expanded over the batch is a single ``mm``.

    ``vmap`` turns X V, with data X (n, k) shared by B cotangents V (B, k, m), into B small products that read X anew
    each: (B, n, k) @ (B, k, m). Folded it is (n, k) @ (k, B m), which reads X once: 2.4 times faster a vector for the
    5000 x 784 softmax (docs/performance.md). Same numbers up to the order of summation.

    Cost: some microseconds of Python per operation, so it pays where products take a millisecond.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.bmm.default and args[0].shape[0] > 1:
            a, b = args
            if a.stride(0) == 0:
                return fold_right(a[0], b)
            if b.stride(0) == 0:
                return fold_left(a, b[0])
        return func(*args, **(kwargs or {}))


def fold_right(a: Tensor, b: Tensor) -> Tensor:
    """a @ b[i] for every i: (n, k), (B, k, m) -> (B, n, m)."""
    batch, k, m = b.shape
    return (a @ b.permute(1, 0, 2).reshape(k, batch * m)).view(a.shape[0], batch, m).permute(1, 0, 2)


def fold_left(a: Tensor, b: Tensor) -> Tensor:
    """a[i] @ b for every i: (B, n, k), (k, m) -> (B, n, m)."""
    batch, n, k = a.shape
    if a.stride(2) == 1:
        return (a.reshape(batch * n, k) @ b).view(batch, n, b.shape[1])
    return (a.permute(2, 0, 1).reshape(k, batch * n).mT @ b).view(batch, n, b.shape[1])
