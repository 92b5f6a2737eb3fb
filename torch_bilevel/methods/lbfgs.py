"""L-BFGS on exact hypergradients, with a strong-Wolfe line search and bounds."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, NotStronglyConvexError, SolverError, nearest
from ..oracles import Evaluation, HyperOracle, ImplicitOracle
from ..oracles.inexact import at_least, positive
from ..problem import BilevelProblem
from ..results import StepReport
from .base import Method, Run
from .line_search import Trial, strong_wolfe
from .registry import register
from .second_order import oracle_options

#: a component of a diagonally scaled direction goes so many times as far as the largest hyperparameter, or as 1, at most
REACH = 4.0
#: share of the value that the first step along a gradient foresees as its decrease
FORESEEN = 0.1
#: share of the value up to which its error is allowed for in the line search, where the slope is below it
NOISE = 1e-3
#: initial inverse Hessians of the recursion, and how far a diagonal one may be from its scalar
SCALINGS, SPREAD = ("scalar", "diagonal"), 10.0
#: pairs that tell as much of a diagonal one as there is chance in them
CHANCE = 4
#: |g|_1^2 / (dx |g|_2^2) from which a first gradient is even (normally distributed ones have 0.64, exponential ones 0.5)
EVEN = 0.5


@final
class LimitedMemoryBFGS(Method):
    """x+ = x + a d, d = -(limited-memory BFGS inverse) gradient; see ``LBFGS``, its constructor by name."""

    name = "lbfgs"

    def __init__(self, *, lr: float, memory: int, scaling: str, oracle: dict[str, Any]):
        if scaling not in SCALINGS:
            raise ConfigError(f"scaling {scaling!r} is not known; {nearest(scaling, SCALINGS)}")
        self.lr, self.memory, self.scaling = positive("lr", lr), at_least("memory", memory, 1), scaling
        self.oracle = oracle

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> LBFGSRun:
        return LBFGSRun(self, problem, problem.exact_oracle(**self.oracle), seed=seed, bounds=bounds)


@final
class LBFGSRun(Run):
    """A run of LBFGS; one ``step`` is one iteration, its line search included."""

    def __init__(
        self, method: LimitedMemoryBFGS, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any
    ):
        super().__init__(method, problem, oracle, seed=seed, bounds=bounds)
        if oracle.lower_is_external:
            raise ConfigError("lbfgs searches along values, which need the lower level solved: not lower='external'")
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def step(self) -> StepReport:
        ev = self.current()
        free = None if self.box is None else self.box.free(self.x, ev.gradient)
        gradient = ev.gradient if free is None else torch.where(free, ev.gradient, torch.zeros_like(ev.gradient))
        found = None
        while found is None:
            direction = -inverse_product(gradient, self.pairs, free, self.method.scaling)
            if self.pairs and self.method.scaling == "diagonal":
                direction = self._within_reach(direction, gradient)
            slope = float(torch.dot(gradient, direction))
            if slope < 0:
                found = self._search(ev, direction, slope)
            if found is None and not self.pairs:
                self.steps += 1
                return self.report(accepted=False, stalled=self.has_stalled())
            if found is None:
                self.pairs = []  # steepest descent, once more
        new: Evaluation = found.found
        s, y = new.x - self.x, new.gradient - ev.gradient
        lengths = torch.stack([torch.dot(s, y), torch.linalg.vector_norm(s), torch.linalg.vector_norm(y)]).tolist()
        if lengths[0] > torch.finfo(s.dtype).eps * lengths[1] * lengths[2]:
            self.pairs = [*self.pairs, (s, y)][-self.method.memory :]
        self.steps += 1
        self.x, self.evaluation = new.x, new
        return self.report(step_norm=lengths[1])

    def _search(self, ev: Evaluation, direction: Tensor, slope: float) -> Trial | None:
        value = float(ev.value)
        bound = min(ev.value_doubt, max(NOISE * abs(value), -slope))  # a bound above both tells nothing
        noise = self.oracle.solution_noise(abs(value)) + bound
        first = self.method.lr * self.scale * (1.0 if self.pairs else self._first_length(value, direction, slope))
        return strong_wolfe(lambda a: self._try(ev, a, direction), value, slope, first, noise)

    def _within_reach(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """A diagonal scaling may send single components far, where they do nothing: these alone are cut, so that they do
        not shorten the others' way; the whole direction where most of the slope is theirs."""
        reach = REACH * self.x.abs().max().clamp_min(1.0)
        cut = direction.clamp(-reach, reach)
        if torch.dot(gradient, cut) < 0.5 * torch.dot(gradient, direction):
            return cut
        return direction * (reach / direction.abs().max()).clamp_max(1.0)

    def _first_length(self, value: float, direction: Tensor, slope: float) -> float:
        """A first length where nothing is known of curvature, whatever the scales of value and x.

        It foresees a tenth off the value, but moves no component of x by more than max(1, |x|_inf); at least the
        customary min(1, 1 / |g|_1).
        """
        sizes = [direction.abs().sum(), direction.abs().max(), self.x.abs().max()]
        total, largest, reach = torch.stack(sizes).tolist()
        return max(min(1.0, 1.0 / total), min(FORESEEN * abs(value) / -slope, max(1.0, reach) / largest))

    def _try(self, ev: Evaluation, length: float, direction: Tensor) -> Trial:
        """The trial at P(x + length d); a component held by a bound there no longer counts in the slope."""
        x_new, predicted = self.x + length * direction, None
        if self.box is not None:
            line, x_new = x_new, self.box.project(x_new)
            direction = torch.where(line == x_new, direction, 0.0)
            predicted = float(torch.dot(ev.gradient, x_new - self.x))
            if not predicted < 0:
                return Trial(length, float("inf"), float("nan"))
        try:
            new = self.oracle.evaluate(x_new)
        except (NonFiniteError, NotStronglyConvexError, SolverError):
            return Trial(length, float("inf"), float("nan"))
        return Trial(length, float(new.value), float(torch.dot(new.gradient, direction)), new, predicted)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pairs": [list(pair) for pair in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pairs = [(s, y) for s, y in state["pairs"]]


def inverse_product(
    gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], free: Tensor | None, scaling: str = "scalar"
) -> Tensor:
    """The L-BFGS inverse Hessian times the gradient by the two-loop recursion, on the free variables.

    References: Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.4.
    """
    if free is not None:
        pairs = [(torch.where(free, s, 0.0), torch.where(free, y, 0.0)) for s, y in pairs]
        pairs = [(s, y) for s, y in pairs if bool(torch.dot(s, y) > 0)]
    q, alphas = gradient, []
    for s, y in reversed(pairs):
        alpha = torch.dot(s, q) / torch.dot(s, y)
        alphas.append(alpha)
        q = q - alpha * y
    if pairs:
        s, y = pairs[-1]
        scalar = torch.dot(s, y) / torch.dot(y, y)
        q = q * (scalar if scaling == "scalar" else _diagonal(pairs, scalar))
    elif scaling == "diagonal":
        q = _levelled(q)
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        q = q + (alpha - torch.dot(y, q) / torch.dot(s, y)) * s
    return q


def _levelled(gradient: Tensor) -> Tensor:
    """Halfway, on a logarithmic scale, from a gradient that is not EVEN to its signs, for components within 1e-2 of the largest.

    Where gradients differ by orders of magnitude (an L2 weight per feature), nothing moves along the gradient but the largest.
    Adam goes all the way to the signs.
    """
    size = gradient.abs()
    top = size.max()
    if size.sum() ** 2 >= EVEN * len(size) * torch.dot(gradient, gradient):
        return gradient
    return gradient / (size / torch.where(top > 0, top, 1.0)).clamp_min(1 / SPREAD**2).sqrt()


def _diagonal(pairs: list[tuple[Tensor, Tensor]], scalar: Tensor) -> Tensor:
    """Per component the root mean square of s over that of y, brought to the mean curvature of the last pair.

    Where a hyperparameter's gradient changes little as it moves, it may move further. Within ten times the scalar. Pairs are
    weighed by 1 / s'y, which gives short steps near the end the say that the long ones had at first. The quotient of a few
    numbers is chance in part: its logarithm counts for k / (k + CHANCE) of what k pairs say, as in an estimate with a prior.
    """
    trust = len(pairs) / (len(pairs) + CHANCE)
    y, (steps, changes) = pairs[-1][1], map(torch.stack, zip(*pairs))
    weights = 1 / (steps * changes).sum(1, keepdim=True)
    moved, changed = (weights * steps.square()).sum(0), (weights * changes.square()).sum(0)
    ratio = (moved / changed.clamp_min(torch.finfo(y.dtype).tiny)).pow(0.5 * trust)
    mean = torch.dot(y, ratio * y) / torch.dot(y, y)
    return (ratio * (scalar / mean)).clamp(scalar / SPREAD, scalar * SPREAD)


@register("lbfgs")
def LBFGS(*, lr: float = 1.0, memory: int = 10, scaling: str = "scalar", **oracle: Any) -> LimitedMemoryBFGS:
    """L-BFGS with a strong-Wolfe line search on exact hypergradients: the strong yardstick of practice.

    d = -H g by the two-loop recursion over the last ``memory`` pairs (s, y) with s'y > 0, then a length that
    meets the strong Wolfe conditions. With bounds: the direction on the free variables, and the same search
    along the projected path. A search that fails is repeated along the gradient; if that fails too the run is
    stalled.

    Args:
        lr: first length tried, default 1; along a gradient (the first iteration) times a length that foresees a tenth
            off the value and moves no hyperparameter by more than max(1, |x|_inf).
        memory: pairs kept, default 10.
        scaling: initial inverse Hessian of the recursion: 'scalar', s'y / y'y of the last pair (default, as in the book), or
            'diagonal' (ours, of `auto`): per hyperparameter |s_i| / |y_i| over the pairs, each weighed by 1 / s'y, to the
            power k / (k + 4) of k pairs, within ten times the scalar, and a first direction g_i / sqrt|g_i| where the
            gradient is uneven, |g|_1^2 < dx |g|_2^2 / 2; no component of a later direction is longer than 4 max(1, |x|_inf).
        oracle: options of ImplicitOracle.

    Cost of a step: one evaluation per trial length, mostly one.

    References: Liu and Nocedal 1989; Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 7.4,
        7.5.
    """
    return LimitedMemoryBFGS(lr=lr, memory=memory, scaling=scaling, oracle=oracle)


LBFGS.oracle_options = oracle_options(ImplicitOracle, "hessian_tol")
