"""Matrix products in the order and the number, and by the library, that are fastest; nothing here is differentiated."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: columns of a thin product: between these it is turned over
THIN, TALL = (4, 128), 8
#: of a thin float64 product, turned over, MKL takes so many at a time
ROWS = 4
#: multiplications of a product from which oneDNN is worth its call, and a float64 one is filled up
WORTH = 1_000_000
#: unknowns up to which the microseconds of a dispatch mode count
SMALL = 2048


class FoldedProducts(TorchDispatchMode):
    """Under it, ``bmm`` with one operand expanded over the batch is a single ``mm``, and every ``mm`` a ``multiply``.

    ``vmap`` turns X V, with data X (n, k) shared by B cotangents V (B, k, m), into B small products that read X anew
    each: (B, n, k) @ (B, k, m). Folded it is (n, k) @ (k, B m), which reads X once: 2.4 times faster a vector for the
    5000 x 784 softmax. A thin product, (n, k) @ (k, m) with m = 10 << n, is slow in the order in which
    ``torch.nn.functional.linear`` asks for it: (V' X')' takes 1.7 ms where X V takes 4.0, and (Z' X)' 2.0 where X' Z
    takes 14 (float32, n = 5000, k = 784, one thread of an x86 CPU). Same numbers up to the order of summation.

    Cost: some microseconds of Python per operation, so it pays where products take a millisecond.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.bmm.default and args[0].shape[0] > 1:
            a, b = args
            if a.stride(0) == 0:
                return fold_right(a[0], b)
            if b.stride(0) == 0:
                return fold_left(a, b[0])
        elif func is torch.ops.aten.mm.default:
            return multiply(*args)
        elif func is torch.ops.aten.addmm.default and not kwargs and len(args) == 3:
            if is_thin(*args[1:]) or is_for_onednn(*args[1:]):
                return multiply(*args[1:]) + args[0]
        return func(*args, **(kwargs or {}))


def is_large(*points: Tensor) -> bool:
    """Whether products are dear enough that the microseconds of a dispatch mode do not count."""
    return sum(point.numel() for point in points) > SMALL


def fast_products(*points: Tensor, batched: bool = False):
    """FoldedProducts for large problems; on a GPU, where there is nothing to turn over, for blocks only."""
    fold = is_large(*points) and (batched or points[0].device.type == "cpu")
    return FoldedProducts() if fold else nullcontext()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b: (n, k), (k, m) -> (n, m), row by row in memory, by whatever is fastest.

    oneDNN where MKL is held back (``mkl_is_held_back``) and the product is worth it; else MKL, thin products turned over.
    """
    if _opaque.get() and a.device.type == "cpu":
        return torch.ops.torch_bilevel.multiply(a, b)
    if is_for_onednn(a, b):
        by_rows = a.stride(1) == 1 or (b.stride(0) != 1 and a.numel() <= b.numel())  # else a copy, at least of the smaller
        by_rows = by_rows and not (b.stride(0) == 1 and is_thin(b.mT, a.mT))
        return onednn(a, b.mT) if by_rows else onednn(b.mT, a).mT.contiguous()
    if is_thin(a, b):
        return turn_over(a, b)
    return fill_up(a, b) if is_thin(b.mT, a.mT) else a @ b


@contextmanager
def opaque_products() -> Iterator[None]:
    """Under it, ``multiply`` is one operation to whoever traces it, and does at run time what it does."""
    token = _opaque.set(True)
    try:
        yield
    finally:
        _opaque.reset(token)


_opaque: ContextVar[bool] = ContextVar("opaque_products", default=False)
_library = torch.library.Library("torch_bilevel", "DEF")
_library.define("multiply(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,))
_library.impl("multiply", lambda a, b: _at_run_time(a, b), "CompositeExplicitAutograd")
_library.impl("multiply", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def _at_run_time(a: Tensor, b: Tensor) -> Tensor:
    token = _opaque.set(False)
    try:
        return multiply(a, b)
    finally:
        _opaque.reset(token)


def is_for_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether ``multiply`` takes a @ b to oneDNN."""
    plain = all(t.dtype is torch.float32 and t.layout is torch.strided and t.device.type == "cpu" for t in (a, b))
    return plain and a.numel() * b.shape[1] >= WORTH and mkl_is_held_back() and torch.backends.mkldnn.enabled


@lru_cache(maxsize=1)
def mkl_is_held_back() -> bool:
    """Whether products are MKL's on an AVX-512 processor that is not Intel's, where MKL uses half of it.

    On an AMD EPYC with AVX-512 a float32 product takes oneDNN, which PyTorch has as well, a third to a half of MKL's time
    (``benchmarks.products``). By the maker and not by a measurement, so that runs can be repeated.
    """
    if not (torch.backends.mkl.is_available() and has_onednn() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" not in (cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else platform.processor())


def has_onednn() -> bool:
    """Whether this PyTorch has ``onednn``; the operation is not part of its documented interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def bands(n: int, count: int) -> list[tuple[int, int]]:
    """(first, last + 1) of so many bands of n rows: a symmetric product is formed band by band, a triangle and a little more."""
    cuts = [i * n // count for i in range(count + 1)]
    return list(zip(cuts, cuts[1:]))


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a @ b': the linear layer of PyTorch's compiler, (n, k), (m, k) -> (n, m). Of a part of a matrix as b a copy is made:
    oneDNN multiplies with such strides by a plain loop, hundreds of times more slowly."""
    b = b if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def is_thin(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b has few columns and many rows, on a CPU."""
    rows, columns = a.shape[0], b.shape[1]
    return a.device.type == "cpu" and THIN[0] <= columns <= THIN[1] and rows >= TALL * columns


def turn_over(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as (b' a')': (n, k), (k, m) -> (n, m), laid out as ``mm`` would: what follows is slow on mixed layouts."""
    return fill_up(b.mT.contiguous(), a.mT).mT.contiguous()


def fill_up(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with few rows in a: where that is a large float64 one, filled up to a multiple of ROWS.

    MKL takes longer with 10 than with 12 (``benchmarks.products``).
    """
    m, k = a.shape
    missing = -m % ROWS
    if missing and a.dtype is torch.float64 and b.numel() * m >= WORTH:
        return (torch.cat([a, a.new_zeros(missing, k)]) @ b)[:m]
    return a @ b


def fold_right(a: Tensor, b: Tensor) -> Tensor:
    """a @ b[i] for every i: (n, k), (B, k, m) -> (B, n, m)."""
    batch, k, m = b.shape
    wide = b.permute(1, 0, 2).reshape(k, batch * m)
    return multiply(a, wide).view(a.shape[0], batch, m).permute(1, 0, 2)


def fold_left(a: Tensor, b: Tensor) -> Tensor:
    """a[i] @ b for every i: (B, n, k), (k, m) -> (B, n, m)."""
    batch, n, k = a.shape
    if a.stride(2) == 1:
        return multiply(a.reshape(batch * n, k), b).view(batch, n, b.shape[1])
    return multiply(a.permute(2, 0, 1).reshape(k, batch * n).mT, b).view(batch, n, b.shape[1])
