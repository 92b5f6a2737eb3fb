"""One run of hyper-cleaning, followed by the exact upper objective and the test loss: the tasks of E1 and E2."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import comparison, hyper_cleaning
from experiments.baselines import detect_clean, evaluate, newton_softmax, train_softmax
from experiments.config import load
from experiments.studies.base import Task

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "hyper_cleaning"
#: learners of at most so many parameters are trained to the end by Newton's method at every record
MAX_EXACT = 100


def published(name: str) -> dict[str, Any]:
    """Method options of configs/hyper_cleaning/NAME.yaml."""
    return load(hyper_cleaning.Config, CONFIGS / f"{name}.yaml").method_options


def run_task(
    key: str,
    data: Mapping[str, Any],
    seed: int,
    method: str,
    options: Mapping[str, Any],
    max_seconds: float,
    max_steps: int = 1_000_000,
    finish: bool = True,
    memory_gb: float = 1.0,
) -> Task:
    """The task of `run_one`."""
    arguments = {
        "data": dict(data),
        "seed": seed,
        "method": method,
        "options": dict(options),
        "max_seconds": max_seconds,
        "max_steps": max_steps,
        "finish": finish,
    }
    return Task(key, "experiments.studies.cleaning:run_one", arguments, memory_gb)


@functools.lru_cache(maxsize=1)
def _problem(settings: str, data_dir: str | None) -> tuple[hyper_cleaning.Task, Tensor, Tensor]:
    """Task of a configuration, built once for the runs that follow one another, and its starting x and y."""
    task = hyper_cleaning.build(_config(json.loads(settings)), data_dir)
    return task, task.problem.x, task.problem.y


def _config(settings: Mapping[str, Any]) -> hyper_cleaning.Config:
    return hyper_cleaning.Config(**{"device": "cpu", **settings})


def _started(data: Mapping[str, Any], seed: int, data_dir: str | None) -> hyper_cleaning.Task:
    task, x, y = _problem(json.dumps({**data, "seed": seed}, sort_keys=True), data_dir)
    task.problem.write(x=x, y=y)
    return task


def clock_of(device: str) -> Callable[[], float]:
    """Processor seconds on a CPU; on CUDA those of the wall, everything asked of the GPU being done."""
    if device != "cuda":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def run_one(
    data: Mapping[str, Any],
    seed: int,
    method: str,
    options: Mapping[str, Any],
    max_seconds: float,
    max_steps: int,
    finish: bool = True,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """One method on one problem, for `max_seconds` of `clock_of` its device (one thread) or `max_steps`.

    Args:
        data: keys of `hyper_cleaning.Config` that describe the problem. options: of the method.
        finish: also train y*(x) and the retrained learner at the end (minutes for 50,000 samples).

    Returns:
        status, seconds, counts; records, each with step, seconds, oracle_calls, hessians, the scores of the learner
        held (test_loss, test_accuracy, validation_loss), f1, and for small learners `objective`, the exact
        upper objective f(x, y*(x)). The last ones again under their names, with precision, recall,
        and with `finish` `objective`, as `exact_` the test scores of y*(x), and those of the retrained learner.
    """
    task = _started(data, seed, data_dir)
    split, reg, small = task.split, float(data["reg"]), task.problem.dy <= MAX_EXACT
    learned: dict[str, Tensor] = {}

    def exact(x: Tensor) -> dict[str, float]:
        """Scores of the lower solution y*(x), trained anew by a solver that shares no code with the methods."""
        inputs, labels, weights = split.train.inputs, task.noisy, task.sample_weights(x)
        if small:
            learner = newton_softmax(inputs, labels, split.classes, reg, weights, start=learned.get("W"))
            learned["W"] = torch.cat([learner.weight, learner.bias[:, None]], 1).detach()
        else:
            learner = train_softmax(inputs, labels, split.classes, reg, weights).learner
        loss, accuracy = evaluate(learner, split.test.inputs, split.test.labels)
        objective, _ = evaluate(learner, split.val.inputs, split.val.labels)
        return {"objective": objective, "exact_test_loss": loss, "exact_test_accuracy": accuracy}

    def measure(x: Tensor, y: Tensor) -> dict[str, float]:
        record = {**hyper_cleaning.scores(task, y), "f1": detect_clean(task.sample_weights(x), task.corrupted).f1}
        return {**record, "objective": exact(x)["objective"]} if small else record

    followed = comparison.follow(
        task.problem,
        method,
        options,
        measure,
        max_steps=max_steps,
        gradient_tol=1e-7,
        seed=seed,
        growth=1.15,
        max_seconds=max_seconds,
        bounds=task.bounds,
        learner=True,
        clock=clock_of(data.get("device", "cpu")),
    )
    x, y = followed.pop("x"), followed.pop("y")
    detection = detect_clean(task.sample_weights(x), task.corrupted)
    answer = {
        **followed,
        "steps": followed["records"][-1]["step"] if followed["records"] else 0,
        **hyper_cleaning.scores(task, y),
        "precision": detection.precision,
        "recall": detection.recall,
        "f1": detection.f1,
    }
    if finish:
        retrained = hyper_cleaning.retrain(_config(data), task, task.sample_weights(x).detach())
        answer |= exact(x) | {f"retrained_{key}": retrained[key] for key in ("test_loss", "test_accuracy")}
    return answer


def references(data: Mapping[str, Any], seed: int, data_dir: str | None = None) -> dict[str, Any]:
    """Test scores of the supervised learners on the same split: noisy, noisy_and_validation, validation_only, clean."""
    return hyper_cleaning.train_references(_config(data), _started(data, seed, data_dir))
