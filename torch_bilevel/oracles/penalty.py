"""PenaltyOracle: the fully second-order surrogate of the hyper-objective, from two lower solves."""

from __future__ import annotations

import math
import warnings
from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..errors import ConfigError, NotStronglyConvexError
from ..lower import LowerResult, make_lower
from ..problem import BilevelProblem
from .difference import Quotient, Segment
from .evaluation import (
    Evaluation,
    HyperOracle,
    LowerSolution,
    require_finite,
    require_lower,
    require_solution,  # fmt: skip
)
from .hessian import HyperHessian

SCHEMES = ("central", "forward")

def largest_rounding(dtype: torch.dtype) -> float:
    """Relative rounding of a plain difference, eps / delta, above which it is taken as an integral.

    That is at penalties of about 8e5 in float64 and 16 in float32; a smaller bound would integrate over long segments.
    """
    return 1e-10 if dtype == torch.float64 else 1e-6



@final
class PenaltyOracle(HyperOracle):
    """Difference quotient of h_sigma(x) = min_y g + sigma f at sigma = 1/penalty, in place of phi = d h/d sigma at 0.

    forward (published): [h_sigma - h_0] * penalty, bias O(1/penalty);
    central (ours): [h_sigma - h_-sigma] * penalty / 2, bias O(1/penalty^2) at the same cost.
    With lo, hi the two minimisers, delta the distance of the two sigmas and d = (hi - lo) / delta:
        value = (h_hi - h_lo) / delta,   gradient = (h_hi,x - h_lo,x) / delta,   Hessian = (S_hi - S_lo) / delta,
        S[h] = h_xx - h_xy h_yy^{-1} h_yx.
    hi is found as lo + delta d with d a variable of its own whose equation takes lo as exact, so an error of the lower
    solves is not multiplied by the penalty. Where the dtype is too coarse for the subtraction (float32 above penalty
    8), differences are integrals of derivatives along the segment, by Gauss-Legendre quadrature; the Hessian then
    takes third derivatives of g. In float64 nothing beyond second derivatives is used.

    Args:
        penalty: lambda > 0, default 1e4: the central bias is then below 1e-6 on every problem of the tests.
        scheme: 'central' (default) or 'forward'. Central needs g - f/penalty strongly convex; where it is not, the
            oracle goes over to forward, with a warning.
        penalised_lower: lower solver for hi, if another than ``lower``.
        hessian_tol: relative residual of the solves inside a Hessian product.
        continuation: raise the penalty tenfold as a run goes on, whenever the gradient's bias has become larger than a
            tenth of the gradient (looked at each time that has fallen tenfold) or than half the tolerance at which the
            run would stop. Default False. With it a small first penalty ends at an exactly stationary point, and
            ``penalty`` is the one in use. The bias is measured against the implicit gradient at ``ev.lower`` (no
            third derivatives): two linear solves, a few gradients.
        quadrature: None (decided by dtype, see above), True or False.
        Others: see HyperOracle. Lower solvers with a fixed number of steps are taken at their word: hi is then what
        they return and no Newton correction is made (the published algorithm).

    Raises:
        NotStronglyConvexError: g itself is not strongly convex in y, or for the forward scheme g + f/penalty.

    Cost: two lower solves and one or two linear solves; the Hessian costs two linear solves per vector.

    References: Yang, Liu, Chen, Lui, arXiv 2605.06431 (FSBA); Chen, Ma, Zhang, JMLR 2025 (F2BA); the central scheme
        as Chen et al., arXiv 2509.02937 (F2SA-p, p = 2). The scaled difference and its quadrature are ours.
    """

    def __init__(
        self,
        problem,
        penalty: float = 1e4,
        scheme: str = "central",
        *,
        penalised_lower: Any = None,
        hessian_tol: float | None = None,
        continuation: bool = False,
        quadrature: bool | None = None,
        **options: Any,
    ):
        super().__init__(problem, **options)
        if not (isinstance(penalty, (int, float)) and penalty > 0 and math.isfinite(penalty)):
            raise ConfigError(f"penalty: expected a positive number, got {penalty!r}")
        if scheme not in SCHEMES:
            raise ConfigError(f"scheme: expected 'central' or 'forward', got {scheme!r}")
        if self.lower_is_external:
            raise ConfigError("the penalty oracle solves two lower levels of its own; lower='external' needs the implicit"
                              " oracle (method='dlcrn', or BilevelOptimizer(..., lower='external'))")  # fmt: skip
        self.penalty, self.scheme = float(penalty), scheme
        self.hessian_tol, self.continuation = hessian_tol, bool(continuation)
        self.penalised_solver = self.lower_solver if penalised_lower is None else make_lower(penalised_lower)
        self.quadrature = quadrature

    @property
    def sigmas(self) -> tuple[float, float]:
        """The two values of sigma, lo first."""
        sigma = 1.0 / self.penalty
        return (-sigma if self.scheme == "central" else 0.0), sigma

    @property
    def uses_quadrature(self) -> bool:
        """Whether differences are integrals along the segment, since the dtype would lose too much to the subtraction."""
        if self.quadrature is not None:
            return self.quadrature
        lo, hi = self.sigmas
        dtype = self.problem.dtype
        coarse = torch.finfo(dtype).eps / (hi - lo) > largest_rounding(dtype)
        return coarse and self.penalised_solver.reaches_tolerance

    def value_noise(self, size: float) -> float:
        """That of values of h, divided by delta where the difference is taken plainly."""
        noise = super().value_noise(size)
        if self.uses_quadrature or "level" not in self.warm:
            return noise
        lo, hi = self.sigmas
        return noise + 4 * torch.finfo(self.problem.dtype).eps * float(self.warm["level"]) / (hi - lo)

    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        x = self.problem.check_x(x)
        counts = self.counts.child()
        counts.add(evaluations=1)
        try:
            segment, d, quotient = self._solve_ends(x, counts)
        except NotStronglyConvexError:
            if self.scheme == "forward":
                raise
            warnings.warn(
                f"g - f/penalty or g + f/penalty is not strongly convex at penalty {self.penalty:g}: going over from"
                " the central to the forward scheme (bias 1/penalty); a larger penalty would keep the central one",
                stacklevel=2,
            )
            self.scheme, self.warm = "forward", {}
            segment, d, quotient = self._solve_ends(x, counts)
        require_finite(quotient.value, quotient.gx, "PenaltyOracle")
        self.warm = {"lo": segment.lo, "hi": segment.lo + segment.delta * d, "d": d}
        if quotient.hi is not None:
            self.warm["level"] = quotient.hi.value.abs()
        recorded = {"lo": segment.recorded_lo, "hi": quotient.hi}
        return self._evaluation(segment, d, quotient.value, quotient.gx, recorded)

    def _segment(self, problem: BilevelProblem, x: Tensor, lo: Tensor, sigmas, counts: OracleCounts) -> Segment:
        return Segment(problem, x, lo, sigmas, integral=self.uses_quadrature, counts=counts)

    def _solve_ends(self, x: Tensor, counts: OracleCounts) -> tuple[Segment, Tensor, Quotient]:
        """lo = argmin h_lo, the scaled difference d = (hi - lo) / delta, and the quotient there."""
        h_lo, h_hi = (Objective(self.problem, upper=s, lower=1.0, counts=counts) for s in self.sigmas)
        start = self.start("lo")
        low = require_lower(self.lower_solver.solve(h_lo, x, start, systems=self.systems, tol=self.lower_tol))
        segment = self._segment(self.problem, x, low.y, self.sigmas, counts)
        if self.penalised_solver.reaches_tolerance:
            d = self._first_difference(low, segment) if "d" not in self.warm else self.warm["d"]
            return segment, *self._correct_difference(segment, d)
        start = self.warm.get("hi", low.y)
        high = self.penalised_solver.solve(h_hi, x, start, systems=self.systems, tol=self.lower_tol)
        d = (require_lower(high).y - low.y) / segment.delta
        return segment, d, segment.quotient(d)

    def _first_difference(self, low: LowerResult, segment: Segment) -> Tensor:
        """-h_lo,yy^{-1} f_y at lo: d for an infinitesimal delta."""
        at = low.at if low.at is not None else segment.at_lo()
        fy = Objective(self.problem, upper=1.0, counts=segment.counts).gradient(segment.x, segment.lo, "y")[2]
        return -require_solution(self.systems.solve(at, fy, tol=1e-2), "penalised lower level")

    def _correct_difference(self, segment: Segment, d: Tensor) -> tuple[Tensor, Quotient]:
        """d with h_hi,y(lo + delta d) = h_lo,y(lo), by Newton's method on the scaled equation."""
        double = d.dtype == torch.float64
        tol, linear_tol = (1e-9, 1e-10) if double else (3e-6, 1e-5)
        if self.lower_tol is not None:  # the user's accuracy, where it is a looser one
            tol = max(tol, self.lower_tol)
        if self.systems.tol is not None:
            linear_tol = max(linear_tol, self.systems.tol)
        # lo + delta d is held to eps |lo|, d therefore no better than to
        rounding = 10 * torch.finfo(d.dtype).eps * (1.0 + float(torch.linalg.vector_norm(segment.lo))) / segment.delta
        kept: tuple[Tensor, Quotient] | None = None
        best = length = math.inf
        for attempt in range(12):
            quotient = segment.quotient(d)
            norm, size = float(torch.linalg.vector_norm(quotient.gy)), float(torch.linalg.vector_norm(d))
            if norm == 0.0 or (attempt and length * norm / best <= tol * size):
                return d, quotient
            if not norm < best:
                if attempt and length <= max(1e3 * tol * size, rounding):
                    return kept  # at rounding: the last point was the better one
                d = d if kept is None else kept[0]
                break
            kept, best = (d, quotient), norm
            at = quotient.hi if quotient.hi is not None else segment.at_hi(d)
            solution = self.systems.solve(at, -quotient.gy, tol=linear_tol)
            if not solution.ok and not bool((solution.residual <= 1e-3).all()):
                break
            d, length = d + solution.x, float(torch.linalg.vector_norm(solution.x))
        # Newton on the difference does not settle (a small penalty, far from lo): minimise h_hi with its line search.
        for start in (segment.lo + segment.delta * d, segment.lo):
            high = self.penalised_solver.solve(segment.h_hi, segment.x, start, systems=self.systems, tol=self.lower_tol)
            if high.ok:
                break
        d = (require_lower(high).y - segment.lo) / segment.delta
        found = d, segment.quotient(d)
        # its error is that of a lower solution, divided by delta: Newton's point may have been the better one
        return kept if kept is not None and best < float(torch.linalg.vector_norm(found[1].gy)) else found

    def _evaluation(
        self, segment: Segment, d: Tensor, value: Tensor, gradient: Tensor, recorded: dict[str, Linearisation | None]
    ) -> Evaluation:
        recorded = {name: at for name, at in recorded.items() if at is not None}

        def hessian() -> HyperHessian:
            lo = recorded["lo"] = segment.at_lo()
            hi = recorded["hi"] = recorded["hi"] if "hi" in recorded else segment.at_hi(d)
            return HyperHessian(lo, hi, segment.hessian_terms(d, lo, hi), self.systems, self.hessian_tol)

        def lower() -> LowerSolution:
            return self._newton_corrected(segment, d)

        points = {"lo": segment.lo, "d": d, "sigmas": torch.tensor(segment.sigmas, dtype=torch.float64)}
        return Evaluation(segment.x, value, gradient, points, segment.counts, hessian, lower, recorded)

    def bias(self, ev: Evaluation) -> Tensor:
        """|gradient - implicit gradient at ev.lower|, (): what the penalty does to the gradient. Cost: two solves."""
        x, y = ev.x, ev.lower.y
        at = Objective(self.problem, lower=1.0, counts=ev.counts).linearise(x, y, "y")
        _, fx, fy = Objective(self.problem, upper=1.0, counts=ev.counts).gradient(x, y)
        v = require_solution(self.systems.solve(at, fy), "adjoint system")
        return torch.linalg.vector_norm(ev.gradient - (fx - at.xy(v)))

    def sharpen(self, ev: Evaluation, allowed: float) -> bool:
        if not (self.continuation and bool(self.bias(ev) > allowed)):
            return False
        self.penalty *= 10.0
        if "d" in self.warm:
            self.warm = {"lo": ev.lower.y, "hi": ev.lower.y, "d": self.warm["d"]}
        return True

    def _newton_corrected(self, segment: Segment, d: Tensor) -> LowerSolution:
        """The minimiser of g: the middle of lo and hi (central) or lo (forward), and one Newton step from there."""
        g = Objective(segment.problem, lower=1.0, counts=segment.counts)
        middle = segment.lo + (0.5 * segment.delta) * d if segment.sigmas[0] else segment.lo
        at = g.linearise(segment.x, middle, "y")
        correction = self.systems.solve(at, -at.gy, tol=1e-3)
        y = middle + require_solution(correction, "Newton correction of the lower solution")
        before, after = (torch.linalg.vector_norm(v) for v in (at.gy, g.gradient(segment.x, y, "y")[2]))
        rate = torch.where(before > 0, torch.clamp(after / before, max=1.0), before)
        return LowerSolution(y, after, rate * torch.linalg.vector_norm(correction.x))

    def restore(self, state: dict[str, Any]) -> Evaluation:
        points, counts = state["points"], self.counts.child()
        sigmas = tuple(points["sigmas"].tolist())
        x, lo, d = state["x"], points["lo"], points["d"]
        segment = self._segment(self.problem, x, lo, sigmas, counts)
        segment.recorded_lo = self.record_again(state, "lo", segment.h_lo, x, lo)
        hi = self.record_again(state, "hi", segment.h_hi, x, lo + segment.delta * d)
        return self._evaluation(segment, d, state["value"], state["gradient"], {"lo": segment.recorded_lo, "hi": hi})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "penalty": self.penalty, "scheme": self.scheme}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.penalty, self.scheme = state["penalty"], state["scheme"]
