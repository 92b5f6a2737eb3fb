"""20 Newsgroups with one L2 weight per feature: 130,107 hyperparameters, 2.6 million learner parameters, sparse."""

from __future__ import annotations

import bz2
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torch_bilevel as tb
from experiments.data import ENVIRONMENT, DataError, data_root

FEATURES, CLASSES = 130_107, 20
_FILES = {part: f"20news-bydate.{part}.counts.svm" for part in ("train", "test")}


@dataclass(frozen=True)
class Part:
    """TF-IDF rows `inputs` (n, features), sparse, and `labels` (n,)."""

    inputs: tb.SparseMatrix
    labels: Tensor


@dataclass(frozen=True)
class Newsgroups:
    """Stratified halves of the official training set, and the official test set."""

    train: Part
    val: Part
    test: Part
    features: int
    classes: int


def read_counts(data_dir: str | Path | None = None, part: str = "train", documents: int | None = None):
    """Token counts (n, 130107) as a scipy CSR matrix, and labels (n,), of the official 'train' or 'test' part.

    Args:
        documents: only so many, the first (they are in random order).

    Raises:
        DataError: the file is not under `data_dir`/20news.
    """
    from sklearn.datasets import load_svmlight_file

    folder = data_root(data_dir) / "20news"
    path = next((p for p in (folder / f"{_FILES[part]}.bz2", folder / _FILES[part]) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"data set '20news' needs {_FILES[part]} (svmlight text, or .bz2) in {folder}: the token counts of scikit-"
            "learn's fetch_20newsgroups_vectorized(normalize=False), written by dump_svmlight_file(zero_based=False);"
            f" or point --data-dir or ${ENVIRONMENT} to a folder that has 20news"
        )
    with bz2.open(path) if path.suffix == ".bz2" else open(path, "rb") as stream:
        lines = stream if documents is None else io.BytesIO(b"".join(itertools.islice(stream, documents)))
        counts, labels = load_svmlight_file(lines, n_features=FEATURES, zero_based=False)
    return counts, torch.from_numpy(labels.astype("int64"))


def load(
    data_dir: str | Path | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, features: int = FEATURES,
    limit: int | None = None,
) -> Newsgroups:  # fmt: skip
    """TF-IDF features, frequencies from the training half, and halves of the training set of equal class shares.

    Args:
        seed: of the split.
        features, limit: the first so many tokens, and so many documents in each part, for quick runs.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.model_selection import train_test_split

    counts, labels = read_counts(data_dir, "train", None if limit is None else 2 * limit)
    held_counts, held_labels = read_counts(data_dir, "test", limit)
    counts, held_counts = counts[:, :features], held_counts[:, :features]
    half = len(labels) // 2 if limit is None else limit
    rows, val_rows = train_test_split(range(len(labels)), train_size=half, test_size=half, random_state=seed,
                                      stratify=labels.numpy())  # fmt: skip
    tfidf = TfidfTransformer().fit(counts[rows])

    def part(counts, labels: Tensor) -> Part:
        return Part(tb.SparseMatrix(tfidf.transform(counts), dtype=dtype), labels)

    return Newsgroups(
        part(counts[rows], labels[rows]), part(counts[val_rows], labels[val_rows]),
        part(held_counts, held_labels), features, CLASSES,
    )  # fmt: skip


class Softmax(nn.Module):
    """Logits X W of a sparse X, W (features, classes), from zero; no bias, as published.

    W's rows, not its columns, belong to features: a stored entry of X then reads one contiguous row.
    """

    def __init__(self, features: int, classes: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, classes, dtype=dtype))

    def forward(self, inputs: tb.SparseMatrix) -> Tensor:
        return inputs @ self.weight


def lower_loss(learner: Softmax, log_l2: Tensor, batch: tuple[tb.SparseMatrix, Tensor]) -> Tensor:
    """CE + mean(W^2 exp(h)) / 2: h (features,) is the logarithm of one L2 weight per feature."""
    inputs, labels = batch
    penalty = 0.5 * (learner.weight.square().sum(1) * log_l2.exp()).sum() / learner.weight.numel()
    return cross_entropy(learner(inputs), labels) + penalty


def upper_loss(learner: Softmax, log_l2: Tensor, batch: tuple[tb.SparseMatrix, Tensor]) -> Tensor:
    """CE on the validation half."""
    inputs, labels = batch
    return cross_entropy(learner(inputs), labels)


def build(data: Newsgroups) -> tb.BilevelProblem:
    """The bilevel problem from h = 0 and W = 0, in the data's dtype."""
    dtype = data.train.inputs.dtype
    learner, log_l2 = Softmax(data.features, data.classes, dtype), torch.zeros(data.features, dtype=dtype)
    batches = (data.train.inputs, data.train.labels), (data.val.inputs, data.val.labels)
    return tb.BilevelProblem(learner, log_l2, lower_loss, upper_loss, *batches)


@torch.no_grad()
def judge(part: Part, weight: Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) of W (features, classes)."""
    logits = part.inputs @ weight
    return cross_entropy(logits, part.labels).item(), (logits.argmax(1) == part.labels).float().mean().item()
