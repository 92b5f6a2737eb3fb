"""Several methods on the same problem over several seeds: run, follow by a common measure, tabulate, resume."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import torch_bilevel as tb
from experiments.config import ConfigError
from experiments.report import write_json
from torch_bilevel.methods import make_method


def split_options(methods: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """label -> (method name, options) of a configuration's `methods: {label: {method: name, option: ...}}`.

    `method` defaults to the label. Raises ConfigError for an unknown method or option, before anything is run.
    """
    found = {}
    for label, options in methods.items():
        options = dict(options or {})
        name = options.pop("method", label)
        if "/" in label:
            raise ConfigError(f"methods: label {label!r} must be a file name")
        make_method(name, options)
        found[label] = (name, options)
    if not found:
        raise ConfigError("methods is empty: give at least one, as methods.lmcn={}")
    return found


def follow(
    problem: tb.BilevelProblem, method: str, options: Mapping[str, Any], measure: Callable[..., dict[str, float]],
    *, max_steps: int, gradient_tol: float, seed: int, max_calls: float = math.inf, max_seconds: float | None = None,
    every: int = 1, growth: float = 1.0, bounds: tuple[float, float] | None = None, learner: bool = False,
    clock: Callable[[], float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One run by `minimize`, with `measure(x)` (its time and calls not counted) at the start and every `every` steps.

    With `growth` above 1 the next record is at `growth` times the step of the last one, if that is later. With
    `learner`, `measure(x, y)` is also given the learner (dy,) as the method holds it, and the answer has the last
    "x" (dx,) and "y". `bounds`: of `minimize`. With `clock` (time.process_time), seconds and `max_seconds` are its own:
    processor time of a single thread does not depend on what else the machine is doing.

    Returns:
        {"status", "records", "counts", "seconds"}; a record has step, oracle_calls, seconds, hessians and the measures.
        A run that fails (diverges) ends with status "failed" or "non_finite" and its records so far.
    """
    records: list[dict[str, Any]] = []
    following = 0  # step of the next record
    started, measuring = clock() if clock else 0.0, 0.0

    def seconds_of(report: tb.StepReport) -> float:
        return clock() - started - measuring if clock else report.seconds

    def note(report: tb.StepReport, x: Tensor, y: Tensor) -> None:
        nonlocal measuring
        seconds = seconds_of(report)
        measured = measure(x, y) if learner else measure(x)
        if clock:
            measuring = clock() - started - seconds
        records.append({"step": report.step, "oracle_calls": report.counts.oracle_calls, "seconds": seconds,
                        "hessians": report.counts.hessians, **measured})  # fmt: skip

    def watch(report: tb.StepReport, x: Tensor, y: Tensor) -> bool:
        nonlocal following
        late = clock is not None and max_seconds is not None and seconds_of(report) >= max_seconds
        stop = late or report.counts.oracle_calls >= max_calls
        if report.step >= following or stop:
            following = max(report.step + every, math.ceil(report.step * growth))
            note(report, x, y)
        return not stop

    try:
        result = tb.minimize(
            problem, make_method(method, dict(options)), max_steps=max_steps, callback=watch, seed=seed,
            gradient_tol=gradient_tol, max_seconds=None if clock else max_seconds, bounds=bounds,
        )  # fmt: skip
    except tb.BilevelError as error:
        if not isinstance(error.result, tb.Result):
            raise  # it did not start
        result = error.result
    last = result.history[-1] if result.history else None
    if last is not None and (not records or records[-1]["step"] != last.step):
        note(last, result.x, result.y)
    answer = {"status": result.status.name.lower(), "message": result.message, "records": records,
              "counts": result.counts.as_dict(),
              "seconds": records[-1]["seconds"] if clock and records else result.seconds}  # fmt: skip
    return {**answer, "x": result.x, "y": result.y} if learner else answer


def cached(run_dir: Path, name: str, make: Callable[[], dict[str, Any]], resume: bool) -> dict[str, Any]:
    """`make()`, kept in run_dir/runs/name.json; a resumed comparison takes finished runs from there."""
    path = run_dir / "runs" / f"{name}.json"
    if resume and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def first_reaching(records: Sequence[Mapping[str, Any]], key: str, level: float, axis: str) -> float | None:
    """The first record's `axis` at which `key` is at most `level`; None if it never is."""
    return next((r[axis] for r in records if r[key] is not None and r[key] <= level), None)


def spread(values: Sequence[float | None]) -> str:
    """'median (lowest-highest)' of the runs that got there; 'k of n' is added where some did not."""
    reached = sorted(value for value in values if value is not None)
    if not reached:
        return "never"
    text = f"{statistics.median(reached):.3g}"
    if reached[0] != reached[-1]:
        text += f" ({reached[0]:.3g}-{reached[-1]:.3g})"
    return text if len(reached) == len(values) else f"{text}, {len(reached)} of {len(values)}"
