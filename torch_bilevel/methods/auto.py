"""auto: quasi-Newton while far, second-order to leave saddles, to finish where that is cheaper, and to certify."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..lower.kept import is_exact
from ..oracles import Evaluation, HyperOracle
from ..problem import BilevelProblem
from ..results import StepReport
from .base import STATE_VERSION, Method, Run
from .cubic_newton import CubicNewton, CubicNewtonRun
from .lbfgs import LBFGSRun, LimitedMemoryBFGS
from .model import MAX_DENSE
from .registry import options_of, register
from .regularisation import FittedRegularisation
from .schedule import make_schedule
from .second_order import for_steps

#: L-BFGS steps before rates are compared; they are measured over so many at least, and over this share of a finish.
WINDOW, WINDOW_SHARE = 6, 1 / 8
#: what a second-order finish is reckoned to need: Hessians, evaluations, decades of gradient it is compared over.
FINISH_HESSIANS, FINISH_EVALUATIONS, FINISH_DECADES = 4, 10, 4
#: products of a typical Krylov model.
KRYLOV_PRODUCTS = 40
#: a function is quadratic along a step where the trapezoid rule is exact to this; one Hessian is then a finish where it
#: costs no more than so many evaluations.
QUADRATIC, QUADRATIC_PRICE = 1e-6, 4.0


@final
class Auto(Method):
    """Settings of ``auto``; see ``AUTO``, its constructor by name."""

    name = "auto"
    second_order = True

    def __init__(self, first: LimitedMemoryBFGS, then: CubicNewton, oracle: dict[str, Any]):
        self.first, self.then, self.oracle = first, then, oracle

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> AutoRun:
        return AutoRun(self, problem, problem.exact_oracle(**self.oracle), seed=seed, bounds=bounds)


@final
class AutoRun(Run):
    """An LBFGSRun, later a CubicNewtonRun, on one oracle; there is no way back."""

    def __init__(self, method: Auto, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any):
        self.method, self.seed, self._bounds = method, seed, bounds
        if oracle.lower_is_external:
            self.active: Run = CubicNewtonRun(method.then, problem, oracle, seed=seed, bounds=bounds)
        else:
            self.active = LBFGSRun(method.first, problem, oracle, seed=seed, bounds=bounds)
        self._norms: list[float] = []
        self._evaluations: list[int] = []
        self._quadratic = False

    @property
    def is_second_order(self) -> bool:
        """Whether the second phase has begun."""
        return isinstance(self.active, CubicNewtonRun)

    def step(self) -> StepReport:
        if not self.is_second_order:
            if not self._norms:
                self._record()
            if self._norms[-1] == 0.0 or self._slow() or (self._quadratic and self.hessian_cost() <= QUADRATIC_PRICE):
                self._go_second_order()
        before = self.active.current()
        report = self.active.step()
        if not self.is_second_order:
            self._record()
            self._quadratic = report.accepted and is_quadratic(before, self.active.current())
            if report.stalled:
                self._go_second_order()
                report.stalled = False
        return report

    def may_stop(self, eps: float) -> bool:
        return self.active.may_stop(eps)

    def tighten(self) -> bool:
        return self.active.tighten()

    def _record(self) -> None:
        self._norms.append(self.active.stationarity())
        self._evaluations.append(self.counts.evaluations)

    def _slow(self) -> bool:
        """Whether L-BFGS, at its rate of late, would pay more for four decades of gradient than a finish costs.

        Of late: over an eighth of the evaluations that a finish costs, since |gradient| goes up and down on the way.
        """
        norms, evaluations = self._norms, self._evaluations
        if len(norms) <= WINDOW:
            return False
        finish = FINISH_HESSIANS * self.hessian_cost() + FINISH_EVALUATIONS
        window = WINDOW
        while window < len(norms) - 1 and evaluations[-1] - evaluations[-1 - window] < WINDOW_SHARE * finish:
            window += 1
        spent = evaluations[-1] - evaluations[-1 - window]
        if spent < WINDOW_SHARE * finish:
            return False
        now, then = min(norms[-window:]), min(norms[:-window])
        decades = math.log10(then / now) if now > 0 else math.inf
        return decades <= 0 or FINISH_DECADES * spent / decades > finish

    def hessian_cost(self) -> float:
        """A hyper-Hessian in evaluations, both in oracle calls: what its model and its lower factor would take over what an
        evaluation has taken so far, lower factors apart."""
        counts, dx, dy = self.counts, self.problem.dx, self.problem.dy
        factored = is_exact(dy)
        factors = dy * counts.factorisations if factored else 0
        per_evaluation = (counts.oracle_calls - factors) / max(1, counts.evaluations)
        per_solve = (counts.upper_products + counts.lower_products - factors) / max(1, counts.solves)
        per_product = 3 + 2 * (1 if factored else per_solve)
        if self.method.then.hessian == "dense" or (self.method.then.hessian == "auto" and dx <= MAX_DENSE):
            calls = min(dx, dy) * per_product
        else:
            calls = min(KRYLOV_PRODUCTS, dx) * per_product
        return (calls + (dy if factored else 0)) / max(per_evaluation, 1.0)

    def _go_second_order(self) -> None:
        old = self.active
        new = CubicNewtonRun(self.method.then, old.problem, old.oracle, seed=self.seed, bounds=self._bounds)
        new.x, new.evaluation, new.steps, new.scale = old.x, old.evaluation, old.steps, old.scale
        self.active = new

    def expect_new_hessian(self, direction: Tensor) -> None:
        """Curvature was found where the gradient vanishes: only the second phase can leave."""
        if not self.is_second_order:
            self._go_second_order()
        self.active.expect_new_hessian(direction)

    # -- the active run's own --------------------------------------------------------------------------------------

    problem = property(lambda self: self.active.problem)
    oracle = property(lambda self: self.active.oracle)
    box = property(lambda self: self.active.box)
    evaluation = property(lambda self: self.active.evaluation)
    steps = property(lambda self: self.active.steps)
    x = property(lambda self: self.active.x)

    @property
    def keeps_data(self) -> bool:
        return self.active.keeps_data

    @property
    def counts(self) -> OracleCounts:
        return self.active.counts

    @property
    def cubic_reg(self) -> float:
        return self.active.cubic_reg

    @property
    def scale(self) -> float:
        return self.active.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.active.scale = value

    def current(self):
        return self.active.current()

    def choices(self) -> dict[str, str]:
        return self.active.choices()

    def set_data(self, problem: BilevelProblem) -> None:
        self.active.set_data(problem)

    def move_to(self, x: Tensor) -> None:
        self.active.move_to(x)

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "method": "auto", "second": self.is_second_order, "active": self.active.state_dict(),
                "norms": list(self._norms), "evaluations": list(self._evaluations),
                "quadratic": self._quadratic}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_method(state)
        if state["second"] and not self.is_second_order:
            self._go_second_order()
        self.active.load_state_dict(state["active"])
        self._norms, self._evaluations = list(state["norms"]), list(state["evaluations"])
        self._quadratic = state["quadratic"]


def is_quadratic(before: Evaluation, after: Evaluation) -> bool:
    """Whether the value's change along the step is that of the two slopes' mean, as for a quadratic function only."""
    s = after.x - before.x
    slopes = torch.stack([torch.dot(before.gradient, s), torch.dot(after.gradient, s)])
    error = after.value - before.value - slopes.mean()
    return bool(error.abs() <= QUADRATIC * slopes.abs().sum())


@register("auto")
def AUTO(
    *,
    memory: int = 10,
    period: int | str = "adaptive",
    cubic_reg: float | None = None,
    hessian: str = "auto",
    model_tol: float = 1e-2,
    max_basis: int | None = None,
    **oracle: Any,
) -> Auto:
    """L-BFGS on exact hypergradients while far, then cubic Newton steps with a lazy Hessian. Ours.

    The first phase ends when L-BFGS stalls, when it stands at a saddle, or when, at its rate of late, four more decades
    of gradient would cost it more than a second-order finish: four Hessians and ten evaluations, in oracle calls
    reckoned from the counts so far. The rate is believed once measured over six steps and an eighth of that finish.
    Where its steps show a quadratic function and a Hessian costs at most four evaluations, it ends at once.

    Args:
        memory: of L-BFGS. period, cubic_reg, hessian, model_tol, max_basis: of the second phase, see DLCRN.
        oracle: options of the problem's exact oracle (ImplicitOracle; MinimaxOracle for a minimax problem).

    References: Liu and Nocedal 1989; Cartis, Gould, Toint 2011; Doikov, Chayti, Jaggi 2023. The switch is ours.
    """


    oracle = for_steps(oracle)
    then = CubicNewton(
        "auto", lambda problem: problem.exact_oracle(**oracle), FittedRegularisation(cubic_reg), make_schedule(period),
        hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip
    return Auto(LimitedMemoryBFGS(lr=1.0, memory=memory, oracle=oracle), then, oracle)


AUTO.oracle_options = tuple(name for name in options_of("dlcrn") if name not in ("adaptive",))
