"""Few-shot classification: trains a shared backbone on miniImageNet, FC100 or episodes of MNIST and Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import episodes, figures
from experiments.comparison import cached, split_options, spread
from experiments.config import ConfigError, check_choice
from experiments.meta_training import train
from experiments.report import table, write_json

DEFAULTS: dict[str, Any] = {
    "adam": {"lr": 3e-3, "lower_tol": 1e-3, "linear_tol": 1e-3},
    "aid": {"lower_steps": 20, "lr": 3e-3, "upper_optimizer": "Adam"},
    "ifsba": {
        "period": 1,
        "penalty": 100.0,
        "hessian_tol": 0.1,
        "lower_tol": 1e-3,
        "linear_tol": 1e-3,
        "model_tol": 0.3,
    },
}

COLUMNS = ("test_accuracy", "test", "val_accuracy", "step", "oracle_calls")


@dataclass
class Config:
    """Keys of configs/few_shot/*.yaml.

    Attributes:
        name: of the run. source: one of episodes.SOURCES. seeds: of class split, backbone and meta-batches.
        methods: label -> {method: name (default the label), option: ...}; empty for DEFAULTS.
        ways, shots: of an episode (15 queries a class). meta_batch: tasks in a step. width: channels of the backbone.
        seconds: CPU seconds of a run. judged: episodes in the judgement. looks: judgements of a run.
    """

    name: str = "mnist_fashion"
    source: str = "mnist_fashion"
    seeds: list[int] = field(default_factory=lambda: [0])
    methods: dict[str, Any] = field(default_factory=dict)
    ways: int = 5
    shots: int = 5
    meta_batch: int = 16
    width: int = 16
    seconds: float = 60.0
    judged: int = 100
    looks: int = 20

    def __post_init__(self) -> None:
        check_choice("source", self.source, episodes.SOURCES)
        if not self.seeds or min(self.ways - 1, self.shots, self.meta_batch, self.judged, self.looks) < 1:
            raise ConfigError(
                "seeds must not be empty; ways at least 2; shots, meta_batch, judged and looks at least 1"
            )
        if self.width < 4 or self.width % 4 or not self.seconds > 0:
            raise ConfigError(f"width={self.width} must be a multiple of 4 (groups of GroupNorm), seconds positive")
        self.methods = self.methods or {label: dict(options) for label, options in DEFAULTS.items()}
        split_options(self.methods)


RESUME_KEYS: tuple[str, ...] = ()


def run(config: Config, run_dir: Path, data_dir: str | Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Every method on every seed; writes runs/*.json, summary.json and figures/few_shot.png into `run_dir`."""
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in config.methods}
    for seed in config.seeds:
        classes = episodes.load_classes(config.source, data_dir, seed)
        for label, (method, options) in split_options(config.methods).items():

            def one(method=method, options=options, seed=seed, classes=classes) -> dict[str, Any]:
                return train(method, options, classes, seconds=config.seconds, seed=seed, meta_batch=config.meta_batch,
                             width=config.width, judged=config.judged, looks=config.looks, ways=config.ways,
                             shots=config.shots)  # fmt: skip

            results[label].append(cached(run_dir, f"{label}-{seed}", one, resume))
            last = results[label][-1]["records"][-1]
            print(f"{label}, seed {seed}: test accuracy {last['test_accuracy']:.3f} after {last['step']} meta-batches",
                  flush=True)  # fmt: skip
    rows = [{"label": label, "statuses": sorted({r["status"] for r in runs}),
             **{key: [r["records"][-1][key] for r in runs] for key in COLUMNS}} for label, runs in results.items()]  # fmt: skip
    summary = {"source": config.source, "seconds": config.seconds, "seeds": config.seeds, "rows": rows}
    write_json(run_dir / "summary.json", summary)
    figures.curves(run_dir / "figures" / "few_shot.png", {label: runs[0]["records"] for label, runs in results.items()},
                   {"test_accuracy": "test accuracy", "val": "validation CE"},
                   {"seconds": "CPU seconds", "oracle_calls": "gradients and products"},
                   log_columns=["oracle_calls"])  # fmt: skip
    return summary


def describe(summary: Mapping[str, Any]) -> str:
    """Where each method stands when its seconds are spent; median (lowest-highest) of the seeds."""
    rows = [
        [row["label"], *(spread(row[key]) for key in COLUMNS), ", ".join(row["statuses"])] for row in summary["rows"]
    ]
    return table(["method", "test accuracy", "test CE", "val accuracy", "meta-batches", "calls", "ended"], rows)
