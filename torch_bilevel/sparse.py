"""SparseMatrix: constant sparse data whose products with dense matrices have derivatives of every order."""

from __future__ import annotations

import warnings
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_leaves

from .errors import ProblemError, ShapeError

_FLOATS = (torch.float32, torch.float64)


@final
class SparseMatrix:
    """A constant sparse matrix (n, d), say token counts, to be put in a batch in the place of a dense one.

    ``X @ W`` for W (d,) or (d, k), ``X.T @ V``, and calls of ``nn.Linear`` or ``F.linear`` on X, give dense tensors.
    A product is linear in W, with transpose X': its backward pass is the product X' V, which is again such a product,
    so that derivatives of every order are sparse products; a block of vectors (``vmap``) is one product with the
    blocks side by side. PyTorch's own sparse products have none of this under ``torch.func`` (COO fails in ``vmap``,
    CSR at once). Outside, CSR takes as long and COO 4 to 10 times as long (``benchmarks/sparse.py``).

    Args:
        matrix: scipy sparse array or matrix, torch tensor (dense, COO, CSR, CSC), or numpy array, of two dimensions.
        dtype: torch.float32 or torch.float64; default that of ``matrix``, float32 for any other.
        device: default that of ``matrix``.

    Attributes: shape (n, d), dtype, device, nnz (number of stored entries), T.

    Raises:
        ShapeError: not two-dimensional, or a product that does not fit in shape, dtype or device.
        ProblemError: something that is not a matrix of numbers.

    Cost: 2 nnz k operations a product with (d, k). Memory: X and X' in compressed rows, 24 nnz + 8 (n + d) bytes in
        float32, 32 nnz in float64. Nothing of size n x d is made.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> X = tb.SparseMatrix(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> f = lambda w: (X @ w).pow(3).sum()
        >>> torch.func.hessian(f)(torch.ones(2)).diagonal()
        tensor([ 6., 48.])
    """

    def __init__(self, matrix: Any, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        csr = _as_csr(matrix)
        if dtype is None:
            dtype = csr.dtype if csr.dtype in _FLOATS else torch.float32
        if dtype not in _FLOATS:
            raise ProblemError(f"SparseMatrix: expected dtype torch.float32 or torch.float64, got {dtype}")
        csr = csr.to(device=device, dtype=dtype)
        csc = _quietly(lambda: csr.to_sparse_csc())
        # compressed rows of the matrix, then those of its transpose
        self._set((csr.crow_indices(), csr.col_indices(), csr.values(),
                   csc.ccol_indices(), csc.row_indices(), csc.values()), tuple(csr.shape))  # fmt: skip

    def _set(self, parts: tuple[Any, ...], shape: tuple[int, int]) -> SparseMatrix:
        self._parts, self.shape = tuple(parts), tuple(shape)
        self._rows: Tensor | None = None
        self._transpose: SparseMatrix | None = None
        return self

    @classmethod
    def _of(cls, parts: Any, shape: tuple[int, int]) -> SparseMatrix:
        return cls.__new__(cls)._set(tuple(parts), shape)

    dtype = property(lambda self: self._parts[2].dtype)
    device = property(lambda self: self._parts[2].device)
    nnz = property(lambda self: self._parts[2].numel())

    @property
    def T(self) -> SparseMatrix:
        """X', (d, n), on the same memory."""
        if self._transpose is None:
            self._transpose = SparseMatrix._of(self._parts[3:] + self._parts[:3], self.shape[::-1])
            self._transpose._transpose = self
        return self._transpose

    def to(self, *args: Any, **kwargs: Any) -> SparseMatrix:
        """The same matrix on another device or in another dtype, as ``Tensor.to``; itself where nothing changes."""
        values = self._parts[2].to(*args, **kwargs)
        if values is self._parts[2]:
            return self
        if values.dtype not in _FLOATS:
            raise ProblemError(f"SparseMatrix: expected dtype torch.float32 or torch.float64, got {values.dtype}")
        moved = [part.to(device=values.device, dtype=values.dtype if part.is_floating_point() else None)
                 for part in self._parts]  # fmt: skip
        return SparseMatrix._of(moved, self.shape)

    def rows(self, index: Tensor) -> SparseMatrix:
        """The rows at ``index`` (m,) of int64, in that order: (m, d). For mini-batches."""
        crow, col, values = self._parts[:3]
        index = index.to(self.device)
        if index.dim() != 1 or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.shape[0]):
            raise ShapeError(
                f"rows: expected a flat index within 0..{self.shape[0] - 1}, got shape {tuple(index.shape)}"
            )
        lengths = crow[index + 1] - crow[index]
        ends = lengths.cumsum(0)
        within = torch.arange(int(lengths.sum()), device=self.device) - (ends - lengths).repeat_interleave(lengths)
        taken = crow[index].repeat_interleave(lengths) + within
        crow = torch.cat([ends.new_zeros(1), ends])
        chosen = _csr(crow, col[taken], values[taken], (index.numel(), self.shape[1]))
        return SparseMatrix(chosen)

    def to_dense(self) -> Tensor:
        """(n, d)."""
        return self._compressed().to_dense()

    def to_sparse_csr(self) -> Tensor:
        """As a PyTorch CSR tensor, on the same memory."""
        return self._compressed()

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Tensor) -> Tensor:
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.dim() not in (1, 2) or other.shape[0] != self.shape[1]:
            raise ShapeError(
                f"SparseMatrix {self.shape} @ tensor: expected ({self.shape[1]},) or ({self.shape[1]}, k), got"
                f" {tuple(other.shape)}"
            )
        if other.dtype != self.dtype or other.device != self.device:
            raise ShapeError(
                f"SparseMatrix is {self.dtype} on {self.device}, the tensor {other.dtype} on {other.device}; expected the"
                " same: convert one with .to(...)"
            )
        return _Product.apply(other, _Opaque(self))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """``F.linear`` (and so ``nn.Linear``), ``torch.mm``, ``torch.matmul`` with X on the left."""
        X = args[0] if args else (kwargs or {}).get("input")
        if function is torch.nn.functional.linear and isinstance(X, SparseMatrix):
            given = dict(zip(("weight", "bias"), args[1:])) | {k: v for k, v in (kwargs or {}).items() if k != "input"}
            product = X @ given["weight"].mT
            return product if given.get("bias") is None else product + given["bias"]
        if function in (torch.mm, torch.matmul, Tensor.matmul) and isinstance(X, SparseMatrix) and len(args) == 2:
            return X @ args[1]
        raise ProblemError(
            f"SparseMatrix: {getattr(function, '__name__', function)} is not among its operations; it has X @ W, X.T @ V,"
            " torch.nn.functional.linear(X, weight, bias), X.rows(index), X.to_dense()"
        )

    def _compressed(self) -> Tensor:
        """X as a CSR tensor on the stored parts, made on first use."""
        if self._rows is None:
            self._rows = _csr(*self._parts[:3], self.shape)
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": list(self._parts), "shape": list(self.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(tuple(state["parts"]), tuple(state["shape"]))

    def __repr__(self) -> str:
        return f"SparseMatrix(shape={self.shape}, nnz={self.nnz}, dtype={self.dtype}, device={str(self.device)!r})"


@final
class _Opaque:
    """A SparseMatrix that ``torch.func`` does not take apart into its tensors."""

    __slots__ = ("matrix",)

    def __init__(self, matrix: SparseMatrix):
        self.matrix = matrix


class _Product(torch.autograd.Function):
    """X W for a constant X; backward X' V by the same function, so that it has every derivative."""

    @staticmethod
    def forward(W: Tensor, X: _Opaque) -> Tensor:
        rows = X.matrix._compressed()
        if W.dim() == 1:
            return (rows @ W[:, None].contiguous())[:, 0]
        return rows @ W.contiguous()  # rows of W lie together: one stored entry reads one of them

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.X = inputs[1]

    @staticmethod
    def backward(ctx: Any, V: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(V, _Opaque(ctx.X.matrix.T)), None

    @staticmethod
    def jvp(ctx: Any, W: Tensor, X: None) -> Tensor:
        return _Product.apply(W, ctx.X)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], W: Tensor, X: _Opaque) -> tuple[Tensor, int]:
        if in_dims[0] is None:
            return _Product.apply(W, X), None
        blocks = W.movedim(in_dims[0], 1)  # (d, b) or (d, b, k): the vectors of the block side by side
        product = _Product.apply(blocks.flatten(1), X)
        return product.unflatten(1, blocks.shape[1:]), 1


def samples(batch: Any) -> int | None:
    """Size of the sample dimension: that of the first tensor or SparseMatrix of a batch; None where there is none."""
    for leaf in tree_leaves(batch, is_leaf=lambda node: isinstance(node, SparseMatrix)):
        if isinstance(leaf, SparseMatrix) or (isinstance(leaf, Tensor) and leaf.dim() > 0):
            return leaf.shape[0]
    return None


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return _quietly(lambda: torch.sparse_csr_tensor(crow, col, values, size=tuple(shape), check_invariants=False))


def _quietly(make: Any) -> Tensor:
    """``make()`` without PyTorch's note that compressed tensors are in beta, and without recording."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*(beta state|invariant checks).*")
        return make()


def _as_csr(matrix: Any) -> Tensor:
    """Any sparse or dense matrix as a CSR tensor with sorted, summed entries."""
    if isinstance(matrix, SparseMatrix):
        return matrix._compressed()
    if hasattr(matrix, "tocsr") and hasattr(matrix, "nnz"):  # scipy
        rows = matrix.tocsr(copy=True)
        if rows.ndim != 2:
            raise ShapeError(f"SparseMatrix: expected a matrix (n, d), got shape {tuple(rows.shape)}")
        rows.sum_duplicates()
        crow, col, values = (torch.as_tensor(part) for part in (rows.indptr, rows.indices, rows.data))
        return _csr(crow.to(torch.int64), col.to(torch.int64), values, rows.shape)
    try:
        tensor = matrix.detach() if isinstance(matrix, Tensor) else torch.as_tensor(matrix)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(
            f"SparseMatrix: expected a scipy sparse matrix, a torch tensor or a numpy array, got {type(matrix).__name__}"
        ) from error
    if tensor.dim() != 2:
        raise ShapeError(f"SparseMatrix: expected a matrix (n, d), got shape {tuple(tensor.shape)}")
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
    return _quietly(lambda: tensor.to_sparse_csr())


register_pytree_node(  # so that a batch that holds one is a tree of tensors
    SparseMatrix,
    lambda X: (list(X._parts), X.shape),
    lambda parts, shape: SparseMatrix._of(parts, shape),
    serialized_type_name="torch_bilevel.SparseMatrix",
)
torch.serialization.add_safe_globals([SparseMatrix])  # so that a checkpoint may hold one
