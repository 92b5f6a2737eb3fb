"""When a lazy method makes its Hessian anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from ..errors import ConfigError


@dataclass
class Age:
    """What is known of the Hessian in use.

    accepted: steps since it was made. distance: |x - x_snapshot| where the last step began, and last_step: that step's
    length. last_accepted: whether it was accepted. last_error: |g+ - (g + H s)| / |g|, what the Hessian got wrong of
        the
    new gradient, which costs nothing to know; inf where nothing is known. price: oracle calls of a new Hessian, its
    model included, over those of a step.
    """

    accepted: int = 0
    distance: float = 0.0
    last_step: float = 0.0
    last_accepted: bool = True
    last_error: float = math.inf
    price: float = 1.0


@final
class FixedPeriod:
    """A new Hessian every ``period`` accepted steps, as published (pi(t) = t - t mod m)."""

    refreshes_on_failure = False
    corrects = False

    def __init__(self, period: int = 1):
        if not isinstance(period, int) or period < 1:
            raise ConfigError(f"period: expected an int >= 1 or 'adaptive', got {period!r}")
        self.period = period

    def due(self, age: Age) -> bool:
        return age.accepted >= self.period


@final
class AdaptiveRefresh:
    """A new Hessian when it is worth its price, rather than by the clock (ours; the papers leave it open).

    A step s leaves the gradient error g+ - (g + H s), of size e |g|. For a Hessian made at distance D and a Lipschitz
    one, that is at most L |s| (D + |s| / 2), of which a fresh one would have left the share |s| / (|s| + 2 D). So to go
    on gains log(1 / e) per step, and to refresh log(1 / fresh) at the price of 1 + ``Age.price`` steps:
        refresh when  fresh = e |s| / (|s| + 2 D) < e^(1 + price);  for e >= 1 when fresh < 1: it would have helped.
    A rejected step counts as e >= 1; where even a fresh Hessian would have failed, M is to blame and grows. Between two
    Hessians a small matrix is corrected by the gradients that it got wrong (``HessianModel.correct``).

    Args:
        longest: at most this many accepted steps, default 20.

    References: the Lipschitz bound as in Doikov, Chayti, Jaggi 2023; the rule is ours.
    """

    refreshes_on_failure = True
    corrects = True

    def __init__(self, longest: int = 20):
        if not isinstance(longest, int) or longest < 1:
            raise ConfigError(f"longest: expected an int >= 1, got {longest!r}")
        self.longest = longest

    def due(self, age: Age) -> bool:
        if age.distance == 0.0:
            return False  # made at this very point: it is M that has to grow
        if age.accepted >= self.longest:
            return True
        error = age.last_error if age.last_accepted else max(age.last_error, 1.0)
        if not math.isfinite(error):
            return True
        fresh = error * age.last_step / (age.last_step + 2.0 * age.distance)
        return fresh < (error ** (1.0 + age.price) if error < 1.0 else 1.0)


def make_schedule(period: Any) -> FixedPeriod | AdaptiveRefresh:
    """FixedPeriod for an int, AdaptiveRefresh for 'adaptive'; schedules pass through."""
    if isinstance(period, (FixedPeriod, AdaptiveRefresh)):
        return period
    return AdaptiveRefresh() if period == "adaptive" else FixedPeriod(period)
