"""The cubic step inside bounds against brute force on the faces of the box."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import torch_bilevel as tb
from torch_bilevel.bounds import Box
from torch_bilevel.linalg import FunctionOperator
from torch_bilevel.methods.model import HessianModel
from torch_bilevel.methods.projected import cauchy_step, projected_step

N, M = 4, 3.0


def model_value(g: Tensor, H: Tensor, s: Tensor) -> float:
    return float(g @ s + s @ H @ s / 2 + M / 6 * s.norm() ** 3)


def draw(seed: int, convex: bool) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(N, N, generator=gen, dtype=torch.float64)
    H = A @ A.T + 0.1 * torch.eye(N, dtype=torch.float64) if convex else (A + A.T) / 2
    return H, 2 * torch.randn(N, generator=gen, dtype=torch.float64)


def make(H: Tensor, kind: str) -> HessianModel:
    operator = FunctionOperator(N, lambda v: H @ v, lambda V: H @ V, dtype=H.dtype, device=H.device)
    return HessianModel(operator, kind=kind, tol=1e-9)


def best_in_box(g: Tensor, H: Tensor, lo: float, hi: float) -> float:
    """The least model value in a box, by projected gradient from every corner and the middle."""
    best = 0.0
    size = float(torch.linalg.matrix_norm(H, 2)) + M * N**0.5 * max(-lo, hi)
    for start in [(0.0,) * N, *itertools.product((lo, hi), repeat=N)]:
        s = torch.tensor(start, dtype=torch.float64)
        for _ in range(400):
            s = (s - (g + H @ s + M / 2 * s.norm() * s) / size).clamp(lo, hi)
        best = min(best, model_value(g, H, s))
    return best


@pytest.mark.parametrize("kind", ["dense", "krylov"])
@pytest.mark.parametrize("seed", range(4))
def test_convex_models(seed, kind):
    H, g = draw(seed, True)
    x = torch.zeros(N, dtype=torch.float64)
    box = Box((-0.2, 0.3), x)
    _, s = projected_step(make(H, kind), box, x, g, M)
    assert bool(((s >= -0.2) & (s <= 0.3)).all())
    best = best_in_box(g, H, -0.2, 0.3)
    # all variables that cross go to their bounds at once, so a few may be there too early: nine tenths of the best
    assert model_value(g, H, s) <= 0.9 * best


@pytest.mark.parametrize("seed", range(4))
def test_without_active_bounds_it_is_the_cubic_step(seed):
    H, g = draw(seed, False)
    x = torch.zeros(N, dtype=torch.float64)
    step, s = projected_step(make(H, "dense"), Box((-1e3, 1e3), x), x, g, M)
    assert torch.equal(s, step.step)


@pytest.mark.parametrize("seed", range(6))
def test_the_cauchy_step_always_decreases_the_model(seed):
    H, g = draw(seed, False)
    x = torch.full((N,), 0.1, dtype=torch.float64)
    for bounds in ((0.0, 0.3), (0.1, 5.0), (-9.0, 0.1)):
        box = Box(bounds, x)
        if float(box.stationarity(x, g)) == 0:
            continue
        s = cauchy_step(make(H, "dense"), box, x, g, M)
        assert torch.equal(box.project(x + s), x + s)
        assert model_value(g, H, s) < 0


def test_held_variables_stay():
    H, _ = draw(0, True)
    x = torch.zeros(N, dtype=torch.float64)
    g = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)  # the first and third are pressed against 0
    _, s = projected_step(make(H, "dense"), Box((0.0, 1.0), x), x, g, M)
    assert float(s[0]) == 0.0 == float(s[2])


def test_a_constant_coefficient_projects_the_whole_step_and_goes_on():
    """As published: x+ = P(x + s) with s the step of all variables; no test of it, and no end while it moves."""
    H, g = draw(0, True)
    box = (-0.2, 0.3)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return g @ y + y @ H @ y / 2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return ((y - x) ** 2).sum() / 2

    zero = torch.zeros(N, dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(upper, lower, zero, zero)
    free = make(H, "dense").solve(g, M).step
    result = tb.minimize(problem, "dlcrn", adaptive=False, cubic_reg=M, bounds=box, max_steps=1, gradient_tol=0.0)
    assert torch.allclose(result.x, free.clamp(*box), atol=1e-8)
    assert bool((free != free.clamp(*box)).any())

    far = tb.BilevelProblem.from_functions(lambda x, y: (y[0] ** 2 - 1) ** 2, lower, zero + 0.3, zero)
    bounded = tb.minimize(far, "dlcrn", adaptive=False, cubic_reg=1e-3, bounds=(-2.0, 2.0), max_steps=60, gradient_tol=0.0)
    assert bounded.history[-1].step == 60 or bounded.gradient_norm < 1e-8
