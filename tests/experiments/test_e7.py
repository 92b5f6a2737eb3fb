"""E7: equal tuning effort, budgets that are kept, the best setting, and the numbers of its tables."""

from __future__ import annotations

import pytest

from experiments.studies import e7
from experiments.studies.e7_report import best_within, first_at, levels

TINY = {"kind": "l2_groups", "groups": 4, "dataset": "digits", "n_train": 60, "n_val": 60}


def test_every_tuned_method_has_as_many_settings():
    for dx in (1, 20, 100):
        sizes = {method: len(e7.settings(method, dx)) for method in e7.METHODS}
        assert {sizes.pop("auto"), sizes.pop("lfsba")} == {1}
        assert set(sizes.values()) == {3}


@pytest.mark.parametrize("method", e7.METHODS)
def test_a_run_keeps_to_its_trainings(method):
    """At most one step, of a line search for L-BFGS, begins within them and ends beyond."""
    options = e7.settings(method, 4)[0]
    run = e7.run_one(TINY, method, options, 7, 0)
    assert run["dx"] == 4
    assert run["dy"] == 65
    trainings = [record["trainings"] for record in run["records"]]
    assert trainings[0] == 1
    assert trainings == sorted(trainings)
    if method in ("lbfgs", "auto"):
        assert 7 <= run["counts"]["lower_solves"] <= 7 + 25
    else:
        assert run["counts"]["lower_solves"] == 7
    values = [record["value"] for record in run["records"]]
    assert all(b < a for a, b in zip(values, values[1:-1]))  # the last record says where the run ended
    assert min(values) < values[0]
    assert 0.4 < run["records"][-1]["accuracy"] <= 1


def test_box_scales_the_search_about_its_centre():
    run = e7.run_one(TINY, "random_search", {"box": 1e-6}, 4, 0)
    centre = e7.build(TINY, 0, None)
    assert centre.box == (-12.0, 2.0)  # its centre is the start, so nothing changes by more than the box
    assert run["value"] == pytest.approx(run["records"][0]["value"], abs=1e-5)


def test_best_setting_is_that_of_the_lowest_loss_and_passes_over_failures():
    def run(*values):
        return {"records": [{"value": value} for value in values]}

    results = {"p-adam-tune0": run(0.5), "p-adam-tune1": {"failed": "SolverError"}, "p-adam-tune2": run(0.6, 0.4, 0.55)}
    assert e7.best_setting("p", "adam", 10, results) == e7.settings("adam", 10)[2]
    assert e7.best_setting("p", "adam", 10, {"p-adam-tune0": {"failed": "x"}}) == e7.settings("adam", 10)[0]
    assert e7.best_setting("p", "auto", 10, {}) == {}


def test_stages_tune_on_one_seed_and_compare_on_others():
    tuning = e7.tune(False, {})
    assert {task.arguments["seed"] for task in tuning} == {e7.TUNING_SEED}
    assert len(tuning) == 3 * 4 * len(e7.PROBLEMS)
    comparison = e7.compare(False, {})
    assert {task.arguments["seed"] for task in comparison} == set(e7.SEEDS)
    assert e7.TUNING_SEED not in e7.SEEDS
    assert len(comparison) == len(e7.SEEDS) * len(e7.METHODS) * len(e7.PROBLEMS)
    keys = [task.key for task in tuning + comparison]
    assert len(set(keys)) == len(keys)


def test_numbers_of_the_tables():
    def run(*points):
        return {
            "records": [{"trainings": t, "oracle_calls": 10 * t, "value": v, "accuracy": v / 10} for t, v in points]
        }

    one = run((1, 5.0), (3, 2.0), (4, 3.0), (60, 1.0))
    assert best_within(one, 50) == 2.0
    assert best_within(one, 60) == 1.0
    assert best_within(one, 0) is None
    assert best_within(one, 4, key="accuracy") == 0.2
    assert first_at(one, 2.5, "oracle_calls", 50) == 30
    assert first_at(one, 1.5, "trainings", 50) is None
    assert first_at(one, 1.5, "trainings", 60) == 60
    assert levels({"lbfgs": [one, {}]}, 0.9, quick=False) == [pytest.approx(5.0 - 0.9 * 3.0), None]
