"""Runs of a method within a budget of CPU seconds, cut off wherever they are: for comparisons against time."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

import torch_bilevel as tb
from torch_bilevel.derivatives import load_torch_func
from torch_bilevel.methods import make_method


class BudgetSpent(tb.BilevelError):
    """The CPU seconds of a run are spent in the middle of a step."""


class CpuBudget:
    """A clock of this process's CPU seconds that raises BudgetSpent in the main thread when `seconds` are spent.

    CPU seconds, not those of the wall, so that other processes on the machine do not enter. ``with budget.paused():``
    for what is not to count. Outside the main thread, and where there are no interval timers, it only counts.
    """

    def __init__(self, seconds: float):
        self.seconds, self._spent, self._since = seconds, 0.0, None
        self._can_raise = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    @property
    def spent(self) -> float:
        """CPU seconds counted so far."""
        return self._spent + (0.0 if self._since is None else time.process_time() - self._since)

    def __enter__(self) -> CpuBudget:
        if self._can_raise:
            self._before = signal.signal(signal.SIGPROF, self._raise)
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._can_raise:
            signal.signal(signal.SIGPROF, self._before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._since = time.process_time()
        if self._can_raise:
            # again and again: an exception that comes within a destructor is swallowed by Python
            signal.setitimer(signal.ITIMER_PROF, max(1e-3, self.seconds - self._spent), 1.0)

    def _stop(self) -> None:
        if self._can_raise:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        if self._since is not None:
            self._spent += time.process_time() - self._since
            self._since = None

    def _raise(self, *_: object) -> None:
        left = self.seconds - self.spent
        if left > 0:  # the timer counts in ticks, and on a loaded machine runs ahead of the clock
            signal.setitimer(signal.ITIMER_PROF, max(1e-3, left), 1.0)
            return
        raise BudgetSpent(f"{self.seconds:g} CPU seconds are spent")


def follow_cpu(
    problem: tb.BilevelProblem, method: str, options: Mapping[str, Any], measure: Callable[[Tensor, Tensor], dict[str, float]],
    *, seconds: float, max_steps: int = 10**6, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One run by `minimize` within CPU `seconds`, with `measure(x, y)` (not counted) at the start and after every step
    that ends before they are spent.

    Returns:
        {"status", "records", "counts", "peak_gb", "seconds"}; a record has step, seconds (CPU), oracle_calls, hessians,
        step_norm and the measures. "status" is "budget" where the time ran out, "failed" or "non_finite" where the
        method could not go on (then with "message"). x and y of the last good point are in the problem's tensors.
    """
    load_torch_func()
    forget_peak()
    records: list[dict[str, Any]] = []
    budget = CpuBudget(seconds)

    def watch(report: tb.StepReport, x: Tensor, y: Tensor) -> bool:
        with budget.paused():
            spent = budget.spent
            if spent >= seconds:  # the alarm is on its way
                return False
            records.append({"step": report.step, "seconds": spent, "oracle_calls": report.counts.oracle_calls,
                            "hessians": report.counts.hessians, "step_norm": report.step_norm, **measure(x, y)})  # fmt: skip
        return True

    message = ""
    try:
        with budget:
            result = tb.minimize(problem, make_method(method, dict(options)), max_steps=max_steps, callback=watch,
                                 seed=seed, gradient_tol=0.0)  # fmt: skip
        status = "budget" if result.status is tb.Status.CALLBACK else result.status.name.lower()
    except tb.BilevelError as error:
        if error.result is None:  # spent before the first point
            return {"status": "budget" if isinstance(error, BudgetSpent) else "failed", "records": records, "counts": {},
                    "seconds": budget.spent, "peak_gb": peak_gb(), "message": str(error)}  # fmt: skip
        result, message = error.result, str(error)
        status = "budget" if isinstance(error, BudgetSpent) else result.status.name.lower()
    return {"status": status, "records": records, "counts": result.counts.as_dict(), "seconds": budget.spent,
            "peak_gb": peak_gb(), "message": message}  # fmt: skip


def forget_peak() -> None:
    """Let `peak_gb` begin anew, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_gb() -> float:
    """Largest resident memory of this process, in GB, since `forget_peak` (or since it started)."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return float(lines["VmHWM"].split()[0]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def within(records: list[dict[str, Any]], seconds: float) -> dict[str, Any] | None:
    """The last record made within `seconds`; None where the first came later."""
    return next((record for record in reversed(records) if record["seconds"] <= seconds), None)
