"""E7: what a practitioner would do instead. Validation loss against trainings, by gradients and by search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch_bilevel as tb
from experiments.practice import Practice, l2_groups, mixture
from experiments.studies.base import Results, Study, Task
from torch_bilevel.methods import make_method

#: problem -> its maker and the maker's arguments
L2 = {"kind": "l2_groups", "features": 200, "n_train": 300, "n_val": 300}
FASHION = {"kind": "mixture", "dataset": "fashion_mnist", "pool": 4, "n_val": 300, "n_test": 10000, "per_source": 30}
PROBLEMS: dict[str, dict[str, Any]] = {
    "l2_1": {**L2, "groups": 1},
    "l2_10": {**L2, "groups": 10},
    "l2_100": {**L2, "groups": 100},
    "l2_1000": {**L2, "groups": 1000, "features": 1000},
    "mixture_20": {**FASHION, "sources": 20},
    "mixture_50": {**FASHION, "sources": 50},
}
QUICK_PROBLEMS: dict[str, dict[str, Any]] = {
    "l2_8": {"kind": "l2_groups", "groups": 8, "dataset": "digits", "n_train": 200, "n_val": 200},
    "mixture_6": {"kind": "mixture", "sources": 6, "per_source": 20, "n_val": 100, "n_test": 300, "pool": 2},
}
MAKERS = {"l2_groups": l2_groups, "mixture": mixture}

#: trainings of the learner that each method may use
GRADIENT_TRAININGS, SEARCH_TRAININGS = 50, 100
QUICK_TRAININGS = 6
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
QUICK_SEEDS = (0,)
SEARCHES = ("random_search", "tpe")


def settings(method: str, dx: int) -> list[dict[str, Any]]:
    """The stated grid: three settings for each method that has something to tune, the defaults for the others.

    `box` scales the searched box about its centre; methods with gradients have the whole box as bounds.
    """
    if method == "adam":
        return [{"lr": lr} for lr in (0.1, 0.3, 1.0)]
    if method == "lbfgs":
        return [{"lr": 1.0, "memory": 10}, {"lr": 1.0, "memory": 30}, {"lr": 3.0, "memory": 10}]
    if method == "random_search":
        return [{"box": box} for box in (1.0, 0.5, 0.25)]
    if method == "tpe" and dx <= 20:  # one density for each hyperparameter is affordable here
        return [{"multivariate": True}, {"multivariate": True, "box": 0.5}, {"multivariate": False}]
    if method == "tpe":
        return [{"startup": 10}, {"startup": 10, "box": 0.5}, {"startup": 30}]
    return [{}]


METHODS = ("auto", "lfsba", "lbfgs", "adam", "tpe", "random_search")


def trainings(method: str, quick: bool) -> int:
    """Trainings that a run may use: twice as many for a search, which takes no gradients."""
    if quick:
        return QUICK_TRAININGS
    return SEARCH_TRAININGS if method in SEARCHES else GRADIENT_TRAININGS


def size(problem: dict[str, Any]) -> int:
    """dx of a row of PROBLEMS."""
    return problem.get("groups") or problem["sources"]


def build(problem: dict[str, Any], seed: int, data_dir: str | None) -> Practice:
    """The problem of a row of PROBLEMS."""
    arguments = {key: value for key, value in problem.items() if key != "kind"}
    return MAKERS[problem["kind"]](seed=seed, data_dir=data_dir, **arguments)


def run_one(
    problem: dict[str, Any], method: str, options: dict[str, Any], budget: int, seed: int, data_dir: str | None = None
) -> dict[str, Any]:
    """One run of at most `budget` trainings: the value of the best point against trainings, oracle calls and seconds.

    A step that begins within the budget is finished; what it reaches beyond is left to the reader of the records.
    Seconds are the method's own (proposals included, test accuracy not).
    """
    practice = build(problem, seed, data_dir)
    options = dict(options)
    lo, hi = practice.box
    centre, half = 0.5 * (lo + hi), 0.5 * (hi - lo) * options.pop("box", 1.0)
    records: list[dict[str, Any]] = []

    def watch(step: tb.StepReport, x: Any, y: Any) -> bool:
        done = step.counts.lower_solves
        if not records or step.value < records[-1]["value"] or done >= budget:
            accuracy = practice.accuracy(y) if not records or step.accepted else records[-1]["accuracy"]
            records.append({"trainings": done, "oracle_calls": step.counts.oracle_calls, "seconds": step.seconds,
                            "value": step.value, "accuracy": accuracy})  # fmt: skip
        return done < budget

    result = tb.minimize(practice.problem, make_method(method, options), max_steps=10 * budget, callback=watch, seed=seed,
                         bounds=(centre - half, centre + half))  # fmt: skip
    outcome = {
        "status": result.status.name.lower(), "value": result.value, "accuracy": practice.accuracy(result.y),
        "seconds": result.seconds, "counts": result.counts.as_dict(), "dx": practice.problem.dx,
        "dy": practice.problem.dy, "gradient_norm": result.gradient_norm, "min_eigenvalue": result.min_eigenvalue,
    }  # fmt: skip
    if practice.sources is not None:
        outcome["weights"] = _weights_by_corruption(result.x, practice.sources)
    return {**outcome, "records": records}


def _weights_by_corruption(x: Any, rates: tuple[float, ...]) -> dict[str, float]:
    """Total mixture weight of the sources of each share of wrong labels."""
    weights = x.softmax(0).tolist()
    return {str(rate): sum(w for w, r in zip(weights, rates) if r == rate) for rate in sorted(set(rates))}


def _task(
    name: str, problem: dict[str, Any], method: str, number: int, options: dict[str, Any], seed: int, quick: bool
) -> Task:
    budget = trainings(method, quick)
    arguments = {"problem": problem, "method": method, "options": options, "budget": budget, "seed": seed}
    stage = f"tune{number}" if seed == TUNING_SEED else f"seed{seed}"
    return Task(f"{name}-{method}-{stage}", "experiments.studies.e7:run_one", arguments)


def tune(quick: bool, results: Results) -> list[Task]:
    """Every setting of the grids, on a seed of its own; methods with one setting have nothing to tune.

    The quick version tunes the first two settings on its first problem.
    """
    tasks = []
    for name, problem in (dict(list(QUICK_PROBLEMS.items())[:1]) if quick else PROBLEMS).items():
        for method in METHODS:
            grid = settings(method, size(problem))[: 2 if quick else None]
            if len(grid) > 1:
                tasks += [
                    _task(name, problem, method, i, options, TUNING_SEED, quick) for i, options in enumerate(grid)
                ]
    return tasks


def best_setting(name: str, method: str, dx: int, results: Results) -> dict[str, Any]:
    """The setting that met the lowest validation loss on the tuning seed; a failed run counts as infinite."""
    grid = settings(method, dx)
    tuned = [(lowest(results.get(f"{name}-{method}-tune{i}", {})), i) for i in range(len(grid))]
    return grid[min(tuned)[1]]


def lowest(run: dict[str, Any]) -> float:
    """The lowest validation loss of a run; infinite for one that failed."""
    return min((record["value"] for record in run.get("records", [])), default=float("inf"))


def compare(quick: bool, results: Results) -> list[Task]:
    """Every method with its best setting, on the seeds of the comparison."""
    tasks = []
    for name, problem in (QUICK_PROBLEMS if quick else PROBLEMS).items():
        dx = size(problem)
        for method in METHODS:
            options = best_setting(name, method, dx, results)
            tasks += [
                _task(name, problem, method, 0, options, seed, quick) for seed in (QUICK_SEEDS if quick else SEEDS)
            ]
    return tasks


def report(results: Results, folder: Path, quick: bool) -> str:
    from experiments.studies import e7_report

    return e7_report.report(results, folder, quick)


STUDY = Study("E7", "What a practitioner would do instead", (tune, compare), report)
