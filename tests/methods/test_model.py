"""HessianModel: dense and Krylov agree, masks hold variables, states restore."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from benchmarks.lazy_vs_fresh import nonconvex
from torch_bilevel.errors import ConfigError
from torch_bilevel.linalg import FunctionOperator
from torch_bilevel.methods.model import MAX_CORRECTED, MAX_DENSE, HessianModel


def matrix(n: int = 12, seed: int = 0) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (A + A.T) / 2


def operator(H: torch.Tensor) -> FunctionOperator:
    return FunctionOperator(len(H), lambda v: H @ v, lambda V: H @ V, dtype=H.dtype, device=H.device)


def gradient(n: int = 12) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def optimality(H: torch.Tensor, g: torch.Tensor, s: torch.Tensor, M: float) -> float:
    return float((H @ s + M / 2 * s.norm() * s + g).norm() / g.norm())


@pytest.mark.parametrize("kind", ["dense", "krylov"])
@pytest.mark.parametrize("M", [0.1, 10.0])
def test_steps_are_global_minimisers(kind, M):
    H, g = matrix(), gradient()
    step = HessianModel(operator(H), kind=kind, tol=1e-8).solve(g, M)
    assert step.ok
    assert optimality(H, g, step.step, M) <= 1e-7
    lifted = H + M / 2 * step.step.norm() * torch.eye(len(H), dtype=H.dtype)
    assert float(torch.linalg.eigvalsh(lifted)[0]) >= -1e-6


@pytest.mark.parametrize("kind", ["dense", "krylov"])
def test_a_mask_holds_variables(kind):
    H, g, M = matrix(), gradient(), 2.0
    free = torch.ones(12, dtype=torch.bool)
    free[[1, 5, 6]] = False
    model = HessianModel(operator(H), kind=kind, tol=1e-9)
    full = model.solve(g, M).step
    step = model.solve(g, M, free).step
    assert bool((step[~free].abs() <= 1e-12).all())
    expected = HessianModel(operator(H[free][:, free]), kind="dense").solve(g[free], M).step
    torch.testing.assert_close(step[free], expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.solve(g, M, torch.ones_like(free)).step, full, rtol=0, atol=1e-7)  # freed again


def test_auto_and_unknown_kinds():
    assert HessianModel(operator(matrix(3))).kind == "dense"
    big = FunctionOperator(MAX_DENSE + 1, lambda v: v, lambda V: V, dtype=torch.float64, device=torch.device("cpu"))
    assert HessianModel(big).kind == "krylov"
    with pytest.raises(ConfigError, match="did you mean 'krylov'"):
        HessianModel(big, kind="krilov")


def test_product_norm_and_curvature():
    H, v = matrix(), gradient()
    values = torch.linalg.eigvalsh(H)
    for kind in ("dense", "krylov"):
        model = HessianModel(operator(H), kind=kind)
        torch.testing.assert_close(model.product(v), H @ v)
        assert 0 < model.norm(v) <= float(values.abs().max()) * (1 + 1e-12)
    assert HessianModel(operator(H), kind="dense").norm(v) == pytest.approx(float(values.abs().max()))
    assert HessianModel(operator(H), kind="krylov").norm(torch.zeros(12, dtype=torch.float64)) > 0  # a saddle


@pytest.mark.parametrize("kind", ["dense", "krylov"])
def test_state(kind):
    H, g = matrix(), gradient()
    model = HessianModel(operator(H), kind=kind)
    model.solve(g, 1.0)
    state = model.state_dict()
    restored = HessianModel(None if kind == "dense" else operator(H), kind=kind, state=state)
    assert torch.equal(model.solve(g + 1, 2.0).step, restored.solve(g + 1, 2.0).step)
    with pytest.raises(ConfigError, match=f"checkpoint of a run with hessian='{kind}'"):
        HessianModel(operator(H), kind="krylov" if kind == "dense" else "dense", state=state)


def test_correct_makes_the_secant_hold_by_a_symmetric_change():
    H, s, y = matrix(), gradient(), gradient().flip(0)
    model = HessianModel(operator(H), kind="dense")
    model.solve(gradient(), 1.0)
    model.correct(s, y)
    assert torch.equal(model.matrix, model.matrix.T)
    torch.testing.assert_close(model.product(s), y)
    assert optimality(model.matrix, gradient(), model.solve(gradient(), 1.0).step, 1.0) <= 1e-7  # and the next step knows
    model.correct(s, y)
    torch.testing.assert_close(model.matrix @ s, y)


def test_correct_does_not_depend_on_units_where_the_matrix_is_diagonal():
    """x = z / units: the corrected matrices are the same one in other units."""
    units = torch.logspace(-0.3, 0.3, 6, dtype=torch.float64)
    H, s, y = torch.diag(torch.linspace(1, 3, 6, dtype=torch.float64)), gradient(6), gradient(6).flip(0)
    here, there = (HessianModel(operator(A), kind="dense") for A in (H, units[:, None] * H * units))
    here.correct(s, y)
    there.correct(s / units, units * y)
    torch.testing.assert_close(there.matrix, units[:, None] * here.matrix * units)


def test_correct_is_for_small_matrices_and_finite_secants():
    H, s = matrix(), gradient()
    large = HessianModel(operator(matrix(MAX_CORRECTED + 1)))
    for model, n in ((large, MAX_CORRECTED + 1), (HessianModel(operator(H), kind="krylov"), 12)):
        before = model.product(gradient(n))
        model.correct(gradient(n), gradient(n))
        assert torch.equal(model.product(gradient(n)), before)
    model = HessianModel(operator(H), kind="dense")
    for bad in ((torch.zeros_like(s), s), (s, s * float("nan"))):
        model.correct(*bad)
        torch.testing.assert_close(model.matrix, H)


def test_corrections_save_hessians_and_calls(monkeypatch):
    """Summed over five nonconvex problems: the same points by at most nine tenths of the work."""
    totals = {}
    for corrected in (True, False):
        if not corrected:
            monkeypatch.setattr(HessianModel, "correct", lambda self, s, y: None)
        found = [tb.minimize(nonconvex(seed, 10, 8), "lfsba", gradient_tol=1e-5) for seed in range(5)]
        assert all(result.status is tb.Status.SECOND_ORDER for result in found)
        totals[corrected] = [sum(r.counts.hessians for r in found), sum(r.counts.oracle_calls for r in found),
                             [r.value for r in found]]  # fmt: skip
    assert totals[True][0] <= 0.85 * totals[False][0]
    assert totals[True][1] <= 0.9 * totals[False][1]
    assert totals[True][2] == pytest.approx(totals[False][2], abs=1e-8)


def test_published_periods_are_not_corrected(monkeypatch):
    monkeypatch.setattr(HessianModel, "correct", lambda self, s, y: pytest.fail("a published Hessian changed"))
    tb.minimize(nonconvex(0, 10, 8), "lfsba", period=3, max_steps=5)
