"""Gradients and second-derivative products of f, g and their combinations. The only place that differentiates.

Gradients come from ``torch.func.grad``; they are recorded once per point as a graph ("linearised"), and every product
is one more backward pass through that graph (reverse over reverse), for one vector or for a block through ``vmap``.
A recorded graph is asked only for the block it is needed for: a product with h_yy never touches what depends on x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from .counting import OracleCounts, columns_of
from .folding import FoldedProducts
from .problem import BilevelProblem

Function = Callable[[Tensor, Tensor], Tensor]
#: columns per vmapped backward pass: 3-10x cheaper per vector up to SMALL unknowns, and about 2x above, where products
#: that share the data are folded into one
BLOCK, SMALL_BLOCK, SMALL = 32, 256, 2048
#: unknowns from which columns go one by one: a block saves nothing there and is slower (2.6 million: twice), and its
#: memory is that of as many backward passes
LARGE = 1_000_000


def load_torch_func() -> None:
    """Make ``torch.func`` import what it imports on first use (seconds, once a process), before a clock is started."""
    one = torch.ones(1)
    grad_and_value(lambda x: x.sum())(one)


def is_large(*points: Tensor) -> bool:
    """Whether products are dear enough that the microseconds of a dispatch mode do not count."""
    return sum(point.numel() for point in points) > SMALL


def fast_products(*points: Tensor, batched: bool = False):
    """FoldedProducts for large problems; on a GPU, where there is nothing to turn over, for blocks only."""
    fold = is_large(*points) and (batched or points[0].device.type == "cpu")
    return FoldedProducts() if fold else nullcontext()


class Objective:
    """h(x, y) = a f(x, y) + b g(x, y) + b' <g_y(x, y), v>: the functions that bilevel formulas differentiate.

    Args:
        problem: supplies f and g.
        upper, lower: the coefficients a and b.
        tangent: v (dy,), held constant, or None; with it h has the term ``tangent_weight`` * <g_y(x, y), v>.
        counts: where the calls are counted.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        upper: float = 0.0,
        lower: float = 0.0,
        *,
        tangent: Tensor | None = None,
        tangent_weight: float = 1.0,
        counts: OracleCounts,
    ):
        self.problem, self.counts = problem, counts
        self.upper, self.lower = upper, lower
        self.tangent, self.tangent_weight = tangent, tangent_weight
        self.uses = {"upper": upper != 0.0, "lower": lower != 0.0 or tangent is not None}

    def functions(self) -> Iterable[Function]:
        """Functions of (x, y) that add up to h: one when the data is one batch, else one per chunk."""
        problem = self.problem
        levels = [level for level, used in self.uses.items() if used]
        if all(problem.is_single_piece(level) for level in levels):
            pieces = {level: next(iter(problem.pieces(level)))[1] for level in levels}
            return [lambda x, y: sum(self._term(level, piece)(x, y) for level, piece in pieces.items())]
        return (self._term(level, f, w) for level in levels for w, f in problem.pieces(level))

    @property
    def is_single(self) -> bool:
        return all(self.problem.is_single_piece(level) for level, used in self.uses.items() if used)

    def _term(self, level: str, piece: Function, weight: float = 1.0) -> Function:
        if level == "upper":
            return lambda x, y: (self.upper * weight) * piece(x, y)
        if self.tangent is None:
            return lambda x, y: (self.lower * weight) * piece(x, y)

        def with_tangent(x: Tensor, y: Tensor) -> Tensor:
            gradient, value = grad_and_value(piece, argnums=1)(x, y)
            term = (self.tangent_weight * weight) * torch.dot(gradient, self.tangent)
            return term + (self.lower * weight) * value if self.lower else term

        return with_tangent

    @property
    def kind(self) -> str:
        """Which terms it has: letters of 'f', 'g' and 't' (the one with the tangent)."""
        terms = (self.upper, self.lower, self.tangent is not None)
        return "".join(letter for letter, has in zip("fgt", terms) if has)

    def _count(self, kind: str, number: int = 1) -> None:
        """One call of each level; <g_y, v> alone is a product when its value or gradient is taken, not a gradient."""
        for level, used in self.uses.items():
            if used:
                only_tangent = level == "lower" and self.tangent is not None and not self.lower
                self.counts.add(**{f"{level}_{'products' if only_tangent else kind}": number})

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """h(x, y), ()."""
        self._count("values")
        with torch.no_grad():
            return sum(function(x, y) for function in self.functions()).detach()

    def gradient(self, x: Tensor, y: Tensor, wrt: str = "xy") -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(h, h_x, h_y) without a retained graph; a derivative that ``wrt`` does not name is None."""
        self._count("gradients")
        argnums = tuple("xy".index(letter) for letter in wrt)
        value, parts = 0.0, None
        for function in self.functions():
            with fast_products(x, y):
                pieces, piece_value = grad_and_value(function, argnums=argnums)(x, y)
            value = value + piece_value.detach()
            pieces = [piece.detach() for piece in pieces]
            parts = pieces if parts is None else [a + b for a, b in zip(parts, pieces)]
        found = dict(zip(wrt, parts))
        return value, found.get("x"), found.get("y")

    def linearise(self, x: Tensor, y: Tensor, wrt: str = "xy") -> Linearisation:
        """The gradient of h at (x, y), recorded for products."""
        return Linearisation(self, x, y, wrt)


class Linearisation:
    """h at one point: value, gradients h_x, h_y, and products with the blocks of its Hessian.

    Products take (n,) or (n, k) and are exact. With one batch the recorded graph is kept (memory: a few times one
    backward pass) and a product costs about two backward passes; with a loader every product records its chunks anew.

    Attributes:
        value (), gx (dx,) or None, gy (dy,) or None.
        factor, prepared: what ``LowerSystems`` knows of this point: the factor of h_yy here, or None, and whether it
            was decided that one be made for many solves. outputs: the ``OutputHessian`` here, once it was asked for.
    """

    def __init__(self, objective: Objective, x: Tensor, y: Tensor, wrt: str = "xy"):
        self.factor: Any = None
        self.prepared = False
        self.outputs: Any = None
        self.objective, self.x, self.y, self.wrt = objective, x.detach(), y.detach(), wrt
        objective._count("gradients")
        self._graph = None
        value, gx, gy = 0.0, None, None
        for function in objective.functions():
            graph = _Graph(function, self.x, self.y, wrt)
            value = value + graph.value
            gx = _plus(gx, graph.gx)
            gy = _plus(gy, graph.gy)
            if objective.is_single:
                self._graph = graph
        self.value = value
        self.gx, self.gy = gx, gy

    def yy(self, w: Tensor) -> Tensor:
        """h_yy w."""
        return self._apply(None, w, "y")[1]

    def xy(self, w: Tensor) -> Tensor:
        """h_xy w, from (dy,) to (dx,)."""
        return self._apply(None, w, "x")[0]

    def yx(self, u: Tensor) -> Tensor:
        """h_yx u, from (dx,) to (dy,)."""
        return self._apply(u, None, "y")[1]

    def xx(self, u: Tensor) -> Tensor:
        """h_xx u."""
        return self._apply(u, None, "x")[0]

    def joint(self, u: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hess h (u, w) as the pair (x-part, y-part); None stands for zero."""
        return self._apply(u, w, "xy")

    def x_part(self, u: Tensor, w: Tensor) -> Tensor:
        """h_xx u + h_xy w."""
        return self._apply(u, w, "x")[0]

    def to_x(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(h_xy w, h_yy w) in one pass."""
        return self._apply(None, w, "xy")

    def _apply(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        given = u if u is not None else w
        self.objective._count("products", columns_of(given))
        if self._graph is not None:
            return self._graph.apply(u, w, wrt)
        total: list[Tensor | None] = [None, None]
        for function in self.objective.functions():
            parts = _Graph(function, self.x, self.y, self.wrt).apply(u, w, wrt)
            total = [_plus(a, b) for a, b in zip(total, parts)]
        return total[0], total[1]


class _Graph:
    """The recorded gradient of one function at one point."""

    def __init__(self, function: Function, x: Tensor, y: Tensor, wrt: str):
        self.x = x.clone().requires_grad_(True)
        self.y = y.clone().requires_grad_(True)
        argnums = tuple("xy".index(letter) for letter in wrt)
        with torch.enable_grad(), fast_products(x, y):
            gradients, value = grad_and_value(function, argnums=argnums)(self.x, self.y)
        found = dict(zip(wrt, gradients))
        self._outputs = {letter: found.get(letter) for letter in "xy"}
        self.value = value.detach()
        self.gx = found["x"].detach() if "x" in found else None
        self.gy = found["y"].detach() if "y" in found else None
        self._batched = True

    def apply(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        inputs = [getattr(self, letter) for letter in wrt]
        outputs, cotangents = [], []
        for letter, vector in (("x", u), ("y", w)):
            if vector is None:
                continue
            output = self._outputs[letter]
            if output is None:
                raise RuntimeError(f"this linearisation has no derivative in {letter}")
            if output.requires_grad:
                outputs.append(output)
                cotangents.append(vector)
        given = u if u is not None else w
        if not outputs:
            results = [given.new_zeros((i.numel(), *given.shape[1:])) for i in inputs]
        elif given.dim() == 1:
            results = self._backward(outputs, inputs, cotangents, False)
        else:
            results = self._block(outputs, inputs, cotangents)
        found = dict(zip(wrt, results))
        return found.get("x"), found.get("y")

    def _block(self, outputs, inputs, cotangents) -> list[Tensor]:
        columns = cotangents[0].shape[1]
        if columns == 1 or not self._batched or self.x.numel() + self.y.numel() >= LARGE:
            singles = [
                self._backward(outputs, inputs, [c[:, j].contiguous() for c in cotangents], False)
                for j in range(columns)
            ]
            return [torch.stack(parts, dim=1) for parts in zip(*singles)]
        blocks, size = [], BLOCK if is_large(self.x, self.y) else SMALL_BLOCK
        for start in range(0, columns, size):
            rows = [c[:, start : start + size].T.contiguous() for c in cotangents]
            try:
                blocks.append(self._backward(outputs, inputs, rows, True))
            except RuntimeError:  # an operation without a vmap rule: one column at a time, from now on
                self._batched = False
                return self._block(outputs, inputs, cotangents)
        return [torch.cat([part.T for part in parts], dim=1) for parts in zip(*blocks)]

    def _backward(self, outputs, inputs, cotangents, batched: bool) -> list[Tensor]:
        with fast_products(self.x, self.y, batched=batched):
            parts = torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        rows = cotangents[0].shape[:1] if batched else ()
        return [
            part if part is not None else inputs[i].new_zeros((*rows, inputs[i].numel())) for i, part in enumerate(parts)
        ]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
