"""Data sets of the experiments: where the files are, seeded splits, standardisation, label noise."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.config import ConfigError, check_choice

DATASETS = ("digits", "mnist", "fashion_mnist", "breast_cancer", "australian", "a9a", "w8a")
NOISE_KINDS = ("uniform", "flip", "shift")
STANDARDIZATIONS = ("global", "feature")
ENVIRONMENT = "TORCH_BILEVEL_DATA"

_IMAGE_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
_IMAGE_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_LIBSVM_SETS = {  # file there, features
    "breast_cancer": ("breast-cancer", 10),
    "australian": ("australian", 14),
    "a9a": ("a9a", 123),
    "w8a": ("w8a", 300),
}
_SIZES = {"digits": (1000, 200, 597), "mnist": (5000, 5000, 10000), "fashion_mnist": (5000, 5000, 10000)}
_FRACTIONS = (0.7, 0.2, 0.1)


class DataError(RuntimeError):
    """A data set that is not at hand; the message names its files and where to put them."""


@dataclass(frozen=True)
class Pool:
    """Raw `inputs` (n, d) float64 and `labels` (n,); the last `held_out` rows are the official test part."""

    inputs: Tensor
    labels: Tensor
    classes: int
    held_out: int = 0
    image_shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Part:
    """One part of a split: standardised `inputs` (n, d) and true `labels` (n,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """Disjoint training, validation and test parts; `rows` are their row numbers in the pool."""

    train: Part
    val: Part
    test: Part
    classes: int
    rows: tuple[Tensor, Tensor, Tensor]
    image_shape: tuple[int, int] | None = None


def data_root(data_dir: str | Path | None = None) -> Path:
    """The folder that holds the data: the argument, else $TORCH_BILEVEL_DATA, else ./data."""
    return Path(data_dir or os.environ.get(ENVIRONMENT) or "data")


def _read_idx(path: Path) -> np.ndarray:
    """The unsigned-byte array in an idx file (gzipped when its name ends in .gz)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        content = stream.read()
    zero, kind, dims = struct.unpack(">HBB", content[:4])
    if zero != 0 or kind != 8:
        raise DataError(f"{path} is not an idx file of unsigned bytes; fetch it again")
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if values.size != int(np.prod(shape)):
        raise DataError(
            f"{path} announces {shape} values but holds {values.size}; it is cut off, fetch it again"
        )
    return values.reshape(shape)


def _find_idx(raw: Path, stem: str) -> Path | None:
    """`stem` in folder `raw`, plain or gzipped."""
    return next((p for p in (raw / stem, raw / f"{stem}.gz") if p.is_file()), None)


def _image_pool(name: str, root: Path) -> Pool:
    """MNIST-like images; downloaded by torchvision when the files are not under `root`."""
    folder = _IMAGE_SETS[name]
    raw = root / folder / "raw"
    stems = [stem for part in ("train", "test") for stem in _IMAGE_FILES[part]]
    if any(_find_idx(raw, stem) is None for stem in stems):
        try:
            import torchvision

            getattr(torchvision.datasets, folder)(str(root), download=True)
        except Exception as error:  # no network, no torchvision, read-only folder: one remedy for all
            files = ", ".join(f"{stem}.gz" for stem in stems)
            raise DataError(
                f"data set {name!r} is not under {raw} and could not be downloaded "
                f"({type(error).__name__}: {error}). Put these files into {raw}: {files}; "
                f"or point --data-dir or ${ENVIRONMENT} to a folder that has {folder}/raw."
            ) from error
    arrays = [_read_idx(_find_idx(raw, stem)) for stem in stems]
    images = np.concatenate([arrays[0], arrays[2]])
    labels = np.concatenate([arrays[1], arrays[3]]).astype(np.int64)
    inputs = torch.from_numpy(images.reshape(len(images), -1)).to(torch.float64)
    return Pool(inputs, torch.from_numpy(labels), 10, len(arrays[3]), images.shape[1:])


def _libsvm_pool(name: str, root: Path) -> Pool:
    """A two-class LIBSVM set in svmlight text, plain or bzip2."""
    from sklearn.datasets import load_svmlight_file

    stem, features = _LIBSVM_SETS[name]
    candidates = [folder / (stem + end) for folder in (root / "libsvm", root) for end in (".bz2", "")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise DataError(
            f"data set {name!r} needs the file {stem!r} (svmlight text, or {stem}.bz2) in {root / 'libsvm'} "
            f"or {root}. It is the set {stem!r} among the binary classification sets of the LIBSVM data "
            f"collection; or point --data-dir or "
            f"${ENVIRONMENT} to a folder that has it."
        )
    inputs, targets = load_svmlight_file(str(path), n_features=features, zero_based=False)
    _, labels = np.unique(targets, return_inverse=True)
    return Pool(torch.from_numpy(inputs.toarray()), torch.from_numpy(labels.astype(np.int64)), 2)


def load_pool(name: str, data_dir: str | Path | None = None) -> Pool:
    """All samples of data set `name`; DataError when its files are absent and cannot be downloaded."""
    check_choice("dataset", name, DATASETS)
    if name in _IMAGE_SETS:
        return _image_pool(name, data_root(data_dir))
    if name in _LIBSVM_SETS:
        return _libsvm_pool(name, data_root(data_dir))
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Pool(torch.from_numpy(digits.data), labels, 10, 0, digits.images.shape[1:])


def require(name: str, data_dir: str | Path | None = None) -> None:
    """DataError unless data set `name` is at hand (or can be downloaded); images are looked for, not read."""
    check_choice("dataset", name, DATASETS)
    if name in _IMAGE_SETS:
        raw = data_root(data_dir) / _IMAGE_SETS[name] / "raw"
        if all(_find_idx(raw, stem) for part in _IMAGE_FILES.values() for stem in part):
            return
    load_pool(name, data_dir)


def split_sizes(
    name: str, n: int, sizes: tuple[int | None, int | None, int | None], fractions: list[float] | None
) -> tuple[int, int, int]:
    """Sizes of training, validation and test part: given, fractions of n, or the data set's usual ones."""
    given = any(size is not None for size in sizes)
    if given and fractions is not None:
        raise ConfigError("give either n_train, n_val, n_test or fractions, not both")
    if not given and (fractions is not None or name not in _SIZES):
        shares = _FRACTIONS if fractions is None else fractions
        if len(shares) != 3 or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise ConfigError(f"fractions={shares} must be three positive shares with sum at most 1")
        train, val = int(shares[0] * n + 1e-9), int(shares[1] * n + 1e-9)
        rest = n - train - val
        return train, val, rest if sum(shares) > 1 - 1e-9 else int(shares[2] * n + 1e-9)
    usual = _SIZES.get(name, (None, None, None))
    chosen = tuple(usual[i] if size is None else size for i, size in enumerate(sizes))
    if any(size is None or size < 1 for size in chosen):
        raise ConfigError(
            f"n_train, n_val, n_test = {chosen}: data set {name!r} needs all three, each at least 1"
        )
    return chosen


def standardize(train: Tensor, others: list[Tensor], kind: str) -> list[Tensor]:
    """Training set and others shifted and scaled by training statistics.

    `global`: one mean and one standard deviation of all entries (images). `feature`: per column, with
    std + 1e-4 (as
    published for the LIBSVM sets; on digits it makes the problem needlessly ill-conditioned).
    """
    check_choice("standardize", kind, STANDARDIZATIONS)
    if kind == "global":
        mean, std = train.mean(), train.std(correction=0)
    else:
        mean, std = train.mean(0), train.std(0, correction=0) + 1e-4
    return [(part - mean) / std for part in [train, *others]]


def make_split(
    name: str,
    data_dir: str | Path | None = None,
    sizes: tuple[int | None, int | None, int | None] = (None, None, None),
    fractions: list[float] | None = None,
    standardization: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Split:
    """Seeded disjoint training, validation and test parts of a data set, standardised by the training part.

    Sets with an official test part (MNIST, Fashion-MNIST) draw training and validation from the official
    training part and take the first n_test rows of the official test part; the others are shuffled as a
    whole.
    """
    pool = load_pool(name, data_dir)
    n = len(pool.labels)
    train, val, test = split_sizes(name, n, sizes, fractions)
    available = n - pool.held_out
    drawn = train + val + (0 if pool.held_out else test)
    if drawn > available or (pool.held_out and test > pool.held_out):
        held = f" and {pool.held_out} official test samples" if pool.held_out else ""
        raise ConfigError(
            f"{name} has {available} samples{held}; n_train={train}, n_val={val}, n_test={test} ask for more"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    last = (
        torch.arange(available, available + test)
        if pool.held_out
        else order[train + val : train + val + test]
    )
    rows = (order[:train], order[train : train + val], last)
    kind = standardization or ("feature" if name in _LIBSVM_SETS else "global")
    inputs = standardize(pool.inputs[rows[0]], [pool.inputs[rows[1]], pool.inputs[rows[2]]], kind)
    parts = [Part(x.to(dtype), pool.labels[r]) for x, r in zip(inputs, rows)]
    return Split(*parts, pool.classes, rows, pool.image_shape)


def corrupt(labels: Tensor, rate: float, kind: str, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels with round(rate n) of them, chosen at random, replaced; and the mask of those now wrong.

    Args:
        labels: (n,) int64, true classes.
        rate: share of the labels that are touched, in [0, 1].
        kind: `uniform` (a uniformly random class, possibly the true one), `shift` (label + 1..classes-1
            modulo classes: always wrong), `flip` (the other one of two classes).
        seed: of the choice and of the new labels.

    Returns:
        noisy labels (n,) int64; corrupted (n,) bool, noisy != labels.
    """
    check_choice("noise_kind", kind, NOISE_KINDS)
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"noise_rate={rate} must be in [0, 1]")
    if kind == "flip" and classes != 2:
        raise ConfigError(
            f"noise_kind='flip' is for two classes, here are {classes}; use 'shift' (always wrong) or "
            f"'uniform'"
        )
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # apart from the generator of the split
    n = len(labels)
    chosen = torch.randperm(n, generator=generator)[: round(rate * n)]
    noisy = labels.clone()
    if kind == "uniform":
        noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    else:
        shift = torch.randint(1, classes, (len(chosen),), generator=generator)
        noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy, noisy != labels
