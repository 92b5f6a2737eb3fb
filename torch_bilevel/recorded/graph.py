"""A gradient recorded at a point, and products with the Hessian behind it, for one vector or for a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from ..folding import fast_products, is_large

#: columns per vmapped backward pass: 3-10x cheaper per vector up to SMALL unknowns, and about 2x above, where products
#: that share the data are folded into one
BLOCK, SMALL_BLOCK = 32, 256
#: unknowns from which columns go one by one: a block saves nothing there and is slower (2.6 million: twice), and its
#: memory is that of as many backward passes
LARGE = 1_000_000


class Recorded(ABC):
    """The value and gradient of one function of (x, y) at one point, with a graph for products.

    Attributes:
        value (), gx (dx,) or None, gy (dy,) or None.
    """

    value: Tensor
    gx: Tensor | None
    gy: Tensor | None

    def __init__(self, unknowns: int, large: bool):
        self._unknowns, self._has_vmap = unknowns, True
        self._columns = BLOCK if large else SMALL_BLOCK

    @property
    def by_outputs(self) -> Any:
        """Itself, where it has leaves in the place of the outputs of linear calls, and ``second``; else None."""
        return None

    def apply(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        """Hess (u, w) as (x-part, y-part), of which those that ``wrt`` names: (n,) or (n, k); None stands for zero."""
        for letter, v, gradient in (("x", u, self.gx), ("y", w, self.gy)):
            if v is not None and gradient is None:
                raise RuntimeError(f"this linearisation has no derivative in {letter}")
        given = u if u is not None else w
        if given.dim() == 1:
            return self.product(u, w, wrt)
        columns = given.shape[1]
        if columns > 1 and self._has_vmap and self._unknowns < LARGE:
            cuts = range(0, columns, self._columns)
            try:
                return _joined(torch.cat, [self.block(*_columns(u, w, slice(i, i + self._columns)), wrt) for i in cuts])
            except RuntimeError:  # an operation without a vmap rule: one column at a time, from now on
                self._has_vmap = False
        return self.one_by_one(u, w, wrt)

    def one_by_one(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        """As ``apply``, for a block, column by column."""
        columns = (u if u is not None else w).shape[1]
        return _joined(torch.stack, [self.product(*_columns(u, w, j), wrt) for j in range(columns)])

    @abstractmethod
    def product(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        """As ``apply``, for one vector."""

    @abstractmethod
    def block(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        """As ``apply``, for a block, at once."""


class Graph(Recorded):
    """Of any function, by ``torch.func.grad``."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, wrt: str):
        super().__init__(x.numel() + y.numel(), is_large(x, y))
        self.x, self.y = x.clone().requires_grad_(True), y.clone().requires_grad_(True)
        argnums = tuple("xy".index(letter) for letter in wrt)
        with torch.enable_grad(), fast_products(x, y):
            gradients, value = grad_and_value(function, argnums=argnums)(self.x, self.y)
        self._gradients = dict(zip(wrt, gradients))
        self.value = value.detach()
        self.gx, self.gy = (self._gradients[letter].detach() if letter in wrt else None for letter in "xy")

    def product(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        return self._backward(u, w, wrt, batched=False)

    def block(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        rows = (None if v is None else v.mT.contiguous() for v in (u, w))
        return tuple(None if part is None else part.mT for part in self._backward(*rows, wrt, batched=True))

    def _backward(self, u: Tensor | None, w: Tensor | None, wrt: str, batched: bool) -> tuple[Tensor | None, Tensor | None]:
        given = {letter: v for letter, v in (("x", u), ("y", w)) if v is not None}
        inputs = {letter: getattr(self, letter) for letter in wrt}
        pairs = [(self._gradients[letter], v) for letter, v in given.items() if self._gradients[letter].requires_grad]
        with fast_products(self.x, self.y, batched=batched):
            parts = backward(pairs, list(inputs.values()), batched)
        shape = next(iter(given.values())).shape[:-1]
        found = {a: torch.zeros(*shape, i.numel(), dtype=i.dtype, device=i.device) if p is None else p
                 for (a, i), p in zip(inputs.items(), parts)}  # fmt: skip
        return found.get("x"), found.get("y")


def backward(pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
    """sum of d <output, cotangent> / d inputs over the pairs, for cotangents or, batched, stacks of them; None for zero."""
    if not pairs:
        return (None,) * len(inputs)
    outputs, cotangents = zip(*pairs)
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched)


def _columns(u: Tensor | None, w: Tensor | None, which: int | slice) -> tuple[Tensor | None, Tensor | None]:
    return tuple(None if v is None else v[:, which].contiguous() for v in (u, w))


def _joined(join: Callable, parts: list[tuple[Tensor | None, Tensor | None]]) -> tuple[Tensor | None, Tensor | None]:
    return tuple(None if column[0] is None else join(column, dim=1) for column in zip(*parts))
