"""E3: 20 Newsgroups, one L2 weight per feature: methods within equal CPU seconds, published and tuned settings."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments import figures, newsgroups
from experiments.budget import follow_cpu, within
from experiments.studies.base import Results, Study, Task
from experiments.studies.tables import markdown
from experiments.studies.tabulate import file_name, median, packed, unpacked

TUNING_SEED, SEEDS = 100, (0, 1, 2)
TUNING_SECONDS, SECONDS, LONG_SECONDS, QUICK_SECONDS, OUTER = 10.0, 40.0, 120.0, 0.5, 45
DIVERGED = 10.0  # validation CE from which a point is left out of the figure
LONG = ("RAHGD", "L-BFGS", "auto (ours)", "ifsba (ours)")

#: as published: T = 10 lower steps of length 100, 10 steps of CG, upper steps of 100; the paper's M counts |s|^3 / 3
_INNER = {"lower_steps": 10, "lower_lr": 100.0}
_ADJOINT = {**_INNER, "adjoint_steps": 10}
_IFSBA = {"period": 1, "scheme": "forward", "adaptive": False, "penalty": 10.0, "solver": "chebyshev", "chebyshev_order": 10,
          "subproblem": "gradient", "lower": {"name": "agd", "steps": 10, "step": 100.0, "momentum": 0.9}}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "AID": ("aid", {"lr": 100.0, **_ADJOINT}),
    "ITD": ("itd", {"lr": 100.0, **_INNER}),
    "F2BA": ("f2ba", {"lr": 100.0, "penalty": 10.0, **_INNER}),
    "RAHGD": ("rahgd", {"lr": 100.0, **_ADJOINT}),
    "IFSBA": ("ifsba", {**_IFSBA, "cubic_reg": 2.0, "spectrum": [2e-5, 4e-3]}),
}

#: (upper step, lower step): three settings each; PAID takes what was best for AID, PRAHGD what was best for RAHGD
_STEPS = ((1e2, 300.0), (1e3, 100.0), (1e3, 300.0))
_LARGE_STEPS = ((1e4, 300.0), (1e5, 100.0), (1e5, 300.0))  # where the hypergradient of few lower steps is small
#: of the lower level and the linear systems: two pairs of fixed ones, and on demand
_EXACT = ({"accuracy": None, "lower_tol": 0.1, "linear_tol": 0.1}, {"accuracy": None, "lower_tol": 0.01, "linear_tol": 0.1},
          {"accuracy": 0.3})  # fmt: skip
GRIDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "AID": ("aid", [{**_ADJOINT, "lr": lr, "lower_lr": lower} for lr, lower in _STEPS]),
    "ITD": ("itd", [{**_INNER, "lr": lr, "lower_lr": lower} for lr, lower in _LARGE_STEPS]),
    "F2BA": ("f2ba", [{**_INNER, "lr": lr, "lower_lr": lower, "penalty": 10.0} for lr, lower in _LARGE_STEPS]),
    "RAHGD": ("rahgd", [{**_ADJOINT, "lr": lr, "lower_lr": lower, "restart_radius": 100.0} for lr, lower in _STEPS]),
    "IFSBA": ("ifsba", [{**_IFSBA, "cubic_reg": M, "spectrum": [low, 4e-3]}
                        for M, low in ((2e-4, 2e-5), (2e-4, 2e-4), (2e-2, 2e-4))]),
    "ifsba (ours)": ("ifsba", [{"lower_tol": 0.1, "linear_tol": 0.1, "hessian_tol": 0.3, "penalty": penalty, "model_tol": tol}
                               for penalty, tol in ((1e4, 0.1), (1e2, 0.1), (1e2, 0.3))]),
    "auto (ours)": ("auto", [{"solver": "cg", "hessian_tol": 0.3, **tolerances} for tolerances in _EXACT]),
    "L-BFGS": ("lbfgs", [{"solver": "cg", **tolerances} for tolerances in _EXACT]),
}  # fmt: skip
_SAME_AS = {"PAID": ("paid", "AID"), "PRAHGD": ("prahgd", "RAHGD")}
QUICK = {"features": 3000, "limit": 200}


@lru_cache(maxsize=1)
def _data(data_dir: str | None, seed: int, features: int, limit: int | None) -> newsgroups.Newsgroups:
    """Kept for the next task of the same worker."""
    return newsgroups.load(data_dir, seed, features=features, limit=limit)


def run_one(
    method: str, settings: list[dict[str, Any]], seconds: float, seed: int, max_steps: int = 10**6,
    features: int = newsgroups.FEATURES, limit: int | None = None, data_dir: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs of `method` with each of `settings`, CPU `seconds` each: {"runs", "records": as of follow_cpu, "best": index}.

    Best is the lowest validation CE of the learner held within the budget, which is what all minimise. A record has
    val, val_accuracy, test, test_accuracy of that learner.
    """
    data = _data(data_dir, seed, features, limit)

    def measure(_: Any, y: Any) -> dict[str, float]:
        W = y.reshape(data.features, data.classes)
        (val, val_accuracy), (test, test_accuracy) = newsgroups.judge(data.val, W), newsgroups.judge(data.test, W)
        return {"val": val, "val_accuracy": val_accuracy, "test": test, "test_accuracy": test_accuracy}

    runs = []
    for options in settings:
        problem = newsgroups.build(data)
        run = follow_cpu(problem, method, options, measure, seconds=seconds, max_steps=max_steps, seed=seed)
        runs.append({**run, "options": options})
    ends = [within(run["records"], seconds) for run in runs]
    values = [float("inf") if end is None or not end["val"] == end["val"] else end["val"] for end in ends]
    return {**packed(runs), "best": values.index(min(values)), "documents": len(data.train.labels)}


def _task(
    key: str, method: str, settings: list[dict[str, Any]], seconds: float, seed: int, quick: bool, **options: Any
) -> Task:
    arguments = {"method": method, "settings": settings, "seconds": seconds, "seed": seed, **options}
    if quick:
        arguments |= QUICK
    return Task(key, "experiments.studies.e3:run_one", arguments, memory_gb=2.5)


def tune(quick: bool, results: Results) -> list[Task]:
    """Three settings of every method, on a seed (a split) of its own. The quick version takes the first."""
    return [_task(f"tune-{file_name(label)}", method, settings, TUNING_SECONDS, TUNING_SEED, quick)
            for label, (method, settings) in ({} if quick else GRIDS).items()]  # fmt: skip


def tuned(label: str, results: Results) -> tuple[str, dict[str, Any]]:
    """(method, best setting of the tuning stage; the first one where there was none)."""
    method, source = _SAME_AS.get(label, (GRIDS[label][0] if label in GRIDS else "", label))
    found = results.get(f"tune-{file_name(source)}", {})
    return method, GRIDS[source][1][found.get("best", 0)]


def compare(quick: bool, results: Results) -> list[Task]:
    """Tuned settings on every seed; on the first one also the published settings (45 iterations) and some
    longer runs."""
    tasks = []
    labels = ("AID", "L-BFGS") if quick else (*GRIDS, *_SAME_AS)
    for seed in (0,) if quick else SEEDS:
        for label in labels if seed == 0 else GRIDS:  # PAID and PRAHGD are AID and RAHGD but for a little noise
            method, options = tuned(label, results)
            seconds = QUICK_SECONDS if quick else SECONDS
            tasks.append(_task(f"{file_name(label)}-seed{seed}", method, [options], seconds, seed, quick))
    for label in () if quick else LONG:
        method, options = tuned(label, results)
        tasks.append(_task(f"long-{file_name(label)}-seed0", method, [options], LONG_SECONDS, 0, quick))
    for label, (method, options) in () if quick else PUBLISHED.items():
        tasks.append(
            _task(f"published-{file_name(label)}-seed0", method, [options], SECONDS, 0, quick, max_steps=OUTER)
        )
    return tasks


def _row(label: str, runs: list[dict[str, Any]], seconds: float) -> list[str]:
    ends = [within(run["records"], seconds) for run in runs]

    def column(key: str, digits: str = ".3f", scale: float = 1.0) -> str:
        return median([None if end is None or end[key] is None else scale * end[key] for end in ends], digits)

    tests = [[r["test"] for r in run["records"] if r["test"] is not None and r["seconds"] <= seconds] for run in runs]
    lowest = median([min(values, default=None) for values in tests])
    return [label, column("val"), column("test"), column("test_accuracy", ".1f", 100.0), lowest, column("step", ".0f"),
            column("oracle_calls", ".0f"), f"{max(run['peak_gb'] for run in runs):.1f}"]  # fmt: skip


HEADER = ["method", "validation CE", "test CE", "test accuracy %", "lowest test CE on the way", "iterations",
          "gradients and products", "peak GB"]  # fmt: skip


def report(results: Results, figures_dir: Path, quick: bool) -> str:
    """Tables at the end of the budget and early in it, the settings chosen, and curves of the first seed."""
    good = {key: result for key, result in results.items() if "failed" not in result}
    seconds = QUICK_SECONDS if quick else SECONDS
    labels = ("AID", "L-BFGS") if quick else (*GRIDS, *_SAME_AS)

    def runs_of(prefix: str) -> list[dict[str, Any]]:
        found = [unpacked(result)[0] for key, result in good.items() if key.rpartition("-seed")[0] == prefix]
        return [run for run in found if run["records"]]

    compared = {label: runs_of(file_name(label)) for label in labels}
    compared = {label: runs for label, runs in compared.items() if runs}
    published = {label: runs_of(f"published-{file_name(label)}") for label in PUBLISHED}
    parts = ["The learner that a method holds after so many CPU seconds, median [quartiles] over the splits (seeds). Validation"
             " CE is the upper objective; test CE and accuracy are of the official test set."]  # fmt: skip
    for budget in (seconds,) if quick else (TUNING_SECONDS, seconds):
        rows = [_row(label, runs, budget) for label, runs in compared.items()]
        parts += [f"### Tuned settings, {budget:g} CPU seconds", markdown(HEADER, rows)]
    rows = [_row(f"{label}, published", runs, seconds) for label, runs in published.items() if runs]
    if rows:
        parts += [f"### Published settings, at most {OUTER} iterations and {seconds:g} CPU seconds, seed 0",
                  markdown(HEADER, rows)]  # fmt: skip
    longer = {label: runs_of(f"long-{file_name(label)}") for label in LONG}
    rows = [_row(label, runs, LONG_SECONDS) for label, runs in longer.items() if runs]
    if rows:
        parts += [f"### Tuned settings, {LONG_SECONDS:g} CPU seconds, seed 0", markdown(HEADER, rows)]
    rows = [[label, f"`{tuned(label, results)[0]}`", f"`{tuned(label, results)[1]}`"] for label in compared]
    parts += [
        "### Settings chosen from three each, on a split of their own",
        markdown(["method", "name", "options"], rows),
    ]
    curves = {label: [record for record in runs[0]["records"] if (record["val"] or DIVERGED) < DIVERGED]
              for label, runs in (compared | longer).items() if runs}  # fmt: skip
    name = figures.curves(
        figures_dir / "E3_curves.png", curves,
        {"val": "validation CE", "test": "test CE", "test_accuracy": "test accuracy"},
        {"seconds": "CPU seconds", "oracle_calls": "gradients and products"}, log_columns=["oracle_calls"],
        log_rows=["val", "test"],
    ).name  # fmt: skip
    parts.append(f"![Curves of one split](figures/{name})")
    return "\n\n".join(parts)


STUDY = Study("E3", "20 Newsgroups: one L2 weight for each of 130,107 features", (tune, compare), report,
              needs=("experiments.newsgroups:read_counts",))  # fmt: skip
