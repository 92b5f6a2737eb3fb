"""E1: hyper-cleaning of breast-cancer and australian with the exact FSBA and LFSBA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.base import Results, Study, Task
from experiments.studies.cleaning import published, run_task

DATASETS = ("breast_cancer", "australian")
NOISE = (0.25, 0.5)
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
#: seconds of a method's own processor time; FSBA and LFSBA with the published constants take longer to get anywhere
BUDGET, BUDGET_HESSIANS, BUDGET_TUNING = 2.5, 6.0, 1.2
SLOW = ("FSBA published", "LFSBA published")
_ONE = {"lower_steps": 10, "adjoint_steps": 10}
#: label -> (weight, method, options besides the step, upper steps tried)
TUNED: dict[str, tuple[str, str, dict[str, Any], tuple[float, ...]]] = {
    "AID": ("clip", "aid", _ONE, (3, 10, 30, 100, 300)),
    "ITD": ("clip", "itd", {"lower_steps": 10}, (3, 10, 30, 100, 300)),
    "F2BA": ("clip", "f2ba", {"lower_steps": 10, "penalty": 10}, (3, 10, 30, 100, 300)),
    "Adam": ("clip", "adam", {}, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "Adam, sigmoid": ("sigmoid", "adam", {}, (0.03, 0.1, 0.3, 1.0, 3.0)),
}
#: published label -> configuration's middle name
PUBLISHED = {
    "FSBA published": "fsba",
    "LFSBA published": "lfsba",
    "F2BA published": "f2ba",
    "AID published": "aid",
    "ITD published": "itd",
}
#: neither tuned nor published: label -> (weight, method)
DEFAULTS = {
    "L-BFGS": ("clip", "lbfgs"),
    "FSBA (ours)": ("clip", "fsba"),
    "LFSBA (ours)": ("clip", "lfsba"),
    "auto (ours)": ("clip", "auto"),
    "L-BFGS, sigmoid": ("sigmoid", "lbfgs"),
    "LFSBA (ours), sigmoid": ("sigmoid", "lfsba"),
    "auto (ours), sigmoid": ("sigmoid", "auto"),
}
#: the published sensitivity study on australian: M of |s|^3/3 with lambda 1 and steps .008/.01; lambda with M = 10,
#: steps .01
SENSITIVITY_M = (0.01, 0.1, 1.0, 10.0, 100.0)
SENSITIVITY_LAMBDA = (0.8, 0.9, 1.0, 1.1, 1.2)
SENSITIVITY_STEPS = 150


def data_of(dataset: str, noise: float, weight: str, quick: bool = False) -> dict[str, Any]:
    """Keys of `hyper_cleaning.Config`; the quick version takes part of the data."""
    parts = [0.1, 0.1, 0.1] if quick else [0.7, 0.2, 0.1]
    return {
        "dataset": dataset,
        "fractions": parts,
        "standardize": "feature",
        "noise_rate": noise,
        "noise_kind": "flip",
        "weight": weight,
        "reg": 0.001,
        "dtype": "float64",
        "init_sgd_steps": 100 if quick else 5000,
    }


def problems(quick: bool) -> list[tuple[str, float]]:
    return [(dataset, noise) for dataset in DATASETS for noise in NOISE][: 1 if quick else None]


def plain(label: str) -> str:
    return label.replace(" (ours)", "").replace(", ", "_").replace(" ", "_")


def key(dataset: str, noise: float, label: str, seed: int | str) -> str:
    return f"{dataset}-{round(100 * noise)}-{plain(label)}-{seed}"


def tuning(quick: bool, _: Results) -> list[Task]:
    """The grid of upper steps of every first-order method on every problem, with a seed of its own."""
    tasks = []
    for dataset, noise in problems(quick):
        for label, (weight, method, options, grid) in TUNED.items():
            for lr in grid[2:3] if quick else grid:
                tasks.append(
                    run_task(
                        key(dataset, noise, label, f"tune{lr:g}"),
                        data_of(dataset, noise, weight, quick),
                        TUNING_SEED,
                        method,
                        {**options, "lr": lr},
                        BUDGET_TUNING,
                        3 if quick else 1_000_000,
                        False,
                    )
                )
    return sorted(
        tasks,
        key=lambda task: (
            task.arguments["data"]["dataset"],
            task.arguments["data"]["noise_rate"],
            task.arguments["data"]["weight"],
        ),
    )


def best_steps(results: Results, dataset: str, noise: float) -> dict[str, float]:
    """Per tuned method the upper step of lowest upper objective at the end of its tuning run."""
    found: dict[str, tuple[float, float]] = {}
    for label, (_, _, _, grid) in TUNED.items():
        for lr in grid:
            result = results.get(key(dataset, noise, label, f"tune{lr:g}"), {})
            if result.get("records"):
                pair = (result["records"][-1]["objective"], lr)
                found[label] = min(found.get(label, pair), pair)
    return {label: lr for label, (_, lr) in found.items()}


def methods(results: Results, dataset: str, noise: float) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """label -> (weight, method, options) of every run on a problem, less tuned ones whose best step is published."""
    steps = best_steps(results, dataset, noise)
    constants = {label: ("clip", name, published(f"{dataset}_{name}_published")) for label, name in PUBLISHED.items()}
    tuned = {
        label: (*TUNED[label][:2], {**TUNED[label][2], "lr": lr})
        for label, lr in steps.items()
        if lr != constants.get(f"{label} published", ("", "", {}))[2].get("lr")
    }
    return {**constants, **tuned, **{label: (*pair, {}) for label, pair in DEFAULTS.items()}}


def compare(results: Results, dataset: str, noise: float, seed: int, quick: bool) -> list[Task]:
    """Every method on one problem, those of one weight together."""
    chosen = sorted(methods(results, dataset, noise).items(), key=lambda item: item[1][0])
    tasks = []
    for label, (weight, method, options) in chosen:
        tasks.append(
            run_task(
                key(dataset, noise, label, seed),
                data_of(dataset, noise, weight, quick),
                seed,
                method,
                options,
                BUDGET_HESSIANS if label in SLOW else BUDGET,
                3 if quick else 1_000_000,
            )
        )
    return tasks


def runs(quick: bool, results: Results) -> list[Task]:
    """Every method on every problem and seed."""
    tasks = []
    for seed in SEEDS[:1] if quick else SEEDS:
        for dataset, noise in problems(quick):
            tasks.append(
                Task(
                    key(dataset, noise, "references", seed),
                    "experiments.studies.cleaning:references",
                    {"data": data_of(dataset, noise, "clip", quick), "seed": seed},
                )
            )
            tasks += compare(results, dataset, noise, seed, quick)
    return tasks


def sensitivity(quick: bool, _: Results) -> list[Task]:
    """FSBA on australian with 25 % noise: M, then lambda, as published (their M is half of ours)."""
    data, tasks = data_of("australian", 0.25, "clip", quick), []
    settings = [("M", M, 1.0, M, 0.008, 0.01) for M in SENSITIVITY_M]
    settings += [("lambda", penalty, penalty, 10.0, 0.01, 0.01) for penalty in SENSITIVITY_LAMBDA]
    for name, value, penalty, M, step_y, step_z in settings[::4] if quick else settings:
        lower = {"name": "agd", "step": step_z, "momentum": 0.95, "steps": 10}
        options = {
            "penalty": penalty,
            "scheme": "forward",
            "cubic_reg": 2 * M,
            "adaptive": False,
            "lower": lower,
            "penalised_lower": {**lower, "step": step_y * penalty, "momentum": 0.9},
        }
        tasks.append(
            run_task(
                f"sensitivity-{name}-{value:g}",
                data,
                0,
                "fsba",
                options,
                15.0,
                3 if quick else SENSITIVITY_STEPS,
                False,
            )
        )
    return tasks


def report(results: Results, figures_dir: Path, quick: bool) -> str:
    from experiments.studies import e1_report  # which needs matplotlib, and this module

    return e1_report.report(results, figures_dir, quick)


STUDY = Study(
    "E1", "Hyper-cleaning of breast-cancer and australian", (tuning, sensitivity, runs), report, needs=DATASETS
)
