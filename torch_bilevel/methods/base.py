"""Method and Run: settings that can be started on a problem, and one started run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..bounds import Box
from ..counting import OracleCounts
from ..errors import ConfigError
from ..oracles import Evaluation, HyperOracle
from ..problem import BilevelProblem
from ..results import StepReport

#: of what a run's state holds, anything below it included (oracles, what systems keep): one more with every change of that
STATE_VERSION = 4


class Method(ABC):
    """Settings of a method. ``start`` binds them to a problem; the settings themselves never change.

    Attributes:
        name: registry name.
        second_order: whether its runs examine curvature before they call a point stationary.
        period: steps that share a Hessian by a fixed schedule, 1 otherwise.
    """

    name: str
    second_order: bool = False
    period: int = 1

    @abstractmethod
    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> Run:
        """A run from the problem's current hyperparameters."""


class Run(ABC):
    """One run of a method: the current point, its evaluation, and everything needed to go on.

    Args:
        method, problem: as given to ``Method.start``.
        oracle: evaluates the hyper-objective.
    """

    def __init__(self, method: Method, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any):
        self.method, self.problem, self.oracle, self.seed = method, problem, oracle, seed
        self.x = problem.x
        self.box = None if bounds is None else Box(bounds, self.x)
        if self.box is not None:
            self.x = self.box.project(self.x)
            oracle.stationarity = self.box.stationarity
        self.evaluation: Evaluation | None = None
        self.steps = 0
        self.scale = 1.0

    @property
    def counts(self) -> OracleCounts:
        return self.oracle.counts

    @property
    def cubic_reg(self) -> float:
        """The M in use; NaN for methods without one."""
        return float("nan")

    @property
    def keeps_data(self) -> bool:
        """Whether it goes on using data that a later ``set_data`` replaces (for a matrix-free Hessian)."""
        return False

    def current(self) -> Evaluation:
        """The evaluation at x, made on first use."""
        if self.evaluation is None:
            self.evaluation = self.oracle.evaluate(self.x)
        return self.evaluation

    def stationarity(self) -> float:
        """|gradient|, with bounds that of the projected gradient step."""
        ev = self.current()
        if self.box is not None:
            return float(self.box.stationarity(self.x, ev.gradient))
        return float(torch.linalg.vector_norm(ev.gradient))

    def may_stop(self, eps: float) -> bool:
        """Whether |gradient| <= eps may end the run now; a perturbed method waits until its noise has had its time, and
        one whose evaluations are loose evaluates as well as its oracle can."""
        return not self.tighten() or self.stationarity() <= eps

    def tighten(self) -> bool:
        """Evaluate again at the oracle's own tolerances, where ``accuracy`` allowed looser ones; whether it did."""
        loose = self.evaluation
        if loose is None or loose.precision is None or loose.precision.tight:
            return False
        self.evaluation = self.oracle.exact(loose)
        return True

    def has_stalled(self) -> bool:
        """Whether a lack of progress is final, as it is unless evaluations are loose: those are made stricter."""
        if not self.tighten():
            return True
        self.oracle.stricter()
        return False

    def choices(self) -> dict[str, str]:
        """What was chosen for solving, in words, by what it serves; see ``Result.choices``."""
        return {"lower systems": self.oracle.systems.describe()}

    def set_data(self, problem: BilevelProblem) -> None:
        """Go on with the same point on other data (``problem.at``)."""
        self.problem = self.oracle.problem = problem
        self.evaluation = None

    def move_to(self, x: Tensor) -> None:
        """Go on from another point, for a user who changed the hyperparameters."""
        self.x = x if self.box is None else self.box.project(x)
        self.evaluation = None

    @abstractmethod
    def step(self) -> StepReport:
        """One outer iteration."""

    def report(self, **numbers: Any) -> StepReport:
        """A StepReport for the point held now."""
        return StepReport(
            step=self.steps, value=float(self.current().value), gradient_norm=self.stationarity(),
            counts=self.counts.copy(), **numbers,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything a restored run needs to go on bit for bit (same settings, data and number of threads)."""
        return {
            "version": STATE_VERSION,
            "method": self.method.name,
            "steps": self.steps,
            "x": self.x,
            "evaluation": None if self.evaluation is None else self.evaluation.state_dict(),
            "oracle": self.oracle.state_dict(),
        }

    def check_method(self, state: dict[str, Any]) -> None:
        """ConfigError unless the state is of this version and method."""
        if state.get("version") != STATE_VERSION:
            raise ConfigError(
                f"checkpoint: written with state version {state.get('version')!r}, this torch_bilevel has {STATE_VERSION};"
                " go on with the one that wrote it, or start anew (without resume, or with the file deleted)"
            )
        if state["method"] != self.method.name:
            raise ConfigError(f"checkpoint of method {state['method']!r}, but this run uses {self.method.name!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``; ConfigError if it belongs to another method, version or problem size."""
        self.check_method(state)
        self.problem.x_layout.check(state["x"], "checkpoint x")
        self.steps, self.x = state["steps"], state["x"]
        self.oracle.load_state_dict(state["oracle"])
        self.evaluation = None if state["evaluation"] is None else self.oracle.restore(state["evaluation"])
        self.oracle.load_state_dict(state["oracle"])  # counts and kept factor, which restoring has changed
