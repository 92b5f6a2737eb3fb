"""Compiled: a weighted sum of traced losses at one point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .calls import LinearCall
from .graph import Recorded
from .trace import Kind, Trace


class Program:
    """One loss, traced for the kinds of products that were asked for so far.

    Args: see ``Trace``; kinds: of products with x and y, with which it begins.
    """

    def __init__(self, record: Callable[..., Recorded], inputs: list[Tensor], kinds: list[tuple[str, str]], what: str):
        self._record, self._inputs, self._what = record, inputs, what
        x, y = inputs[:2]
        examples = {"x": torch.ones_like(x), "y": torch.ones_like(y)}
        self._make({(tuple(given), tuple(wanted), None): [examples[name] for name in given] for given, wanted in kinds})

    def traced(self, kind: Kind | None = None, directions: list[Tensor] | None = None) -> Trace:
        """The last trace, or a new one where it lacks this kind."""
        if kind is not None and kind not in self._examples:
            self._make({**self._examples, kind: [torch.ones_like(v) for v in directions]})
        return self._last

    def _make(self, examples: dict[Kind, list[Tensor]]) -> None:
        self._last, self._examples = Trace(self._record, self._inputs, examples, self._what), examples


@dataclass
class Term:
    """weight * loss(x, y, *beside), of the data of a level.

    Attributes:
        calls: the linear maps by which the loss goes, where it goes by nothing else; else None.
    """

    weight: float
    program: Program
    beside: list[Tensor]
    level: str
    calls: list[LinearCall] | None


def gradient(terms: list[Term], x: Tensor, y: Tensor, wrt: str) -> list[Tensor]:
    """The sum of the terms and its gradients that ``wrt`` names, where no products are wanted."""
    return _sum([(term.weight, term.program.traced().gradient([x, y, *term.beside], wrt)) for term in terms])


class Compiled(Recorded):
    """A sum of terms at one point, by compiled programs; blocks of directions in y by what is not compiled.

    Args:
        plain: records the same without compiling, where that is needed.

    Attributes: as ``Phi`` has them where all terms go by linear calls, but that the z are empty.
    """

    complete = True

    def __init__(self, terms: list[Term], x: Tensor, y: Tensor, wrt: str, plain: Callable[[], Recorded]):
        super().__init__(x.numel() + y.numel(), large=False)
        self.x, self.y, self.wrt, self._plain = x, y, wrt, plain
        self._terms = [(term, _Point(term.program, [x, y, *term.beside], wrt)) for term in terms]
        found = dict(zip(("h", *wrt), _sum([(term.weight, point.found) for term, point in self._terms])))
        self.value, self.gx, self.gy = found["h"], found.get("x"), found.get("y")

    @cached_property
    def plain(self) -> Recorded:
        """The same point, recorded and not compiled."""
        return self._plain()

    @property
    def by_outputs(self) -> Compiled | None:
        return self if all(term.calls is not None for term, _ in self._terms) else None

    @cached_property
    def levels(self) -> dict[str, list[tuple[Tensor, LinearCall]]]:
        """(z, call) by level."""
        found = {term.level: term.calls for term, _ in self._terms}
        levels = [level for level in ("upper", "lower") if level in found]
        return {level: [(self.y.new_empty(call.shape), call) for call in found[level]] for level in levels}

    @property
    def zs(self) -> list[Tensor]:
        return [z for pairs in self.levels.values() for z, _ in pairs]

    @property
    def calls(self) -> list[LinearCall]:
        return [call for pairs in self.levels.values() for _, call in pairs]

    def is_gradient(self, gy: Tensor) -> bool:
        """Its own; found out before it was traced."""
        return gy is self.gy

    def product(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        given = {name: v.contiguous() for name, v in (("x", u), ("y", w)) if v is not None}
        wanted = tuple(name for name in "xy" if name in wrt)
        kind, directions = (tuple(given), wanted, None), list(given.values())
        parts = dict(zip(wanted, _sum([(term.weight, point.product(kind, directions)) for term, point in self._terms])))
        return parts.get("x"), parts.get("y")

    def block(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        return self.plain.apply(u, w, wrt)

    def second(self, given: dict[Tensor, Tensor], inputs: list[Tensor], batched: bool = True) -> list[Tensor | None]:
        """As that of ``Phi``, for stacks of directions, which lie in memory as those with which it was first called."""
        total: dict[Tensor, Tensor] = {}
        for term, point in self._terms:
            names = {self.x: "x", self.y: "y"} | {z: f"z{i}" for i, (z, _) in enumerate(self.levels[term.level])}
            here = {names[leaf]: v for leaf, v in given.items() if leaf in names}
            wanted = [leaf for leaf in inputs if leaf in names]
            kind = tuple(here), tuple(names[leaf] for leaf in wanted), len(next(iter(given.values())))
            for leaf, part in zip(wanted, point.product(kind, list(here.values()))):
                if part is not None:
                    part = part if term.weight == 1.0 else term.weight * part
                    total[leaf] = total[leaf] + part if leaf in total else part
        return [total.get(leaf) for leaf in inputs]


class _Point:
    """A program begun at a point."""

    def __init__(self, program: Program, inputs: list[Tensor], wrt: str):
        self._program, self._inputs, self._wrt = program, inputs, wrt
        self._trace = program.traced()
        self.found, self._values = self._trace.begin(inputs, wrt)

    def product(self, kind: Kind, directions: list[Tensor]) -> list[Tensor | None]:
        if kind not in self._trace.kinds:
            self._trace = self._program.traced(kind, directions)
            _, self._values = self._trace.begin(self._inputs, self._wrt)
        return self._trace.product(kind, self._values, directions)


def _sum(terms: list[tuple[float, list[Tensor]]]) -> list[Tensor]:
    """sum of weight * values, value by value."""
    (weight, first), *rest = terms
    total = first if weight == 1.0 else [weight * value for value in first]
    for weight, values in rest:
        total = [a.add(b, alpha=weight) for a, b in zip(total, values)]
    return total
