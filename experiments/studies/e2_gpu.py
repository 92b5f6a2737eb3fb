"""E2_GPU: E2 at its published size, 50,000 training samples, on a GPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies import e2
from experiments.studies.base import Results, Study, Task
from experiments.studies.cleaning import run_task

#: wall seconds of a method, everything but measuring counted
BUDGET, BUDGET_TUNING = 5.0, 1.5
#: upper steps tried; with ten times the samples those of E2 end too early
STEPS = (12500, 62500, 312500, 1562500, 7812500)
#: labels of E2 that run here; LFSBA too, which has no time for a step on a CPU
LABELS = (*e2.TUNED, "L-BFGS", "auto (ours)", "LFSBA (ours)", "F2BA published", "IFSBA published, CG")


def data_of(dataset: str, quick: bool) -> dict[str, Any]:
    """The setting of F2BA (50 % uniform noise) on the GPU; the quick version is E2's, on the CPU."""
    return e2.data_of(dataset, "half", full=True, quick=quick) | ({} if quick else {"device": "cuda"})


def tuning(quick: bool, _: Results) -> list[Task]:
    """The grid of upper steps, on MNIST and a seed of its own."""
    data = data_of("mnist", quick)
    seconds, steps = (2.0, 2) if quick else (BUDGET_TUNING, 1_000_000)
    return [
        run_task(f"tune-{label}-{lr:g}", data, e2.TUNING_SEED, method, {**options, "lr": lr}, seconds, steps, False, 4.0)
        for label, (method, options, _) in e2.TUNED.items()
        for lr in (grid_of(label)[1:2] if quick else grid_of(label))
    ]


def grid_of(label: str) -> tuple[float, ...]:
    """The upper steps tried."""
    return e2.TUNED[label][2] if label == "Adam" else STEPS


def runs(quick: bool, results: Results) -> list[Task]:
    """Both data sets, seed by seed; published constants on the first one only."""
    chosen = e2.methods(results, grid_of)
    tasks: list[Task] = []
    for seed in e2.SEEDS[:1] if quick else e2.SEEDS:
        for dataset in e2.DATASETS[:1] if quick else e2.DATASETS:
            data = data_of(dataset, quick)
            name = e2.key(dataset, "half", "references", seed, "gpu")
            tasks.append(Task(name, "experiments.studies.cleaning:references", {"data": data, "seed": seed}, 4.0))
            for label in LABELS:
                if seed != e2.SEEDS[0] and "published" in label or quick and label == "IFSBA published, CG":
                    continue
                method, options = chosen[label]
                name = e2.key(dataset, "half", label, seed, "gpu")
                steps = 2 if quick else 1_000_000
                tasks.append(run_task(name, data, seed, method, options, BUDGET, steps, memory_gb=4.0))
    return tasks


def report(results: Results, figures_dir: Path, quick: bool) -> str:
    from experiments.studies import e2_report  # which needs matplotlib

    about = f"""## What was run

The setting of F2BA as in [E2](E2.md) (50 % uniform noise, reg 0.001, weights `sigmoid(x_i)`, linear softmax layer), at its
published size of 50,000 / 10,000 / 10,000 samples: dx = 50,000, dy = 7850, float32, on one GPU, one process at a time.
Seconds are of the wall, with everything asked of the GPU done and measuring not counted; a run ends after {BUDGET:g} of
them, or at a gradient of 1e-7. Upper steps of AID, ITD, RAHGD, F2BA and Adam are tuned here on MNIST with seed
{e2.TUNING_SEED}. The other terms are those of E2."""
    parts = [about, e2_report.tuning(results, BUDGET_TUNING, grid_of)]
    for dataset in e2.DATASETS:
        parts.append(e2_report.comparison(results, figures_dir, dataset, "half", "gpu", "E2_GPU", "seconds"))
    return "\n\n".join(part for part in parts if part)


STUDY = Study("E2_GPU", "Hyper-cleaning at full size on a GPU", (tuning, runs), report, needs=e2.DATASETS, gpu=True)
