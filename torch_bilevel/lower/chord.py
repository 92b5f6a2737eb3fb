"""Chord steps: Newton steps with the kept factor of another point, which take a gradient each and no system solved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..derivatives import Linearisation, Objective
from .systems import LowerSystems

#: what a step leaves of |h_y|, or of the step before it, from which Newton steps are cheaper; steps at most
SLOW, MOST = 1 / 8, 10


@dataclass
class Start:
    """Where chord steps have come to.

    Attributes:
        y, at: the point, and h recorded there.
        first, norm: |h_y| where they began, and here.
        error: estimate of |y - y*|, or None where none were made or the last was slow.
    """

    y: Tensor
    at: Linearisation
    first: float
    norm: Tensor
    error: Tensor | None = None


def chord_steps(
    objective: Objective, x: Tensor, y: Tensor, systems: LowerSystems, *, tol: float, residual: float, reduction: float
) -> Start:
    """y - F^{-1} h_y, again and again, with the kept Cholesky factor F, until |y - y*| <= tol (1 + |y|), or |h_y| <= residual
    and <= reduction of what it was, or steps become slow; none where the first of the last such start was.

    F is positive definite and near h_yy, so that |F^{-1} h_y| is the error but for a small factor. A step that does not lower
    |h_y| is taken back. Newton steps go on where the last one was slow: in directions in which F is far too large nothing moves,
    and |F^{-1} h_y| is small.

    Cost: a gradient and a solve with F each.

    References: Ortega and Rheinboldt, Iterative Solution of Nonlinear Equations, section 7.1 (the simplified Newton method).
    """
    kept, at = systems.kept, objective.linearise(x, y, "y")
    norm = torch.linalg.vector_norm(at.gy)
    start = Start(y, at, float(norm), norm)
    able = systems.solver == "auto" and kept.is_cholesky() and (kept.contraction is None or kept.contraction <= SLOW)
    if not (able and 0 < start.first < math.inf):
        return start
    inverse = kept.factor.preconditioner()
    p, steps = -inverse(at.gy), 0
    size, target = torch.linalg.vector_norm(p), min(residual, reduction * start.first)
    for steps in range(1, MOST + 1):
        at = objective.linearise(x, start.y + p, "y")
        norm = torch.linalg.vector_norm(at.gy)
        left, allowed = float(norm / start.norm), tol * (1.0 + float(torch.linalg.vector_norm(start.y)))
        if steps == 1 and float(size) > allowed:  # else what it leaves is rounding
            kept.contraction = left if left < 1 else 1.0
        if not left < 1:
            break
        start.y, start.at, start.norm = start.y + p, at, norm
        p = -inverse(at.gy)
        new_size = torch.linalg.vector_norm(p)
        ratio, size = max(left, float(new_size / size)), new_size
        start.error = size / (1 - ratio) if ratio <= SLOW else None  # what is slow at the end may have hardly begun
        if float(norm) <= target or start.error is None or float(start.error) <= allowed:
            break
    kept.spent += max(0, steps - 2) * systems.ladder(start.at).step(y.numel())
    return start
