"""Every accelerator on and off: the same second-order stationary points, whatever is kept, blocked, folded or formed."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.problems import ill_conditioned, nonconvex
from torch_bilevel import folding
from torch_bilevel.lower import chord, kept
from torch_bilevel.methods.model import HessianModel
from torch_bilevel.outputs import prices
from torch_bilevel.recorded import calls, graph

CASES = {"nonconvex": nonconvex(), "ill_conditioned": ill_conditioned()}


def nothing(monkeypatch):
    return {}


def folded(monkeypatch):
    monkeypatch.setattr(folding, "SMALL", 0)
    return {}


def single_products(monkeypatch):
    for name in ("BLOCK", "SMALL_BLOCK"):
        monkeypatch.setattr(graph, name, 1)
    return {}


def nothing_kept(monkeypatch):
    return {"solver": "cg"}


def a_factor_everywhere(monkeypatch):
    return {"solver": "cholesky"}


def sketches(monkeypatch):
    monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 1)
    monkeypatch.setattr(kept.KeptFactor, "levels", staticmethod(lambda n, dtype: [n // 4, n // 2]))
    return {"hessian": "krylov"}


def by_outputs(monkeypatch):
    """Learners of a test's size are worth it."""
    monkeypatch.setattr(calls, "SMALL", 0)
    monkeypatch.setattr(calls, "PROBES", -100)
    return {}


def float32_factors(monkeypatch):
    """Of float64 Hessians of a test's size."""
    monkeypatch.setattr(prices, "WORTH_SINGLE_FACTOR", 0)
    return by_outputs(monkeypatch)


def no_chords(monkeypatch):
    monkeypatch.setattr(chord, "MOST", 0)
    return {}


def krylov(monkeypatch):
    return {"hessian": "krylov"}


def uncorrected(monkeypatch):
    """No secants between refreshes."""
    monkeypatch.setattr(HessianModel, "correct", lambda self, s, y: None)
    return {}


def ritz_vectors(monkeypatch):
    """Kept from solves of two steps and more, and nothing else."""
    monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 1)
    monkeypatch.setattr(kept, "RITZ_STEPS", 2)
    monkeypatch.setattr(kept.KeptFactor, "levels", staticmethod(lambda n, dtype: []))
    return {}


SETTINGS = (
    nothing, folded, single_products, by_outputs, float32_factors, no_chords, nothing_kept, a_factor_everywhere, sketches,
    krylov, uncorrected, ritz_vectors,
)  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["auto", "dlcrn", "lfsba", "lazy_slcrn"])
def test_same_quality_with_every_accelerator_on_and_off(method, name, setting, monkeypatch):
    case = CASES[name]
    result = tb.minimize(case.problem(), method, max_steps=100, gradient_tol=1e-6, **setting(monkeypatch))
    exact = case.reference.implicit(result.x)
    assert result.status is tb.Status.SECOND_ORDER
    assert float(exact.gradient.norm()) <= 1e-5
    assert float(torch.linalg.eigvalsh(exact.hessian)[0]) >= -1e-5


def test_choices_are_reported():
    dense = tb.minimize(nonconvex().problem(), "dlcrn", max_steps=3)
    assert dense.choices == {"lower systems": "a Cholesky factor of 8, kept", "hyper-Hessian": "dense, 12 x 12"}
    assert "hyper-Hessian: dense" in dense.describe()
    free = tb.minimize(nonconvex().problem(), "dlcrn", max_steps=3, solver="cg", hessian="krylov")
    assert free.choices["lower systems"] == "cg"
    assert free.choices["hyper-Hessian"].startswith("krylov, ")
    assert "hyper-Hessian" not in tb.minimize(nonconvex().problem(), "lbfgs", max_steps=3).choices
