"""minimize: run a method on a problem, with stopping, progress, checkpoints and errors that lose nothing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import checkpoint as checkpoints
from .certify import smallest_eigenvalue
from .derivatives import load_torch_func
from .errors import BilevelError, ConfigError, NonFiniteError
from .linalg import FunctionOperator, own_stream
from .methods import Method, Run, make_method
from .problem import BilevelProblem
from .results import Result, Status, StepReport

Callback = Callable[[StepReport, Tensor, Tensor], "dict[str, Any] | bool | None"]
STOP_RULES = ("gradient", "step")


def minimize(
    problem: BilevelProblem,
    method: str | Method = "auto",
    *,
    max_steps: int = 100,
    gradient_tol: float = 1e-6,
    stop_rule: str = "gradient",
    max_seconds: float | None = None,
    bounds: tuple[Any, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Minimise the hyper-objective from the problem's current hyperparameters.

    Args:
        problem: with its data.
        method: a name (``torch_bilevel.method_names()``) or a method object; ``options`` go to the named constructor.
        max_steps: outer iterations, rejected ones included; default 100.
        gradient_tol: eps: stop when |gradient| <= eps and, for second-order methods, the smallest eigenvalue of the
            hyper-Hessian is at least -sqrt(M eps) (examined by Lanczos at that point); default 1e-6.
        stop_rule: 'gradient' as above, or 'step': the published |s| <= sqrt(eps / M) / 2; with a period m > 1 for the
            cubic mean of |s| over the m steps of one Hessian, and the result is then the x after the shortest of
            them. A guarantee for a constant M >= L2 (m = 1) or 6 m L2, a heuristic for an adaptive M.
        max_seconds: of the method's own time; callbacks are not counted.
        bounds: (lo, hi), numbers or (dx,) tensors: steps are projected, and accepted on what the projected step does.
        callback: called with (report, x, y) at the start and after every step; a returned dict is kept in
            ``report.extra`` and shown; ``False`` stops the run.
        progress: show a bar.
        checkpoint: file written every ``checkpoint_every`` steps; ``resume=True`` goes on from it bit for bit.
        seed: of every random choice of the method.

    Returns:
        A Result. x and y are also written into the user's tensors.

    Raises:
        ConfigError: a wrong name or option. NonFiniteError, NotStronglyConvexError, SolverError: the run could not
            go on; ``error.result`` is the Result up to the last good point, which is in the user's tensors.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x0 = torch.zeros(1, dtype=torch.float64)
        >>> p = tb.BilevelProblem.from_functions(
        ...     lambda x, y: ((y - 1) ** 2).sum() / 2, lambda x, y: ((y - x) ** 2).sum() / 2, x0, x0)
        >>> result = tb.minimize(p, method="lfsba")
        >>> round(result.x.item(), 6), result.status.name
        (1.0, 'SECOND_ORDER')
    """
    method = make_method(method, options)
    _validate(max_steps, gradient_tol, stop_rule, checkpoint_every, resume, checkpoint)
    with own_stream(problem.device):
        run = method.start(problem, seed=seed, bounds=bounds)
        loop = _Loop(run, gradient_tol, stop_rule, callback, checkpoint, checkpoint_every, progress, max_steps)
        try:
            if resume and os.path.exists(checkpoint):
                loop.load(checkpoint)
            else:
                loop.begin()
            status = loop.status(max_steps, max_seconds)
            while status is Status.RUNNING:
                loop.advance()
                status = loop.status(max_steps, max_seconds)
        except BilevelError as error:
            status = Status.NON_FINITE if isinstance(error, NonFiniteError) else Status.FAILED
            error.result = loop.result(status, str(error))
            raise type(error)(f"{error} [stopped at step {run.steps}; the last good point is in error.result and in your"
                              " tensors]", **_carried(error)) from error  # fmt: skip
        except KeyboardInterrupt:
            loop.result(Status.CALLBACK, "interrupted")
            raise
        finally:
            loop.close()
        return loop.result(status, status.value)


class _Loop:
    """The state of one ``minimize``: history, time and the bar around a Run."""

    def __init__(self, run: Run, eps: float, stop_rule: str, callback, checkpoint, every: int, progress: bool, total: int):
        self.run, self.eps, self.stop_rule, self.callback = run, eps, stop_rule, callback
        self.checkpoint, self.every = checkpoint, every
        self.history: list[StepReport] = []
        self.seconds = 0.0
        self.stopped = False
        self.phase: list[tuple[float, Tensor]] = []
        self.min_eigenvalue = math.nan
        self.bar = tqdm(total=total, desc=run.method.name, unit="step", disable=not progress)

    def begin(self) -> None:
        load_torch_func()
        start = time.perf_counter()
        report = self.run.report()
        self.seconds += time.perf_counter() - start
        self._finish(report)

    def advance(self) -> None:
        start = time.perf_counter()
        report = self.run.step()
        self.seconds += time.perf_counter() - start
        self._finish(report)
        self.bar.update(1)

    def _finish(self, report: StepReport) -> None:
        report.seconds = self.seconds
        if self.callback is not None:
            answer = self.callback(report, self.run.x, self._y())
            if answer is False:
                self.stopped = True
            elif isinstance(answer, dict):
                report.extra.update(answer)
        self.history.append(report)
        shown = {"value": f"{report.value:.5g}", "|g|": f"{report.gradient_norm:.1e}"}
        shown.update({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in report.extra.items()})
        shown["hess"] = report.counts.hessians
        self.bar.set_postfix(shown, refresh=False)
        if self.checkpoint is not None and report.step % self.every == 0:
            self.save()

    def _y(self) -> Tensor:
        """The lower solution as the evaluation has it, without paying for a correction."""
        return self.run.current().y

    def status(self, max_steps: int, max_seconds: float | None) -> Status:
        last, run = self.history[-1], self.run
        if self.stopped:
            return Status.CALLBACK
        if self.stop_rule == "step" and last.step and last.accepted and math.isfinite(last.cubic_reg):
            if self._phase_is_short(last):
                return Status.STEP_RULE
        if self.stop_rule == "gradient" and last.gradient_norm <= self.eps and run.may_stop(self.eps):
            if not run.method.second_order:
                return Status.GRADIENT_TOLERANCE
            else:
                start = time.perf_counter()
                escape = self._negative_curvature()
                self.seconds += time.perf_counter() - start
                if escape is None:
                    return Status.SECOND_ORDER
                run.expect_new_hessian(escape)
        if last.stalled:
            return Status.STALLED
        if run.steps >= max_steps:
            return Status.MAX_STEPS
        if max_seconds is not None and self.seconds >= max_seconds:
            return Status.MAX_SECONDS
        return Status.RUNNING

    def _phase_is_short(self, last: StepReport) -> bool:
        """The published rule: over the m steps of one Hessian, the cubic mean of |s| is at most sqrt(eps / M) / 2.

        The run then goes back to the x after the shortest of them.
        """
        self.phase.append((last.step_norm, self.run.x))
        if len(self.phase) < self.run.method.period:
            return False
        phase, self.phase = self.phase, []
        mean = (sum(length**3 for length, _ in phase) / len(phase)) ** (1 / 3)
        if not mean <= 0.5 * math.sqrt(self.eps / last.cubic_reg):
            return False
        x = min(phase, key=lambda step: step[0])[1]
        if x is not self.run.x:
            self.run.move_to(x)
            self.run.current()
        return True

    def _negative_curvature(self) -> Tensor | None:
        """A unit direction of curvature below -sqrt(M eps) at the current point (on the free variables), or None.

        The products are as exact as the oracle makes them, not as loose as a method may take them for its steps.
        """
        run = self.run
        ev = run.current()
        H = ev.hessian
        loose, H.tol = H.tol, None
        if run.box is not None:
            mask = run.box.free(run.x, ev.gradient).to(H.dtype)
            full = H
            H = FunctionOperator(full.n, lambda v: mask * full.matvec(mask * v), dtype=full.dtype, device=full.device)
        value, _, norm, direction = smallest_eigenvalue(H, seed=run.seed)
        ev.hessian.tol = loose
        self.min_eigenvalue = value
        delta = math.sqrt(run.cubic_reg * self.eps) if math.isfinite(run.cubic_reg) else 0.0
        rounding = 100 * torch.finfo(H.dtype).eps * norm
        return None if value >= -(delta + rounding) else direction

    def save(self) -> None:
        state = {"run": self.run.state_dict(), "seconds": self.seconds, "min_eigenvalue": self.min_eigenvalue,
                 "phase": [list(step) for step in self.phase],
                 "history": [checkpoints.pack_report(report) for report in self.history]}  # fmt: skip
        checkpoints.save(self.checkpoint, state)

    def load(self, path) -> None:
        state = checkpoints.to_device(checkpoints.load(path), self.run.problem.device)
        if not isinstance(state, dict) or not {"run", "history", "seconds", "min_eigenvalue", "phase"} <= set(state):
            raise ConfigError(f"{path} is not a checkpoint of minimize; delete it to start anew")
        self.run.load_state_dict(state["run"])
        self.seconds, self.min_eigenvalue = state["seconds"], state["min_eigenvalue"]
        self.phase = [tuple(step) for step in state["phase"]]
        self.history = [checkpoints.unpack_report(plain) for plain in state["history"]]
        self.bar.update(self.run.steps)

    def result(self, status: Status, message: str) -> Result:
        """The Result at the last good point, which is also written into the user's tensors."""
        run = self.run
        last = self.history[-1] if self.history else None
        value, norm = (math.nan, math.nan) if last is None else (last.value, last.gradient_norm)
        try:
            run.tighten()
        except BilevelError:
            pass  # then what is returned is as loose as the run's own
        on_demand = run.evaluation is not None and run.evaluation.precision is not None
        if last is not None and (status is Status.STEP_RULE or on_demand):  # perhaps a point before the last
            value, norm = float(run.current().value), run.stationarity()
        y = run.problem.y
        if run.evaluation is not None:
            try:
                y = run.evaluation.lower.y
            except BilevelError:
                y = self._y()
        run.problem.write(x=run.x, y=y)
        return Result(
            x=run.x, y=y, value=value, gradient_norm=norm, status=status, message=message,
            history=self.history, counts=run.counts.copy(), seconds=self.seconds, method=run.method.name,
            cubic_reg=run.cubic_reg, min_eigenvalue=self.min_eigenvalue, choices=run.choices(),
        )  # fmt: skip

    def close(self) -> None:
        self.bar.close()


def _carried(error: BilevelError) -> dict[str, Any]:
    carried = {"result": error.result}
    if hasattr(error, "curvature"):
        carried["curvature"] = error.curvature
    return carried


def _validate(max_steps, gradient_tol, stop_rule, checkpoint_every, resume, checkpoint) -> None:
    if not isinstance(max_steps, int) or max_steps < 0:
        raise ConfigError(f"max_steps: expected an int >= 0, got {max_steps!r}")
    if not (isinstance(gradient_tol, (int, float)) and gradient_tol >= 0):
        raise ConfigError(f"gradient_tol: expected a number >= 0, got {gradient_tol!r}")
    if stop_rule not in STOP_RULES:
        raise ConfigError(f"stop_rule: expected one of {', '.join(STOP_RULES)}, got {stop_rule!r}")
    if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every: expected an int >= 1, got {checkpoint_every!r}")
    if resume and checkpoint is None:
        raise ConfigError("resume=True needs checkpoint=PATH")
