"""The difference quotient (h_hi(., hi) - h_lo(., lo)) / delta along a segment of learners, free of cancellation."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..doctor import has_third_derivatives
from ..problem import BilevelProblem


@dataclass
class Quotient:
    """Value (), gradient in x (dx,) and in y (dy,) of the quotient at one d, and what was recorded on the way.

    The y-part is the residual of the equation for d. What is left of h_lo,y(lo) shifts lo and hi alike, so that it is
    not multiplied by 1 / delta.
    """

    value: Tensor
    gx: Tensor
    gy: Tensor
    hi: Linearisation | None = None
    nodes: list[Linearisation] = field(default_factory=list)


class Segment:
    """h_sigma = g + sigma f at two values of sigma, and learners lo and hi = lo + delta d between them.

    Two ways to the same numbers. Direct: subtract and divide by delta, exact to eps / delta. Integral: the derivative
    of h along the segment, by Gauss-Legendre quadrature (two points, three for penalties below 100): what the dtype
    cannot subtract is never formed.

    Args:
        problem, x, lo: the data, (dx,), (dy,).
        sigmas: the two values, lo first: (0, s) forward, (-s, s) central.
        integral: which way.
    """

    def __init__(self, problem: BilevelProblem, x: Tensor, lo: Tensor, sigmas: tuple[float, float], *, integral: bool,
                 counts: OracleCounts):  # fmt: skip
        self.problem, self.x, self.lo, self.sigmas, self.counts = problem, x, lo, sigmas, counts
        self.delta = sigmas[1] - sigmas[0]
        self.integral = integral
        self.h_lo, self.h_hi = (Objective(problem, upper=s, lower=1.0, counts=counts) for s in sigmas)
        self.recorded_lo: Linearisation | None = None

    def at_lo(self) -> Linearisation:
        """The joint gradient of h_lo at lo, recorded once."""
        if self.recorded_lo is None:
            self.recorded_lo = self.h_lo.linearise(self.x, self.lo)
        return self.recorded_lo

    def at_hi(self, d: Tensor) -> Linearisation:
        """The joint gradient of h_hi at lo + delta d, recorded."""
        return self.h_hi.linearise(self.x, self.lo + self.delta * d)

    def quotient(self, d: Tensor) -> Quotient:
        """The quotient at d (dy,)."""
        if not self.integral:
            lo, hi = self.at_lo(), self.at_hi(d)
            pairs = ((hi.value, lo.value), (hi.gx, lo.gx), (hi.gy, lo.gy))
            return Quotient(*((b - a) / self.delta for b, a in pairs), hi)
        value, gx, gy, nodes = 0.0, 0.0, 0.0, []
        f = Objective(self.problem, upper=1.0, counts=self.counts)
        g = Objective(self.problem, lower=1.0, counts=self.counts)
        for place, weight in self._upper_ends():
            parts = f.gradient(self.x, self._point(place, d))
            value, gx, gy = value + weight * parts[0], gx + weight * parts[1], gy + weight * parts[2]
        for place, weight in self._nodes():
            at = g.linearise(self.x, self._point(place, d), "y")
            a, b = at.to_x(d)
            value, gx, gy = value + weight * torch.dot(at.gy, d), gx + weight * a, gy + weight * b
            nodes.append(at)
        return Quotient(value, gx, gy, None, nodes)

    def hessian_terms(self, d: Tensor, lo: Linearisation, hi: Linearisation) -> list[tuple[float, Linearisation]]:
        """(weight, at) with sum of weight Hess at = (Hess h_hi(hi) - Hess h_lo(lo)) / delta.

        The integral form needs third derivatives.
        """
        delta = self.delta
        integral = self.integral
        if integral and not has_third_derivatives(self.problem):
            integral = False
            warnings.warn(
                f"{self.problem.dtype} with a layer that has no third derivatives: the Hessian is a plain difference,"
                f" with rounding errors of about {torch.finfo(self.problem.dtype).eps / delta:.0e}; use a smaller"
                " penalty or float64",
                stacklevel=2,
            )
        if not integral:
            return [(1 / delta, hi), (-1 / delta, lo)]
        f = Objective(self.problem, upper=1.0, counts=self.counts)
        g_along_d = Objective(self.problem, tangent=d, counts=self.counts)
        terms = [(weight, f.linearise(self.x, self._point(place, d))) for place, weight in self._upper_ends()]
        return terms + [(weight, g_along_d.linearise(self.x, self._point(place, d))) for place, weight in self._nodes()]

    def _point(self, place: float, d: Tensor) -> Tensor:
        return self.lo + (place * self.delta) * d

    def _nodes(self) -> list[tuple[float, float]]:
        """Gauss-Legendre nodes and weights on [0, 1]."""
        if self.delta <= 0.02:
            nodes = [(-1 / math.sqrt(3), 1.0), (1 / math.sqrt(3), 1.0)]
        else:
            nodes = [(-math.sqrt(0.6), 5 / 9), (0.0, 8 / 9), (math.sqrt(0.6), 5 / 9)]
        return [((1 + node) / 2, weight / 2) for node, weight in nodes]

    def _upper_ends(self) -> list[tuple[float, float]]:
        """(place on the segment, weight) of f in the quotient: half at each end (central), or at hi (forward)."""
        return [(0.0, 0.5), (1.0, 0.5)] if self.sigmas[0] else [(1.0, 1.0)]
