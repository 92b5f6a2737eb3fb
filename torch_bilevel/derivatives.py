"""Gradients and second-derivative products of f, g and their combinations.

Gradients are recorded once per point as a graph ("linearised", see ``recorded``), and every product is one more backward
pass through that graph (reverse over reverse), for one vector or for a block through ``vmap``. A recorded graph is asked
only for the block it is needed for: a product with h_yy never touches what depends on x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.func import grad_and_value

from .counting import OracleCounts, columns_of
from .folding import fast_products
from .problem import BilevelProblem
from .recorded import Compiled, Graph, LinearCall, Phi, Program, Recorded, calls, look, worth_it

Function = Callable[[Tensor, Tensor], Tensor]

#: products of g, and of other objectives, that methods ask for: traced at once, compiled where they are asked for
USUAL, OTHERS = {"g": [("y", "y"), ("y", "x"), ("x", "y")]}, [("y", "y"), ("xy", "xy")]


def load_torch_func() -> None:
    """Make ``torch.func`` import what it imports on first use (seconds, once a process), before a clock is started."""
    one = torch.ones(1)
    grad_and_value(lambda x: x.sum())(one)


class Objective:
    """h(x, y) = a f(x, y) + b g(x, y) + b' <g_y(x, y), v>: the functions that bilevel formulas differentiate.

    Args:
        problem: supplies f and g.
        upper, lower: the coefficients a and b.
        tangent: v (dy,), held constant, or None; with it h has the term ``tangent_weight`` * <g_y(x, y), v>.
        counts: where the calls are counted.

    Attributes:
        kind: which terms it has, letters of 'f', 'g' and 't' (the one with the tangent). uses: which levels.
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
        terms = (upper != 0.0, lower != 0.0, tangent is not None)
        self.kind = "".join(letter for letter, has in zip("fgt", terms) if has)
        self.uses = {"upper": terms[0], "lower": terms[1] or terms[2]}

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

        kind = self.kind

        def with_tangent(x: Tensor, y: Tensor) -> Tensor:
            gradient, value = grad_and_value(piece, argnums=1)(x, y)
            term = (self.tangent_weight * weight) * torch.dot(gradient, self.tangent)
            return term + (self.lower * weight) * value if "g" in kind else term

        return with_tangent

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
        if self.is_compiled:
            program, inputs = self._program(x, y)
            found = dict(zip(("h", *wrt), program.gradient(inputs, wrt)))
            return found["h"], found.get("x"), found.get("y")
        if self.is_chain(x, y):
            phi = Phi(self, x, y, wrt, record=False)
            return phi.value, phi.gx, phi.gy
        return self._gradient(x, y, wrt)

    def _gradient(self, x: Tensor, y: Tensor, wrt: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """By ``torch.func``, piece by piece."""
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

    def calls(self, x: Tensor, y: Tensor, anew: bool = False) -> list[LinearCall]:
        """The linear maps of fixed inputs that f and g make, as far as it uses them, in the order of its calls.

        As last seen, or ``anew`` where their inputs may have changed. None of them where the data comes in chunks, where they
        would save less than half of the products with h_yy, or in bfloat16, where rounding hides what is not of this kind.
        """
        if y.numel() <= calls.SMALL or not self.is_single or y.dtype not in (torch.float32, torch.float64):
            return []
        found = [call for level, used in self.uses.items() if used for call in look(self.problem, level, x, y, anew)]
        return found if worth_it(found, y.numel()) else []

    def is_chain(self, x: Tensor, y: Tensor) -> bool:
        """Whether it is evaluated by ``Phi``: all that it does with y goes by linear calls, or entry by entry.

        Found out once for a problem, by one evaluation each way, not counted; where f and g are, all that is made of them is.
        """
        chains = self.problem.seen.chains
        if self.kind not in chains:
            known = all(chains.get("g" if letter == "t" else letter) for letter in self.kind)
            chains[self.kind] = known or self._goes_by_calls(x, y)
        return chains[self.kind] and bool(self.calls(x, y))

    def _goes_by_calls(self, x: Tensor, y: Tensor) -> bool:
        phi = Phi(self, x, y, "y", record=False) if self.calls(x, y) else None
        return phi is not None and phi.complete and phi.is_gradient(self._gradient(x, y, "y")[2])

    @property
    def is_compiled(self) -> bool:
        return self.problem.compile and self.is_single

    def record(self, x: Tensor, y: Tensor, wrt: str = "xy", *, compiled: bool) -> Recorded:
        """h at one point, where its data is one batch."""
        if compiled:
            program, inputs = self._program(x, y)
            calls = (lambda: self.calls(x, y, anew=True)) if self.is_chain(x, y) else None
            return Compiled(program, inputs, wrt, calls, lambda: self.record(x, y, wrt, compiled=False))
        if self.is_chain(x, y):
            return Phi(self, x, y, wrt)
        return Graph(next(iter(self.functions())), x, y, wrt)

    def _program(self, x: Tensor, y: Tensor) -> tuple[Program, list[Tensor]]:
        """What is compiled for objectives of this kind and data of these shapes, and what it is given here."""
        problem, names = self.problem, ("upper", "lower", "tangent_weight")
        weights = torch.tensor([getattr(self, name) for name in names], dtype=x.dtype, device=x.device)
        tangent = [] if self.tangent is None else [self.tangent.detach()]
        inputs = [x, y, weights, *tangent, *problem.tensors()]
        key = self.kind, problem.signature()
        if key not in problem.seen.programs:
            kind, beside = self.kind, len(tangent)

            def record(x: Tensor, y: Tensor, weights: Tensor, *rest: Tensor) -> Recorded:
                h = Objective(
                    problem.to_trace(rest[beside:]), upper=float("f" in kind), lower=float("g" in kind),
                    tangent=rest[0] if beside else None, counts=OracleCounts(),
                )  # fmt: skip
                for letter, name, weight in zip("fgt", names, weights):
                    if letter in kind:
                        setattr(h, name, weight)  # instead of 1
                return h.record(x, y, compiled=False)

            self.is_chain(x, y)  # found out by looking at values, before it is traced
            what = " and ".join(problem.words[level] for level, is_used in self.uses.items() if is_used)
            problem.seen.programs[key] = Program(record, inputs, USUAL.get(kind, OTHERS), what)
        return problem.seen.programs[key], inputs

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
        self._graph: Recorded | None = None
        if objective.is_single:
            self._graph = graph = objective.record(self.x, self.y, wrt, compiled=objective.is_compiled)
            self.value, self.gx, self.gy = graph.value, graph.gx, graph.gy
            return
        value, gx, gy = 0.0, None, None
        for function in objective.functions():
            graph = Graph(function, self.x, self.y, wrt)
            value = value + graph.value
            gx = _plus(gx, graph.gx)
            gy = _plus(gy, graph.gy)
        self.value, self.gx, self.gy = value, gx, gy

    @property
    def phi(self) -> Phi | Compiled:
        """What is recorded, where it goes by outputs; else a ``Phi`` made now, for a function that is not evaluated by it."""
        graph = None if self._graph is None else self._graph.by_outputs
        return Phi(self.objective, self.x, self.y, self.wrt) if graph is None else graph

    @property
    def recorded_node(self) -> Node | None:
        """The backward node of the value; None where the recording does not show it."""
        return self._graph.node if isinstance(self._graph, Phi) else None

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
            parts = Graph(function, self.x, self.y, self.wrt).apply(u, w, wrt)
            total = [_plus(a, b) for a, b in zip(total, parts)]
        return total[0], total[1]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
