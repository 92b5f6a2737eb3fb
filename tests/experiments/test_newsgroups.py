"""20 Newsgroups: reading counts, stratified halves, the losses against dense ones, and runs within CPU seconds."""

from __future__ import annotations

import bz2
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_bilevel as tb
from experiments import newsgroups
from experiments.budget import BudgetSpent, CpuBudget, follow_cpu, forget_peak, peak_gb, within
from experiments.data import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Counts of 200 training and 60 test documents of 5 classes, whose class decides their tokens."""
    rng = np.random.default_rng(0)
    (tmp_path / "20news").mkdir()
    for part, size in (("train", 200), ("test", 60)):
        lines = []
        for row in range(size):
            label = row % 5
            tokens = sorted({int(t) for t in rng.integers(1, 30, 6)} | {31 + label, 130_107})
            lines.append(f"{label} " + " ".join(f"{t}:{rng.integers(1, 4)}" for t in tokens))
        path = tmp_path / "20news" / f"20news-bydate.{part}.counts.svm.bz2"
        path.write_bytes(bz2.compress("\n".join(lines).encode()))
    return tmp_path


def test_halves_are_stratified_disjoint_and_sparse(folder: Path) -> None:
    data = newsgroups.load(folder, seed=1)
    assert data.train.inputs.shape == data.val.inputs.shape == (100, newsgroups.FEATURES)
    assert data.test.inputs.shape == (60, newsgroups.FEATURES)
    assert data.train.labels.bincount().tolist() == data.val.labels.bincount().tolist() == [20] * 5
    assert data.train.inputs.dtype == torch.float32
    rows = data.train.inputs.rows(torch.arange(3)).to_dense()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))  # TF-IDF rows have length 1
    again, other = newsgroups.load(folder, seed=1), newsgroups.load(folder, seed=2)
    ones = torch.ones(newsgroups.FEATURES)
    assert torch.equal(again.val.inputs @ ones, data.val.inputs @ ones)
    assert not torch.equal(other.val.inputs @ ones, data.val.inputs @ ones)
    small = newsgroups.load(folder, seed=1, features=36, limit=20)
    assert (small.train.inputs.shape, small.test.inputs.shape) == ((20, 36), (20, 36))


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20news-bydate.train.counts.svm.*fetch_20newsgroups_vectorized"):
        newsgroups.load(tmp_path)


def test_hypergradient_agrees_with_dense_losses(folder: Path) -> None:
    data = newsgroups.load(folder, features=36, dtype=torch.float64)
    problem = newsgroups.build(data)
    assert (problem.dx, problem.dy) == (36, 36 * 20)
    X, V = data.train.inputs.to_dense(), data.val.inputs.to_dense()

    def g(h, w):
        W = w.reshape(36, 20)
        penalty = 0.5 * (W.square() * h.exp()[:, None]).mean()  # the published form
        return torch.nn.functional.cross_entropy(X @ W, data.train.labels) + penalty

    def f(h, w):
        return torch.nn.functional.cross_entropy(V @ w.reshape(36, 20), data.val.labels)

    plain = tb.BilevelProblem.from_functions(f, g, problem.x, problem.y)
    sparse, dense = (
        tb.ImplicitOracle(p).evaluate(torch.linspace(-1, 1, 36, dtype=torch.float64)) for p in (problem, plain)
    )
    torch.testing.assert_close(sparse.gradient, dense.gradient, rtol=1e-6, atol=1e-9)
    loss, accuracy = newsgroups.judge(data.val, sparse.lower.y.reshape(36, 20))
    assert loss == pytest.approx(float(sparse.value))
    assert accuracy == pytest.approx(
        float(((V @ sparse.lower.y.reshape(36, 20)).argmax(1) == data.val.labels).double().mean())
    )


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_budget_counts_cpu_seconds_and_ends_what_runs() -> None:
    with pytest.raises(BudgetSpent, match="0.2 CPU seconds"), CpuBudget(0.2) as budget:  # noqa: PT012
        with budget.paused():
            burn(0.3)
        time.sleep(0.3)
        assert budget.spent < 0.1
        burn(5.0)
    assert 0.2 <= budget.spent < 0.6  # not before the clock says so, however the timer ticks
    burn(0.3)  # no alarm is left


def quadratic(slow_from: int) -> tb.BilevelProblem:
    calls = []

    def g(x, y):
        calls.append(1)
        if len(calls) > slow_from:
            burn(0.02)
        return ((y - x) ** 2).sum() / 2

    one = torch.ones(2, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(lambda x, y: ((y - 3) ** 2).sum(), g, one, one)


def test_run_ends_within_its_budget_with_its_records() -> None:
    def measure(x, y):
        burn(0.05)
        return {"x": float(x[0])}

    options = {"lr": 0.05, "lower_steps": 5, "lower_lr": 0.5}
    run = follow_cpu(quadratic(10**9), "aid", options, measure, seconds=30.0, max_steps=4)
    assert (run["status"], [r["step"] for r in run["records"]]) == ("max_steps", [0, 1, 2, 3, 4])
    assert run["seconds"] < 1.0  # five measures of 0.05 s are not in it, or hardly anything else is
    assert run["records"][-1]["x"] > run["records"][0]["x"]
    cut = follow_cpu(quadratic(40), "aid", options, measure, seconds=0.3)
    assert cut["status"] == "budget"
    assert 0.29 <= cut["seconds"] < 0.8  # likewise
    assert cut["records"]
    assert all(r["seconds"] < 0.3 for r in cut["records"])
    none = follow_cpu(quadratic(4), "aid", {**options, "lower_steps": 500}, measure, seconds=0.2)
    assert (none["status"], none["records"]) == ("budget", [])
    assert within(run["records"], run["records"][2]["seconds"])["step"] == 2
    assert within(run["records"], -1.0) is None


def test_failed_run_keeps_its_records() -> None:
    run = follow_cpu(
        quadratic(10**9), "aid", {"lr": 1e200, "lower_steps": 1, "lower_lr": 0.5}, lambda x, y: {}, seconds=5.0
    )
    assert run["status"] == "non_finite"
    assert "not finite" in run["message"]
    assert run["records"][0]["step"] == 0


def test_peak_memory_can_begin_anew() -> None:
    held = torch.ones(40_000_000, dtype=torch.float64)
    high = peak_gb()
    assert high > 0.3
    assert math.isfinite(high)
    del held
    forget_peak()
    assert peak_gb() <= high
