"""Reference problems of the oracle tests, the referee's answers kept for the session, and devices."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import torch_bilevel as tb
from tests import reference


@cache
def problem_reference(name: str) -> reference.Reference:
    return {
        "smooth": reference.smooth,
        "one by one": lambda: reference.smooth(1, 1, seed=3),
        "modules": lambda: reference.cleaning().reference,
    }[name]()


@cache
def answer(name: str, penalty: float | None = None, scheme: str = "central"):
    """The referee's value, gradient and Hessian: exact for penalty None, else the surrogate's."""
    ref = problem_reference(name)
    return ref.implicit() if penalty is None else ref.penalty(penalty, scheme)


def make_problem(name: str, dtype=torch.float64, device="cpu") -> tb.BilevelProblem:
    """'smooth' or 'one by one' from functions, 'modules' (softmax hyper-cleaning) from modules."""
    ref = problem_reference(name)
    x, y0 = ref.x.to(device, dtype), ref.y0.to(device, dtype)
    if name != "modules":
        return tb.BilevelProblem.from_functions(ref.f, ref.g, x, y0)
    data = reference.cleaning()
    learner = nn.Linear(data.A.shape[1], data.classes).to(device, dtype)
    cross_entropy = nn.functional.cross_entropy

    def lower(learner, hyper, batch):
        inputs, labels = batch
        losses = cross_entropy(learner(inputs), labels, reduction="none")
        l2 = sum((p * p).sum() for p in learner.parameters())
        return (torch.sigmoid(hyper["log_weight"]) * losses).mean() + data.l2 * l2

    def upper(learner, hyper, batch):
        return cross_entropy(learner(batch[0]), batch[1])

    train, clean = (data.A.to(dtype), data.t), (data.A_clean.to(dtype), data.t_clean)
    problem = tb.BilevelProblem(learner, {"log_weight": x}, lower, upper, train, clean)
    problem.write(y=y0)
    return problem


@pytest.fixture
def make():
    """make(name, dtype=float64, device='cpu') -> BilevelProblem."""
    return make_problem


@pytest.fixture
def expected():
    """expected(name, penalty=None, scheme='central') -> value, gradient, hessian of the referee."""
    return answer


@pytest.fixture
def referee():
    """referee(name) -> Reference."""
    return problem_reference
