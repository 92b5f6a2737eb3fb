"""E4: few-shot meta-learning, a linear head per task on a shared backbone: methods within equal CPU seconds."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments import episodes, figures
from experiments.budget import within
from experiments.meta_training import train
from experiments.studies.base import Results, Study, Task
from experiments.studies.tables import markdown
from experiments.studies.tabulate import file_name, median, packed, unpacked

TUNING_SEED, SEEDS, QUICK_SEEDS = 100, (0, 1, 2, 3, 4), (0,)
TUNING_SECONDS, SECONDS, QUICK_SECONDS, LONG_SECONDS = 5.0, 15.0, 0.5, 40.0
SMALL = {"meta_batch": 2, "judged": 5}

#: as published: 20 lower steps of 1/100, lambda 1, M 1 (ours is twice that, for |s|^3 / 6); momenta and order as in E2
_IFSBA = {"period": 1, "scheme": "forward", "adaptive": False, "penalty": 1.0, "solver": "chebyshev", "chebyshev_order": 8,
          "subproblem": "gradient", "lower": {"name": "agd", "steps": 20, "step": 0.01, "momentum": 0.9}}  # fmt: skip
_UPPER = [{"lr": 0.1}, {"lr": 3e-3, "upper_optimizer": "Adam"}, {"lr": 1e-2, "upper_optimizer": "Adam"}]
#: three settings each
GRIDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "AID": ("aid", [{"lower_steps": 20, **upper} for upper in _UPPER]),
    "ITD": ("itd", [{"lower_steps": 20, **upper} for upper in _UPPER]),
    "F2BA": ("f2ba", [{"lower_steps": 20, **upper} for upper in _UPPER]),
    "Adam, exact hypergradients": ("adam", [{"lr": lr, "lower_tol": 1e-3, "linear_tol": 1e-3} for lr in (1e-3, 3e-3, 1e-2)]),
}  # fmt: skip
#: not tuned: no setting finishes a step within the seconds of a tuning run. Ours: lazy over meta-batches, and no
#: quadrature
SECOND_ORDER: dict[str, tuple[str, dict[str, Any]]] = {
    "IFSBA": ("ifsba", {**_IFSBA, "cubic_reg": 2.0}),
    "ifsba (ours)": ("ifsba", {"hessian_tol": 0.3, "lower_tol": 1e-2, "linear_tol": 1e-2, "penalty": 10.0,
                               "scheme": "forward", "model_tol": 0.3}),
}  # fmt: skip
REFERENCE = "Adam, exact hypergradients"


@lru_cache(maxsize=1)
def _classes(source: str, data_dir: str | None, seed: int) -> dict[str, episodes.Classes]:
    """Kept for the next task of the same worker."""
    return episodes.load_classes(source, data_dir, seed)


def run_one(
    method: str, settings: list[dict[str, Any]], seconds: float, seed: int, source: str = "mnist_fashion",
    meta_batch: int = 16, judged: int = 100, looks: int = 6, data_dir: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`train` with each of `settings`: {"runs", "records": of each, "best": of the highest last accuracy on val episodes}."""
    classes = _classes(source, data_dir, seed)
    runs = [{**train(method, options, classes, seconds=seconds, seed=seed, meta_batch=meta_batch, judged=judged, looks=looks),
             "options": options} for options in settings]  # fmt: skip
    values = [run["records"][-1]["val_accuracy"] if run["status"] != "failed" else 0.0 for run in runs]
    return {**packed(runs), "best": values.index(max(values))}


def _task(key: str, method: str, settings: list[dict[str, Any]], seconds: float, seed: int, quick: bool) -> Task:
    arguments = {"method": method, "settings": settings, "seconds": seconds, "seed": seed}
    looks = {TUNING_SECONDS: 1, LONG_SECONDS: 12}
    arguments |= SMALL if quick else {"looks": looks[seconds]} if seconds in looks else {}
    return Task(key, "experiments.studies.e4:run_one", arguments, memory_gb=2.0)


def tune(quick: bool, results: Results) -> list[Task]:
    """Three settings of every first-order method, on a seed (classes, backbone, episodes) of its own. Quick: the first."""
    return [_task(f"tune-{key(label)}", method, settings, TUNING_SECONDS, TUNING_SEED, quick)
            for label, (method, settings) in ({} if quick else GRIDS).items()]  # fmt: skip


def key(label: str) -> str:
    return file_name(label.split(",")[0])


def chosen(label: str, results: Results) -> dict[str, Any]:
    if label in SECOND_ORDER:
        return SECOND_ORDER[label][1]
    return GRIDS[label][1][results.get(f"tune-{key(label)}", {}).get("best", 0)]


def compare(quick: bool, results: Results) -> list[Task]:
    """The chosen settings on every seed; then the second-order methods and a reference, longer, on the first seed."""
    tasks = [_task(f"{key(label)}-seed{seed}", method, [chosen(label, results)], QUICK_SECONDS if quick else SECONDS, seed, quick)
             for seed in (QUICK_SEEDS if quick else SEEDS) for label, (method, _) in GRIDS.items()
             if label == REFERENCE or not quick]  # fmt: skip
    for label in ("ifsba (ours)",) if quick else (REFERENCE, *SECOND_ORDER):
        method = (GRIDS | SECOND_ORDER)[label][0]
        tasks.append(_task(f"long-{key(label)}-seed0", method, [chosen(label, results)],
                           QUICK_SECONDS if quick else LONG_SECONDS, 0, quick))  # fmt: skip
    return tasks


def _rows(runs: dict[str, list[dict[str, Any]]], seconds: float) -> list[list[str]]:
    rows = []
    for label, found in runs.items():
        ends = [within(run["records"], seconds) for run in found]
        failed = sum(run["status"] == "failed" for run in found)
        rows.append([label, median([_percent(end["test_accuracy"]) for end in ends], ".1f"),
                     median([end["test"] for end in ends]), median([end["step"] for end in ends], ".0f"),
                     median([end["oracle_calls"] for end in ends], ".0f"), f"{failed} of {len(found)}"])  # fmt: skip
    return rows


HEADER = ["method", "test accuracy %", "test CE", "meta-batches", "gradients and products", "runs that failed"]


def report(results: Results, figures_dir: Path, quick: bool) -> str:
    """Accuracy on episodes of unseen classes after so many CPU seconds, and its curves."""

    def runs_of(labels: Any, prefix: str) -> dict[str, list[dict[str, Any]]]:
        found = {label: [unpacked(result)[0] for name, result in results.items()
                         if "failed" not in result and name.startswith(f"{prefix}{key(label)}-seed")]
                 for label in labels}  # fmt: skip
        return {label: runs for label, runs in found.items() if runs}

    runs, long = runs_of(GRIDS, ""), runs_of((REFERENCE, *SECOND_ORDER), "long-")
    parts = ["5-way 5-shot accuracy on 100 episodes of classes that training never saw, every head at its minimiser; median"
             " [quartiles] over the seeds (class split, initial backbone, meta-batches)."]  # fmt: skip
    for seconds in (QUICK_SECONDS,) if quick else (TUNING_SECONDS, SECONDS):
        parts += [f"### First order, after {seconds:g} CPU seconds", markdown(HEADER, _rows(runs, seconds))]
    untrained = median([_percent(run["records"][0]["test_accuracy"]) for run in next(iter(runs.values()))], ".1f")
    parts.append(f"The untrained backbone: {untrained} %.")
    for seconds in (QUICK_SECONDS,) if quick else (SECONDS, LONG_SECONDS):
        parts += [f"### Second order, seed 0, after {seconds:g} CPU seconds", markdown(HEADER, _rows(long, seconds))]
    rows = [
        [label, f"`{(GRIDS | SECOND_ORDER)[label][0]}`", f"`{chosen(label, results)}`"] for label in {**runs, **long}
    ]
    parts += ["### Settings: first order chosen from three each, on a seed of their own; second order as given",
              markdown(["method", "name", "options"], rows)]  # fmt: skip
    curves = {label: found[0]["records"] for label, found in runs.items()}
    curves |= {f"{label}, long": found[0]["records"] for label, found in long.items()}
    name = figures.curves(
        figures_dir / "E4_curves.png", curves, {"test_accuracy": "test accuracy", "val": "validation CE"},
        {"seconds": "CPU seconds", "oracle_calls": "gradients and products"}, log_columns=["oracle_calls"],
    ).name  # fmt: skip
    parts.append(f"![Curves of seed 0](figures/{name})")
    return "\n\n".join(parts)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


STUDY = Study("E4", "Few-shot learning: heads per task on a shared backbone", (tune, compare), report,
              needs=("mnist", "fashion_mnist"))  # fmt: skip
