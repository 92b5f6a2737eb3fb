"""A whole run: seconds and oracle calls until the value is within a gap of the best, and until the gradient is small.

    python -m benchmarks.whole_run --data-dir DATA --threads 2 --problems digits_cleaning [--methods auto lbfgs]

Problems: hyper-cleaning of digits (dx = 1000, dy = 650, float64) and of MNIST-5000 (5000, 7850, float32), 50 % noise,
sigmoid weights from 0; one log L2 weight per feature on digits (dx = 64, 200 training samples, float64) and MNIST (784,
1000 samples, float32), from exp(-6). Everything starts at the same x. The gap is to the lowest value that any method
found on that seed, of those compared. First-order step lengths are chosen from a grid on a seed of their own (1000), by
the value reached in the same time. Runs are kept in ``--cache``, one file per (problem, method, seed), and taken from
there: a comparison can be made in parts; ``--fresh`` makes them anew.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Skip, begin, finish, machine, markdown, number, parser_of
from benchmarks.problems import Setting, cleaning, images, per_feature_l2, synthetic_cleaning
from benchmarks.runs import METHODS, PEER, library_run, peer_run
from experiments.report import write_json

GAPS = (1e-2, 1e-3, 1e-4)
EPS = 1e-6
TUNING_SEED = 1000


def digits_cleaning(args, seed: int) -> Setting:
    return cleaning("digits", args.data_dir, (None, None, None), seed, 0.01, dtype=torch.float64)


def mnist_cleaning(args, seed: int) -> Setting:
    return cleaning("mnist", args.data_dir, (None, None, None), seed, 1e-3)


def digits_l2(args, seed: int) -> Setting:
    return per_feature_l2("digits", args.data_dir, (200, 700, 597), seed)


def mnist_l2(args, seed: int) -> Setting:
    return per_feature_l2("mnist", args.data_dir, (1000, 2000, 1000), seed).to(torch.float32)


def tiny_cleaning(args, seed: int) -> Setting:
    """Of the smoke test."""
    setting = synthetic_cleaning(30 + seed % 7, 4, 3).to(torch.float64)
    setting.x = torch.zeros_like(setting.x)
    return setting


def tiny_l2(args, seed: int) -> Setting:
    """Of the smoke test."""
    inputs, labels = images(60, 4, 3, seed)
    return Setting("tiny L2", (16, 3), True, "log_l2", 1e-3, (inputs[:30], labels[:30]), (inputs[30:], labels[30:]),
                   torch.full((16,), -6.0, dtype=torch.float64))  # fmt: skip


PROBLEMS: dict[str, tuple[Callable[[Any, int], Setting], int, float]] = {  # maker, seeds, seconds a run
    "digits_cleaning": (digits_cleaning, 10, 30.0),
    "digits_l2": (digits_l2, 10, 30.0),
    "mnist_cleaning": (mnist_cleaning, 3, 300.0),
    "mnist_l2": (mnist_l2, 3, 300.0),
    "tiny_cleaning": (tiny_cleaning, 1, 5.0),
    "tiny_l2": (tiny_l2, 1, 5.0),
}


class Runs:
    """Runs of one problem, from the cache or made now."""

    def __init__(self, args, name: str):
        self.args, self.name = args, name
        self.make, self.seeds, seconds = PROBLEMS[name]
        self.max_seconds = seconds if args.run_seconds is None else args.run_seconds
        self.seeds = self.seeds if args.seeds is None else args.seeds
        self.folder = args.cache / "whole_run" / (name if args.device == "cpu" else f"{name}-{args.device}")

    def get(self, label: str, seed: int) -> dict[str, Any]:
        """The run, or {'skipped': reason}."""
        path = self.folder / f"{label.replace(', ', '-').replace(' ', '_')}-{seed}.json"
        if path.is_file() and not self.args.fresh:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["status"] != "max_seconds" or kept["max_seconds"] >= self.max_seconds:
                return kept
        try:
            found = self.run(label, seed, self.learning_rate(label), self.max_seconds)
        except Skip as reason:
            return {"skipped": str(reason)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**found, "max_seconds": self.max_seconds, "machine": machine()})
        last = found["records"][-1]
        print(f"  {self.name} {label} seed {seed}: {number(last['seconds'])} s, value {last['value']:.6f},"
              f" |gradient| {last['gradient']:.1e}, {found['status']}", flush=True)  # fmt: skip
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, label: str, seed: int, lr: float | None, max_seconds: float) -> dict[str, Any]:
        setting, steps = self.make(self.args, seed).to(device=self.args.device), self.args.max_steps
        if label == PEER:
            return peer_run(setting, lr, max_seconds=max_seconds, max_steps=steps, eps=EPS)
        return library_run(setting, label, lr, max_seconds=max_seconds, max_steps=steps, eps=EPS, seed=seed)

    def learning_rate(self, label: str) -> float | None:
        """Of the grid the one that reaches the lowest value on the tuning seed; Adam's serves the peer's Adam too."""
        label = "adam" if label == PEER else label
        grid = METHODS[label][2] if label in METHODS else ()
        if not grid:
            return None
        if self.name.endswith("l2") and label != "adam":  # ten times the gradient of hyper-cleaning
            grid = tuple(lr / 10 for lr in grid)
        path = self.folder / f"tuned-{label}.json"
        if path.is_file() and not self.args.fresh:
            return json.loads(path.read_text(encoding="utf-8"))["lr"]
        finals = {}
        for lr in grid:
            found = self.run(label, TUNING_SEED, lr, self.max_seconds * self.args.tune_share)
            finals[lr] = math.inf if found["status"].startswith("failed") else lowest(found)
        lr = min(finals, key=finals.get)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"lr": lr, "values": {str(k): v for k, v in finals.items()}})
        return lr


def first(records: list[dict], key: str, level: float, axis: str) -> float | None:
    """The axis at the first record whose key is at most level."""
    return next((r[axis] for r in records if r[key] is not None and r[key] <= level), None)  # null in a JSON: NaN


def reached(found: list[float | None]) -> str:
    """'median (lowest-highest), k of n' of those that got there."""
    there = sorted(v for v in found if v is not None)
    if not there:
        return "never"
    text = number(float(statistics.median(there)))
    text += "" if there[0] == there[-1] else f" ({number(float(there[0]))}-{number(float(there[-1]))})"
    return text if len(there) == len(found) else f"{text}, {len(there)} of {len(found)}"


def lowest(run: dict) -> float:
    """The lowest finite value of a run."""
    values = [r["value"] for r in run["records"] if r["value"] is not None]
    return min((value for value in values if not math.isnan(value)), default=math.inf)


def summarise(name: str, runs: dict[str, list[dict]], axis: str, best: list[float]) -> dict[str, dict[str, list]]:
    """label -> criterion -> one number per seed."""
    found: dict[str, dict[str, list]] = {}
    for label, of_seeds in runs.items():
        row = found[label] = {}
        for gap in GAPS:
            row[f"gap {gap:g}"] = [first(r["records"], "value", b + gap, axis) for r, b in zip(of_seeds, best)]
        row[f"gradient {EPS:g}"] = [first(r["records"], "gradient", EPS, axis) for r in of_seeds]
    return found


def ratio(a: list[float | None], b: list[float | None]) -> str:
    """Median over the seeds that b reached of a / b, a seed that a did not reach counting as infinite."""
    pairs = [(math.inf if x is None else x / y) for x, y in zip(a, b) if y is not None]
    if not pairs:
        return "unknown (never reached)"
    value = statistics.median(pairs)
    return f"{number(value)}" if math.isfinite(value) else "inf (never there on most seeds)"


def claims(runs: dict[str, list[dict]], seconds: dict, best: list[float], l2: bool) -> list[str]:
    """The comparisons that issue from these runs, in words."""
    lines = []
    if l2 and {"auto", "lbfgs"} <= runs.keys():
        levels = []
        for run in runs["lbfgs"]:
            after = [r for r in run["records"] if r["evaluations"] >= 100] or [run["records"][-1]]
            levels.append((after[0]["value"], after[0]["seconds"]))
        for label, of_seeds in runs.items():
            times = [first(r["records"], "value", v, "seconds") for r, (v, _) in zip(of_seeds, levels)]
            text = ratio(times, [s for _, s in levels])
            missed = sum(t is None for t in times)
            lines.append(f"L-BFGS's value after 100 evaluations: {label}'s time / L-BFGS's = {text};"
                         f" never on {missed} seeds")  # fmt: skip
        return lines
    if {"auto", PEER} <= runs.keys():
        text = ratio(seconds[PEER]["gap 0.001"], seconds["auto"]["gap 0.001"])
        lines.append(f"gap 0.001: seconds of {PEER} / of auto = {text}")
    if {"auto", "lbfgs"} <= runs.keys():
        for key in ("gap 0.001", f"gradient {EPS:g}"):
            lines.append(f"{key}: seconds of lbfgs / of auto = {ratio(seconds['lbfgs'][key], seconds['auto'][key])}")
        low = sum(lowest(a) <= lowest(b) + 1e-9 for a, b in zip(runs["auto"], runs["lbfgs"]))
        lines.append(f"final value of auto at least as low as lbfgs's on {low} of {len(best)} seeds")
    return lines


def compare(args, name: str) -> dict[str, Any]:
    """All methods on all seeds of a problem: two tables, and the claims."""
    jobs, runs, absent = Runs(args, name), {}, {}
    for seed in range(jobs.seeds):
        for label in args.methods:
            if label in absent:
                continue
            found = jobs.get(label, seed)
            if "skipped" in found:
                absent[label] = found["skipped"]
            else:
                runs.setdefault(label, []).append(found)
    best = [min(lowest(of_seeds[i]) for of_seeds in runs.values()) for i in range(jobs.seeds)]
    print(f"\n## {name}: {jobs.seeds} seeds, at most {number(jobs.max_seconds)} s a run; best values "
          f"{number(min(best))}-{number(max(best))}")  # fmt: skip
    record: dict[str, Any] = {"absent": absent, "best": best}
    for axis, title in (("seconds", "Seconds"), ("calls", "Oracle calls (gradients and products)")):
        table = record[axis] = summarise(name, runs, axis, best)
        keys = next(iter(table.values())).keys()
        rows = []
        for label, row in table.items():
            final = statistics.median(lowest(r) - b for r, b in zip(runs[label], best))
            hessians = statistics.median(r["records"][-1]["hessians"] for r in runs[label])
            lr = runs[label][0].get("lr")
            rows.append([label, *(reached(row[key]) for key in keys), f"{final:.1e}", hessians, lr])
        print(f"\n{title} to:\n")
        print(markdown(["method", *keys, "final gap", "Hessians", "lr"], rows), flush=True)
    record["claims"] = claims(runs, record["seconds"], best, name.endswith("l2"))
    print("\n" + "\n".join(f"- {line}" for line in record["claims"]))
    for label, reason in absent.items():
        print(f"Not here: {label} ({reason})")
    return record


def main(argv: list[str] | None = None) -> dict:
    everybody = [*METHODS, PEER]
    parser = parser_of(__doc__)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), help="default: the four of the docstring")
    parser.add_argument("--methods", nargs="+", default=everybody, choices=everybody)
    parser.add_argument("--seeds", type=int, help="default 10 on digits, 3 on MNIST")
    parser.add_argument("--run-seconds", type=float, help="of one run; default 30 on digits, 300 on MNIST")
    parser.add_argument("--max-steps", type=int, default=100_000)
    parser.add_argument("--tune-share", type=float, default=1 / 3, help="of the run's seconds, a step length")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--fresh", action="store_true", help="make cached runs anew")
    args = begin(parser, argv)
    if args.quick:
        args.problems = args.problems or ["tiny_cleaning", "tiny_l2"]
        args.run_seconds, args.max_steps = args.run_seconds or 1.0, min(args.max_steps, 15)
    record: dict[str, Any] = {}
    for name in args.problems or [key for key in PROBLEMS if not key.startswith("tiny")]:
        try:
            record[name] = compare(args, name)
        except Skip as reason:
            print(f"\n## {name}: skipped: {reason}")
            continue
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
