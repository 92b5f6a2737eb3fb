"""The cubic Newton method: one loop body for FSBA, LFSBA, DLCRN, MCN, LMCN and their lazy and matrix-free kin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotStronglyConvexError, SolverError
from ..oracles import Evaluation, HyperOracle
from ..problem import BilevelProblem
from ..results import StepReport
from .base import Method, Run
from .model import HessianModel, check_kind
from .proposal import Proposal, propose
from .regularisation import FittedRegularisation, FixedRegularisation, Trial
from .schedule import AdaptiveRefresh, Age, FixedPeriod

#: steps in a row without progress beyond rounding after which a run counts as stalled
PATIENCE = 25


@final
class CubicNewton(Method):
    """x+ = x + argmin_s  g's + s'Hs/2 + (M/6)|s|^3 with a fresh gradient g and a possibly older Hessian H.

    Args:
        name: registry name, for reports and checkpoints.
        oracle: makes the HyperOracle for a problem.
        regularisation: FixedRegularisation (published) or FittedRegularisation (default in the constructors).
        schedule: FixedPeriod (published) or AdaptiveRefresh.
        hessian: 'auto', 'dense', 'krylov' or 'gradient'; model_tol, max_basis, model_eps: see HessianModel.
    """

    second_order = True

    def __init__(
        self,
        name: str,
        oracle: Callable[[BilevelProblem], HyperOracle],
        regularisation: FixedRegularisation | FittedRegularisation,
        schedule: FixedPeriod | AdaptiveRefresh,
        *,
        hessian: str = "auto",
        model_tol: float = 1e-2,
        max_basis: int | None = None,
        model_eps: float = 1e-4,
    ):
        check_kind(hessian)
        self.name, self.oracle = name, oracle
        self.regularisation, self.schedule = regularisation, schedule
        self.period = schedule.period if isinstance(schedule, FixedPeriod) else 1
        self.hessian, self.model_tol, self.max_basis, self.model_eps = hessian, model_tol, max_basis, model_eps

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> CubicNewtonRun:
        return CubicNewtonRun(self, problem, self.oracle(problem), seed=seed, bounds=bounds)


@final
class CubicNewtonRun(Run):
    """A run of CubicNewton. ``step`` tries one step; adaptive methods may reject it and then stay where they are."""

    def __init__(self, method: CubicNewton, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any):
        super().__init__(method, problem, oracle, seed=seed, bounds=bounds)
        self.model: HessianModel | None = None
        self.snapshot: Evaluation | None = None
        self.snapshot_problem: BilevelProblem | None = None
        self.age = Age()
        self._cubic_reg: float | None = None
        self._accepted = self._streak = 0
        self._failures = 0
        self._idle = 0
        self._hessian_calls = 0
        self._lag = 0.0
        self._checked = math.inf
        self._best = (math.inf, math.inf)
        self._untested: dict[str, Any] | None = None
        self._escape: Tensor | None = None

    @property
    def cubic_reg(self) -> float:
        return math.nan if self._cubic_reg is None else self._cubic_reg

    @property
    def keeps_data(self) -> bool:
        return self.model is not None and self.model.kind != "dense"

    # -- one iteration --------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        if self.oracle.continuation:
            self._sharpen()
        method, ev = self.method, self.current()
        if self._untested is not None:
            self._judge_untested(ev)
        refreshed = self.model is None or method.schedule.due(self.age)
        spent = self.counts.oracle_calls
        if refreshed:
            self.refresh()
        if self._cubic_reg is None:
            g_norm = float(torch.linalg.vector_norm(ev.gradient))
            self._cubic_reg = method.regularisation.initial(self.model.norm(ev.gradient), g_norm)
        cubic_reg = self._cubic_reg
        tried = propose(self.model, ev, cubic_reg, box=self.box, scale=self.scale, adaptive=method.regularisation.adaptive)
        if tried.length == 0.0:
            return self._stay(refreshed, cubic_reg)
        if refreshed:  # the price of a Hessian is that of its model as well
            self._hessian_calls, spent = self.counts.oracle_calls - spent, self.counts.oracle_calls
        if self.oracle.lower_is_external:
            return self._go_untested(ev, tried, refreshed)
        warm = dict(self.oracle.warm)
        self.oracle.predict(ev, tried.x_new)
        new = self._try(tried.x_new)
        if new is None:
            pull = float(torch.linalg.vector_norm(ev.gradient)) / tried.length**2
            trial, accepted = Trial(tried.predicted, -math.inf, math.inf, pull), False
        else:
            trial = self._compare(ev, new, tried)
            accepted = method.regularisation.accepts(trial)
        self.steps += 1
        error = math.inf
        if new is not None and method.schedule.refreshes_on_failure:
            error = self._model_error(ev.x, ev.gradient, new.gradient, tried.model_gradient(self.model, ev.gradient))
        self._grow_older(ev.x, tried.length, accepted, error, self.counts.oracle_calls - spent)
        if accepted and method.schedule.corrects:
            self.model.correct(tried.x_new - ev.x, new.gradient - ev.gradient)
        if accepted:
            self.x, self.evaluation = tried.x_new, new
            self._accepted += 1
            self._streak += 1
            self._failures = 0
        else:
            self._failures += 1
            self._streak = 0
            self.oracle.warm = warm
        lagging = not accepted and self.oracle.single_loop and self._catch_up(tried.predicted)
        blamed = method.schedule.refreshes_on_failure and method.schedule.due(self.age)  # a stale Hessian, before M
        if not lagging and not blamed:
            self._cubic_reg = method.regularisation.after(cubic_reg, trial, accepted, self._accepted, self._streak)
        self._idle = 0 if lagging or (accepted and self._progressed()) else self._idle + 1
        return self.report(
            step_norm=tried.length, accepted=accepted, cubic_reg=cubic_reg, refreshed=refreshed,
            predicted_decrease=tried.predicted, ratio=trial.ratio,
            stalled=self._stalled(),
        )  # fmt: skip

    def _grow_older(self, start: Tensor, length: float, accepted: bool, error: float, calls: int) -> None:
        """What a step from ``start`` (dx,) showed of the Hessian it was made with; ``calls``: what it cost."""
        self.age = Age(
            accepted=self.age.accepted + accepted, distance=float(torch.linalg.vector_norm(start - self.snapshot.x)),
            last_step=length, last_accepted=accepted, last_error=error, price=self._hessian_calls / max(calls, 1),
        )  # fmt: skip

    def _model_error(self, x: Tensor, g: Tensor, new_gradient: Tensor, model_gradient: Tensor) -> float:
        """|g+ - (g + H s)| / |g|, on the variables that are free at x."""
        error = new_gradient - model_gradient
        if self.box is not None:
            free = self.box.free(x, g).to(g.dtype)
            error, g = free * error, free * g
        wrong, size = torch.stack([torch.linalg.vector_norm(error), torch.linalg.vector_norm(g)]).tolist()
        return wrong / size if size > 0 else math.inf if wrong > 0 else 0.0

    def _progressed(self) -> bool:
        """Whether the value fell by more than rounding, or the gradient by a tenth, below the best so far."""
        value, norm = float(self.current().value), self.stationarity()
        best_value, best_norm = self._best
        lower = value < best_value - self._noise(value, value)
        self._best = (value if lower else best_value, min(norm, best_norm) if norm < 0.9 * best_norm else best_norm)
        return lower or norm < 0.9 * best_norm

    def _sharpen(self) -> None:
        """Each time the gradient has fallen tenfold: let the oracle reduce a bias above a tenth of it."""
        norm = self.stationarity()
        if norm <= 0.1 * self._checked or math.isinf(self._checked):
            self._checked = norm
            if self.oracle.sharpen(self.current(), 0.1 * norm):
                self._begin_anew()

    def _begin_anew(self) -> None:
        """The hyper-objective has changed: evaluate it again, with its own Hessian."""
        self.evaluation = self.model = None
        self._best = (math.inf, math.inf)

    def _catch_up(self, predicted: float) -> bool:
        """Evaluate a single loop anew where it stands, its y now one step further on after a rejected step.

        By as much as the value moves, values of different lag differ without a step. Returns whether that is more than
        a tenth of the predicted decrease: then their comparison said nothing of M.
        """
        before = float(self.evaluation.value)
        self.evaluation = None
        after = float(self.current().value)
        self._lag = abs(after - before)
        return self._lag > max(0.1 * predicted, self._noise(before, after))

    def _noise(self, value: float, other: float) -> float:
        """Rounding of a difference of values of the hyper-objective."""
        return self.oracle.value_noise(max(abs(value), abs(other)))

    def choices(self) -> dict[str, str]:
        chosen = super().choices()
        return chosen if self.model is None else {**chosen, "hyper-Hessian": self.model.describe()}

    def set_data(self, problem: BilevelProblem) -> None:
        super().set_data(problem)
        self._best = (math.inf, math.inf)

    def refresh(self) -> None:
        """Make the Hessian anew at the current point."""
        ev = self.current()
        self.counts.add(hessians=1)
        self.model, self.snapshot, self.snapshot_problem = self._model_of(ev), ev, self.problem
        if self._escape is not None:
            self.model.include(self._escape)
            self._escape = None
        self.age = Age()
        if self.model.kind == "dense":
            ev.release()

    def may_stop(self, eps: float) -> bool:
        """A small gradient counts once its error (a single loop's lag, a penalty's bias) is below eps as well."""
        if self.oracle.continuation and self.oracle.sharpen(self.current(), 0.5 * eps):
            self._begin_anew()
            return False
        if not self.oracle.single_loop or self.oracle.gradient_error(self.current()) <= eps:
            return super().may_stop(eps)
        self.evaluation = None  # the next one has taken another lower step
        return False

    def expect_new_hessian(self, direction: Tensor) -> None:
        """Make the next step refresh, with the direction of negative curvature that was found here in its model."""
        self.model, self._escape = None, direction

    def _model_of(self, ev: Evaluation, state: dict[str, Any] | None = None) -> HessianModel:
        method = self.method
        matrix_saved = state is not None and state["kind"] == "dense"
        return HessianModel(None if matrix_saved else ev.hessian, kind=method.hessian, tol=method.model_tol,
                            max_basis=method.max_basis, eps=method.model_eps, seed=self.seed, state=state)  # fmt: skip

    def _try(self, x_new: Tensor) -> Evaluation | None:
        """The evaluation at a trial point; None where it fails and the method may shorten the step instead."""
        if not self.method.regularisation.adaptive:
            return self.oracle.evaluate(x_new)
        try:
            return self.oracle.evaluate(x_new)
        except (NonFiniteError, NotStronglyConvexError, SolverError):
            if self._failures >= 8:
                raise
            return None

    def _compare(self, ev: Evaluation, new: Evaluation, tried: Proposal) -> Trial:
        """Actual decrease and fitted M of a step, from values or, where rounding drowns them, from gradients.

        For a cubic function the two agree: with e = (g_new - g - H s)'s, actual change = quadratic change + e/3 and
        fit = 2 e / |s|^3. Values carry an error of about 30 eps |value|, of a single loop also that of its lag; the
        gradient form replaces them when the predicted decrease is not well above that, and they do not show an increase.
        """
        s, length, predicted, quadratic = tried.s, tried.length, tried.predicted, tried.quadratic
        pull = float(torch.linalg.vector_norm(ev.gradient)) / length**2
        lowest = float(tried.cubic.min_eigenvalue)
        reach = float(torch.linalg.vector_norm(new.gradient)) / (lowest * length) if lowest > 0 else math.inf
        value, new_value = float(ev.value), float(new.value)
        noise = self._noise(value, new_value) + 0.1 * (ev.value_doubt + new.value_doubt)
        change = new_value - value
        # by the values: it went up, and no cubic function need be what did it
        told = change > max(3 * noise, 3 * self._lag, self.oracle.solution_noise(max(abs(value), abs(new_value))))
        if not told and not abs(predicted) > max(100 * noise, 10 * self._lag):
            noise = max(noise, self._lag)
            bend = float(torch.dot(new.gradient - tried.model_gradient(self.model, ev.gradient), s))
            change, fit = quadratic + bend / 3, 2 * bend / length**3
            old_norm, new_norm = self.stationarity(), float(torch.linalg.vector_norm(new.gradient))
            if self.box is not None:
                new_norm = float(self.box.stationarity(new.x, new.gradient))
            if new_norm < old_norm and new_value - value <= noise:  # at rounding: a smaller gradient is progress
                change = min(change, -0.5 * predicted)
            return Trial(predicted, -change, fit, pull, reach)
        return Trial(predicted, -change, 6 * (change - quadratic) / length**3, pull, reach)

    def _stay(self, refreshed: bool, cubic_reg: float) -> StepReport:
        """The model has no step to offer: stationary for this Hessian."""
        self.steps += 1
        self._idle = PATIENCE if self.snapshot is self.evaluation else self._idle + 1
        self.age.last_accepted, self.age.distance = False, float(torch.linalg.vector_norm(self.x - self.snapshot.x))
        return self.report(accepted=False, cubic_reg=cubic_reg, refreshed=refreshed, stalled=self._stalled(True))

    def _stalled(self, stays: bool = False) -> bool:
        """Whether there has been no progress for too long; a constant M may go up and down unless it ``stays``."""
        if not (stays or self.method.regularisation.adaptive) or self._idle < PATIENCE:
            return False
        if self.has_stalled():
            return True
        self._idle = 0
        return False

    # -- a learner that the user trains: no trial can be evaluated, M follows the gradients --------------------------

    def _go_untested(self, ev: Evaluation, tried: Proposal, refreshed: bool) -> StepReport:
        """Take the step; the next evaluation's gradient will judge it. The report is of the point it left."""
        self.steps += 1
        report = self.report(step_norm=tried.length, cubic_reg=self._cubic_reg, refreshed=refreshed,
                             predicted_decrease=tried.predicted)  # fmt: skip
        model_gradient = tried.model_gradient(self.model, ev.gradient)
        self._untested = {"s": tried.s, "model_gradient": model_gradient, "predicted": tried.predicted,
                          "quadratic": tried.quadratic, "gradient": ev.gradient, "x": ev.x}  # fmt: skip
        self.x, self.evaluation = tried.x_new, None
        self._accepted += 1
        self._streak += 1
        return report

    def _judge_untested(self, ev: Evaluation) -> None:
        last, self._untested = self._untested, None
        length = float(torch.linalg.vector_norm(last["s"]))
        bend = float(torch.dot(ev.gradient - last["model_gradient"], last["s"]))
        trial = Trial(last["predicted"], -(last["quadratic"] + bend / 3), 2 * bend / length**3)
        error = self._model_error(last["x"], last["gradient"], ev.gradient, last["model_gradient"])
        self._grow_older(last["x"], length, True, error, ev.counts.oracle_calls)
        self._cubic_reg = self.method.regularisation.after(self._cubic_reg, trial, True, self._accepted, self._streak)

    # -- data, state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        needs_data = self.keeps_data and self.snapshot_problem is not self.problem
        state.update(
            model=None if self.model is None else self.model.state_dict(),
            snapshot=None if self.snapshot is None else self.snapshot.state_dict(),
            snapshot_is_current=self.snapshot is self.evaluation,
            snapshot_data=list(self.snapshot_problem.data()) if needs_data else None,
            age=dict(self.age.__dict__), cubic_reg=self._cubic_reg, accepted=self._accepted, streak=self._streak,
            failures=self._failures, hessian_calls=self._hessian_calls,
            idle=self._idle, lag=self._lag, checked=self._checked, best=self._best, untested=self._untested, escape=self._escape,
        )  # fmt: skip
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.age = Age(**state["age"])
        self._cubic_reg, self._accepted, self._failures = state["cubic_reg"], state["accepted"], state["failures"]
        self._streak, self._hessian_calls = state["streak"], state["hessian_calls"]
        self._lag, self._checked = state["lag"], state["checked"]
        self._idle, self._best, self._untested = state["idle"], tuple(state["best"]), state["untested"]
        self._escape = state["escape"]
        self.model = self.snapshot = None
        if state["model"] is None:
            return
        data = state["snapshot_data"]
        self.snapshot_problem = self.problem if data is None else self.problem.at(*data)
        if state["snapshot_is_current"] and self.evaluation is not None:
            self.snapshot = self.evaluation
        else:
            dense = state["model"]["kind"] == "dense"  # then nothing of the snapshot is used but its place
            self.oracle.problem = self.snapshot_problem
            self.snapshot = self.oracle.restore({**state["snapshot"], **({"recorded": {}} if dense else {})})
            self.oracle.problem = self.problem
        self.model = self._model_of(self.snapshot, state["model"])
        self.oracle.load_state_dict(state["oracle"])  # counts and kept factor, which restoring has changed

