"""Training of a shared backbone on fresh meta-batches by a bilevel method, within CPU seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import torch_bilevel as tb
from experiments import episodes
from experiments.budget import BudgetSpent, CpuBudget, forget_peak, peak_gb
from experiments.config import ConfigError
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import load_torch_func
from torch_bilevel.methods import make_method
from torch_bilevel.methods.gradient_method import GradientMethod


class Stepper(Protocol):
    """Takes one step on the hyperparameters for each problem it is given."""

    counts: OracleCounts

    def step(self, problem: tb.BilevelProblem) -> Tensor: ...


class FirstOrderStepper:
    """One hypergradient at x, then the upper optimizer: nothing is evaluated at the new point, whose data are others."""

    def __init__(self, method: GradientMethod, problem: tb.BilevelProblem, seed: int):
        self.oracle, self.x = method.oracle(problem, seed), problem.x
        self.upper = method.upper_step(self.x)
        self.counts = self.oracle.counts

    def step(self, problem: tb.BilevelProblem) -> Tensor:
        self.oracle.problem, self.oracle.warm = problem, {}  # other tasks: the heads start from zero
        ev = self.oracle.evaluate(self.x)
        self.x = self.upper.step(self.x, ev.gradient, ev.value)
        return self.x


class SecondOrderStepper:
    """One iteration of the method's own run, which tests an adaptive step on the same meta-batch."""

    def __init__(self, method: tb.methods.Method, problem: tb.BilevelProblem, seed: int):
        self.run = method.start(problem, seed=seed)
        self.counts = self.run.counts

    def step(self, problem: tb.BilevelProblem) -> Tensor:
        self.run.set_data(problem)
        self.run.oracle.warm = {}
        self.run.step()
        return self.run.x


def make_stepper(name: str, options: Mapping[str, Any], problem: tb.BilevelProblem, seed: int) -> Stepper:
    """The stepper of a method: any GradientMethod (aid, itd, f2ba, adam, ...) or cubic Newton (ifsba, ...)."""
    method = make_method(name, options)
    if isinstance(method, GradientMethod) and method.perturbation is None:
        return FirstOrderStepper(method, problem, seed)
    if method.second_order and name != "auto":
        return SecondOrderStepper(method, problem, seed)
    raise ConfigError(f"{name} is not a method for fresh meta-batches; use aid, itd, f2ba, adam, sgd, ifsba or lfsba")


def train(
    name: str, options: Mapping[str, Any], classes: Mapping[str, episodes.Classes], *, seconds: float, seed: int,
    meta_batch: int = 16, width: int = 16, judged: int = 100, looks: int = 20, ways: int = 5, shots: int = 5,
    max_steps: int = 10**6,
) -> dict[str, Any]:  # fmt: skip
    """Steps on fresh meta-batches of the train classes until CPU `seconds` are spent.

    Looks at `judged` fixed episodes of the val and of the test classes, each head at its minimiser, at the start, at
    `looks` even times and at the end (not counted). The seed gives the initial backbone, the meta-batches and episodes.

    Returns:
        {"status": "budget", "max_steps" or "failed", "records": [{step, seconds, oracle_calls, val, val_accuracy, test,
        test_accuracy}], "counts", "peak_gb", "message"}.
    """
    load_torch_func()
    forget_peak()
    torch.manual_seed(seed)
    channels, size = classes["train"].images[0].shape[1:3]
    backbone = episodes.Backbone(channels, size, width)
    generator = torch.Generator().manual_seed(seed)
    held = {part: episodes.sample(classes[part], judged, torch.Generator().manual_seed(seed + 1), ways, shots)
            for part in ("val", "test")}  # fmt: skip

    def fresh() -> episodes.Episodes:
        return episodes.sample(classes["train"], meta_batch, generator, ways, shots)

    problem = episodes.build(backbone, fresh(), ways=ways)
    stepper = make_stepper(name, options, problem, seed)
    records: list[dict[str, Any]] = []
    budget = CpuBudget(seconds)

    def look(step: int, x: Tensor) -> None:
        problem.write(x=x)
        record = {"step": step, "seconds": budget.spent, "oracle_calls": stepper.counts.oracle_calls}
        for part, tasks in held.items():
            record[part], record[f"{part}_accuracy"] = episodes.judge(backbone, tasks, ways=ways)
        records.append(record)

    x, step, status, message = problem.x, 0, "max_steps", ""
    look(0, x)
    try:
        with budget:
            while step < max_steps:
                with budget.paused():
                    batches = episodes.batches(fresh())
                x = stepper.step(problem.at(*batches))
                step += 1
                if budget.spent >= seconds:
                    raise BudgetSpent("between two steps")
                if budget.spent >= len(records) * seconds / looks:
                    with budget.paused():
                        look(step, x)
    except BudgetSpent:
        status = "budget"
    except tb.BilevelError as error:
        status, message = "failed", f"{type(error).__name__}: {error}"
    if records[-1]["step"] != step:
        look(step, x)
    return {
        "status": status,
        "records": records,
        "counts": stepper.counts.as_dict(),
        "peak_gb": peak_gb(),
        "message": message,
    }
