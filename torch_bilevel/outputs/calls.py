"""Which linear maps of fixed inputs a loss makes, found by watching it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from ..derivatives import Objective

#: products by which an ``OutputHessian`` is found and tested, beside one an output
PROBES = 4
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
                self._note(func, out, args, kwargs or {})
            if self.number in self.shifts:
                out = out + self.shifts[self.number]
            self.number += 1
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
    return calls if calls and 2 * (max(call.index.shape[1] for call in calls) + PROBES) <= len(y) else []
