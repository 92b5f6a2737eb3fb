"""Hyper-cleaning from the command line: a small run, the same run killed and resumed, and errors without
tracebacks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import torch_bilevel as tb
from experiments import hyper_cleaning
from experiments.__main__ import main
from experiments.config import load
from experiments.hyper_cleaning import Config, build, retrain, scores
from experiments.report import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["n_train=100", "n_val=50", "n_test=100", "gradient_tol=0", "max_steps=6", "name=small"]


def small(*overrides: str) -> Config:
    return load(Config, None, [*SMALL, *overrides])


def run(runs: Path, *arguments: str) -> Path:
    """A finished run by `main`; its directory."""
    assert main(["hyper_cleaning", "--runs-dir", str(runs), *arguments]) == 0
    return max((runs / "hyper_cleaning").iterdir(), key=lambda p: p.stat().st_mtime)


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k}
    return value


@pytest.mark.parametrize("weight", ["sigmoid", "clip"])
def test_losses_against_their_formulas(weight: str) -> None:
    task = build(small(f"weight={weight}", "reg=0.02"))
    train, val, problem = task.split.train, task.split.val, task.problem
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(problem.dx, generator=generator, dtype=torch.float64) * 3 - 1
    y = torch.randn(problem.dy, generator=generator, dtype=torch.float64)
    W, b = y[:640].reshape(10, 64), y[640:]
    c = 1 / (1 + torch.exp(-x)) if weight == "sigmoid" else x.clamp(0, 1)
    losses = -(train.inputs @ W.T + b).log_softmax(1)[torch.arange(100), task.noisy]
    lower = sum(w * function(x, y) for w, function in problem.pieces("lower"))
    upper = sum(w * function(x, y) for w, function in problem.pieces("upper"))
    assert lower == pytest.approx(float((c * losses).sum() / 100 + 0.02 * (y**2).sum()), rel=1e-12)
    assert upper == pytest.approx(float(cross_entropy(val.inputs @ W.T + b, val.labels)), rel=1e-12)
    assert torch.allclose(task.sample_weights(x), c)
    assert problem.x.unique().tolist() == [0.0 if weight == "sigmoid" else 0.5]
    assert task.bounds == (None if weight == "sigmoid" else (0.0, 1.0))
    found = scores(task, y)
    logits = task.split.test.inputs @ W.T + b
    assert found["validation_loss"] == pytest.approx(float(upper), rel=1e-12)
    assert found["test_loss"] == pytest.approx(
        float(cross_entropy(logits, task.split.test.labels)), rel=1e-12
    )
    assert found["test_accuracy"] == pytest.approx(
        float((logits.argmax(1) == task.split.test.labels).double().mean())
    )


def test_retraining_is_the_documented_objective() -> None:
    config = small()
    task = build(config)
    train, val = task.split.train, task.split.val
    # weight 0 for all training samples: (sum_val CE) / (n + n_val) + reg |w|^2, the validation problem with
    # reg (n + n_val) / n_val
    retrained = retrain(config, task, torch.zeros(100, dtype=torch.float64))
    from experiments.baselines import evaluate, train_softmax

    peer = train_softmax(val.inputs, val.labels, 10, config.reg * 150 / 50)
    assert retrained["converged"]
    loss, _ = evaluate(peer.learner, task.split.test.inputs, task.split.test.labels)
    assert retrained["test_loss"] == pytest.approx(loss, abs=1e-5)
    assert len(train.labels) == 100


def test_initial_learner_of_the_published_setting() -> None:
    assert build(small()).problem.y.abs().max() == 0
    task = build(small("init_sgd_steps=20", "init_sgd_lr=0.5"))
    assert task.problem.y.abs().max() > 0.01


def test_run_directory_is_complete_and_consistent(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run(tmp_path, *SMALL, "tensorboard=true")
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert written >= {"config.yaml", "versions.json", "metrics.jsonl", "checkpoint.pt", "summary.json",
                       "figures/curves.png", "figures/weights.png", "figures/lowest_weights.png"}  # fmt: skip
    assert any(name.startswith("tensorboard/") for name in written)
    assert load(Config, folder / "config.yaml") == small("tensorboard=true")
    records = read_metrics(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    assert [r["step"] for r in records] == list(range(7))
    assert records[-1]["value"] < records[0]["value"]
    assert summary["value"] == records[-1]["value"]
    assert summary["test_loss"] == pytest.approx(
        records[-1]["test_loss"], abs=0.01
    )  # y at the closing lower solution
    for name, number in records[-1]["counts"].items():  # the closing lower solution may cost some calls more
        assert number <= summary["counts"][name]
    assert summary["counts"]["hessians"] == records[-1]["counts"]["hessians"]
    assert summary["f1"] == records[-1]["f1"]
    assert (summary["steps"], summary["method"], summary["dataset"], summary["status"]) == (
        6,
        "lfsba",
        "digits",
        "max_steps",
    )
    for key in ("noisy", "noisy_and_validation", "validation_only", "clean", "retrained"):
        assert 0.3 < summary[f"{key}_test_accuracy"] <= 1
        assert summary["references"][key]["converged"]
    assert summary["min_eigenvalue"] is not None
    assert summary["counts"]["hessians"] >= 1
    out = capsys.readouterr().out
    assert "retrained on weighted training + validation" in out
    assert out.rstrip().endswith(f"run directory: {folder}")


def test_interrupted_and_resumed_is_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = run(tmp_path / "whole", *SMALL, "certify=false")
    calls = iter(range(100))
    original = hyper_cleaning.scores

    def interrupted(*arguments: object) -> dict[str, float]:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(hyper_cleaning, "scores", interrupted)
    parent = tmp_path / "cut"
    assert main(["hyper_cleaning", "--runs-dir", str(parent), *SMALL, "certify=false"]) == 130
    (folder,) = (parent / "hyper_cleaning").iterdir()
    assert f"--resume {folder}" in capsys.readouterr().err
    assert len(read_metrics(folder / "metrics.jsonl")) == 4
    assert main(["hyper_cleaning", "--runs-dir", str(parent), "--resume"]) == 0
    same_run(whole, folder)
    assert (
        main(["hyper_cleaning", "--resume", str(folder), "max_steps=8"]) == 0
    )  # and on, beyond its first goal
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == list(range(9))


def same_run(a: Path, b: Path) -> None:
    assert without_times(json.loads((a / "summary.json").read_text())) == without_times(
        json.loads((b / "summary.json").read_text())
    )
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (a, b))
    assert [without_times(r) for r in first] == [without_times(r) for r in second]


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path: Path) -> None:
    arguments = [*SMALL, "n_train=60", "n_val=30", "n_test=40", "max_steps=10", "certify=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # bits depend on the number of threads

    def start(runs: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments", "hyper_cleaning", "--runs-dir", str(runs), *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    whole = start(tmp_path / "whole", *arguments)
    killed = start(tmp_path / "cut", *arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = list((tmp_path / "cut").glob("hyper_cleaning/*/metrics.jsonl"))
        if metrics and len(metrics[0].read_text().splitlines()) >= 4:
            break
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    (folder,) = (tmp_path / "cut" / "hyper_cleaning").iterdir()
    assert 4 <= len(read_metrics(folder / "metrics.jsonl")) <= 11
    assert not (folder / "summary.json").exists()
    assert start(tmp_path / "cut", "--resume", str(folder)).wait() == 0
    assert whole.wait() == 0
    same_run(next((tmp_path / "whole" / "hyper_cleaning").iterdir()), folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hyper_cleanin"], ["hyper_cleaning"]),
        (["hyper_cleaning", "--config", "configs/hyper_cleaning/digit.yaml"], ["digits.yaml"]),
        (["hyper_cleaning", "noise_rat=0.3"], ["noise_rate"]),
        (["hyper_cleaning", "noise_rate=lots"], ["noise_rate", "lots"]),
        (["hyper_cleaning", "method=newton"], ["lfsba"]),
        (["hyper_cleaning", "method_options.penalti=3"], ["penalty"]),
        (["hyper_cleaning", "dataset=australian"], ["australian", "LIBSVM", "--data-dir"]),
        (["hyper_cleaning", "--resume"], ["nothing to resume"]),
        (["hyper_cleaning", "--resume", "nowhere"], ["nowhere", "config.yaml"]),
        (["hyper_cleaning", "--resume", "reg=1"], ["reg", "max_steps"]),
    ],
)
def test_user_errors_have_status_2_and_no_traceback(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_BILEVEL_DATA", str(tmp_path))
    assert main([*arguments, "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error


def test_the_module_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "hyper_cleaning" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_solver_is_reported_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise tb.errors.SolverError("no convergence")

    monkeypatch.setattr(tb, "minimize", failing)
    assert main(["hyper_cleaning", "--runs-dir", str(tmp_path), *SMALL]) == 1
    error = capsys.readouterr().err
    assert "SolverError: no convergence" in error
    assert "--resume" in error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits_levels(seed: int, tmp_path: Path) -> None:
    """Cleaning with 200 clean digits beats both the noisy training set and the clean samples alone."""
    folder = run(
        tmp_path, "--config", str(ROOT / "configs" / "hyper_cleaning" / "digits.yaml"), f"seed={seed}"
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] > summary["noisy_test_accuracy"] + 0.01
    assert summary["test_accuracy"] > summary["validation_only_test_accuracy"] - 0.005
    assert summary["f1"] > 0.85


@pytest.mark.slow
def test_mnist_levels(tmp_path: Path, data_dir: Path) -> None:
    """Levels of an independent computation with exact hypergradients: noisy 66.8, bilevel 89.8, validation
    90.1, retrained 90.4.
    """
    config = str(ROOT / "configs" / "hyper_cleaning" / "mnist.yaml")
    folder = run(tmp_path, "--config", config, "--data-dir", str(data_dir), "max_steps=25", "certify=false")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["noisy_test_accuracy"] == pytest.approx(0.668, abs=0.02)
    assert summary["validation_only_test_accuracy"] == pytest.approx(0.901, abs=0.01)
    assert summary["test_accuracy"] == pytest.approx(0.898, abs=0.01)
    assert summary["retrained_test_accuracy"] == pytest.approx(0.904, abs=0.01)
    assert summary["f1"] > 0.8


@pytest.mark.gpu
def test_on_cuda(tmp_path: Path) -> None:
    """From the command line to the figures, with the numbers of the CPU."""
    found = {}
    for device in ("cpu", "cuda"):
        folder = run(tmp_path / device, *SMALL, f"device={device}", "max_steps=3")
        found[device] = json.loads((folder / "summary.json").read_text())
        assert (folder / "figures" / "curves.png").is_file()
    assert found["cuda"]["value"] == pytest.approx(found["cpu"]["value"], rel=1e-4)
    assert found["cuda"]["retrained_test_loss"] == pytest.approx(found["cpu"]["retrained_test_loss"], rel=1e-4)
