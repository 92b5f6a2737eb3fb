"""Reference learners against scikit-learn and detection scores against scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from torch.nn.functional import cross_entropy

from experiments.baselines import detect_clean, evaluate, newton_softmax, sgd_start, train_softmax, zero_linear
from torch_bilevel.errors import SolverError


@pytest.fixture
def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(120, 5, generator=generator, dtype=torch.float64)
    labels = (inputs[:, :3] + 0.5 * torch.randn(120, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return inputs, labels, torch.rand(120, generator=generator, dtype=torch.float64)


def test_weighted_softmax_is_scikit_learns(samples: tuple) -> None:
    inputs, labels, weights = samples
    reg = 0.01
    trained = train_softmax(inputs, labels, 3, reg, weights)
    # the bias is regularised like any weight: a constant feature instead of sklearn's free intercept
    with_bias = np.hstack([inputs.numpy(), np.ones((120, 1))])
    peer = LogisticRegression(C=1 / (2 * reg * 120), fit_intercept=False, tol=1e-10, max_iter=10_000)
    peer.fit(with_bias, labels.numpy(), sample_weight=weights.numpy())
    ours = torch.cat([trained.learner.weight, trained.learner.bias[:, None]], 1).detach().numpy()
    assert trained.converged
    assert trained.gradient_norm <= 1e-6
    np.testing.assert_allclose(ours, peer.coef_, atol=5e-5)  # 1e-6 / mu, mu = 2 reg


def test_newton_finds_the_same_learner_and_says_when_it_does_not(samples: tuple) -> None:
    inputs, labels, weights = samples
    for c in (None, weights):
        slow = train_softmax(inputs, labels, 3, 0.01, c, tolerance=1e-9).learner
        fast = newton_softmax(inputs, labels, 3, 0.01, c)
        assert torch.allclose(fast.weight, slow.weight, atol=1e-7)
        assert torch.allclose(fast.bias, slow.bias, atol=1e-7)
    start = torch.cat([fast.weight, fast.bias[:, None]], 1).detach()
    again = newton_softmax(inputs, labels, 3, 0.01, weights, start=start, max_iter=1)
    assert torch.equal(again.weight, fast.weight)
    with pytest.raises(SolverError, match="gradient norm"):
        newton_softmax(inputs, labels, 3, 0.01, weights, max_iter=2)


def test_gradient_norm_is_the_true_one_and_a_stop_is_not_called_converged(samples: tuple) -> None:
    inputs, labels, _ = samples
    trained = train_softmax(inputs, labels, 3, 0.01, tolerance=1e-14, max_iter=20)
    learner = trained.learner
    loss = cross_entropy(learner(inputs), labels) + 0.01 * (
        learner.weight.square().sum() + learner.bias.square().sum()
    )
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(learner.parameters()))])
    assert trained.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert not trained.converged


def test_float32_comes_close_to_the_float64_answer(samples: tuple) -> None:
    inputs, labels, _ = samples
    single = train_softmax(inputs.float(), labels, 3, 0.01)
    double = train_softmax(inputs, labels, 3, 0.01)
    assert single.converged
    assert single.learner.weight.dtype == torch.float32
    assert torch.allclose(
        single.learner.weight.double(), double.learner.weight, atol=0.1
    )  # 2e-3 / mu, mu = 2 reg


def test_nan_data_is_not_converged() -> None:
    trained = train_softmax(torch.full((4, 2), float("nan")), torch.tensor([0, 1, 0, 1]), 2, 0.1)
    assert not trained.converged
    assert math.isnan(trained.gradient_norm)


def test_sgd_start_approaches_the_minimiser(samples: tuple) -> None:
    inputs, labels, _ = samples
    learner = zero_linear(5, 3, torch.float64, "cpu")
    sgd_start(learner, inputs, labels, 0.01, 5000, 0.5)
    exact = train_softmax(inputs, labels, 3, 0.01).learner
    assert torch.allclose(learner.weight, exact.weight, atol=5e-5)
    assert all(p.grad is None for p in learner.parameters())


def test_evaluate() -> None:
    learner = zero_linear(2, 2, torch.float64, "cpu")
    with torch.no_grad():
        learner.weight.copy_(torch.eye(2))
    loss, accuracy = evaluate(
        learner,
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64),
        torch.tensor([0, 1, 0]),
    )
    assert accuracy == pytest.approx(2 / 3)
    assert loss == pytest.approx((2 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_detection_is_scikit_learns(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(80, generator=generator)
    corrupted = torch.rand(80, generator=generator) < 0.4
    found = detect_clean(weights, corrupted)
    expected = precision_recall_fscore_support(
        (~corrupted).numpy(), (weights > 0.5).numpy(), average="binary"
    )[:3]
    assert (found.precision, found.recall, found.f1) == pytest.approx(expected)


def test_undefined_detection_is_nan() -> None:
    clean = torch.zeros(3, dtype=torch.bool)
    nothing_kept = detect_clean(torch.zeros(3), clean)
    assert math.isnan(nothing_kept.precision)
    assert (nothing_kept.recall, nothing_kept.f1) == (0.0, 0.0)
    assert math.isnan(detect_clean(torch.zeros(3), ~clean).f1)
    assert detect_clean(torch.full((3,), 0.5), clean).recall == 0.0  # 1/2 itself is not above 1/2
