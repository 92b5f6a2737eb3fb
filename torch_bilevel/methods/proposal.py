"""The step of a cubic model before it is tried, with bounds and scale applied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Box
from ..cubic import CubicStatus, CubicStep
from ..errors import NonFiniteError, SolverError
from ..oracles import Evaluation
from .model import HessianModel
from .projected import cauchy_step, projected_step


@dataclass(frozen=True)
class Proposal:
    """A step before it is tried: ``s`` = x_new - x (dx,), |s|, what the models predict, and H s where it was cut or scaled."""

    cubic: CubicStep
    x_new: Tensor
    s: Tensor
    length: float
    predicted: float
    quadratic: float
    Hs: Tensor | None = None

    def model_gradient(self, model: HessianModel, gradient: Tensor) -> Tensor:
        """g + H s: from the optimality of the cubic step (no product), or with the H s of a step that was cut or scaled."""
        if self.Hs is not None:
            return gradient + self.Hs
        if model.kind != "gradient":
            return -float(self.cubic.shift) * self.cubic.step  # a Krylov step's residual is orthogonal to s
        return gradient + model.product(self.s)


def propose(model: HessianModel, ev: Evaluation, cubic_reg: float, *, box: Box | None, scale: float, adaptive: bool) -> Proposal:
    """The step from ev.x by the cubic model with the gradient there; ``scale`` times as long.

    With bounds and a fitted M (``adaptive``) the model is minimised inside them; with a constant M, as published, the step of
    all variables is projected.

    Raises:
        NonFiniteError, SolverError: the model has no step that descends.
    """
    x, g = ev.x, ev.gradient
    if box is None or not adaptive:
        step = model.solve(g, cubic_reg)
        s = step.step
    else:
        step, s = projected_step(model, box, x, g, cubic_reg)
    if step.status is CubicStatus.NON_FINITE:
        raise NonFiniteError(step.describe())
    if not step.ok and not step.descends and float(torch.linalg.vector_norm(step.step)) > 0:
        raise SolverError(step.describe(), step)
    if box is None and scale == 1.0:
        x_new = x + s
        s = x_new - x
        length = float(torch.linalg.vector_norm(s))
        return Proposal(step, x_new, s, length, float(step.predicted_decrease), float(step.quadratic_change))
    s = scale * s
    if box is not None and not adaptive:
        s = box.project(x + s) - x
    quadratic, predicted, Hs = _model_values(model, g, s, cubic_reg)
    if box is not None and adaptive and not predicted > 0:
        s = cauchy_step(model, box, x, g, cubic_reg)
        quadratic, predicted, Hs = _model_values(model, g, s, cubic_reg)
    x_new = x + s if box is None else box.project(x + s)
    s = x_new - x
    return Proposal(step, x_new, s, float(torch.linalg.vector_norm(s)), predicted, quadratic, Hs)


def _model_values(model: HessianModel, gradient: Tensor, s: Tensor, cubic_reg: float) -> tuple[float, float, Tensor]:
    """(quadratic change, predicted decrease) of the cubic model along any s, and H s; one product for a Krylov model."""
    Hs = model.product(s)
    quadratic = float(torch.dot(gradient, s) + 0.5 * torch.dot(s, Hs))
    return quadratic, -quadratic - cubic_reg / 6 * float(torch.linalg.vector_norm(s)) ** 3, Hs
