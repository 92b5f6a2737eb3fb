"""Phi: a function of (x, y) as one of x, y and the outputs of its linear calls, with its gradient and products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..folding import is_large
from .calls import Watch
from .graph import Recorded, backward

if TYPE_CHECKING:
    from ..derivatives import Objective

#: difference over the size of the terms that counts as rounding, in units of eps
ROUNDING = 200


class Phi(Recorded):
    """h(x, y) = phi(x, y, A y) at one point: phi is the loss with leaves z in the place of the outputs of its linear calls.

    The chain rule does the rest, h_y = phi_y + A' phi_z and so on, with products with the data in the order and by the library
    that are fastest, and nothing of the data in the recorded graph. Right where ``is_chain``.

    Args:
        h: an objective whose data is one batch. wrt: for which of "xy" there are to be gradients. record: keep a graph for
            products.

    Attributes:
        calls: in the order of the levels. leaves: y, the z of the calls, x, as far as they are differentiated.
        complete: see ``Watch``. node: the backward node of the value, where recorded.
    """

    def __init__(self, h: Objective, x: Tensor, y: Tensor, wrt: str = "xy", *, record: bool = True):
        super().__init__(x.numel() + y.numel(), is_large(x, y))
        self.x, self.y = x.detach().clone().requires_grad_(True), y.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            value = self._value(h)
            self.leaves = {"y": [self.y, *self.zs], "x": [self.x]}
            inputs = [leaf for letter in wrt for leaf in self.leaves[letter]]
            parts = torch.autograd.grad(value, inputs, create_graph=record, allow_unused=True)
        self._gradients = dict(zip(inputs, parts))
        self.value, self.wrt, self.node = value.detach(), wrt, value.grad_fn if record else None
        self.gx = self._part(self._gradients[self.x], self.x) if "x" in wrt else None
        self.gy = self._pulled([self._gradients[leaf] for leaf in self.leaves["y"]]) if "y" in wrt else None

    @property
    def by_outputs(self) -> Phi:
        return self

    def _value(self, h: Objective) -> Tensor:
        """phi = a f + b g + b' <g_y, v>, where <g_y, v> = <phi_y, v> + <phi_z, A v> with the phi of g."""
        seen, values, found, self.complete = h.problem.seen, {}, {}, True
        for level in (level for level, used in h.uses.items() if used):
            with Watch(self.y, seen, level) as watch:
                values[level] = next(iter(h.problem.pieces(level)))[1](self.x, self.y)
            found[level] = watch.found
            seen.calls[level] = [call for _, call in found[level]]
            self.complete = self.complete and watch.complete
        everything = [pair for pairs in found.values() for pair in pairs]
        self.zs, self.calls = [z for z, _ in everything], [call for _, call in everything]
        total = h.upper * values.get("upper", 0.0) + h.lower * values.get("lower", 0.0)
        if h.tangent is None:
            return total
        leaves, v = [self.y, *(z for z, _ in found["lower"])], h.tangent.detach()
        parts = torch.autograd.grad(values["lower"], leaves, create_graph=True, allow_unused=True)
        directions = [v, *(call.as_called(call.outputs(v[:, None]))[0] for _, call in found["lower"])]
        return total + h.tangent_weight * sum((p * direction).sum() for p, direction in zip(parts, directions) if p is not None)

    def is_gradient(self, gy: Tensor) -> bool:
        """Whether this is h_y, found otherwise: the chain rule goes wrong where an output is used in ways that were not seen."""
        size = torch.linalg.vector_norm(self._part(self._gradients[self.y], self.y))
        for call, z in zip(self.calls, self.zs):
            size += call.norm * torch.linalg.vector_norm(self._part(self._gradients[z], z))
        return bool(torch.linalg.vector_norm(self.gy - gy) <= ROUNDING * torch.finfo(gy.dtype).eps * size)

    def product(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        rows = (None if v is None else v[:, None] for v in (u, w))
        return tuple(None if part is None else part[:, 0] for part in self._product(*rows, wrt, batched=False))

    def block(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        return self._product(u, w, wrt, batched=True)

    def _product(self, u: Tensor | None, w: Tensor | None, wrt: str, batched: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of (dx, k) and (dy, k); k = 1 unless batched."""
        directions = [] if w is None else [w.mT, *(call.as_called(call.outputs(w)) for call in self.calls)]
        given = dict(zip(self.leaves["y"], directions))
        if u is not None:
            given[self.x] = u.mT
        parts = self.second(given, [leaf for letter in wrt for leaf in self.leaves[letter]], batched)
        k = (u if u is not None else w).shape[1]
        on_x = None
        if "x" in wrt:
            *parts, on_x = parts if wrt[-1] == "x" else [*parts[1:], parts[0]]
            on_x = self._part(on_x, self.x, k).mT
        return on_x, self._pulled(parts, k) if "y" in wrt else None

    def second(self, given: dict[Tensor, Tensor], inputs: list[Tensor], batched: bool = False) -> list[Tensor | None]:
        """Hess phi times stacks of directions (k, ...) by their leaves, at these inputs; None stands for zero.

        One direction comes back without its stack.
        """
        pairs = [(self._gradients[leaf], v if batched else v[0]) for leaf, v in given.items()]
        return list(backward([(g, v) for g, v in pairs if g is not None and g.requires_grad], inputs, batched))

    def _pulled(self, parts: list[Tensor | None], columns: int | None = None) -> Tensor:
        """y-part + A' z-parts: (dy,), or (dy, k)."""
        on_y, *on_z = parts
        out = self._part(on_y, self.y, columns or 1).mT.contiguous()
        for call, part in zip(self.calls, on_z):
            if part is not None:
                call.add_adjoint(out, call.by_outputs(part.detach()))
        return out if columns else out[:, 0]

    @staticmethod
    def _part(part: Tensor | None, leaf: Tensor, columns: int | None = None) -> Tensor:
        """What autograd answers with, in the shape of a leaf, or (k, n) for a flat one."""
        shape = leaf.shape if columns is None else (columns, *leaf.shape)
        return torch.zeros(shape, dtype=leaf.dtype, device=leaf.device) if part is None else part.detach().reshape(shape)
