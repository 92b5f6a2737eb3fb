"""The published stop of the lazy method: cubic mean of a phase, and the x after its shortest step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, hessian

import torch_bilevel as tb
from tests.methods.test_cubic_newton import phi_of_saddle
from tests.problems import saddle

L2 = 2.0  # of w''


@pytest.mark.parametrize("m", [1, 2, 4])
def test_the_phase_rule_stops_at_the_published_point(m):
    eps, M = 1e-4, (6 * m if m > 1 else 1) * L2
    points = {}
    result = tb.minimize(
        saddle((0.5, -0.5, 0.02)).problem(), "lfsba", period=m, adaptive=False, cubic_reg=M, stop_rule="step",
        gradient_tol=eps, max_steps=2000, callback=lambda report, x, y: points.update({report.step: x.clone()}),
    )  # fmt: skip
    assert result.status is tb.Status.STEP_RULE
    steps = result.history[1:]
    assert len(steps) % m == 0
    phases = [steps[i : i + m] for i in range(0, len(steps), m)]
    means = [(sum(step.step_norm**3 for step in phase) / m) ** (1 / 3) for phase in phases]
    bound = 0.5 * math.sqrt(eps / M)
    assert means[-1] <= bound
    assert all(mean > bound for mean in means[:-1])
    shortest = min(phases[-1], key=lambda step: step.step_norm)
    assert torch.equal(result.x, points[shortest.step])
    assert result.value == pytest.approx(float(phi_of_saddle(result.x)), abs=1e-10)
    assert result.gradient_norm == pytest.approx(float(grad(phi_of_saddle)(result.x).norm()), rel=1e-4, abs=1e-10)
    # what the rule promises: an (eps, sqrt(M eps))-second-order stationary point
    assert float(grad(phi_of_saddle)(result.x).norm()) <= eps
    assert float(torch.linalg.eigvalsh(hessian(phi_of_saddle)(result.x))[0]) >= -math.sqrt(M * eps)


def test_a_resumed_phase_is_the_uninterrupted_one(tmp_path):
    def go(steps, **kwargs):
        return tb.minimize(
            saddle((0.5, -0.5, 0.02)).problem(), "lfsba", period=4, adaptive=False, cubic_reg=12.0, stop_rule="step",
            gradient_tol=1e-5, max_steps=steps, checkpoint=tmp_path / f"{steps}.pt", **kwargs,
        )  # fmt: skip

    whole = go(500)
    stop = len(whole.history) - 3  # within the last phase
    go(stop)
    (tmp_path / f"{stop}.pt").rename(tmp_path / "500.pt")
    resumed = go(500, resume=True)
    assert resumed.status is whole.status is tb.Status.STEP_RULE
    assert torch.equal(resumed.x, whole.x)
    assert len(resumed.history) == len(whole.history)
    assert resumed.value == whole.value
