"""Upper updates by every optimizer and scheduler of torch.optim, resumed bit for bit, and by the user's own classes."""

from __future__ import annotations

import inspect

import pytest
import torch

import torch_bilevel as tb
from tests.problems import nonconvex
from torch_bilevel.methods.upper_step import UpperStep

#: not for one dense vector of hyperparameters: needs values, sparse gradients, matrices
UNSUITED = {"LBFGS", "SparseAdam", "Muon"}
OPTIMIZERS = sorted(
    name for name, item in vars(torch.optim).items()
    if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
    and name not in UNSUITED
)  # fmt: skip
SCHEDULERS = {
    "ConstantLR": {"total_iters": 4},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.7},
    "LambdaLR": {"lr_lambda": lambda step: 1 / (1 + step)},
    "LinearLR": {"total_iters": 4},
    "MultiStepLR": {"milestones": [2, 5]},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.8},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 12},
    "PolynomialLR": {"total_iters": 6},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 0.5},
    "StepLR": {"step_size": 2},
}


def gradient(x):
    return x**3 - torch.linspace(-1, 2, len(x), dtype=x.dtype)


def descend(upper, x, steps):
    points = []
    for _ in range(steps):
        x = upper.step(x, gradient(x), x.square().sum())
        points.append(x)
    return points


def by_torch(make_optimizer, make_scheduler, x, steps):
    """The same steps in an ordinary training loop."""
    leaf = torch.nn.Parameter(x.clone())
    optimizer = make_optimizer([leaf])
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    points = []
    for _ in range(steps):
        value = leaf.detach().square().sum()
        leaf.grad = gradient(leaf.detach())
        optimizer.step()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(value)
        elif scheduler is not None:
            scheduler.step()
        points.append(leaf.detach().clone())
    return points


def test_the_table_has_every_scheduler_of_its_own():
    base = torch.optim.lr_scheduler.LRScheduler
    known = {name for name, item in vars(torch.optim.lr_scheduler).items()
             if inspect.isclass(item) and issubclass(item, base) and not name.startswith("_")}  # fmt: skip
    composed = {"LRScheduler", "ChainedScheduler", "SequentialLR"}  # made of others: given as a factory, below
    assert known - composed == set(SCHEDULERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_torch_s_and_resumes(name):
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    make = getattr(torch.optim, name)
    whole = descend(UpperStep(name, 0.05, None, x), x, 8)
    for ours, theirs in zip(whole, by_torch(lambda p: make(p, lr=0.05), None, x, 8), strict=True):
        assert torch.equal(ours, theirs)
    first, second = UpperStep(name, 0.05, None, x), UpperStep(make, 0.05, None, x)
    half = descend(first, x, 3)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(descend(second, half[-1], 5), whole[3:], strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_torch_s_and_resumes(name):
    x, options = torch.linspace(-1, 1, 4, dtype=torch.float64), SCHEDULERS[name]
    optimizer = ("SGD", {"momentum": 0.9})
    whole = descend(UpperStep(optimizer, 0.05, (name, options), x), x, 8)
    make = getattr(torch.optim.lr_scheduler, name)
    theirs = by_torch(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda o: make(o, **options), x, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, theirs, strict=True))
    constant = descend(UpperStep(optimizer, 0.05, None, x), x, 8)
    assert not torch.equal(whole[-1], constant[-1])
    first, second = (UpperStep(optimizer, 0.05, (name, options), x) for _ in range(2))
    half = descend(first, x, 3)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(descend(second, half[-1], 5), whole[3:], strict=True))


class Sign(torch.optim.Optimizer):
    """x - lr sign(sum of the gradients so far)."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("total", torch.zeros_like(p))
                total += p.grad
                p -= group["lr"] * total.sign()


def warm_then_cosine(optimizer):
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 6)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


@pytest.mark.parametrize("method", ["adam", "aid", "f2ba"])
def test_the_user_s_own_classes_in_a_run_resumed_bit_for_bit(method, tmp_path):
    optimizer = "optimizer" if method == "adam" else "upper_optimizer"

    def go(steps, **kwargs):
        options = {optimizer: Sign, "lr": 0.05, "scheduler": warm_then_cosine}
        return tb.minimize(nonconvex().problem(), method, max_steps=steps, gradient_tol=0.0, **options, **kwargs)

    whole = go(8)
    go(4, checkpoint=tmp_path / "run.pt")
    resumed = go(8, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(resumed.x, whole.x)
    assert [s.value for s in resumed.history] == [s.value for s in whole.history]
    assert whole.history[1].step_norm == pytest.approx(0.005 * len(whole.x) ** 0.5)  # the first rate is lr / 10
