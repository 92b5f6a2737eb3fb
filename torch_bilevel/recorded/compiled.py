"""Compiled: a traced loss at one point."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .calls import LinearCall
from .graph import Recorded
from .trace import Kind, Trace

#: columns of a block up to which they go one by one, rather than by what is recorded for it
FEW = 4


class Program:
    """One loss, traced for the kinds of products that were asked for so far.

    Args: see ``Trace``; kinds: of products with x and y, with which it begins.
    """

    def __init__(self, record: Callable[..., Recorded], inputs: list[Tensor], kinds: list[tuple[str, str]], what: str):
        self._record, self._inputs, self._what, self._known = record, inputs, what, {}
        examples = dict(zip("xy", inputs))
        self._make({(tuple(given), tuple(wanted), None): [examples[name] for name in given] for given, wanted in kinds})
        self.gradient = self._last.gradient  # which a new trace would not change

    def traced(self, kind: Kind | None = None, directions: list[Tensor] | None = None) -> Trace:
        """The last trace, or a new one where it lacks this kind."""
        if kind is not None and kind not in self._examples:
            self._make({**self._examples, kind: [torch.ones_like(v) for v in directions]})
        return self._last

    def _make(self, examples: dict[Kind, list[Tensor]]) -> None:
        self._last, self._examples = Trace(self._record, self._inputs, examples, self._what, self._known), examples


class Compiled(Recorded):
    """A loss at one point, by compiled programs; blocks of many directions in x and y by what is not compiled.

    Args:
        inputs: x, y, and what else the program is given. calls: finds the linear maps by which the loss goes, if by nothing else.
        plain: records the same without compiling, where that is needed.

    Attributes: as ``Phi`` has them where there are calls, but that the z are empty.
    """

    complete = True

    def __init__(
        self, program: Program, inputs: list[Tensor], wrt: str, calls: Callable[[], list[LinearCall]] | None,
        plain: Callable[[], Recorded],
    ):  # fmt: skip
        self.x, self.y, self.wrt, self._plain = *inputs[:2], wrt, plain
        super().__init__(self.x.numel() + self.y.numel(), large=False)
        self._program, self._inputs, self._find_calls = program, inputs, calls
        self._trace = program.traced()
        (self.value, *gradient), self._values = self._trace.begin(inputs, wrt)
        parts = dict(zip(wrt, gradient))
        self.gx, self.gy = parts.get("x"), parts.get("y")

    @cached_property
    def plain(self) -> Recorded:
        """The same point, recorded and not compiled."""
        return self._plain()

    @property
    def by_outputs(self) -> Compiled | None:
        return None if self._find_calls is None else self

    @cached_property
    def calls(self) -> list[LinearCall]:
        return self._find_calls()

    @cached_property
    def zs(self) -> list[Tensor]:
        return [self.y.new_empty(call.shape) for call in self.calls]

    def is_gradient(self, gy: Tensor) -> bool:
        """Its own; found out before it was traced."""
        return gy is self.gy

    def product(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        given = {name: v.contiguous() for name, v in (("x", u), ("y", w)) if v is not None}
        wanted = tuple(name for name in "xy" if name in wrt)
        parts = dict(zip(wanted, self._product((tuple(given), wanted, None), list(given.values()))))
        return parts.get("x"), parts.get("y")

    def block(self, u: Tensor | None, w: Tensor | None, wrt: str) -> tuple[Tensor | None, Tensor | None]:
        few = (u if u is not None else w).shape[1] <= FEW
        return self.one_by_one(u, w, wrt) if few else self.plain.apply(u, w, wrt)

    def second(self, given: dict[Tensor, Tensor], inputs: list[Tensor], batched: bool = False) -> list[Tensor | None]:
        """As that of ``Phi``, for stacks of directions, which lie in memory as those with which it was first called."""
        names = {self.x: "x", self.y: "y"} | {z: f"z{i}" for i, z in enumerate(self.zs)}
        columns = len(next(iter(given.values())))
        kind = tuple(names[leaf] for leaf in given), tuple(names[leaf] for leaf in inputs), columns
        parts = self._product(kind, list(given.values()))
        return parts if batched else [None if part is None else part[0] for part in parts]

    def _product(self, kind: Kind, directions: list[Tensor]) -> list[Tensor | None]:
        if kind not in self._trace.kinds:
            self._trace = self._program.traced(kind, directions)
            _, self._values = self._trace.begin(self._inputs, self.wrt)
        return self._trace.product(kind, self._values, directions)
