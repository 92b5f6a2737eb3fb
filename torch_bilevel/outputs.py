"""Hessians of losses that see the learner through linear maps of fixed inputs, assembled from those of its outputs.

A linear layer on data (or on the features of a frozen network) makes z = X V of the inputs X (n, d) and of weights V
that are entries of y; a loss that treats its samples one by one then has

    h_yy = A' B A + diag(d),   h_yx = A' C,      A: y -> z,  B: one (K, K) block a sample,  C: one x_i a sample,

with X' diag(B_kl) X for each pair of outputs: K products and n d^2 K^2 multiplications instead of K d products. Nobody
declares this: the calls are found by watching the loss, the blocks by a few products, and the whole is believed if it
multiplies random vectors as the true Hessian does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .folding import is_thin, turn_over

if TYPE_CHECKING:
    from .derivatives import Linearisation, Objective

#: products that tell d and the diagonal of h_xx, and whether B, C and these are all there is
PROBES = 4
#: numbers of all outputs of a block of products: bounds memory
COLUMN_NUMBERS = 2**23
#: |A' B A v + d v - h_yy v| over the norms of its terms that counts as rounding, in units of eps sqrt(n)
ROUNDING = 10
#: a multiplication inside a large matrix product over one inside a product with a vector, in time
GEMM = 0.4
#: multiplications of a product with a vector that take as long as the calls it is made of
LEAST = 1_000_000
#: learner parameters up to which columns are as cheap
SMALL = 100

MATMULS = (
    torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__,
)  # fmt: skip
ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


@dataclass
class LinearCall:
    """z = X V: one linear map of fixed inputs, as a loss has called it.

    Attributes:
        number: which of the loss's calls it was. shape: of z as the loss got it.
        X: (n, d), with a column of ones where the layer has a bias. index: (d, K), V = y[index].
    """

    number: int
    shape: torch.Size
    X: Tensor
    index: Tensor


class Watch(TorchFunctionMode):
    """Under it, a loss's linear maps are counted; those of fixed inputs and entries of ``y`` are noted in ``calls``.

    Args:
        y: the leaf (dy,) that the loss is evaluated at, to note; or None.
        shifts: number -> tensor to add to the output of that call.
    """

    def __init__(self, y: Tensor | None = None, shifts: dict[int, Tensor] | None = None):
        super().__init__()
        self.y, self.shifts = y, shifts or {}
        self.calls: list[LinearCall] = []
        self._found: list[tuple[Tensor, LinearCall]] = []
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ADDS and self.y is not None and not kwargs:
            self._note_bias(*args)
        if func is torch.nn.functional.linear or func in MATMULS:
            if self.y is not None:
                self._note(func, out, *args, **(kwargs or {}))
            if self.number in self.shifts:
                out = out + self.shifts[self.number]
            self.number += 1
        return out

    def _note(self, func: Any, out: Tensor, X: Any, weight: Any, bias: Any = None, **others: Any) -> None:
        if others or not isinstance(X, Tensor) or X.layout is not torch.strided or X.requires_grad or X.dim() == 0:
            return
        index = self._entries(weight)
        if index is None or X.dtype != self.y.dtype:
            return
        index = index.T if func is torch.nn.functional.linear else index
        index = index.reshape(len(index), -1)  # a vector of weights has one output
        if index.shape[0] != X.shape[-1]:
            return
        self.calls.append(LinearCall(self.number, out.shape, X.detach().reshape(-1, X.shape[-1]), index))
        self._found.append((out, self.calls[-1]))
        if isinstance(bias, Tensor) and bias.requires_grad:
            self._note_bias(out, bias)

    def _note_bias(self, a: Any, b: Any) -> None:
        """z + b, for z the output of a call and b entries of y, is that of a call with a column of ones."""
        for out, other in ((a, b), (b, a)):
            call = next((call for known, call in self._found if known is out), None)
            entries = self._entries(other) if call is not None else None
            if entries is not None and entries.numel() == call.index.shape[1]:
                call.index = torch.cat([call.index, entries.reshape(1, -1)])
                call.X = torch.cat([call.X, call.X.new_ones(len(call.X), 1)], dim=1)

    def _entries(self, view: Any) -> Tensor | None:
        """Which entries of y a view of it shows, or y itself; or None."""
        if not isinstance(view, Tensor) or view.dim() > 2 or not (view is self.y or view._base is self.y):
            return None
        entries = torch.arange(len(self.y), device=self.y.device)
        entries = entries.as_strided(view.shape, view.stride(), view.storage_offset() - self.y.storage_offset())
        distinct = torch.zeros(len(self.y), dtype=torch.bool, device=self.y.device).index_fill_(0, entries.reshape(-1), True)
        return entries if int(distinct.sum()) == entries.numel() else None


class OutputHessian:
    """h_yy, h_yx and h_xx of one recorded objective, from Hessians with respect to the learner's outputs.

    Attributes:
        calls: the linear maps; each with its B (n, K, K) in ``blocks``.
        diagonal: d (dy,).
        cross: C (n, K) and its call where x_i meets the i-th sample only, else None.
        xx: the diagonal (dx,) of h_xx where that is a diagonal matrix, else None.
    """

    def __init__(self, calls: list[LinearCall], blocks: list[Tensor], diagonal: Tensor):
        self.calls, self.blocks, self.diagonal = calls, blocks, diagonal
        self.cross: tuple[LinearCall, Tensor] | None = None
        self.xx: Tensor | None = None

    @classmethod
    def of(cls, at: Linearisation, calls: list[LinearCall]) -> OutputHessian | None:
        """That of ``at``, whose objective makes these calls, or None where it is not of this kind.

        Cost: one pass with its graph; max K products with the outputs' Hessian and two or four with the whole one.
        """
        h, x, y = at.objective, at.x, at.y
        blocks, cross = output_blocks(next(iter(h.functions())), x, y, calls)
        h._count("products", most_outputs(calls))
        self = cls(calls, blocks, torch.zeros_like(y))
        w = _probes(y)
        if "x" in at.wrt:
            u = _probes(x)
            on_x, on_y = at.joint(torch.cat([x.new_zeros(len(x), 2), u], dim=1), torch.cat([w, y.new_zeros(len(y), 2)], dim=1))
        else:
            u, on_x, on_y = None, None, at.yy(w)
        first, second = self.yy(w).T
        self.diagonal = on_y[:, 0] - first
        direct = self.diagonal * w[:, 1]
        if not _same(second + direct, on_y[:, 1], second, direct):
            return None
        if u is not None:
            self.cross = cross
            if cross is not None and not _same(self.yx(u[:, 1]), on_y[:, 3], on_y[:, 3]):
                self.cross = None
            if _same(on_x[:, 2] * u[:, 1], on_x[:, 3], on_x[:, 3]):
                self.xx = on_x[:, 2]
        return self

    def yy(self, v: Tensor) -> Tensor:
        """h_yy v for (dy,) or (dy, k)."""
        V = v.reshape(len(v), -1)
        out = self.diagonal[:, None] * V
        for call, B in zip(self.calls, self.blocks):
            X, entries = call.X, call.index.reshape(-1)
            Z = _product(X, V[entries].view(X.shape[1], -1)).view(len(X), B.shape[1], -1)
            back = _product(X.mT, torch.bmm(B, Z).view(len(X), -1))
            out.index_add_(0, entries, back.view(len(entries), -1))
        return out.view(v.shape)

    def yx(self, u: Tensor) -> Tensor:
        """h_yx u, (dy,), from ``cross``."""
        call, C = self.cross
        return u.new_zeros(len(self.diagonal)).index_add(0, call.index.reshape(-1), (call.X.mT @ (C * u[:, None])).reshape(-1))

    def dense_yy(self) -> Tensor:
        """(dy, dy). Cost: sum over the calls of n d^2 K (K + 1) / 2 multiplications; memory: n d K numbers beside it."""
        dy, rest = len(self.diagonal), list(zip(self.calls, self.blocks))
        H = torch.diag(self.diagonal)
        while rest:
            index = rest[0][0].index
            group = [(call.X, B) for call, B in rest if torch.equal(call.index, index)]
            rest = [(call, B) for call, B in rest if not torch.equal(call.index, index)]
            place = index.T.reshape(-1)
            G = _add_pairs(H.new_zeros(len(place), len(place)), group, *index.shape)
            if len(place) == dy:  # all of y, in another order
                back = torch.argsort(place)
                H += G[back[:, None], back]
            else:
                H[place[:, None], place] += G
        return H

    def times(self, W: Tensor) -> Tensor:
        """h_yy W for (dy, k) with many columns: by the matrix where that is cheaper, else by blocks of products."""
        sizes = [(len(c.X), *c.index.shape) for c in self.calls]
        dense = sum(n * d * d * K * (K + 1) / 2 for n, d, K in sizes) + len(W) ** 2 * W.shape[1]
        if dense < sum(2 * n * d * K for n, d, K in sizes) * W.shape[1]:
            return self.dense_yy() @ W
        step = max(1, COLUMN_NUMBERS // max(n * K for n, _, K in sizes))
        return torch.cat([self.yy(block) for block in W.split(step, dim=1)], dim=1)

    def preconditioner(self, damping: float = 0.0) -> BlockPreconditioner:
        """For h_yy + damping I. Calls must share their weights."""
        index = self.calls[0].index
        U = torch.linalg.eigh(torch.cat(self.blocks).mean(0))[1]
        diagonal = self.diagonal + damping
        blocks = torch.diag_embed((diagonal[index] @ U**2).mT.contiguous())
        for call, B in zip(self.calls, self.blocks):
            weights = torch.einsum("nkl,ka,la->na", B, U, U)
            for k in range(len(blocks)):
                blocks[k].addmm_(call.X.mT, weights[:, k, None] * call.X)
        return BlockPreconditioner(blocks, U, index, diagonal)

    def dense_yx(self) -> Tensor:
        """(dy, dx), from ``cross``. Cost: n d K multiplications."""
        call, C = self.cross
        G = torch.zeros(len(self.diagonal), len(C), dtype=C.dtype, device=C.device)
        for k in range(C.shape[1]):
            G[call.index[:, k]] = (C[:, k, None] * call.X).mT
        return G


def one_product(calls: list[LinearCall]) -> float:
    """Multiplications of a product with h_yy, at least as many as take the time of its calls."""
    return max(LEAST, sum(2 * len(c.X) * c.index.numel() for c in calls))


def price(calls: list[LinearCall], more: float = 0.0) -> float:
    """The time of h_yy by these calls and of ``more`` multiplications in large matrix products, in products with a vector."""
    sizes = [(len(c.X), *c.index.shape) for c in calls]
    dense = sum(n * d * d * K * (K + 1) / 2 for n, d, K in sizes)
    return most_outputs(calls) + PROBES + GEMM * (dense + more) / one_product(calls)


def block_size(calls: list[LinearCall]) -> int | None:
    """Of a ``BlockPreconditioner``; None where the calls do not share their weights, or have one output only."""
    index = calls[0].index
    same = all(torch.equal(call.index, index) for call in calls[1:])
    return index.shape[0] if same and index.shape[1] > 1 else None


def block_price(calls: list[LinearCall]) -> float:
    """The time of a ``BlockPreconditioner``, in products with a vector."""
    d, K = calls[0].index.shape
    made = sum(len(call.X) for call in calls) * d**2 * K + d**3 * K
    return K + PROBES + GEMM * made / one_product(calls)


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


def _add_pairs(G: Tensor, group: list[tuple[Tensor, Tensor]], d: int, K: int) -> Tensor:
    """G + sum of X' diag(B_kl) X over the (X, B) of the group, at rows k d and columns l d of G (K d, K d); in place."""
    for k in range(K):
        here = slice(k * d, (k + 1) * d)
        for X, B in group:
            G[here, k * d :].addmm_(X.mT, (B[:, k, k:, None] * X[:, None, :]).view(len(X), -1))
        G[(k + 1) * d :, here] += G[here, (k + 1) * d :].mT
    return G


def most_outputs(calls: list[LinearCall]) -> int:
    return max(call.index.shape[1] for call in calls)


def watch(objective: Objective, x: Tensor, y: Tensor) -> list[LinearCall]:
    """The linear maps of fixed inputs in f and g, as far as the objective uses them, in the order of its calls.

    None of them where the data comes in chunks, or where they would save less than half of the products with h_yy.
    Cost: one evaluation of the losses, not counted: it is made once a run, like the checks of the problem.
    """
    if len(y) <= SMALL or not objective.is_single:
        return []
    x, y = x.clone().requires_grad_(True), y.clone().requires_grad_(True)
    with torch.enable_grad(), Watch(y) as mode:
        for level, used in objective.uses.items():
            if used:
                next(iter(objective.problem.pieces(level)))[1](x, y)
    calls = mode.calls
    return calls if calls and 2 * (most_outputs(calls) + PROBES) <= len(y) else []


def output_blocks(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, calls: list[LinearCall]
) -> tuple[list[Tensor], tuple[LinearCall, Tensor] | None]:
    """The (n, K, K) Hessians of a loss in the outputs of its calls, were each sample on its own; C likewise, with its call.

    B = h_zz and C = h_zx are read off products with ones: right if no sample's output meets another's, or another's x.
    """
    x = x.clone().requires_grad_(True)
    shifts = {c.number: torch.zeros(c.shape, dtype=y.dtype, device=y.device, requires_grad=True) for c in calls}
    outputs = list(shifts.values())
    with torch.enable_grad(), Watch(shifts=shifts):
        h = function(x, y)
    gx, *gradients = torch.autograd.grad(h, [x, *outputs], create_graph=True, allow_unused=True)
    blocks = []
    for call, z, gradient in zip(calls, outputs, gradients):
        K = call.index.shape[1]
        B = z.new_zeros(K, z.numel() // K, K)
        if gradient is not None and gradient.requires_grad:
            ones = torch.eye(K, dtype=z.dtype, device=z.device)[:, None, :].expand(K, z.numel() // K, K)
            B = _rows(gradient, z, ones.reshape(K, *z.shape)).reshape(K, -1, K)
        blocks.append(B.permute(1, 2, 0).contiguous())
    cross = None
    if gx is not None and gx.requires_grad:
        own = torch.autograd.grad(gx, outputs, torch.ones_like(gx), allow_unused=True)
        found = [(call, C.reshape(len(x), -1)) for call, C in zip(calls, own)
                 if C is not None and len(call.X) == len(x) and bool(C.any())]  # fmt: skip
        cross = found[0] if len(found) == 1 else None
    return blocks, cross


def _rows(gradient: Tensor, z: Tensor, cotangents: Tensor) -> Tensor:
    """d<gradient, c>/dz for every cotangent c, stacked."""
    try:
        (rows,) = torch.autograd.grad(gradient, z, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True)
        return torch.zeros_like(cotangents) if rows is None else rows
    except RuntimeError:  # an operation without a vmap rule
        rows = [torch.autograd.grad(gradient, z, c, retain_graph=True, allow_unused=True)[0] for c in cotangents]
        return torch.stack([torch.zeros_like(z) if row is None else row for row in rows])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, contiguous, in the faster order."""
    return turn_over(a, b) if is_thin(a, b) else a @ b


def _probes(like: Tensor) -> Tensor:
    """(n, 2): ones and a random vector."""
    random = torch.randn(len(like), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    return torch.stack([torch.ones_like(like), random], dim=1)


def _same(mine: Tensor, true: Tensor, *terms: Tensor) -> bool:
    """Whether two vectors are equal up to the rounding of the terms that ``mine`` is made of."""
    size = sum(torch.linalg.vector_norm(term) for term in terms)
    tolerance = ROUNDING * torch.finfo(true.dtype).eps * len(true) ** 0.5
    return bool(torch.linalg.vector_norm(mine - true) <= tolerance * size)
