"""follow: the measures, the clock and the records; tables: medians, quartiles and curves."""

from __future__ import annotations

import time

import pytest
import torch

import torch_bilevel as tb
from experiments.comparison import follow
from experiments.studies.tables import leader, median_curve, quartiles, stopped, value_at, with_gap


def problem() -> tb.BilevelProblem:
    x = torch.full((3,), 2.0, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2).sum() / 2, x, torch.zeros(3, dtype=torch.float64)
    )


def test_records_grow_apart_and_the_learner_is_measured() -> None:
    run = follow(
        problem(),
        "sgd",
        {"lr": 1e-3},
        lambda x, y: {"norm": float(y.norm())},
        max_steps=20,
        gradient_tol=0.0,
        seed=0,
        growth=2.0,
        learner=True,
        bounds=(1.9, 3.0),
    )
    assert [r["step"] for r in run["records"]] == [0, 1, 2, 4, 8, 16, 20]
    assert bool((run["x"] >= 1.9).all())
    assert run["records"][-1]["norm"] == pytest.approx(float(run["y"].norm()))
    assert run["status"] == "max_steps"


def test_a_clock_of_ones_own_counts_neither_measuring_nor_other_processes() -> None:
    ticks = iter(range(10_000))  # every look at the clock is one second; measuring takes a hundred
    now = 0.0

    def clock() -> float:
        nonlocal now
        next(ticks)
        now += 1.0
        return now

    def measure(x: torch.Tensor) -> dict[str, float]:
        nonlocal now
        now += 100.0
        return {}

    run = follow(
        problem(), "sgd", {"lr": 0.01}, measure, max_steps=1000, gradient_tol=0.0, seed=0, max_seconds=50.0, clock=clock
    )
    assert run["status"] == "callback"
    assert 50.0 <= run["seconds"] <= 55.0
    assert all(a["seconds"] < b["seconds"] < a["seconds"] + 10 for a, b in zip(run["records"], run["records"][1:]))
    spent = follow(
        problem(),
        "sgd",
        {"lr": 0.01},
        lambda x: time.sleep(0.01) or {},
        max_steps=10,
        gradient_tol=0.0,
        seed=0,
        clock=time.process_time,
    )
    assert 0 < spent["seconds"] < 10.0


def test_a_run_that_does_not_start_is_an_error() -> None:
    with pytest.raises(tb.ConfigError, match="lr"):
        follow(problem(), "sgd", {"lr": -1.0}, lambda x: {}, max_steps=1, gradient_tol=0.0, seed=0)


def run(values: list[float], status: str = "callback") -> dict:
    return {
        "status": status,
        "steps": 1,
        "message": "why",
        "records": [{"seconds": 2.0**k, "v": v} for k, v in enumerate(values)],
    }


def test_quartiles_and_who_never_arrives() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 (2.00-4.00)"
    assert quartiles([1.0, 2.0, 3.0, None, None]) == "3.00 (2.00-)"
    assert quartiles([1.0, None, None]) == "1 of 3"
    assert quartiles([0.5], scale=100) == "50.0"
    assert quartiles([None]) == "never"
    assert quartiles([3, 4, 5]) == "4 (3.50-4.50)"
    assert leader({"a": [1.0, None, None], "b": [5.0, 6.0, None]}) == "b (6.00)"
    assert leader({"a": [None]}) == "none"


def test_curves_are_medians_as_far_as_most_runs_go() -> None:
    assert value_at(run([5.0, 3.0, 1.0]), "v", "seconds", 2.5) == 3.0
    assert value_at(run([5.0, 3.0, 1.0]), "v", "seconds", 9.0) is None
    assert value_at(run([5.0, 3.0, 1.0], "stalled"), "v", "seconds", 9.0) == 1.0
    assert value_at(run([5.0]), "v", "seconds", 0.5) is None
    runs = [run([5.0, 3.0, 1.0]), run([6.0, 4.0, 2.0]), run([9.0])]
    curve = median_curve(runs, "v", "seconds", points=3)
    assert [round(r["seconds"], 2) for r in curve] == [1.0, 2.0, 4.0]
    assert [r["v"] for r in curve] == [6.0, 3.5, 1.5]
    assert with_gap(runs, "v", 1.0, "gap")[1]["records"][2]["gap"] == 1.0
    assert stopped({"a": runs}) == ""
    assert "a: 1 of 2 runs ended early, the first after 1 steps: why" in stopped(
        {"a": [run([1.0], "failed"), run([1.0])]}
    )
