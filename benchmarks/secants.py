"""Secant corrections of a lazy Hessian on and off, by count: medians over seeds of what they save, at the same points.

    OMP_NUM_THREADS=1 python -m benchmarks.secants [--seeds 10] [--json FILE]

LFSBA and lazy DLCRN with their defaults to |gradient| <= 1e-5 and no negative curvature, on five families of problems
(the saddle and the ridge are single ones). Entries: steps, Hessians and oracle calls with corrections over those without.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch_bilevel as tb
from benchmarks.adaptive_vs_grid import ridge, saddle
from benchmarks.common import markdown
from benchmarks.lazy_vs_fresh import cleaning, nonconvex
from benchmarks.problems import per_feature_l2
from torch_bilevel.methods.model import HessianModel

METHODS = {"lfsba": ("lfsba", {}), "lazy dlcrn": ("dlcrn", {"period": "adaptive"})}


def digits(seed: int) -> tb.BilevelProblem:
    return per_feature_l2("digits", None, (200, 700, 597), seed).problem()


def families(seeds: int) -> dict[str, list[Callable[[], tb.BilevelProblem]]]:
    """Name -> one maker a seed."""
    return {
        "strict saddle": [saddle],
        "ridge, a weight per feature": [ridge],
        "nonconvex": [lambda i=i: nonconvex(i, 10, 8) for i in range(seeds)],
        "hyper-cleaning": [lambda i=i: cleaning(i, samples=30, held=20, features=4) for i in range(seeds)],
        "digits, a weight per pixel": [lambda i=i: digits(i) for i in range(seeds)],
    }


def counts(make: Callable[[], tb.BilevelProblem], label: str) -> list[int] | None:
    """[steps, Hessians, oracle calls] of a run; None where it does not end at a second-order point."""
    name, options = METHODS[label]
    try:
        result = tb.minimize(make(), name, max_steps=300, gradient_tol=1e-5, **options)
    except tb.BilevelError:
        return None
    if result.status is not tb.Status.SECOND_ORDER:
        return None
    return [result.history[-1].step, result.counts.hessians, result.counts.oracle_calls]


def compare(makers: list[Callable[[], tb.BilevelProblem]], label: str) -> tuple[list[list[float]], int]:
    """Quotients of each seed where both runs got there, and of how many seeds they did not."""
    found, correct = [], HessianModel.correct
    for make in makers:
        corrected = counts(make, label)
        HessianModel.correct = lambda self, s, y: None
        try:
            plain = counts(make, label)
        finally:
            HessianModel.correct = correct
        if corrected and plain:
            found.append([a / b for a, b in zip(corrected, plain)])
    return found, len(makers) - len(found)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    record: dict = {}
    for label in METHODS:
        rows = []
        for family, makers in families(args.seeds).items():
            found, missing = compare(makers, label)
            record[f"{label}, {family}"] = found
            medians = [f"{statistics.median(q):.2f} ({min(q):.2f}-{max(q):.2f})" for q in zip(*found)] or ["-"] * 3
            rows.append([family, len(found), missing, *medians])
        print(f"\n## {label}\n")
        print(markdown(["problem", "runs", "not both there", "steps", "Hessians", "oracle calls"], rows), flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
