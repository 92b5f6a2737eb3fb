"""Accuracy on demand: lower and linear tolerances as loose as the gradient of the moment allows, with a bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..derivatives import Objective
from ..doctor import refuse_third_derivatives
from ..errors import ConfigError
from ..lower import LowerSolver
from .evaluation import Evaluation, HyperOracle, require_solution

#: the norms come from power iterations, which approach them from below: the factor by which they are raised, and within which
#: those of the gradient's error have not changed; the evaluations that an estimate serves at first, where they have not, and how
#: many times as many as the one before where they have; relative residual of its solves
SAFETY, SERVES, LASTS, GROWTH, ROUGH = 2.0, 1, 30, 3, 0.1
#: share of the allowed error that a solve aims at, and evaluations of one point before the tolerances are the default
AIM, ROUNDS = 0.5, 3
#: relative residual of any adjoint solve at most; lower solves leave ``REDUCTION`` of what they start from, at most
LOOSE = 1e-2


@dataclass(frozen=True)
class Goal:
    """|g_y| and |f_y - g_yy v| that will do; 0: what the default tolerances give."""

    lower: float
    adjoint: float


TIGHT, ANY = Goal(0.0, 0.0), Goal(math.inf, math.inf)


class Accuracy:
    """Chooses the residuals g_y and r = f_y - g_yy v of an evaluation (y, v) so that its gradient is good to theta.

    To first order, with L = f - <v, g_y>, Y = -g_yy^{-1} g_yx and Q = g_yy^{-1} (L_yx + L_yy Y),

        G(y, v) - grad phi = Q' g_y - Y' r,      |G - grad phi| <= |Q| |g_y| + |Y| |r|,
        L(y, v) - phi = <r, e> - <e, L_yy e> / 2,   e = g_yy^{-1} g_y.

    |g_y| and |r| are known of every evaluation; the norms are estimated by power iterations now and then.

    Args:
        theta: |gradient error| allowed, relative to the gradient (with bounds: to the projected one); in (0, 1).
        solver: the lower solver, which must iterate to a tolerance.

    Raises:
        ConfigError: theta outside (0, 1), or a lower solver with a set amount of work.

    Cost: nothing but the estimates: two gradients and 8 solves to 0.1 each, in four blocks; 5, in two, the first time.
    """

    def __init__(self, theta: float, solver: LowerSolver):
        if not (isinstance(theta, (int, float)) and not isinstance(theta, bool) and 0 < theta < 1):
            raise ConfigError(f"accuracy: expected a number in (0, 1), 'auto', or None for fixed tolerances, got {theta!r}")
        if not self.suits(solver):
            raise ConfigError(
                "accuracy: needs a lower solver that iterates to a tolerance ('newton_cg', or 'agd' or 'gradient_descent'"
                f" without steps), got {type(solver).__name__}"
            )
        self.theta = float(theta)
        self.norms: dict[str, float] = {}
        self.vectors: dict[str, Tensor] = {}
        self.size, self.trend, self.floor = math.nan, 1.0, 0.0
        self.age, self.serves = 0, SERVES

    @staticmethod
    def suits(solver: LowerSolver) -> bool:
        """Whether the lower solver iterates to a residual that it is told."""
        return solver.takes_residual and solver.reaches_tolerance

    # -- evaluations ----------------------------------------------------------------------------------------------

    def evaluate(self, oracle: HyperOracle, solve: Callable[[Tensor, Tensor | None, Goal], Evaluation], x: Tensor,
                 y: Tensor, v: Tensor | None) -> Evaluation:  # fmt: skip
        """The evaluation at x from (y, v), solved on and on until its bound holds or its tolerances are the default."""
        self.age += 1
        goal = self.goal(self.size * self.trend) if self.norms else ANY
        for rounds in range(ROUNDS + 1):
            ev = solve(y, v, goal)
            size = float(oracle.stationarity(x, ev.gradient))
            if not self.norms or self.age > self.serves:
                self.estimate(oracle, ev)
            self.judge(ev)
            if goal is TIGHT:
                self.floor = ev.precision.lower
            if goal is TIGHT or ev.precision.gradient <= self.theta * size:
                break
            goal = self.goal(size) if rounds + 1 < ROUNDS else TIGHT
            y, v = ev.points["y"], ev.points["v"]
        self.trend = min(1.0, max(0.1, size / self.size)) if self.size > 0 else 1.0
        self.size = size
        return ev

    def goal(self, size: float) -> Goal:
        """Residuals whose part in the bound is each half of what is aimed at; TIGHT where they would be below its."""
        if not self.norms:
            return TIGHT
        share = AIM * self.theta * size / (2 * SAFETY)
        lower, adjoint = (share / self.norms[name] if self.norms[name] > 0 else math.inf for name in ("Q", "Y"))
        return Goal(lower, adjoint) if lower > self.floor else TIGHT

    def judge(self, ev: Evaluation) -> None:
        """Write the bounds of value and gradient into ``ev.precision``."""
        p, n = ev.precision, self.norms
        p.gradient = SAFETY * (n["Q"] * p.lower + n["Y"] * p.adjoint)
        p.value = SAFETY * (n["inverse"] * p.lower * p.adjoint + 0.5 * n["S"] * p.lower**2)

    def stricter(self) -> None:
        """A run has stalled on evaluations as loose as they are: allow a tenth from now on."""
        self.theta *= 0.1

    # -- norms ----------------------------------------------------------------------------------------------------

    def estimate(self, oracle: HyperOracle, ev: Evaluation) -> None:
        """|Y|, |Q|, |S| for S = g_yy^{-1} L_yy g_yy^{-1}, and |g_yy^{-1}|, from the last vectors on.

        One power iteration each, with Y'Y, Q'Q and S, side by side; the first of Y and Q is its second half, from near the
        residual of which the norm is a factor.
        """
        x, y, v = ev.x, ev.points["y"], ev.points["v"]
        at = Objective(oracle.problem, lower=1.0, counts=ev.counts).linearise(x, y)
        refuse_third_derivatives(at)
        L = Objective(oracle.problem, upper=1.0, tangent=v, tangent_weight=-1.0, counts=ev.counts).linearise(x, y)
        if "at" in ev.recorded:
            at.factor = ev.recorded["at"].factor

        def solve(*columns: Tensor) -> tuple[Tensor, ...]:
            b = torch.stack(columns, dim=1)
            return require_solution(oracle.systems.solve(at, b, tol=ROUGH), "norms for accuracy on demand").unbind(1)

        norms, vectors = {"Y": 0.0, "Q": 0.0}, self.vectors
        w, z, s = _start(L.gy), _start(at.gy), vectors.get("S", _start(at.gy))  # L.gy = f_y - g_yy v
        if vectors:
            u = vectors["Q"]
            cross = at.yx(torch.stack([vectors["Y"], u], dim=1))
            w, Yu = solve(*(-cross).unbind(1))
            (z,) = solve(L.joint(u, Yu)[1])
            for name, image in (("Y", w), ("Q", z)):
                norms[name] = float(torch.linalg.vector_norm(image))
            w, z = _unit(w), _unit(z)
        w, z, inverse = solve(w, z, s)
        on_x, on_y = L.joint(None, z)
        b, new_S = solve(on_y, L.yy(inverse))
        cross = at.xy(torch.stack([w, b], dim=1))
        new = {"Y": -cross[:, 0], "Q": on_x - cross[:, 1], "S": new_S}
        sizes = {name: float(torch.linalg.vector_norm(vector)) for name, vector in new.items()}
        norms = {name: max(size, norms.get(name, 0.0)) for name, size in sizes.items()}  # |A' w| / |w| >= |A u| / |u|
        if self.norms and self.age > self.serves:
            same = all(norms[name] <= SAFETY * self.norms[name] <= SAFETY**2 * norms[name] for name in ("Y", "Q"))
            self.serves = LASTS if same else min(GROWTH * self.serves, LASTS)
        self.norms = {**norms, "inverse": float(torch.linalg.vector_norm(inverse))}
        self.vectors = {name: _unit(vector) if sizes[name] > 0 else _start(vector) for name, vector in new.items()}
        self.age = 0

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"norms": dict(self.norms), "vectors": dict(self.vectors),
                "numbers": [self.theta, self.size, self.trend, self.floor, self.age, self.serves]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms, self.vectors = dict(state["norms"]), dict(state["vectors"])
        self.theta, self.size, self.trend, self.floor, self.age, self.serves = state["numbers"]


def _unit(v: Tensor) -> Tensor:
    """v / |v|, zero for zero."""
    size = torch.linalg.vector_norm(v)
    return v / torch.where(size > 0, size, size + 1)


def _start(residual: Tensor) -> Tensor:
    """A unit vector halfway between the residual, whose effect is sought, and a random one, which misses nothing."""
    random = torch.randn(residual.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(residual)
    size = torch.linalg.vector_norm(residual)
    random = torch.where(torch.dot(random, residual) < 0, -random, random) / torch.linalg.vector_norm(random)
    start = random + residual / torch.where(size > 0, size, size + 1)
    return start / torch.linalg.vector_norm(start)
