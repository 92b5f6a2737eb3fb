"""Continuation of the penalty: a coarse first penalty, an exactly stationary end."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.problems import hyper_cleaning, nonconvex
from tests.reference import error

FORWARD = {"scheme": "forward", "penalty": 10.0}


@pytest.mark.parametrize("method", ["lfsba", "fsba", "ifsba"])
def test_forward_from_penalty_ten_ends_where_the_exact_gradient_vanishes(method):
    case = nonconvex()
    plain = tb.minimize(case.problem(), method, gradient_tol=1e-6, **FORWARD)
    assert float(case.reference.implicit(plain.x).gradient.norm()) > 1e-2  # the bias at penalty 10
    result = tb.minimize(case.problem(), method, gradient_tol=1e-6, continuation=True, **FORWARD)
    assert result.status is tb.Status.SECOND_ORDER
    exact = case.reference.implicit(result.x)
    assert float(exact.gradient.norm()) <= 1e-5
    assert float(torch.linalg.eigvalsh(exact.hessian)[0]) >= -1e-5


def test_bias_is_the_distance_to_the_exact_gradient():
    case = nonconvex()
    for penalty in (10.0, 100.0):
        oracle = tb.PenaltyOracle(case.problem(), penalty, "forward", continuation=True)
        ev = oracle.evaluate()
        true = (ev.gradient - case.reference.implicit().gradient).norm()
        assert error(oracle.bias(ev), true) <= 1e-3
        assert not oracle.sharpen(ev, 1.01 * float(true))
        assert oracle.penalty == penalty
        assert oracle.sharpen(ev, 0.9 * float(true))
        assert oracle.penalty == 10 * penalty
        new = oracle.evaluate()
        assert float((new.gradient - case.reference.implicit().gradient).norm()) < 0.2 * float(true)
    still = tb.PenaltyOracle(case.problem(), 10.0, "forward")
    assert not still.sharpen(still.evaluate(), 0.0)


def test_a_sharp_penalty_is_left_alone():
    result = tb.minimize(nonconvex().problem(), "lfsba", continuation=True)
    plain = tb.minimize(nonconvex().problem(), "lfsba")
    torch.testing.assert_close(result.x, plain.x, rtol=0, atol=1e-6)
    assert abs(result.history[-1].step - plain.history[-1].step) <= 1  # what the bias costs is not a step's
    assert abs(result.counts.hessians - plain.counts.hessians) <= 1


def test_resume_is_bit_for_bit(tmp_path):
    def go(steps, **kwargs):
        return tb.minimize(hyper_cleaning().problem(), "lfsba", continuation=True, max_steps=steps, gradient_tol=1e-9,
                           **FORWARD, **kwargs)  # fmt: skip

    whole = go(16)
    go(8, checkpoint=tmp_path / "run.pt")
    resumed = go(16, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(resumed.x, whole.x)
    assert resumed.counts.as_dict() == whole.counts.as_dict()
