"""E3 and E4: stages that follow the tuning, settings that exist, tables that say how many runs they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.budget import within
from experiments.studies import e3, e4, load_study
from experiments.studies.tabulate import median, packed, unpacked
from torch_bilevel.methods import make_method


@pytest.mark.parametrize("study", [e3, e4])
def test_settings_are_options_of_their_methods(study) -> None:
    for label, (method, settings) in study.GRIDS.items():
        assert len(settings) == 3, label  # the same effort for each
        for options in settings:
            make_method(method, options)
    for method, options in (*e3.PUBLISHED.values(), *e4.SECOND_ORDER.values()):
        make_method(method, options)


@pytest.mark.parametrize("study", [e3, e4])
def test_compared_settings_are_the_tuned_ones(study) -> None:
    tuning = study.tune(False, {})
    assert {task.arguments["seed"] for task in tuning} == {study.TUNING_SEED}
    assert study.TUNING_SEED not in study.SEEDS
    results = {task.key: {"best": number % 3} for number, task in enumerate(tuning)}
    results[tuning[0].key] = {"failed": "diverged"}
    compared = {task.key: task for task in study.compare(False, results)}
    for number, label in enumerate(study.GRIDS):
        name = tuning[number].key.removeprefix("tune-")
        for seed in study.SEEDS:
            expected = study.GRIDS[label][1][number % 3 if number else 0]
            assert compared[f"{name}-seed{seed}"].arguments["settings"] == [expected]
    same = {task.arguments["seconds"] for name, task in compared.items() if not name.startswith("long-")}
    assert len(same) == 1


def test_perturbed_methods_share_the_settings_of_their_kin() -> None:
    tasks = {task.key: task for task in e3.compare(False, {"tune-aid": {"best": 2}, "tune-rahgd": {"best": 1}})}
    assert tasks["paid-seed0"].arguments["settings"] == [e3.GRIDS["AID"][1][2]]
    assert (tasks["prahgd-seed0"].arguments["method"], tasks["prahgd-seed0"].arguments["settings"]) == (
        "prahgd", [e3.GRIDS["RAHGD"][1][1]])  # fmt: skip
    assert tasks["published-ifsba-seed0"].arguments["max_steps"] == 45


def record(step: int, seconds: float, value: float) -> dict:
    return {"step": step, "seconds": seconds, "oracle_calls": 10 * step, "val": value, "val_accuracy": 0.5, "test": value + 1,
            "test_accuracy": value / 10}  # fmt: skip


def test_e3_report_reads_the_records_within_the_budget(tmp_path: Path) -> None:
    run = {
        "status": "budget",
        "peak_gb": 1.25,
        "records": [record(0, 0.1, 3.0), record(1, 0.9 * e3.SECONDS, 2.0), record(2, 1.1 * e3.SECONDS, 1.0)],
    }
    text = e3.report(
        {"tune-aid": {"best": 1}, "aid-seed0": packed([run]), "itd-seed0": {"failed": "x"}}, tmp_path, False
    )
    assert "| AID | 3.000 | 4.000 | 30.0 | 4.000 | 0 | 0 | 1.2 |" in text  # the seconds of tuning
    assert "| AID | 2.000 | 3.000 | 20.0 | 3.000 | 1 | 10 | 1.2 |" in text  # all seconds
    assert "'lr': 1000.0" in text
    assert (tmp_path / "E3_curves.png").is_file()


def test_e4_report_counts_runs_and_failures(tmp_path: Path) -> None:
    runs = [{"status": status, "records": [record(0, 0.0, 5.0), record(9, 0.9 * e4.SECONDS, value)]} for status, value in
            (("budget", 8.0), ("failed", 6.0), ("budget", 7.0))]  # fmt: skip
    results = {f"adam-seed{i}": packed([run]) for i, run in enumerate(runs)}
    slow = [record(0, 0.0, 5.0), record(1, 0.9 * e4.LONG_SECONDS, 6.0)]
    results["long-ifsba_ours-seed0"] = packed([{"status": "budget", "records": slow}])
    text = e4.report(results, tmp_path, False)
    assert "| ifsba (ours) | 50.0 | 6.000 | 0 | 0 | 0 of 1 |" in text  # at the seconds of the others
    assert "| ifsba (ours) | 60.0 | 7.000 | 1 | 10 | 0 of 1 |" in text
    assert (
        "| Adam, exact hypergradients | 70.0 [65.0, 75.0] | 8.000 [7.500, 8.500] | 9 [9, 9] | 90 [90, 90] | 1 of 3 |"
        in text
    )
    assert "untrained backbone: 50.0 [50.0, 50.0] %" in text
    assert (tmp_path / "E4_curves.png").is_file()


def test_medians_say_how_many_runs_have_a_value() -> None:
    assert median([]) == median([None]) == "-"
    assert median([2.0]) == "2.000"
    assert median([1.0, 2.0, 3.0, None], ".1f") == "2.0 [1.5, 2.5] (3 of 4)"
    run = {"status": "budget", "records": [record(0, 1.0, 2.0)]}
    assert unpacked(packed([run])) == [run]
    assert within(run["records"], 0.5) is None
    assert load_study("e3") is e3.STUDY
