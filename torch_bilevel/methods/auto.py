"""auto: quasi-Newton while far, second-order to leave saddles, to finish where that proves cheaper, and to certify."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Objective
from ..errors import NonFiniteError, NotStronglyConvexError, SolverError
from ..lower.kept import is_exact
from ..oracles import Evaluation, HyperOracle
from ..oracles.hessian import KRYLOV_PRODUCTS
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
#: share of what has been spent that the first Hessian of a finish may cost, so that a mistake costs little
STAKE = 0.25
#: after a finish that was slower L-BFGS has so many times what it cost before another; twice as many after each.
PATIENCE = 2
#: product of a finish's shares of what L-BFGS gained, in value and in gradient, below which it was slower, where it has not
#: gained so many decades of gradient yet; a share counts for so much at most (L-BFGS may have gained no gradient at all)
CLEARLY, CONVERGES, MOST = 0.5, 2.0, 3.0
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
        oracle = problem.exact_oracle(**self.oracle)
        return AutoRun(self if oracle.systems.keeps(problem) else self._with_scalar(), problem, oracle, seed=seed, bounds=bounds)

    def _with_scalar(self) -> Auto:
        """Where plain CG pays for lower systems whose condition far moves of single hyperparameters spoil."""
        first = LimitedMemoryBFGS(lr=self.first.lr, memory=self.first.memory, scaling="scalar", oracle=self.oracle)
        return Auto(first, self.then, self.oracle)


@final
class AutoRun(Run):
    """An LBFGSRun, then a CubicNewtonRun, on one oracle; back where L-BFGS proves to have been faster."""

    def __init__(self, method: Auto, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any):
        self.method, self.seed, self._bounds = method, seed, bounds
        if oracle.lower_is_external:
            self.active: Run = CubicNewtonRun(method.then, problem, oracle, seed=seed, bounds=bounds)
        else:
            self.active = LBFGSRun(method.first, problem, oracle, seed=seed, bounds=bounds)
        self._path: list[tuple[float, float, int, int]] = []  # of L-BFGS: value, |gradient|, evaluations, oracle calls
        self._quadratic = False
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._trial: dict[str, Any] | None = None  # of a second phase that must prove itself, since its last Hessian
        self._failed, self._wait = 0, 0  # finishes that were slower, and the oracle calls before which there is no other

    @property
    def is_second_order(self) -> bool:
        """Whether the second phase has begun."""
        return isinstance(self.active, CubicNewtonRun)

    def step(self) -> StepReport:
        if self.is_second_order:
            self._judge()
        if not self.is_second_order:
            if not self._path:
                self._record()
            if self._path[-1][1] == 0.0 or (self._quadratic and self.hessian_cost() <= QUADRATIC_PRICE):
                self._go_second_order()
            elif self.counts.oracle_calls >= self._wait and self._slow():
                self._go_second_order(on_trial=True)
        before = self.active.current()
        try:
            report = self.active.step()
        except (NonFiniteError, NotStronglyConvexError, SolverError):
            if self._trial is None:
                raise
            self._give_up(self.counts.oracle_calls - self._trial["calls"])
            report = self.active.step()
        if not self.is_second_order:
            self._record()
            self._quadratic = report.accepted and is_quadratic(before, self.active.current())
            if report.stalled:
                self._go_second_order()
                report.stalled = False
        elif self._trial is not None:
            self._trial["norm"] = min(self._trial["norm"], report.gradient_norm)
        return report

    def may_stop(self, eps: float) -> bool:
        return self.active.may_stop(eps)

    def tighten(self) -> bool:
        return self.active.tighten()

    def _record(self) -> None:
        value = float(self.active.current().value)
        self._path.append((value, self.active.stationarity(), self.counts.evaluations, self.counts.oracle_calls))

    def _slow(self) -> bool:
        """Whether L-BFGS, at its rate of late, would pay more for four decades of gradient than a finish costs."""
        window = self._window()
        if window is None or self.hessian_cost() > STAKE * self.counts.evaluations:
            return False
        spent, decades = self._path[-1][2] - self._path[-1 - window][2], self._decades(window)
        return decades <= 0 or FINISH_DECADES * spent / decades > self._finish_cost()

    def _window(self) -> int | None:
        """The last steps that took an eighth of the evaluations that a finish costs, since |gradient| goes up and down
        on the way; None before there are so many."""
        evaluations = [point[2] for point in self._path]
        if len(evaluations) <= WINDOW:
            return None
        least, window = WINDOW_SHARE * self._finish_cost(), WINDOW
        while window < len(evaluations) - 1 and evaluations[-1] - evaluations[-1 - window] < least:
            window += 1
        return window if evaluations[-1] - evaluations[-1 - window] >= least else None

    def _decades(self, window: int) -> float:
        """Decades of gradient gained over the last ``window`` steps of L-BFGS."""
        norms = [point[1] for point in self._path]
        return decades(min(norms[:-window]), min(norms[-window:]))

    def _finish_cost(self) -> float:
        return FINISH_HESSIANS * self.hessian_cost() + FINISH_EVALUATIONS

    def _judge(self) -> None:
        """Before a second Hessian: back to L-BFGS where it gained more for as many calls, by value and by gradient, or, as long
        as the finish does not converge, clearly more by the product of the two. Before a later one: for the second time running.
        """
        trial, active = self._trial, self.active
        if trial is None or active.model is None or not active.method.schedule.due(active.age):
            return
        self._trial, calls, value = None, self.counts.oracle_calls, float(active.current().value)
        spent = calls - trial["calls"]
        gained = trial["value"] - value, decades(trial["before"], trial["norm"])
        shares = [max(0.0, now) / (rate * spent) if rate > 0 else math.inf for now, rate in zip(gained, trial["rates"])]
        converges = decades(trial["start"], trial["norm"]) >= CONVERGES
        slower = max(shares) < 1 or not converges and min(shares) * min(MOST, max(shares)) < CLEARLY
        if slower and (trial["first"] or trial["slower"]):
            self._give_up(spent)
        else:
            self._trial = {**trial, "calls": calls, "value": value, "before": trial["norm"], "first": False,
                           "slower": slower}  # fmt: skip

    def _give_up(self, spent: int) -> None:
        """A trial that has cost so many calls: back to L-BFGS for some multiple of them."""
        self._failed += 1
        self._wait = self.counts.oracle_calls + PATIENCE**self._failed * spent
        self._go_first_order()

    def hessian_cost(self) -> float:
        """A hyper-Hessian in evaluations, both in oracle calls: what its model and its lower factor would take over what an
        evaluation has taken so far, lower factors apart."""
        counts, problem = self.counts, self.problem
        dx, dy = problem.dx, problem.dy
        factored = is_exact(dy)
        lower = Objective(problem, lower=1.0, counts=OracleCounts())
        factor = self.oracle.systems.products_to_factor(lower, problem.x, problem.y)
        factors = factor * counts.factorisations if factored else 0
        per_evaluation = (counts.oracle_calls - factors) / max(1, counts.evaluations)
        per_solve = (counts.upper_products + counts.lower_products - factors) / max(1, counts.solves)
        per_product = 3 + 2 * (1 if factored else per_solve)
        calls = (factor if factored else 0) + min(KRYLOV_PRODUCTS, dx) * per_product
        kind, worth = self.method.then.hessian, self.oracle.dense_price()
        if kind == "dense" or (kind == "auto" and dx <= MAX_DENSE):
            calls = (factor if factored else 0) + min(dx, dy) * per_product if worth is None else worth
        elif kind == "auto" and worth is not None:
            calls = min(calls, worth)
        return calls / max(per_evaluation, 1.0)

    def _go_second_order(self, on_trial: bool = False) -> None:
        """For good, or for as long as that is faster than L-BFGS was."""
        self._trial = None
        if on_trial:
            window = self._window()
            value, _, _, calls = self._path[-1]
            value_then, _, _, lately = self._path[-1 - window // 2]  # values fall steadily: a shorter time tells
            best, spent = min(point[1] for point in self._path), calls - self._path[-1 - window][3]
            rates = [(value_then - value) / max(1, calls - lately), max(0.0, self._decades(window)) / max(1, spent)]
            self._trial = {"rates": rates, "calls": calls, "value": value, "start": best, "before": best, "norm": best,
                           "first": True, "slower": False}  # fmt: skip
        self._pairs = self.active.pairs
        self._change(CubicNewtonRun(self.method.then, self.problem, self.oracle, seed=self.seed, bounds=self._bounds))

    def _go_first_order(self) -> None:
        """Back to L-BFGS, with the pairs it had."""
        run = LBFGSRun(self.method.first, self.problem, self.oracle, seed=self.seed, bounds=self._bounds)
        run.pairs, self._trial = self._pairs, None
        self._path, self._quadratic = [], False
        self._change(run)

    def _change(self, new: Run) -> None:
        old = self.active
        new.x, new.evaluation, new.steps, new.scale = old.x, old.evaluation, old.steps, old.scale
        self.active = new

    def expect_new_hessian(self, direction: Tensor) -> None:
        """Curvature was found where the gradient vanishes: only the second phase can leave."""
        if not self.is_second_order:
            self._go_second_order()
        self._trial = None
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
                "path": list(self._path), "quadratic": self._quadratic,
                "pairs": [list(pair) for pair in self._pairs], "trial": self._trial,
                "waits": [self._failed, self._wait]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_method(state)
        if state["second"] != self.is_second_order:
            self._go_second_order() if state["second"] else self._go_first_order()
        self.active.load_state_dict(state["active"])
        self._path, self._quadratic = [tuple(point) for point in state["path"]], state["quadratic"]
        self._pairs, self._trial = [(s, y) for s, y in state["pairs"]], state["trial"]
        self._failed, self._wait = state["waits"]


def decades(before: float, after: float) -> float:
    return math.log10(before / after) if after > 0 else math.inf


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

    L-BFGS has a diagonal scaling, but where lower systems are solved by CG alone (solver 'cg' and the like, or too large
    for what ``KeptFactor`` keeps): they pay for the condition that far moves of single hyperparameters bring.

    The first phase ends when L-BFGS stalls, when it stands at a saddle, or when, at its rate of late, four more decades
    of gradient would cost it more than a second-order finish: four Hessians and ten evaluations, in oracle calls
    reckoned from the counts so far. The rate is believed once measured over six steps and an eighth of that finish, and
    the first Hessian may cost a quarter of what has been spent.
    Where its steps show a quadratic function and a Hessian costs at most four evaluations, it ends at once.
    A second phase that was begun for speed must prove it: before its second Hessian the decrease of value and gradient
    by the first is compared with that of L-BFGS for as many oracle calls. If both are less, or the product of the two
    shares is below a half, the run goes back to L-BFGS, which then has at least twice (four times, eight times, ...)
    the calls of that trial. Before later Hessians it goes back if both are less for the second time running, and at once
    where a system with its Hessian cannot be solved.

    Args:
        memory: of L-BFGS. period, cubic_reg, hessian, model_tol, max_basis: of the second phase, see DLCRN.
        oracle: options of the problem's exact oracle (ImplicitOracle; MinimaxOracle for a minimax problem). Its
            ``accuracy`` is 'auto' here: where dy > 100, gradients good to a tenth until the end.

    References: Liu and Nocedal 1989; Cartis, Gould, Toint 2011; Doikov, Chayti, Jaggi 2023. The switch is ours.
    """
    oracle = {"accuracy": "auto", **for_steps(oracle)}
    then = CubicNewton(
        "auto", lambda problem: problem.exact_oracle(**oracle), FittedRegularisation(cubic_reg), make_schedule(period),
        hessian=hessian, model_tol=model_tol, max_basis=max_basis,
    )  # fmt: skip
    return Auto(LimitedMemoryBFGS(lr=1.0, memory=memory, scaling="diagonal", oracle=oracle), then, oracle)


AUTO.oracle_options = tuple(name for name in options_of("dlcrn") if name not in ("adaptive",))
