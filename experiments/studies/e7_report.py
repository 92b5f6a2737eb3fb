"""The report of E7: trainings to what L-BFGS reaches, best values, test accuracy, tuning, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.figures import bands
from experiments.studies import e7
from experiments.studies.base import Results
from experiments.studies.tables import markdown, number, quartiles

LABELS = {
    "auto": "auto",
    "lfsba": "LFSBA",
    "lbfgs": "L-BFGS",
    "adam": "Adam",
    "tpe": "TPE",
    "random_search": "random search",
}
#: shares of what L-BFGS gains within its trainings
SHARES = (0.9, 0.99)

Runs = dict[str, list[dict[str, Any]]]


def report(results: Results, folder: Path, quick: bool) -> str:
    problems = e7.QUICK_PROBLEMS if quick else e7.PROBLEMS
    seeds = e7.QUICK_SEEDS if quick else e7.SEEDS
    runs = {name: _runs(results, name, seeds) for name in problems}
    parts = [ABOUT, "## Trainings to what L-BFGS reaches", REACHING, _reaching(runs, "trainings", quick),
             "The same in oracle calls (gradients and Hessian-vector products of both levels, those of trainings and of the"
             " hyper-Hessian included):", _reaching(runs, "oracle_calls", quick),
             "And in seconds, the search's own included; the machine had other work, so only large ratios mean something:",
             _reaching(runs, "seconds", quick)]  # fmt: skip
    parts += ["## Best values and test accuracy", VALUES, _values(runs, quick)]
    parts += ["## Where the mixture weight goes", WEIGHTS, _weights(runs)]
    for name in problems:
        parts.append(_figure(runs[name], folder, name))
    parts += ["## Tuning", TUNING, _tuning(results, quick)]
    return "\n\n".join(parts)


def _runs(results: Results, name: str, seeds: tuple[int, ...]) -> Runs:
    """method -> its runs by seed; {} for one that failed."""
    found = {method: [results.get(f"{name}-{method}-seed{seed}", {}) for seed in seeds] for method in e7.METHODS}
    return {method: [run if run.get("records") else {} for run in runs] for method, runs in found.items()}


def best_within(run: dict[str, Any], limit: float, axis: str = "trainings", key: str = "value") -> float | None:
    """`key` of the best point found within `limit` on `axis`; None before the first."""
    records = [r for r in run.get("records", []) if r[axis] <= limit]
    return min(records, key=lambda r: r["value"])[key] if records else None


def first_at(run: dict[str, Any], level: float, axis: str, trainings: int) -> float | None:
    """Where on `axis` the run first has a value of at most `level`, within so many trainings; None if never."""
    return next((r[axis] for r in run.get("records", []) if r["value"] <= level and r["trainings"] <= trainings), None)


def levels(runs: Runs, share: float, quick: bool) -> list[float | None]:
    """For each seed the value after `share` of the way from the start to where L-BFGS is at the end of its trainings."""
    budget = e7.trainings("lbfgs", quick)
    found = []
    for run in runs["lbfgs"]:
        best = best_within(run, budget)
        found.append(None if best is None else run["records"][0]["value"] + share * (best - run["records"][0]["value"]))
    return found


def _reaching(runs: dict[str, Runs], axis: str, quick: bool) -> str:
    rows = []
    for name, group in runs.items():
        for share in SHARES:
            target = levels(group, share, quick)
            cells = []
            for method in e7.METHODS:
                budget = e7.trainings(method, quick)
                cells.append(quartiles([None if level is None else first_at(run, level, axis, budget)
                                        for run, level in zip(group[method], target)]))  # fmt: skip
            rows.append([f"{name}, {100 * share:g} %", *cells])
    return markdown(["", *[LABELS[method] for method in e7.METHODS]], rows)


def _values(runs: dict[str, Runs], quick: bool) -> str:
    common, rows = e7.trainings("lbfgs", quick), []
    for name, group in runs.items():
        for method in e7.METHODS:
            budget = e7.trainings(method, quick)
            start = [run["records"][0] if run else {} for run in group[method]]
            rows.append([
                f"{name}, {LABELS[method]}", quartiles([r.get("value") for r in start], 4),
                quartiles([best_within(run, common) for run in group[method]], 4),
                f"{budget}", quartiles([best_within(run, budget) for run in group[method]], 4),
                quartiles([r.get("accuracy") for r in start], 3, 100),
                quartiles([best_within(run, common, key="accuracy") for run in group[method]], 3, 100),
                quartiles([best_within(run, budget, key="accuracy") for run in group[method]], 3, 100),
                quartiles([run.get("seconds") for run in group[method]], 2),
                sum(run.get("status") == "second_order" for run in group[method]),
            ])  # fmt: skip
    header = ["", "loss at start", f"after {common}", "trainings", "after these", "test % at start",
              f"after {common}", "at the end", "seconds",
              "certified"]  # fmt: skip
    return markdown(header, rows)


def _weights(runs: dict[str, Runs]) -> str:
    rows = []
    for name, group in runs.items():
        for method in e7.METHODS:
            weights = [run["weights"] for run in group[method] if run.get("weights")]
            if weights:
                cells = [quartiles([w[rate] for w in weights], 2, 100) for rate in sorted(weights[0])]
                rows.append([f"{name}, {LABELS[method]}", *cells])
    return markdown(["", "sound", "half wrong", "wholly wrong"], rows) if rows else "(no such problem was run)"


def _figure(group: Runs, folder: Path, name: str) -> str:
    panels = [("trainings", "value", "validation loss"), ("oracle_calls", "value", "validation loss"),
              ("seconds", "value", "validation loss"), ("trainings", "accuracy", "test accuracy")]  # fmt: skip
    path = folder / f"E7_{name}.png"
    labelled = {LABELS[method]: [run for run in group[method] if run] for method in e7.METHODS}
    axes = {"trainings": "trainings", "oracle_calls": "oracle calls", "seconds": "seconds"}
    bands(path, labelled, [(axis, key, axes[axis], label) for axis, key, label in panels], best="value")
    return f"![{name}](figures/{path.name})"


def _tuning(results: Results, quick: bool) -> str:
    problems, rows = e7.QUICK_PROBLEMS if quick else e7.PROBLEMS, []
    for name, problem in problems.items():
        dx = e7.size(problem)
        for method in e7.METHODS:
            grid = e7.settings(method, dx)
            chosen = e7.best_setting(name, method, dx, results)
            tried = [f"{_text(options)}: {number(e7.lowest(results.get(f'{name}-{method}-tune{i}', {})), 4)}"
                     for i, options in enumerate(grid)]  # fmt: skip
            if len(grid) > 1:
                rows.append([f"{name}, {LABELS[method]}", _text(chosen), "; ".join(tried)])
    return markdown(["", "chosen", "validation loss on the tuning seed"], rows)


def _text(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"


ABOUT = f"""## What was run

Two searches of daily practice, each minimised over the same hyperparameters by gradients and by search:

- **l2_N**: logistic regression, `mean BCE(train) + sum_j exp(x_group(j)) w_j^2 + 1e-4 b^2`, one L2 weight for each of N
groups of features, validated by
  mean BCE. 20 Newsgroups, rec.* against sci.*, log(1 + count) of the 200 most frequent tokens, rows of length 1, 300
  training and 300 validation documents, the official test set. The groups are neighbours in frequency. x starts at -5;
  bounds -12 .. 2.
- **mixture_N**: softmax regression on N sources, `sum_k softmax(x)_k mean CE(source k) + 0.01 |w|^2`, validated by mean
CE on 300 clean
  samples. Fashion-MNIST averaged to 7 x 7, 30 samples a source; a quarter of the sources has all labels wrong (shifted
  by 1..9), a quarter half of them. x starts at 0 (all alike); bounds -5 .. 5.

Float64, dx = N; dy = 201 and 500. `auto` and LFSBA have all defaults; L-BFGS and Adam use exact hypergradients; TPE is
Optuna's. All train the learner by the library's Newton-CG to a relative error of 1e-10, warm-started at the learner
trained last. **Trainings** are counted by the library (`counts.lower_solves`): one for each value, with or without
gradient, line searches included. Methods with gradients have {e7.GRADIENT_TRAININGS}, searches {e7.SEARCH_TRAININGS}.
What a training does not contain, and oracle calls and seconds do: the adjoint system of a gradient, the
products of a Hessian, and LFSBA's second lower level beside the first (found by Newton steps from it, not counted as a
training). A seed draws the split, the label noise and the search. Everything is reported for the best point found so
far. Medians (quartiles) over the
seeds."""

REACHING = f"""Trainings until the validation loss has fallen by 90 % and 99 % of what L-BFGS gains in
{e7.GRADIENT_TRAININGS} trainings on the same seed. "2 of 5": so
many seeds got there within the method's trainings."""

VALUES = """"certified": runs that ended by themselves at a point with gradient below 1e-6 and no negative curvature
(only second-order methods look)."""

WEIGHTS = """Per cent of the mixture, by the share of wrong labels in a source, at the end of the run."""

TUNING = f"""Every method but `auto` and LFSBA, which were not tuned, has three settings, tried with all its trainings
on a seed of its own ({e7.TUNING_SEED}); the lowest validation
loss chooses. `box` scales the searched box about its centre."""
