"""Compiled: a weighted sum of traced losses at one point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from torch import Tensor

from .graph import Recorded
from .trace import Kind, Trace


class Program:
    """One loss, traced for the kinds of products that were asked for so far.

    Args: see ``Trace``; kinds: with which it begins.
    """

    def __init__(self, record: Callable[..., Recorded], inputs: list[Tensor], kinds: Iterable[Kind], what: str):
        self._record, self._inputs, self._what = record, inputs, what
        self._last = self._make(kinds)

    def traced(self, kinds: Iterable[Kind] = ()) -> Trace:
        """The last trace, or a new one where it lacks one of these kinds."""
        if not set(kinds) <= set(self._last.kinds):
            self._last = self._make(sorted({*self._last.kinds, *kinds}))
        return self._last

    def _make(self, kinds: Iterable[Kind]) -> Trace:
        return Trace(self._record, self._inputs, kinds, self._what)


#: (weight, program, what it is given beside x and y)
Terms = list[tuple[float, Program, list[Tensor]]]


def gradient(terms: Terms, x: Tensor, y: Tensor, wrt: str) -> list[Tensor]:
    """The sum of weight * loss(x, y, *data), and its gradients that ``wrt`` names, where no products are wanted."""
    return _sum([(weight, program.traced().gradient([x, y, *data], wrt)) for weight, program, data in terms])


class Compiled(Recorded):
    """sum of weight * loss(x, y, *data) at one point, by compiled programs; blocks of directions by what is not compiled.

    Args:
        terms: (weight, program, data). plain: records the same without compiling, where that is needed.
    """

    def __init__(self, terms: Terms, x: Tensor, y: Tensor, wrt: str, plain: Callable[[], Recorded]):
        super().__init__(x.numel() + y.numel(), large=False)
        self._plain = plain
        self._terms = [(weight, _Point(program, [x, y, *data], wrt)) for weight, program, data in terms]
        found = dict(zip(("h", *wrt), _sum([(weight, point.found) for weight, point in self._terms])))
        self.value, self.gx, self.gy = found["h"], found.get("x"), found.get("y")

    @cached_property
    def plain(self) -> Recorded:
        """The same point, recorded and not compiled."""
        return self._plain()

    def product(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        given = [(letter, v) for letter, v in (("x", u), ("y", w)) if v is not None]
        wanted = "".join(letter for letter in "xy" if letter in wrt)
        kind, directions = ("".join(letter for letter, _ in given), wanted), [v.contiguous() for _, v in given]
        parts = dict(zip(wanted, _sum([(weight, point.product(kind, directions)) for weight, point in self._terms])))
        return parts.get("x"), parts.get("y")

    def block(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        return self.plain.apply(u, w, wrt)


class _Point:
    """A program begun at a point."""

    def __init__(self, program: Program, inputs: list[Tensor], wrt: str):
        self._program, self._inputs, self._wrt = program, inputs, wrt
        self._trace = program.traced()
        self.found, self._values = self._trace.begin(inputs, wrt)

    def product(self, kind: Kind, directions: list[Tensor]) -> list[Tensor]:
        if kind not in self._trace.kinds:
            self._trace = self._program.traced([kind])
            _, self._values = self._trace.begin(self._inputs, self._wrt)
        return self._trace.product(kind, self._values, directions)


def _sum(terms: list[tuple[float, list[Tensor]]]) -> list[Tensor]:
    """sum of weight * values, value by value."""
    (weight, first), *rest = terms
    total = first if weight == 1.0 else [weight * value for value in first]
    for weight, values in rest:
        total = [a.add(b, alpha=weight) for a, b in zip(total, values)]
    return total
