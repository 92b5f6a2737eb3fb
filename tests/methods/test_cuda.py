"""Every method on a CUDA device: the same answer as on the CPU, on tensors that stayed there."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.problems import CASES

pytestmark = pytest.mark.gpu

METHODS = ["auto", "fsba", "lfsba", "ifsba", "dlcrn", "slcrn", "lazy_slcrn", "lbfgs"]


def _on_cpu(h):
    """The case's functions close over CPU data: evaluate there, differentiably, and bring the value back."""
    return lambda x, y: h(x.cpu(), y.cpu()).to(x.device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_with_the_cpu(method: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == "quadratic")
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    here = case.problem(dtype)
    f, g = (_on_cpu(h) for h in (case.f, case.g))
    there = tb.BilevelProblem.from_functions(f, g, here.x.cuda(), here.y.cuda())
    a = tb.minimize(here, method, gradient_tol=tol)
    b = tb.minimize(there, method, gradient_tol=tol)
    assert b.x.is_cuda
    assert b.y.is_cuda
    assert b.status.converged
    assert b.value == pytest.approx(a.value, rel=1e-4, abs=1e-6)


def test_hyper_cleaning_modules_on_cuda() -> None:
    torch.manual_seed(0)
    X, t = torch.randn(200, 12, device="cuda"), torch.randint(0, 3, (200,), device="cuda")
    learner = torch.nn.Linear(12, 3).cuda()

    def lower(learner, hyper, batch):
        X, t, index = batch
        loss = torch.nn.functional.cross_entropy(learner(X), t, reduction="none")
        return (torch.sigmoid(hyper["w"][index]) * loss).mean() + 0.01 * sum(p.square().sum() for p in learner.parameters())

    def upper(learner, hyper, batch):
        return torch.nn.functional.cross_entropy(learner(batch[0]), batch[1])

    problem = tb.BilevelProblem(learner, {"w": torch.zeros(100, device="cuda")}, lower, upper,
                                (X[:100], t[:100], torch.arange(100, device="cuda")), (X[100:], t[100:]))  # fmt: skip
    before = tb.ImplicitOracle(problem).evaluate().value
    result = tb.minimize(problem, "lfsba", max_steps=10, gradient_tol=1e-5)
    assert result.x.is_cuda
    assert result.value < float(before)
