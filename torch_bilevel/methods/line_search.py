"""Line search to a strong Wolfe point, along a line or along its projection onto bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SUFFICIENT, CURVATURE = 1e-4, 0.9
MAX_TRIALS = 25


@dataclass(frozen=True)
class Trial:
    """phi(length) with its slope; ``found`` is what the caller wants back. A failed evaluation has value inf.

    ``predicted`` is the change to first order; None for that along a line, length times the slope at 0.
    """

    length: float
    value: float
    slope: float
    found: Any = None
    predicted: float | None = None


def strong_wolfe(
    trial: Callable[[float], Trial], value: float, slope: float, first: float, noise: float
) -> Trial | None:
    """A length a > 0 with phi(a) <= phi(0) + 1e-4 a phi'(0) and |phi'(a)| <= 0.9 |phi'(0)|.

    Along a projected path x(a) = P(x + a d) the decrease is asked of g'(x(a) - x) in place of a phi'(0), as trials
    say by ``predicted``, and phi'(a) is the slope of what still moves.

    Args:
        trial: evaluates a length. value, slope: phi(0), phi'(0) < 0. first: the first length tried.
        noise: error of the values, allowed for in the decrease (near a minimum values no longer tell).

    Returns:
        The Trial; after 25 trials the best one that decreases; None where none does.

    References: Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithms 3.5 and 3.6.
    """

    def decreases(t: Trial) -> bool:
        predicted = t.length * slope if t.predicted is None else t.predicted
        return predicted < 0 and t.value <= value + SUFFICIENT * predicted + noise

    low, high, length = Trial(0.0, value, slope), None, first
    for _ in range(MAX_TRIALS):
        new = trial(length)
        if decreases(new) and abs(new.slope) <= -CURVATURE * slope:
            return new
        if not decreases(new) or (low.length > 0.0 or high is not None) and not new.value < low.value + noise:
            high = new
        elif high is None and new.slope < 0:  # still going down, nothing brackets a minimum yet
            length = _within(_cubic_minimum(low, new), 2.0 * new.length, 10.0 * new.length)
            low = new
            continue
        else:
            if high is None or new.slope * (high.length - low.length) >= 0:
                high = low
            low = new
        left, right = sorted((low.length, high.length))
        margin = 0.1 * (right - left)
        length = _within(_cubic_minimum(low, high), left + margin, right - margin)
        if not (right - left > 1e-14 * right and (right - left) * abs(slope) > 0.01 * noise):
            break  # nothing left to tell apart
    return low if low.length > 0.0 else None


def _cubic_minimum(a: Trial, b: Trial) -> float:
    """Minimiser of the cubic through both values and slopes (Nocedal and Wright, 3.59); NaN where there is none."""
    if not (math.isfinite(a.value) and math.isfinite(b.value) and math.isfinite(a.slope) and math.isfinite(b.slope)):
        return math.nan
    d1 = a.slope + b.slope - 3.0 * (a.value - b.value) / (a.length - b.length)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0.0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), b.length - a.length)
    denominator = b.slope - a.slope + 2.0 * d2
    if denominator == 0.0:
        return math.nan
    return b.length - (b.length - a.length) * (b.slope + d2 - d1) / denominator


def _within(length: float, least: float, most: float) -> float:
    """``length`` moved into [least, most]; the middle for NaN."""
    return min(max(length, least), most) if math.isfinite(length) else 0.5 * (least + most)
