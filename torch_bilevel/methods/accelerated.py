"""RAHGD and PRAHGD: (perturbed) restarted accelerated hypergradient descent."""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor

from ..errors import ConfigError
from ..oracles import HyperOracle
from ..oracles.aid import AIDOracle
from ..oracles.inexact import at_least, positive
from ..problem import BilevelProblem
from ..results import StepReport
from .base import Method
from .gradient_method import FirstOrderRun, OracleFactory
from .perturbation import uniform_ball
from .registry import register


@final
class RestartedAccelerated(Method):
    """x_{k+1} = w_k - lr grad(w_k),  w_{k+1} = x_{k+1} + momentum (x_{k+1} - x_k), with restarts.

    A restart (k = 0, x_1 = x_0, so no momentum) follows when k sum_{i<=k} |x_i - x_{i-1}|^2 >
    restart_radius^2; with ``radius`` noise from that ball is added at each restart, and at the first step.

    Args:
        name, oracle: see GradientMethod. lr, momentum (1 - theta of the paper), restart_radius: B.
        radius: of the noise, None for none. epoch: with noise, a small gradient ends a run only when so many
            steps have passed without a restart (the paper's K).
    """

    def __init__(
        self,
        name: str,
        oracle: OracleFactory,
        *,
        lr: float,
        momentum: float = 0.9,
        restart_radius: float = 1.0,
        radius: float | None = None,
        epoch: int = 50,
    ):
        if not (isinstance(momentum, (int, float)) and 0 <= momentum < 1):
            raise ConfigError(f"momentum: expected a number in [0, 1), got {momentum!r}")
        self.name, self.oracle = name, oracle
        self.lr, self.momentum = positive("lr", lr), float(momentum)
        self.restart_radius = positive("restart_radius", restart_radius)
        self.radius = positive("radius", radius, optional=True)
        self.epoch = at_least("epoch", epoch, 1)

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> RestartedRun:
        return RestartedRun(self, problem, self.oracle(problem, seed), seed=seed, bounds=bounds)


@final
class RestartedRun(FirstOrderRun):
    """A run of RestartedAccelerated. ``x`` is w_k, where the gradient is taken; ``anchor`` the paper's x_k."""

    def __init__(
        self, method: RestartedAccelerated, problem: BilevelProblem, oracle: HyperOracle, *, seed: int, bounds: Any
    ):
        super().__init__(method, problem, oracle, seed=seed, bounds=bounds)
        self.generator = torch.Generator().manual_seed(seed)
        self.anchor, self.k, self.travelled, self.restarts = self.x, 0, 0.0, 0

    def step(self) -> StepReport:
        method, gradient = self.method, self.current().gradient
        x_new = self._project(self.x - (method.lr * self.scale) * gradient)
        move = x_new - self.anchor
        self.k += 1
        self.travelled += float(torch.dot(move, move))
        first_noise = method.radius is not None and self.steps == 0
        if first_noise or self.k * self.travelled > method.restart_radius**2:
            self.restarts += 1
            self.k, self.travelled = 0, 0.0
            if method.radius is not None:
                x_new = self._project(x_new + uniform_ball(x_new, method.radius, self.generator))
            self.anchor = x_new
            return self.go_to(x_new)
        self.anchor = x_new
        return self.go_to(x_new + method.momentum * move)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.box is None else self.box.project(x)

    def may_stop(self, eps: float) -> bool:
        return self.method.radius is None or self.k >= self.method.epoch

    def move_to(self, x: Tensor) -> None:
        super().move_to(x)
        self.anchor, self.k, self.travelled = self.x, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        own = {"anchor": self.anchor, "k": self.k, "travelled": self.travelled, "restarts": self.restarts}
        return {**super().state_dict(), **own, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.anchor, self.k = state["anchor"], state["k"]
        self.travelled, self.restarts = state["travelled"], state["restarts"]
        self.generator.set_state(state["generator"].cpu())


@register("rahgd")
def RAHGD(
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    restart_radius: float = 1.0,
    lower_momentum: float = 0.9,
    **oracle: Any,
) -> RestartedAccelerated:
    """Restarted accelerated hypergradient descent: Nesterov's momentum on AID hypergradients.

    Published (Yang, Luo, Li, Jordan, arXiv 2307.00126): for k = 0, 1, ... in epoch t
        w_k = x_k + (1 - theta)(x_k - x_{k-1});
        y by accelerated gradient on g(w_k, .);  v by conjugate gradients;
        x_{k+1} = w_k - eta (f_x - g_xy v)(w_k, y);
        if k sum_{i<k} |x_{i+1} - x_i|^2 > B^2: the next epoch starts from the last x, k = 0, no momentum.
    O~(eps^-1.75) oracle calls to a first-order stationary point.
    Deviations: the run holds and reports the last w (the paper returns an average of an epoch's w); fixed T
        and K.

    Args:
        lr: eta, default 0.1; no default fits all problems. momentum: 1 - theta. restart_radius: B, a length
            over which curvature changes (theory: of order sqrt(eps / L2)).
        lower_momentum and ``oracle``: see AIDOracle.
    """
    return _restarted("rahgd", lr, momentum, restart_radius, None, 50, {"lower_momentum": lower_momentum, **oracle})


@register("prahgd")
def PRAHGD(
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    restart_radius: float = 1.0,
    radius: float = 1e-2,
    epoch: int = 50,
    lower_momentum: float = 0.9,
    **oracle: Any,
) -> RestartedAccelerated:
    """Perturbed RAHGD: noise from a ball is added to the start of every epoch, so that saddles are left.

    Published (arXiv 2307.00126): RAHGD with x_{t,0} <- x_{t,0} + xi, |xi| <= r; O~(eps^-1.75) oracle calls to
    an (eps, O(sqrt eps))-second-order stationary point; ends with the first epoch of K steps without a
    restart.
    Deviations: as RAHGD's; the first noise follows a plain gradient step, so that the start itself is
        reported.

    Args:
        radius: r, default 1e-2. epoch: K, default 50: a small gradient ends the run only after so many steps
            without a restart. Others: see RAHGD.
    """
    options = {"lower_momentum": lower_momentum, **oracle}
    return _restarted("prahgd", lr, momentum, restart_radius, positive("radius", radius), epoch, options)


def _restarted(name, lr, momentum, restart_radius, radius, epoch, oracle: dict[str, Any]) -> RestartedAccelerated:
    return RestartedAccelerated(
        name, lambda problem, seed: AIDOracle(problem, **oracle), lr=lr, momentum=momentum,
        restart_radius=restart_radius, radius=radius, epoch=epoch,
    )  # fmt: skip


RAHGD.oracle_options = PRAHGD.oracle_options = tuple(
    name for name in inspect.signature(AIDOracle).parameters if name not in ("problem", "lower_momentum")
)
