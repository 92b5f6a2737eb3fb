"""Cross entropies of a few classes, in operations that are fast on rows of a few numbers.

PyTorch's kernels of ``log_softmax`` and its derivative take several times as long, on rows of ten numbers and a CPU, as the
exponentials and sums that they are made of (``benchmarks.products``). Same functions, same derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: numbers from which that outweighs the calls
WORTH = 4000


def cross_entropy(
    input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """As ``torch.nn.functional.cross_entropy`` of (n, K) and class numbers (n,); None where it is another case."""
    if not (weight is None and size_average is None and reduce is None and label_smoothing == 0.0 and reduction in REDUCTIONS):
        return None
    if not (_is_rows(input) and isinstance(target, Tensor) and target.dtype is torch.int64 and target.shape == input.shape[:1]):
        return None
    lowest, highest = torch.aminmax(target)
    if lowest < 0 or highest >= input.shape[1] or ignore_index >= 0:
        return None
    largest = input.detach().amax(1, keepdim=True)
    normaliser = (input - largest).exp().sum(1).log() + largest[:, 0]
    picked = input.mT.gather(0, target[None])[0]  # of its transpose: so is what comes back
    return REDUCTIONS[reduction](normaliser - picked)


def log_softmax(input: Tensor, dim: int | None = None, *rest: Any, dtype: Any = None, **others: Any) -> Tensor | None:
    """As ``torch.log_softmax`` of (n, K) along its rows; None where it is another case."""
    if dim not in (1, -1) or dtype is not None or rest or others or not _is_rows(input):
        return None
    shifted = input - input.detach().amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def _is_rows(t: Any) -> bool:
    """Whether it is (n, K), large, and on a CPU."""
    plain = isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
    return plain and t.dim() == 2 and t.numel() >= max(1, WORTH) and t.dtype in (torch.float32, torch.float64)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "mean": torch.mean, "sum": torch.sum}
#: what takes the place of a function of PyTorch's where it answers with something
FAST: dict[Callable, Callable[..., Tensor | None]] = {
    torch.nn.functional.cross_entropy: cross_entropy,
    torch.nn.functional.log_softmax: log_softmax,
    torch.log_softmax: log_softmax,
    Tensor.log_softmax: log_softmax,
}
