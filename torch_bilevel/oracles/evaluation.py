"""HyperOracle and Evaluation: value, gradient and Hessian of the hyper-objective at one point, and their cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..errors import NonFiniteError, NotStronglyConvexError, SolverError
from ..linalg import LinearOperator, Solution, SolveStatus
from ..lower import External, LowerResult, LowerSolver, LowerStatus, LowerSystems, make_lower
from ..lower.systems import tolerance_of_step
from ..problem import BilevelProblem


@dataclass(frozen=True)
class LowerSolution:
    """y (dy,) near y*(x), ``gradient_norm`` = |g_y(x, y)|, and ``error``, an estimate of |y - y*| or None."""

    y: Tensor
    gradient_norm: Tensor
    error: Tensor | None

    @property
    def residual(self) -> Tensor:
        """|g_y(x, y)|: the same as ``gradient_norm``."""
        return self.gradient_norm


@dataclass
class Precision:
    """How well an evaluation made with accuracy on demand (``ImplicitOracle(accuracy=...)``) was solved.

    Attributes:
        lower, adjoint: |g_y| and |f_y - g_yy v|. tight: whether the default tolerances were used.
        gradient, value: bounds, to first order, of the errors of gradient and value.
    """

    lower: float
    adjoint: float
    tight: bool
    gradient: float = math.inf
    value: float = math.inf


class Evaluation:
    """The hyper-objective phi(x) = f(x, y*(x)), or its surrogate, at one x.

    Attributes:
        x: (dx,).
        value: (); gradient: (dx,).
        hessian: LinearOperator of size dx; made on first use (its linearisations are then retained).
        lower: the LowerSolution at x; may cost a solve on first use.
        counts: what this evaluation has cost so far, the products with its Hessian included.
        points: the lower-level vectors it rests on, by name; enough to rebuild it (``HyperOracle.restore``).
        recorded: the linearisations that ``hessian`` finds ready, by name. They are recorded again on restoring, so
            that a resumed run counts and rounds as one that was never stopped.
        precision: see ``Precision``; None where tolerances are fixed.
    """

    def __init__(
        self,
        x: Tensor,
        value: Tensor,
        gradient: Tensor,
        points: dict[str, Tensor],
        counts: OracleCounts,
        hessian: Callable[[], LinearOperator],
        lower: Callable[[], LowerSolution],
        recorded: dict[str, Linearisation] | None = None,
    ):
        self.recorded = {} if recorded is None else recorded
        self.x, self.value, self.gradient, self.points, self.counts = x, value, gradient, points, counts
        self._make_hessian, self._make_lower = hessian, lower
        self.precision: Precision | None = None
        self._hessian: LinearOperator | None = None
        self._lower: LowerSolution | None = None

    @property
    def hessian(self) -> LinearOperator:
        if self._hessian is None:
            self._hessian = self._make_hessian()
        return self._hessian

    @property
    def lower(self) -> LowerSolution:
        if self._lower is None:
            self._lower = self._make_lower()
        return self._lower

    @property
    def gradient_bound(self) -> float | None:
        """First-order bound of |gradient - grad phi| with estimated norms, where accuracy is on demand; else None."""
        return None if self.precision is None else self.precision.gradient

    @property
    def value_bound(self) -> float:
        """Second-order bound of |value - phi| with estimated norms, where accuracy is on demand; else 0."""
        return 0.0 if self.precision is None else self.precision.value

    @property
    def value_doubt(self) -> float:
        """``value_bound`` where that is looser than the oracle's own tolerances, whose error ``solution_noise`` tells; else 0.

        An evaluation is solved to these where its bound tells nothing, as with weights of 1e18 in float32.
        """
        return 0.0 if self.precision is None or self.precision.tight else self.precision.value

    @property
    def y(self) -> Tensor:
        """(dy,): the lower solution as far as it is known without more work; ``lower`` gives it with its residual."""
        points = self.points
        if "y" in points:
            return points["y"]
        lo, hi = points["sigmas"].tolist()  # the penalty oracle's ends; their middle where they lie around g
        return points["lo"] + (0.5 * (hi - lo) if lo else 0.0) * points["d"]

    def release(self) -> None:
        """Forget the Hessian operator and its retained graphs; ``hessian`` makes them again."""
        self._hessian = None

    def state_dict(self) -> dict[str, Any]:
        """Everything ``HyperOracle.restore`` needs to rebuild this evaluation without a lower solve."""
        recorded = {name: [at.wrt, at.factor is not None, at.prepared, at.outputs is not None]
                    for name, at in self.recorded.items()}  # fmt: skip
        precision = None if self.precision is None else list(astuple(self.precision))
        return {"x": self.x, "value": self.value, "gradient": self.gradient, "points": dict(self.points),
                "recorded": recorded, "precision": precision}  # fmt: skip


class HyperOracle(ABC):
    """Evaluates the hyper-objective of a bilevel problem; knows nothing of methods.

    Args:
        problem: the problem; ``oracle.problem`` may be set to ``problem.at(...)`` between evaluations.
        lower: lower solver: a LowerSolver, a name, or {'name': ..., option: ...}; default Newton-CG.
        solver, linear_tol, max_iterations, damping, chebyshev_order, spectrum: of the linear systems, see
            ``LowerSystems``.
        lower_tol: relative error of the lower solution; default 1e-10 in float64, 3e-6 in float32.

    Attributes:
        counts: all calls since construction.
        warm: last lower-level vectors by name, the starts of the next solves.
        third_derivatives: whether its Hessian needs third derivatives of g.
        single_loop: whether y only follows y*(x), so that evaluating again at the same x gives a better answer.
        continuation: whether it can ``sharpen`` itself as a run comes nearer.
    """

    third_derivatives: bool = False
    single_loop: bool = False
    continuation: bool = False

    def __init__(
        self,
        problem: BilevelProblem,
        *,
        lower: Any = None,
        solver: str = "auto",
        linear_tol: float | None = None,
        max_iterations: int | None = None,
        damping: float = 0.0,
        lower_tol: float | None = None,
        chebyshev_order: int | None = None,
        spectrum: tuple[float, float] | None = None,
    ):
        self.problem = problem
        self.lower_solver: LowerSolver = make_lower(lower)
        self.systems = LowerSystems(
            solver=solver, tol=linear_tol, max_iterations=max_iterations, damping=damping,
            chebyshev_order=chebyshev_order, spectrum=spectrum,
        )  # fmt: skip
        self.lower_tol = lower_tol
        self.counts = OracleCounts()
        self.warm: dict[str, Tensor] = {}

    @property
    def lower_is_external(self) -> bool:
        """Whether the user trains the learner, so that y is taken as it is in the user's tensors."""
        return isinstance(self.lower_solver, External)

    def start(self, name: str = "y") -> Tensor:
        """(dy,) where a lower solve begins: its last solution (``warm[name]``), or the user's learner."""
        warm = None if self.lower_is_external else self.warm.get(name)
        return self.problem.y if warm is None else warm

    def dense_price(self) -> float | None:
        """What the hyper-Hessian costs as a matrix, in products with one vector, where that is less than by its columns."""
        return None

    def stationarity(self, x: Tensor, gradient: Tensor) -> Tensor:
        """|gradient|, (); a run with bounds puts that of the projected gradient in its place."""
        return torch.linalg.vector_norm(gradient)

    def exact(self, ev: Evaluation) -> Evaluation:
        """``ev`` at the oracle's own tolerances: itself, unless it was made at looser ones."""
        return ev

    def stricter(self) -> None:  # noqa: B027
        """A run has stalled on evaluations looser than the oracle's own tolerances: allow less from now on."""

    def value_noise(self, size: float) -> float:
        """Rounding error to expect of a difference of two values of this size."""
        return 30 * torch.finfo(self.problem.dtype).eps * size

    def solution_noise(self, size: float) -> float:
        """Error to expect of a value of this size at a lower solution that is good to the oracle's tolerance."""
        tol = self.lower_tol if self.lower_tol is not None else tolerance_of_step(self.problem.dtype)
        return 10 * tol * size

    @abstractmethod
    def evaluate(self, x: Tensor | None = None) -> Evaluation:
        """Value and gradient at x (dx,), or at the user's current hyperparameters for None.

        Raises:
            ShapeError: x does not fit. NotStronglyConvexError, SolverError, NonFiniteError: the lower level or the
            adjoint system could not be solved, or a number is not finite.
        """

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> Evaluation:
        """The evaluation saved by ``Evaluation.state_dict``, without solving the lower level again."""

    def sharpen(self, ev: Evaluation, allowed: float) -> bool:
        """Reduce the gradient's bias where at ev it is above ``allowed``; whether it did, so that ev is out of date."""
        return False

    def predict(self, ev: Evaluation, x_new: Tensor) -> None:
        """Move the start of the next lower solve to y + Y (x_new - x), Y = -g_yy^{-1} g_yx at ev.

        Only for first-order solvers that iterate to a tolerance: their error then starts at O(|x_new - x|^2).

        Cost: one lower gradient, one product, one linear solve to 1e-2.
        """
        solver, name = self.lower_solver, "lo" if "lo" in self.warm else "y"
        if not (solver.first_order and solver.reaches_tolerance) or name not in self.warm:
            return
        at = Objective(self.problem, lower=1.0, counts=ev.counts).linearise(ev.x, ev.y)
        solution = self.systems.solve(at, -at.yx(x_new - ev.x), tol=1e-2)
        if solution.ok:
            self.warm[name] = ev.points[name] + solution.x

    def record_again(self, state: dict[str, Any], name: str, h: Objective, x: Tensor, y: Tensor) -> Linearisation | None:
        """What the saved evaluation had recorded under ``name``, with its factor if it had one; None for nothing.

        The caller of ``restore`` puts the counts and the kept factor back (``load_state_dict``).
        """
        if name not in state["recorded"]:
            return None
        wrt, factored, prepared, by_outputs = state["recorded"][name]
        at = h.linearise(x, y, wrt)
        at.prepared = prepared  # whether to make a factor was decided then; the kept one has changed since
        if by_outputs:
            self.systems.outputs(at)
        if factored:
            self.systems.factor_at(at)
        return at

    def state_dict(self) -> dict[str, Any]:
        return {"warm": dict(self.warm), "systems": self.systems.state_dict(), "counts": self.counts.as_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warm = dict(state["warm"])
        self.systems.load_state_dict(state["systems"], self.problem)
        self.counts.load(state["counts"])


def require_lower(result: LowerResult) -> LowerResult:
    """The result if it can be built upon; the error that says why not otherwise."""
    if result.ok:
        return result
    if result.status is LowerStatus.NOT_CONVEX:
        curvature = float("nan") if result.curvature is None else result.curvature
        raise NotStronglyConvexError(f"{result.describe()} (curvature {curvature:.2e})", curvature, result)
    if result.status is LowerStatus.NON_FINITE:
        raise NonFiniteError(result.describe(), result)
    raise SolverError(result.describe(), result)


def require_solution(solution: Solution, what: str) -> Tensor:
    """The solution's x if it can be built upon, else an error.

    A system that stagnates or runs out of iterations within 1e-3 is used: its residual is the caller's to report.
    """
    if solution.ok:
        return solution.x
    if solution.status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NOT_POSITIVE_DEFINITE):
        curvature = float("nan") if solution.curvature is None else float(solution.curvature.min())
        raise NotStronglyConvexError(
            f"{what}: the lower-level Hessian is not positive definite (curvature {curvature:.2e}); add L2"
            " regularisation to the lower loss, or damping=... to the oracle",
            curvature,
            solution,
        )
    if solution.status is SolveStatus.NON_FINITE:
        raise NonFiniteError(f"{what}: {solution.describe()}", solution)
    if bool((solution.residual <= 1e-3).all()):
        return solution.x
    raise SolverError(f"{what}: {solution.describe()}; try damping=..., or a larger max_iterations", solution)


def require_finite(value: Tensor, gradient: Tensor, where: str) -> None:
    """NonFiniteError unless value () and gradient (dx,) are finite."""
    if not bool(torch.isfinite(value) & torch.isfinite(gradient).all()):
        raise NonFiniteError(f"{where}: the hyper-objective or its gradient is not finite; check the batch for NaN")
