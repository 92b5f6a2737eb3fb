"""Two hyperparameter searches of daily practice: L2 weights per group of features, and weights of data sources."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy

import torch_bilevel as tb
from experiments.baselines import zero_linear
from experiments.config import ConfigError, check_choice
from experiments.data import corrupt, load_pool, make_split

#: topics told apart in the 20 Newsgroups: the four rec.* against the four sci.*
TOPICS = ((7, 8, 9, 10), (11, 12, 13, 14))
#: sources that are wholly wrong (labels shifted), half wrong, and sound, in turn
CORRUPTION = (1.0, 0.5, 0.0, 0.0)


@dataclass(frozen=True)
class Practice:
    """A problem with its test set: `test` gives logits to judge, `sources` the share of wrong labels of each source."""

    problem: tb.BilevelProblem
    inputs: Tensor
    labels: Tensor
    box: tuple[float, float]
    sources: tuple[float, ...] | None = None

    @torch.no_grad()
    def accuracy(self, y: Tensor) -> float:
        """Share of the test samples that the learner parameters y (dy,) classify rightly."""
        named = self.problem.learner_parameters(y)
        logits = self.inputs @ named["weight"].T + named["bias"]
        guess = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
        return (guess == self.labels).double().mean().item()


# -- L2 weights of groups of features --------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _documents(data_dir: str | None, features: int) -> tuple[Tensor, Tensor, int]:
    """(inputs (n, features), labels (n,) 0 or 1, rows of the official test part at the end), float64.

    The most frequent features by documents of the training part, most frequent first; entries log(1 + count), rows of
    length 1.
    """
    import numpy as np

    from experiments.newsgroups import read_counts

    blocks, topics = [], []
    for part in ("train", "test"):
        counts, labels = read_counts(data_dir, part)
        if part == "train":
            order = np.argsort(-np.asarray((counts > 0).sum(0)).ravel(), kind="stable")[:features]
        kept = np.isin(labels.numpy(), sum(TOPICS, ()))
        blocks.append(torch.from_numpy(np.log1p(counts[kept][:, order].toarray())))
        topics.append(torch.from_numpy(np.isin(labels.numpy()[kept], TOPICS[1]).astype(np.int64)))
    inputs = torch.cat(blocks)
    return inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-12), torch.cat(topics), len(topics[1])


def _two_classes(dataset: str, data_dir: str | None, features: int) -> tuple[Tensor, Tensor, int]:
    check_choice("dataset", dataset, ("newsgroups", "digits"))
    if dataset == "newsgroups":
        return _documents(data_dir, features)
    pool = load_pool("digits")
    inputs = pool.inputs[:, :features]
    return inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-12), pool.labels % 2, 0


def l2_groups(
    groups: int, seed: int, data_dir: str | None = None, *, dataset: str = "newsgroups", features: int = 1000,
    n_train: int = 300, n_val: int = 300,
) -> Practice:  # fmt: skip
    """Logistic regression with one L2 weight per group of features; the groups are neighbours in frequency.

        g = mean BCE(train) + sum_j exp(x_group(j)) w_j^2 + 1e-4 b^2,    f = mean BCE(validation),
    x from -5, dx = `groups`, dy = `features` + 1.

    Args:
        groups: a divisor of `features`.
        dataset: `newsgroups` (rec.* against sci.*, official test part), or `digits` (odd against even, 64 features).
        seed: of the split.
    """
    inputs, labels, held = _two_classes(dataset, data_dir, features)
    features = inputs.shape[1]
    if groups < 1 or features % groups:
        raise ConfigError(f"groups={groups} must divide the number of features, {features}")
    free = len(labels) - held
    if n_train + n_val > free - (0 if held else 1):
        raise ConfigError(f"n_train + n_val = {n_train + n_val}: {dataset} has {free} samples for them")
    order = torch.randperm(free, generator=torch.Generator().manual_seed(seed))
    train, val = order[:n_train], order[n_train : n_train + n_val]
    test = torch.arange(free, free + held) if held else order[n_train + n_val :]
    group = torch.arange(features) // (features // groups)

    def lower(learner: nn.Linear, log_l2: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = (log_l2.exp()[group] * learner.weight[0].square()).sum() + 1e-4 * learner.bias.square().sum()
        return upper(learner, log_l2, batch) + penalty

    def upper(learner: nn.Linear, log_l2: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(learner(batch[0])[:, 0], batch[1])

    learner = zero_linear(features, 1, torch.float64, "cpu")
    x0 = torch.full((groups,), -5.0, dtype=torch.float64)
    batches = [(inputs[rows], labels[rows].double()) for rows in (train, val)]
    problem = tb.BilevelProblem(learner, x0, lower, upper, *batches)
    return Practice(problem, inputs[test], labels[test], (-12.0, 2.0))


# -- weights of data sources -----------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _split(dataset: str, data_dir: str | None, sizes: tuple[int, int, int], seed: int) -> Any:
    return make_split(dataset, data_dir, sizes, seed=seed)


def mixture(
    sources: int, seed: int, data_dir: str | None = None, *, dataset: str = "digits", per_source: int = 50,
    n_val: int = 200, n_test: int = 597, pool: int = 1, reg: float = 1e-2,
) -> Practice:  # fmt: skip
    """Softmax regression on a mixture of data sources, a quarter of which has wrong labels, a quarter half of them.

        g = sum_k p_k mean CE(source k) + reg |w|^2,  p = softmax(x),    f = mean CE(validation, clean),
    x from 0 (all sources alike), dx = `sources`.

    Args:
        dataset: one of `experiments.data`. pool: images are averaged over pool x pool pixels.
        seed: of split, label noise and the order of the sources.
    """
    split = _split(dataset, data_dir, (sources * per_source, n_val, n_test), seed)

    def shrink(inputs: Tensor) -> Tensor:
        if pool == 1:
            return inputs
        return avg_pool2d(inputs.reshape(-1, 1, *split.image_shape), pool).flatten(1)

    order = torch.randperm(sources, generator=torch.Generator().manual_seed(seed)).tolist()
    rates = [0.0] * sources
    for place, k in enumerate(order):
        rates[k] = CORRUPTION[place % len(CORRUPTION)]
    labels = split.train.labels.reshape(sources, per_source)
    noisy = [corrupt(labels[k], rates[k], "shift", split.classes, 1000 * seed + k)[0] for k in range(sources)]

    def lower(learner: nn.Linear, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = cross_entropy(learner(batch[0]), batch[1], reduction="none").reshape(sources, per_source).mean(1)
        return (logits.softmax(0) * losses).sum() + reg * sum(p.square().sum() for p in learner.parameters())

    def upper(learner: nn.Linear, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(learner(batch[0]), batch[1])

    train, val, test = (shrink(part.inputs) for part in (split.train, split.val, split.test))
    learner = zero_linear(train.shape[1], split.classes, torch.float64, "cpu")
    batches = (train, torch.cat(noisy)), (val, split.val.labels)
    problem = tb.BilevelProblem(learner, torch.zeros(sources, dtype=torch.float64), lower, upper, *batches)
    return Practice(problem, test, split.test.labels, (-5.0, 5.0), tuple(rates))
