"""Proposal: a step of a cubic model before it is tried."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cubic import CubicStep


@dataclass(frozen=True)
class Proposal:
    """A step before it is tried: ``s`` = x_new - x (dx,), |s|, what the models predict, and H s where it was computed."""

    cubic: CubicStep
    x_new: Tensor
    s: Tensor
    length: float
    predicted: float
    quadratic: float
    Hs: Tensor | None = None
