"""The problems of E7: their losses against plain formulas, splits, corruption, and bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

import torch_bilevel as tb
from experiments.config import ConfigError
from experiments.practice import CORRUPTION, l2_groups, mixture
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective

DIGITS = {"dataset": "digits", "n_train": 60, "n_val": 50}


def values(problem, x, y):
    """(f, g) at flat x, y."""
    counts = OracleCounts()
    return [float(Objective(problem, **{level: 1.0}, counts=counts).value(x, y)) for level in ("upper", "lower")]


@pytest.mark.parametrize("groups", [1, 8, 64])
def test_l2_losses(groups):
    practice = l2_groups(groups, 0, **DIGITS)
    problem = practice.problem
    assert (problem.dx, problem.dy) == (groups, 65)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, generator=generator, dtype=torch.float64)
    y = torch.randn(65, generator=generator, dtype=torch.float64)
    w, b = y[:64], y[64]

    def loss(batch):
        logits = batch[0] @ w + b
        return (softplus(logits) - logits * batch[1]).mean()

    train, val = problem.data()
    penalty = sum(x[j // (64 // groups)].exp() * w[j] ** 2 for j in range(64)) + 1e-4 * b**2
    f, g = values(problem, x, y)
    assert f == pytest.approx(float(loss(val)))
    assert g == pytest.approx(float(loss(train) + penalty))
    right = ((practice.inputs @ w + b > 0).long() == practice.labels).double().mean()
    assert practice.accuracy(y) == pytest.approx(float(right))


def test_parts_are_disjoint_and_seeded():
    def rows(practice):
        parts = [practice.problem.data()[0][0], practice.problem.data()[1][0], practice.inputs]
        return [{tuple(row) for row in part.tolist()} for part in parts]

    train, val, test = rows(l2_groups(1, 0, **DIGITS))
    assert len(train) == 60
    assert len(val) == 50
    assert len(test) == 1797 - 110
    assert not train & val
    assert not train & test
    assert not val & test
    assert rows(l2_groups(1, 0, **DIGITS))[0] == train != rows(l2_groups(1, 1, **DIGITS))[0]


def test_newsgroups(data_dir: Path):
    if not (data_dir / "20news").is_dir():
        pytest.skip("no 20news in the data folder")
    practice = l2_groups(5, 0, str(data_dir), features=20, n_train=40, n_val=30)
    assert (practice.problem.dx, practice.problem.dy) == (5, 21)
    inputs = practice.problem.data()[0][0]
    norms = inputs.norm(dim=1)
    assert bool(((norms - 1).abs() < 1e-12).logical_or(norms == 0).all())
    share = practice.labels.double().mean()
    assert len(practice.labels) > 3000
    assert 0.4 < float(share) < 0.6


def test_mixture_losses():
    practice = mixture(4, 3, per_source=20, n_val=40, n_test=50, reg=0.02)
    problem = practice.problem
    x = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    y = torch.randn(650, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W, b = y[:640].reshape(10, 64), y[640:]

    def losses(batch):
        log_p = (batch[0] @ W.T + b).log_softmax(1)
        return -log_p[torch.arange(len(batch[1])), batch[1]]

    train, val = problem.data()
    per_source = torch.stack([losses(train)[20 * k : 20 * k + 20].mean() for k in range(4)])
    f, g = values(problem, x, y)
    assert f == pytest.approx(float(losses(val).mean()))
    assert g == pytest.approx(float((torch.softmax(x, 0) * per_source).sum() + 0.02 * y.square().sum()))
    assert practice.accuracy(y) == pytest.approx(
        float(((practice.inputs @ W.T + b).argmax(1) == practice.labels).double().mean()))  # fmt: skip


def test_mixture_corrupts_its_sources_as_it_says():
    from experiments.data import make_split

    practice = mixture(8, 5, per_source=20, n_val=40, n_test=50)
    true = make_split("digits", None, (160, 40, 50), seed=5).train.labels.reshape(8, 20)
    given = practice.problem.data()[0][1].reshape(8, 20)
    wrong = (true != given).double().mean(1).tolist()
    assert wrong == list(practice.sources)
    assert sorted(wrong) == sorted(CORRUPTION * 2)
    assert practice.sources != mixture(8, 6, per_source=20, n_val=40, n_test=50).sources


def test_pooling_averages_pixels():
    whole, pooled = (mixture(2, 0, per_source=5, n_val=5, n_test=5, pool=pool) for pool in (1, 2))
    image, small = (p.inputs[0].reshape(side, side) for p, side in ((whole, 8), (pooled, 4)))
    assert small[1, 2].item() == pytest.approx(image[2:4, 4:6].mean().item())
    assert pooled.problem.dy == 10 * 17


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: l2_groups(7, 0, **DIGITS), "divide"),
        (lambda: l2_groups(0, 0, **DIGITS), "divide"),
        (lambda: l2_groups(1, 0, dataset="digit"), "digits"),
        (lambda: l2_groups(1, 0, dataset="digits", n_train=1700, n_val=100), "1797"),
        (lambda: mixture(4, 0, dataset="mnits"), "mnist"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ConfigError, match=match):
        call()


def test_the_optimum_shuns_the_corrupted_sources():
    practice = mixture(4, 0, per_source=40, n_val=100, n_test=200)
    tb.minimize(practice.problem, "auto", bounds=practice.box, max_steps=15)
    weight = practice.problem.x.softmax(0)
    wrong = torch.tensor(practice.sources) > 0
    assert float(weight[wrong].sum()) < 0.2
