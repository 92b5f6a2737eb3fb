"""An objective's values, gradients and products against the dense reference, however it is evaluated."""

from __future__ import annotations

import torch

from tests.reference import blocks
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Linearisation, Objective


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(p, **terms) -> Objective:
    return Objective(p, counts=OracleCounts(), **terms)


def close(found, true) -> None:
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def check_derivatives(h: Objective, function, kind: type) -> Linearisation:
    """h is this function of (x, y), in all that it answers with, and recorded as this kind."""
    x, y = h.problem.x, h.problem.y
    xx, xy, yx, yy = blocks(function, x, y)
    gx, gy = torch.func.grad(function, argnums=(0, 1))(x, y)
    at = h.linearise(x, y)
    assert isinstance(at._graph, kind)
    for value, on_x, on_y in (h.gradient(x, y), (at.value, at.gx, at.gy)):
        close(value, function(x, y))
        close(on_x, gx)
        close(on_y, gy)
    assert h.gradient(x, y, "x")[2] is None
    close(h.gradient(x, y, "y")[2], gy)
    close(h.linearise(x, y, "y").yy(gy), yy @ gy)
    for columns in ((), (5,)):
        u, w = randn(5, len(x), *columns), randn(6, len(y), *columns)
        close(at.yy(w), yy @ w)
        close(at.xy(w), xy @ w)
        close(at.yx(u), yx @ u)
        close(at.xx(u), xx @ u)
        close(at.x_part(u, w), xx @ u + xy @ w)
        for found, true in zip(at.joint(u, w), (xx @ u + xy @ w, yx @ u + yy @ w)):
            close(found, true)
        for found, true in zip(at.to_x(w), (xy @ w, yy @ w)):
            close(found, true)
    return at
