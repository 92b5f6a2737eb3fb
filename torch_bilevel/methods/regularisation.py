"""How the cubic coefficient M is chosen: fixed as published, or fitted to the steps taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from ..errors import ConfigError


@dataclass(frozen=True)
class Trial:
    """What a tried step showed.

    predicted: decrease of the cubic model (> 0). actual: decrease of the hyper-objective.
    fit: the coefficient for which the model would have been exact along s, 6 (actual change - quadratic change) / |s|^3.
    pull: |g| / |s|^2, half the coefficient that makes a step of this length from the gradient alone.
    reach: |g+| / lambda_min(H) / |s|, how many times longer a next step without regularisation may be; inf where H is
        not positive definite.
    """

    predicted: float
    actual: float
    fit: float
    pull: float = 0.0
    reach: float = math.inf

    @property
    def ratio(self) -> float:
        return self.actual / self.predicted if self.predicted > 0 else math.nan


#: |fit| / M below which a function is taken to be quadratic along the step, and how many times as far it is believed
QUADRATIC, BELIEVED = 1e-6, 1e3


@final
class FixedRegularisation:
    """A constant M, every step accepted: the published algorithms.

    Args:
        cubic_reg: M of the model g's + s'Hs/2 + (M/6)|s|^3 (twice the M of codes that write (M/3)|s|^3).
    """

    adaptive = False

    def __init__(self, cubic_reg: float):
        if not (isinstance(cubic_reg, (int, float)) and cubic_reg > 0 and math.isfinite(cubic_reg)):
            raise ConfigError(f"cubic_reg: expected a positive number, got {cubic_reg!r}")
        self.cubic_reg = float(cubic_reg)

    def initial(self, hessian_norm: float, gradient_norm: float) -> float:
        return self.cubic_reg

    def accepts(self, trial: Trial) -> bool:
        return True

    def after(self, cubic_reg: float, trial: Trial, accepted: bool, steps: int, streak: int) -> float:
        return self.cubic_reg


@final
class FittedRegularisation:
    """M from the steps themselves: M <- clip(2 fit, M/2, 4 M), down to M/4 after four accepted steps in a row,
    wider in the first steps (ours).

    A step is accepted when the decrease is at least ``eta`` of the predicted one. The fitted coefficient costs
    nothing, and hardly a step is rejected; fixed shrink-and-grow factors lose half of the evaluations
    (docs/methods.md). Where the fit is nothing beside M (1e-6) and H is positive definite, the function is taken to be
    quadratic and M goes down to the fit at once. A rejection raises M twofold to tenfold, or to 20 |g| / |s|^2 where M
    was too small to shorten a step. The first M makes the regularisation as strong as the Hessian at the Newton step, M
    = 2 |H|^2 / |g|, bounded by |H| per unit length, so that it follows any scaling of values and variables.

    Args:
        cubic_reg: first M, or None for the rule above.
        eta: acceptance threshold, default 0.1.

    References: Cartis, Gould, Toint 2011 (ARC); the fit is ours.
    """

    adaptive = True

    def __init__(self, cubic_reg: float | None = None, eta: float = 0.1):
        if cubic_reg is not None:
            FixedRegularisation(cubic_reg)
        if not 0 < eta < 1:
            raise ConfigError(f"eta: expected a number in (0, 1), got {eta!r}")
        self.cubic_reg, self.eta = cubic_reg, eta

    def initial(self, hessian_norm: float, gradient_norm: float) -> float:
        if self.cubic_reg is not None:
            return float(self.cubic_reg)
        if not hessian_norm > 0:
            return 1.0
        newton_length = gradient_norm / hessian_norm
        return 2.0 * hessian_norm / max(newton_length, 1.0) if newton_length < 1.0 else 2.0 * hessian_norm / newton_length

    def accepts(self, trial: Trial) -> bool:
        return trial.ratio >= self.eta

    def after(self, cubic_reg: float, trial: Trial, accepted: bool, steps: int, streak: int) -> float:
        """The next M; ``steps`` accepted so far, ``streak`` of them in a row."""
        wide = 25.0 if steps < 4 else 1.0
        wanted = 2.0 * trial.fit if math.isfinite(trial.fit) else math.inf
        if accepted and abs(trial.fit) <= QUADRATIC * cubic_reg and trial.reach <= BELIEVED:
            new = max(wanted, QUADRATIC**2 * cubic_reg)
        elif accepted:
            lowest = (0.25 if streak >= 4 else 0.5) * cubic_reg / (wide if wanted > 0 else 1.0)
            new = min(max(wanted, lowest), 4.0 * cubic_reg)
        else:
            new = min(max(wanted, 2.0 * cubic_reg), max(10.0 * cubic_reg, 20.0 * trial.pull) * wide)
        return max(new, 1e-30)
