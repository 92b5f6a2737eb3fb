"""Which linear maps of fixed inputs a loss makes, found by watching it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..folding import multiply

if TYPE_CHECKING:
    from ..derivatives import Objective

#: products by which an ``OutputHessian`` is found and tested, beside one an output; as many more where x is seen as well
PROBES = 2
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

    @cached_property
    def single(self) -> LinearCall:
        """The same with X in float32, kept."""
        return self if self.X.dtype is torch.float32 else LinearCall(self.number, self.shape, self.X.float(), self.index)

    @cached_property
    def norm(self) -> Tensor:
        """The Frobenius norm of X, kept."""
        return torch.linalg.vector_norm(self.X)

    @property
    def share(self) -> Tensor:
        """What a number in y is worth in z: rounding of it at B (K, K, n) is rounding of 1 in X' B X."""
        return len(self.X) ** 0.5 / self.norm**2

    def by_outputs(self, z: Tensor) -> Tensor:
        """(K, 1, n) of a tensor of the shape as the loss has it."""
        return z.reshape(-1, self.index.shape[1]).mT.contiguous().unsqueeze(1)

    def outputs(self, V: Tensor) -> Tensor:
        """X V for every column: (dy, k) -> (K, k, n)."""
        d, K = self.index.shape
        return multiply(self.X, V[self.index.reshape(-1)].view(d, -1)).mT.contiguous().view(K, -1, len(self.X))

    def add_adjoint(self, out: Tensor, W: Tensor) -> Tensor:
        """out + X' W at the entries of y for every column, in place: (dy, k), (K, k, n) -> (dy, k)."""
        entries = self.index.reshape(-1)
        return out.index_add_(0, entries, multiply(self.X.mT, W.view(-1, len(self.X)).mT).view(len(entries), -1))


class Watch(TorchFunctionMode):
    """Under it, a loss's linear maps are counted; those of fixed inputs and entries of ``y`` are noted in ``calls``.

    Args:
        y: the leaf (dy,) that the loss is evaluated at.
    """

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = y
        self.calls: list[LinearCall] = []
        self._found: list[tuple[Tensor, LinearCall]] = []
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ADDS and not kwargs:
            args = self._adding(*args)
        out = func(*args, **kwargs)
        if func is torch.nn.functional.linear or func in MATMULS:
            out = self._called(func, out, args, kwargs)
            self.number += 1
        return out

    def _adding(self, a: Any, b: Any) -> tuple:
        """The operands of a sum, seen."""
        self._note_bias(a, b)
        return a, b

    def _called(self, func: Any, out: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The output of a linear map, seen."""
        self._note(func, out, args, kwargs)
        return out

    def _note(self, func: Any, out: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(args) < 2 or not kwargs.keys() <= {"bias"}:
            return
        X, weight, bias = *args[:2], args[2] if len(args) > 2 else kwargs.get("bias")
        if not isinstance(X, Tensor) or X.layout is not torch.strided or X.requires_grad or X.dim() == 0:
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
            call, entries = self._bias(out, other)
            if entries is not None:
                call.index = torch.cat([call.index, entries.reshape(1, -1)])
                call.X = torch.cat([call.X, call.X.new_ones(len(call.X), 1)], dim=1)

    def _bias(self, out: Any, other: Any) -> tuple[LinearCall | None, Tensor | None]:
        """The call whose output this is, and, where the other one is a bias for it, which entries of y."""
        call = next((call for known, call in self._found if known is out), None)
        entries = self._entries(other) if call is not None else None
        return call, entries if entries is not None and entries.numel() == call.index.shape[1] else None

    def _entries(self, view: Any) -> Tensor | None:
        """Which entries of y a view of it shows, or y itself; or None."""
        if not isinstance(view, Tensor) or view.dim() > 2 or not (view is self.y or view._base is self.y):
            return None
        entries = torch.arange(len(self.y), device=self.y.device)
        entries = entries.as_strided(view.shape, view.stride(), view.storage_offset() - self.y.storage_offset())
        distinct = torch.zeros(len(self.y), dtype=torch.bool, device=self.y.device).index_fill_(0, entries.reshape(-1), True)
        return entries if int(distinct.sum()) == entries.numel() else None


class Replacement(Watch):
    """Under it, calls that were noted answer with their value plus a tensor, and know nothing of ``y``; nor do their biases.

    Args:
        y: the leaf (dy,) that the loss is evaluated at.
        calls: of this loss. zs: a tensor for each, of the shape of its output.
    """

    def __init__(self, y: Tensor, calls: list[LinearCall], zs: list[Tensor]):
        super().__init__(y)
        self.by_number = {call.number: (call, z) for call, z in zip(calls, zs)}

    def _adding(self, a: Any, b: Any) -> tuple:
        return (a.detach() if self._bias(b, a)[1] is not None else a), (b.detach() if self._bias(a, b)[1] is not None else b)

    def _called(self, func: Any, out: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if self.number not in self.by_number:
            return out
        call, z = self.by_number[self.number]
        out = out.detach() + z
        self._found.append((out, call))
        return out


def watch(objective: Objective, x: Tensor, y: Tensor) -> list[LinearCall]:
    """The linear maps of fixed inputs in f and g, as far as the objective uses them, in the order of its calls.

    None of them where the data comes in chunks, where they would save less than half of the products with h_yy, or in
    bfloat16, where rounding hides what is not of this kind.
    Cost: one evaluation of the losses, not counted: it is made once a run, like the checks of the problem.
    """
    if len(y) <= SMALL or not objective.is_single or y.dtype not in (torch.float32, torch.float64):
        return []
    x, y = x.clone().requires_grad_(True), y.clone().requires_grad_(True)
    with torch.enable_grad(), Watch(y) as mode:
        for level, used in objective.uses.items():
            if used:
                next(iter(objective.problem.pieces(level)))[1](x, y)
    calls = mode.calls
    return calls if calls and 2 * (max(call.index.shape[1] for call in calls) + 2 * PROBES) <= len(y) else []
