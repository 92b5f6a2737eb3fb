"""Accuracy on demand against fixed tolerances, by oracle calls of whole runs to the same gradient.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy_on_demand [--seeds 3] [--settings digits ...] [--max-seconds 120]

digits: hyper-cleaning of scikit-learn's digits as in configs/hyper_cleaning/digits.yaml (dx 1000, dy 650), to
|gradient| <= 1e-5; ill-conditioned: a lower level of condition 1e4 (dx 5, dy 20), to 1e-7. The final gradient of every
run is that of the default tolerances. Prints medians over seeds, and in brackets the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torch_bilevel as tb
from benchmarks.common import machine

ACCURACIES = (None, 0.3, 0.1, 0.03)


def ill_conditioned(seed: int, dx: int = 5, dy: int = 20) -> tb.BilevelProblem:
    """y'Hy/2 - y'Bx with cond(H) = 1e4 in a random basis and a mild nonlinearity."""
    gen = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(dy, dy, generator=gen, dtype=torch.float64))[0]
    H, B = Q @ torch.diag(torch.logspace(-2, 2, dy, dtype=torch.float64)) @ Q.T, 0.1 * Q[:, :dx]
    t = torch.randn(dy, generator=gen, dtype=torch.float64)

    def g(x: Tensor, y: Tensor) -> Tensor:
        return y @ (H @ y) / 2 - y @ (B @ x) + torch.cosh(x / 3).sum() * (y * y).sum() / 100

    def f(x: Tensor, y: Tensor) -> Tensor:
        return ((y - t) ** 2).sum() / 2 + (x**4).sum() / 50 + (x * x).sum() / 100

    x, y = torch.ones(dx, dtype=torch.float64), torch.zeros(dy, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(f, g, x, y)


def digits(seed: int) -> tb.BilevelProblem:
    """The demonstration's problem."""
    from experiments.hyper_cleaning import Config, build

    return build(Config(n_train=1000, n_val=200, n_test=597, seed=seed, device="cpu")).problem


LAZY = {"period": "adaptive"}
#: setting: (problem of a seed, tolerance, [(method, its options, lower solver, linear solver)])
SETTINGS: dict[str, tuple[Callable[[int], tb.BilevelProblem], float, list[tuple[str, dict[str, Any], str, str]]]] = {
    "ill-conditioned": (ill_conditioned, 1e-7, [
        ("lbfgs", {}, "agd", "auto"), ("lbfgs", {}, "agd", "cg"), ("dlcrn", LAZY, "agd", "auto"),
        ("lbfgs", {}, "newton_cg", "auto"), ("lbfgs", {}, "newton_cg", "cg"), ("dlcrn", LAZY, "newton_cg", "auto"),
    ]),
    "digits": (digits, 1e-5, [
        ("lbfgs", {}, "newton_cg", "auto"), ("lbfgs", {}, "newton_cg", "cg"), ("lbfgs", {}, "agd", "auto"),
        ("dlcrn", LAZY, "newton_cg", "auto"), ("auto", {}, "newton_cg", "auto"),
    ]),
}  # fmt: skip


def calls(problem: tb.BilevelProblem, method: str, eps: float, max_seconds: float, **options: Any) -> tuple[int, bool]:
    """(oracle calls, whether the run ended at a small gradient)."""
    result = tb.minimize(problem, method, gradient_tol=eps, max_steps=1000, max_seconds=max_seconds, **options)
    return result.counts.oracle_calls, result.status.converged


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-seconds", type=float, default=120.0, help="of one run; one that needs more is marked *")
    args = parser.parse_args(argv)
    print(f"{machine()}; oracle calls, median (least-most) of {args.seeds} seeds\n")
    heads = " | ".join("fixed" if accuracy is None else str(accuracy) for accuracy in ACCURACIES)
    print(f"| problem | method | lower, linear solver | {heads} |")
    print("|" + "---|" * (3 + len(ACCURACIES)))
    for name in args.settings:
        make, eps, rows = SETTINGS[name]
        for method, options, lower, solver in rows:
            cells = []
            for accuracy in ACCURACIES:
                given = {"lower": lower, "solver": solver, "accuracy": accuracy, **options}
                found = [calls(make(seed), method, eps, args.max_seconds, **given) for seed in range(args.seeds)]
                numbers = [number for number, _ in found]
                star = "" if all(done for _, done in found) else "*"
                cells.append(f"{statistics.median(numbers):.0f}{star} ({min(numbers)}-{max(numbers)})")
            print(f"| {name} | {method} | {lower}, {solver} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
