"""Data hyper-cleaning: one learned weight per training sample, so that wrong labels lose their influence.

    upper: f(w)    = (1/n_val) sum_j CE_j(w)                     on clean validation samples
    lower: g(x, w) = (1/n) sum_i c(x_i) CE_i(w) + reg |w|^2      on noisy training samples

w is a linear softmax layer; c = sigmoid (x unconstrained, from 0) or clip to [0, 1] (as published; from 0.5,
steps projected). reg |w|^2 includes the bias, so g is strongly convex. The learner of the bilevel problem is
compared with the same layer trained on the noisy set, the clean version of it, the validation set, both
together, and on the *weighted* training set plus validation set:

    retrained: (sum_i c_i CE_i + sum_j CE_j) / (n + n_val) + reg |w|^2        which is what a user would ship.

References: Franceschi et al. (2017), section 5.1, for the task; the papers named in the configurations for
the settings.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import torch_bilevel as tb
from experiments import figures
from experiments.baselines import detect_clean, evaluate, sgd_start, train_softmax, zero_linear
from experiments.config import ConfigError, check_choice
from experiments.data import DATASETS, NOISE_KINDS, STANDARDIZATIONS, Split, corrupt, make_split
from experiments.report import Metrics, read_metrics, record_of, table, write_json
from torch_bilevel.methods import make_method


@dataclass
class Config:
    """Keys of configs/hyper_cleaning/*.yaml.

    Attributes:
        name: of the run; run directories begin with it.
        dataset: digits, mnist, fashion_mnist, breast_cancer or australian.
        n_train, n_val, n_test, fractions: sizes of the parts, or shares of the data set; None for its usual
            split.
        standardize: `global` or `feature`; None for the usual of the data set (images global, LIBSVM per
            feature).
        noise_rate, noise_kind: see `experiments.data.corrupt`.
        weight: c, `sigmoid` or `clip`.
        reg: coefficient of |w|^2.
        seed: of split, noise and method.
        device: auto, cpu or cuda. dtype: float32 or float64. compile: see `torch_bilevel.BilevelProblem`.
        init_sgd_steps, init_sgd_lr: full-batch gradient steps of the learner on noisy training + validation
            set before the run.
        method, method_options: name and constructor options; `lower: {name: agd, ...}` chooses the lower
            solver.
        max_steps, gradient_tol, max_seconds: when to stop.
        checkpoint_every: outer steps between checkpoints.
        certify: compute the exact gradient norm and smallest Hessian eigenvalue at the result.
        tensorboard: also write TensorBoard scalars.
    """

    name: str = "digits"
    dataset: str = "digits"
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    fractions: list[float] | None = None
    standardize: str | None = None
    noise_rate: float = 0.5
    noise_kind: str = "uniform"
    weight: str = "sigmoid"
    reg: float = 0.01
    seed: int = 0
    device: str = "auto"
    dtype: str = "float64"
    compile: bool = False
    init_sgd_steps: int = 0
    init_sgd_lr: float = 0.1
    method: str = "lfsba"
    method_options: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 50
    gradient_tol: float = 1e-5
    max_seconds: float | None = None
    checkpoint_every: int = 1
    certify: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, DATASETS)
        check_choice("noise_kind", self.noise_kind, NOISE_KINDS)
        check_choice("weight", self.weight, ("sigmoid", "clip"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("dtype", self.dtype, ("float32", "float64"))
        if self.standardize is not None:
            check_choice("standardize", self.standardize, STANDARDIZATIONS)
        if not self.name or "/" in self.name:
            raise ConfigError(f"name={self.name!r} must be a file name, it names the run directory")
        if not 0.0 <= self.noise_rate <= 1.0:
            raise ConfigError(f"noise_rate={self.noise_rate} must be in [0, 1]")
        if not self.reg > 0.0:
            raise ConfigError(f"reg={self.reg} must be positive: it makes the lower level strongly convex")
        for key in ("max_steps", "init_sgd_steps"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}={getattr(self, key)} must not be negative")
        if self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every={self.checkpoint_every} must be at least 1")
        make_method(self.method, self.method_options)  # an unknown option is an error before anything is run


# What --resume may change.
RESUME_KEYS = ("max_steps", "max_seconds", "gradient_tol", "certify", "tensorboard")


@dataclass(frozen=True)
class Task:
    """Data, noise and bilevel problem of one configuration."""

    split: Split
    noisy: Tensor
    corrupted: Tensor
    problem: tb.BilevelProblem
    weight: str
    bounds: tuple[float, float] | None

    def sample_weights(self, x: Tensor) -> Tensor:
        """c(x), (n,)."""
        return sample_weights(self.problem.hyperparameters(x)["weight"], self.weight)


def sample_weights(x: Tensor, kind: str) -> Tensor:
    """c(x) in [0, 1]: `sigmoid` or `clip`."""
    return x.sigmoid() if kind == "sigmoid" else x.clamp(0.0, 1.0)


def build(config: Config, data_dir: str | Path | None = None) -> Task:
    """Data, label noise, learner and problem of `config`, all decided by its seed."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but this PyTorch sees no CUDA device; use device=auto or device=cpu")
    dtype = getattr(torch, config.dtype)
    sizes = (config.n_train, config.n_val, config.n_test)
    split = make_split(
        config.dataset, data_dir, sizes, config.fractions, config.standardize, config.seed, dtype
    )
    train, val = split.train, split.val
    noisy, corrupted = corrupt(train.labels, config.noise_rate, config.noise_kind, split.classes, config.seed)
    split, noisy = _moved(split, device), noisy.to(device)
    train, val = split.train, split.val

    learner = zero_linear(train.inputs.shape[1], split.classes, dtype, device)
    if config.init_sgd_steps:
        inputs, labels = torch.cat([train.inputs, val.inputs]), torch.cat([noisy, val.labels])
        sgd_start(learner, inputs, labels, config.reg, config.init_sgd_steps, config.init_sgd_lr)
    n = len(noisy)
    start = 0.0 if config.weight == "sigmoid" else 0.5
    hyper = {"weight": torch.full((n,), start, dtype=dtype, device=device)}

    def lower_loss(
        learner: nn.Module, hyper: Mapping[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        inputs, labels, index = batch
        c = sample_weights(hyper["weight"][index], config.weight)
        losses = cross_entropy(learner(inputs), labels, reduction="none")
        return (c * losses).mean() + config.reg * sum(p.square().sum() for p in learner.parameters())

    def upper_loss(learner: nn.Module, hyper: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return cross_entropy(learner(inputs), labels)

    lower_batch = (train.inputs, noisy, torch.arange(n, device=device))
    problem = tb.BilevelProblem(
        learner, hyper, lower_loss, upper_loss, lower_batch, (val.inputs, val.labels), compile=config.compile
    )
    bounds = (0.0, 1.0) if config.weight == "clip" else None
    return Task(split, noisy, corrupted, problem, config.weight, bounds)


def _moved(split: Split, device: str) -> Split:
    parts = {key: getattr(split, key) for key in ("train", "val", "test")}
    moved = {
        key: replace(part, inputs=part.inputs.to(device), labels=part.labels.to(device))
        for key, part in parts.items()
    }
    return replace(split, **moved)


def train_references(config: Config, task: Task) -> dict[str, dict[str, Any]]:
    """Test loss and accuracy of the supervised learners that hyper-cleaning is compared with."""
    train, val = task.split.train, task.split.val
    both = torch.cat([train.inputs, val.inputs])
    sets = {
        "noisy": (train.inputs, task.noisy),
        "noisy_and_validation": (both, torch.cat([task.noisy, val.labels])),
        "validation_only": (val.inputs, val.labels),
        "clean": (train.inputs, train.labels),
    }
    return {name: _trained_scores(config, task, inputs, labels) for name, (inputs, labels) in sets.items()}


def retrain(config: Config, task: Task, weights: Tensor) -> dict[str, Any]:
    """Scores of the learner trained on the weighted training set plus the validation set with weight 1."""
    train, val = task.split.train, task.split.val
    inputs, labels = torch.cat([train.inputs, val.inputs]), torch.cat([task.noisy, val.labels])
    return _trained_scores(
        config, task, inputs, labels, torch.cat([weights, torch.ones_like(val.inputs[:, 0])])
    )


def _trained_scores(
    config: Config, task: Task, inputs: Tensor, labels: Tensor, weights: Tensor | None = None
) -> dict[str, Any]:
    trained = train_softmax(inputs, labels, task.split.classes, config.reg, weights)
    loss, accuracy = evaluate(trained.learner, task.split.test.inputs, task.split.test.labels)
    optimality = {"gradient_norm": trained.gradient_norm, "converged": trained.converged}
    return {"test_loss": loss, "test_accuracy": accuracy, **optimality}


def scores(task: Task, y: Tensor) -> dict[str, float]:
    """Validation loss (the upper objective f), test loss and test accuracy of the learner y (dy,)."""
    parameters = task.problem.learner_parameters(y)

    def learner(inputs: Tensor) -> Tensor:
        return functional_call(task.problem.learner, parameters, (inputs,))

    loss, accuracy = evaluate(learner, task.split.test.inputs, task.split.test.labels)
    validation_loss, _ = evaluate(learner, task.split.val.inputs, task.split.val.labels)
    return {"test_accuracy": accuracy, "test_loss": loss, "validation_loss": validation_loss}


def run(
    config: Config, run_dir: Path, data_dir: str | Path | None = None, resume: bool = False
) -> dict[str, Any]:
    """Build, minimise, compare, draw; returns the summary that is also written to run_dir/summary.json.

    Writes metrics.jsonl (a line per outer step), checkpoint.pt, summary.json and figures/*.png into
    `run_dir`. With `resume` the run continues from run_dir/checkpoint.pt, if it got that far, with the
    numbers it would have had.
    """
    method = make_method(config.method, config.method_options)
    task = build(config, data_dir)
    checkpoint = run_dir / "checkpoint.pt"

    with Metrics(run_dir, config.tensorboard) as metrics:

        def follow(report: Any, x: Tensor, y: Tensor) -> dict[str, float]:
            extra = {**scores(task, y), "f1": detect_clean(task.sample_weights(x), task.corrupted).f1}
            metrics.write(record_of(report, extra))
            return extra

        result = tb.minimize(
            task.problem,
            method=method,
            max_steps=config.max_steps,
            gradient_tol=config.gradient_tol,
            max_seconds=config.max_seconds,
            bounds=task.bounds,
            callback=follow,
            progress=True,
            checkpoint=checkpoint,
            checkpoint_every=config.checkpoint_every,
            resume=resume and checkpoint.is_file(),
            seed=config.seed,
        )

    weights = task.sample_weights(result.x).detach()
    references = train_references(config, task)
    references["retrained"] = retrain(config, task, weights)
    summary = summarize(config, task, result, weights, references)
    write_json(run_dir / "summary.json", summary)
    draw(run_dir, config, task, weights, references)
    return summary


def summarize(
    config: Config, task: Task, result: Any, weights: Tensor, references: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What summary.json holds: cost, accuracies, references, detection of clean samples, optimality."""
    detection = detect_clean(weights, task.corrupted)
    started = time.perf_counter()
    certificate = tb.certify(task.problem, result.x) if config.certify else None
    return {
        "method": config.method,
        "dataset": config.dataset,
        "seed": config.seed,
        "status": result.status,
        "steps": result.history[-1].step if result.history else 0,
        "seconds": result.seconds,
        "value": float(result.value),
        "gradient_norm": float(result.gradient_norm),
        "exact_gradient_norm": None if certificate is None else float(certificate.gradient_norm),
        "min_eigenvalue": None if certificate is None else float(certificate.min_eigenvalue),
        "min_eigenvalue_error": None if certificate is None else float(certificate.min_eigenvalue_error),
        "certify_seconds": time.perf_counter() - started,
        **scores(task, result.y),
        **{f"{name}_test_accuracy": reference["test_accuracy"] for name, reference in references.items()},
        **{f"{name}_test_loss": reference["test_loss"] for name, reference in references.items()},
        "references": references,
        "precision": detection.precision,
        "recall": detection.recall,
        "f1": detection.f1,
        "corrupted": int(task.corrupted.sum()),
        "n_train": len(task.noisy),
        "n_val": len(task.split.val.labels),
        "n_test": len(task.split.test.labels),
        "counts": result.counts.as_dict(),
    }


def draw(
    run_dir: Path, config: Config, task: Task, weights: Tensor, references: Mapping[str, Mapping[str, Any]]
) -> None:
    """The figures of one run, in run_dir/figures."""
    folder = run_dir / "figures"
    records = read_metrics(run_dir / "metrics.jsonl")
    levels = {
        key: {name.replace("_", " "): reference[key] for name, reference in references.items()}
        for key in ("test_loss", "test_accuracy")
    }
    figures.curves(
        folder / "curves.png",
        {config.method: records},
        {"validation_loss": "upper objective", "test_loss": "test loss", "test_accuracy": "test accuracy"},
        {"seconds": "seconds", "oracle_calls": "gradients and products"},
        levels,
    )
    figures.weight_histogram(folder / "weights.png", weights, task.corrupted)
    if task.split.image_shape is not None:
        images = task.split.train.inputs.reshape(-1, *task.split.image_shape)
        figures.lowest_weights(
            folder / "lowest_weights.png", images, weights, task.noisy, task.split.train.labels
        )


def describe(summary: Mapping[str, Any]) -> str:
    """The closing table: the bilevel learner beside its references."""
    names = {
        "noisy": "noisy training set",
        "noisy_and_validation": "noisy training + validation",
        "validation_only": "validation only",
        "clean": "clean training set (not available in practice)",
    }
    rows = [[label, *_percent(summary, f"{key}_")] for key, label in names.items()]
    rows.insert(3, [f"bilevel, {summary['method']}", *_percent(summary, "")])
    rows.insert(4, ["retrained on weighted training + validation", *_percent(summary, "retrained_")])
    counts = summary["counts"]
    eigenvalue = "not computed" if summary["min_eigenvalue"] is None else f"{summary['min_eigenvalue']:.3g}"
    status = getattr(summary["status"], "name", summary["status"]).lower()
    return "\n".join(
        [
            table(["learner", "test accuracy %", "test loss"], rows),
            f"weight > 1/2 finds clean samples: precision {summary['precision']:.3f}, recall "
            f"{summary['recall']:.3f}, "
            f"F1 {summary['f1']:.3f} ({summary['corrupted']} of {summary['n_train']} labels are wrong)",
            f"{status} after {summary['steps']} steps and {summary['seconds']:.1f} s: hyper-objective "
            f"{summary['value']:.6g}, "
            f"|gradient| {summary['gradient_norm']:.3g}, smallest Hessian eigenvalue {eigenvalue}",
            f"{counts['hessians']} Hessians, {counts['factorisations']} factorisations, {counts['solves']} "
            f"solves, "
            f"{counts['upper_gradients'] + counts['lower_gradients']} gradients, "
            f"{counts['upper_products'] + counts['lower_products']} products",
        ]
    )


def _percent(summary: Mapping[str, Any], prefix: str) -> list[str]:
    return [f"{100 * summary[f'{prefix}test_accuracy']:.1f}", f"{summary[f'{prefix}test_loss']:.4f}"]
