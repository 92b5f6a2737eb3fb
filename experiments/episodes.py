"""Few-shot classification: image classes from folders or from MNIST-like files, episodes, heads on a shared backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, gelu

import torch_bilevel as tb
from experiments.config import ConfigError
from experiments.data import DataError, data_root, load_pool

#: name -> (folder below the data folder, height and width, what is published as train, val, test classes)
FOLDER_SETS = {"mini_imagenet": ("miniImageNet", 84, (64, 16, 20)), "fc100": ("FC100", 32, (60, 20, 20))}
SOURCES = ("mnist_fashion", *FOLDER_SETS)
PARTS = ("train", "val", "test")
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp"}


@dataclass(frozen=True)
class Classes:
    """Images (n_i, channels, height, width) in [0, 1], float32, of each class; a class of the same `group` as another
    (its rotations) never meets it in an episode."""

    images: Sequence[Tensor]
    groups: Sequence[int]


@dataclass(frozen=True)
class Episodes:
    """Tasks at once: support (tasks, ways * shots, features...) with labels (tasks, ways * shots), and queries likewise."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


def read_class_folders(root: Path, size: int) -> list[Tensor]:
    """The classes of root/CLASS/IMAGE, (n_i, 3, size, size) uint8 each, classes and images in the order of their names.

    Raises:
        DataError: no such folder, or no class folder with images in it.
    """
    from PIL import Image

    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    classes = []
    for folder in folders:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGES)
        images = []
        for path in paths:
            try:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
            except OSError as error:
                raise DataError(f"{path} is not a readable image ({error}); remove it or fetch it again") from error
        if images:
            classes.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())
    if not classes:
        raise DataError(
            f"{root}: expected a folder of class folders of images ({', '.join(sorted(_IMAGES))}), as"
            f" {root}/n01532829/n0153282900000005.jpg"
        )
    return classes


def load_folder_set(name: str, data_dir: str | Path | None = None, size: int | None = None) -> dict[str, Classes]:
    """The train, val and test classes of 'mini_imagenet' or 'fc100' from data_dir/FOLDER/{train,val,test}/CLASS/IMAGE.

    Args:
        size: height and width, default the usual 84 or 32.

    Raises:
        DataError: a part is absent; names the folders. Neither set is downloaded: both are given by their authors.
    """
    folder, usual, published = FOLDER_SETS[name]
    root = data_root(data_dir) / folder
    absent = [part for part in PARTS if not (root / part).is_dir()]
    if absent:
        wanted = ", ".join(f"{root}/{part} ({count} class folders)" for part, count in zip(PARTS, published))
        raise DataError(
            f"data set {name!r} is not at hand: {', '.join(str(root / part) for part in absent)} missing. Expected {wanted},"
            " images in each class folder; point --data-dir to the folder that holds it, or use source=mnist_fashion"
        )
    parts = {}
    for part in PARTS:
        images = [i.float() / 255.0 for i in read_class_folders(root / part, size or usual)]
        parts[part] = Classes(images, list(range(len(images))))
    return parts


def load_mnist_fashion(
    data_dir: str | Path | None = None, seed: int = 0, per_class: int = 200, pool: int = 2
) -> dict[str, Classes]:
    """Classes in the style of Omniglot: the 20 of MNIST and Fashion-MNIST, each with its four rotations.

    10 / 5 / 5 of the 20 (half of each set, a seeded draw) and their rotations are meta-train, val and test: 40 / 20 /
    20 classes, disjoint. As a rotated 0 or T-shirt is much like itself, an episode never takes two rotations of one
    class.

    Args:
        per_class: images kept of each. pool: images are averaged over pool x pool pixels, 28 -> 14 by default.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for number, name in enumerate(("mnist", "fashion_mnist")):
        data = load_pool(name, data_dir)
        order = torch.randperm(10, generator=generator).tolist()
        cuts = (5, 7, 10) if number == 0 else (5, 8, 10)
        for part, classes in zip(PARTS, (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])):
            for label in classes:
                rows = torch.nonzero(data.labels == label)[:, 0]
                rows = rows[torch.randperm(len(rows), generator=generator)[:per_class]]
                images = data.inputs[rows].reshape(-1, 1, 28, 28).float() / 255.0
                chosen[part].append(avg_pool2d(images, pool))
    return {
        part: Classes([torch.rot90(x, k, (2, 3)) for x in images for k in range(4)],
                      [i for i in range(len(images)) for _ in range(4)])
        for part, images in chosen.items()
    }  # fmt: skip


def load_classes(source: str, data_dir: str | Path | None = None, seed: int = 0) -> dict[str, Classes]:
    """Meta-train, val and test classes of a source of SOURCES."""
    if source in FOLDER_SETS:
        return load_folder_set(source, data_dir)
    if source == "mnist_fashion":
        return load_mnist_fashion(data_dir, seed)
    raise ConfigError(f"source {source!r} is not known; one of {', '.join(SOURCES)}")


def sample(
    classes: Classes, tasks: int, generator: torch.Generator, ways: int = 5, shots: int = 5, queries: int = 15
) -> Episodes:
    """Random episodes: for each, `ways` classes of different groups, `shots` support and `queries` query images of each.

    Raises:
        ConfigError: fewer groups than ways, or a class with fewer than shots + queries images.
    """
    groups = sorted(set(classes.groups))
    if len(groups) < ways:
        raise ConfigError(f"{ways}-way episodes need as many classes, there are {len(groups)}")
    short = min(len(images) for images in classes.images)
    if short < shots + queries:
        raise ConfigError(f"{shots} shots and {queries} queries need {shots + queries} images a class; one has {short}")
    members = {g: [i for i, group in enumerate(classes.groups) if group == g] for g in groups}
    support, query = [], []
    for _ in range(tasks):
        drawn = torch.randperm(len(groups), generator=generator)[:ways].tolist()
        for g in (groups[i] for i in drawn):
            of = members[g]
            images = classes.images[of[int(torch.randint(len(of), (), generator=generator))]]
            images = images[torch.randperm(len(images), generator=generator)[: shots + queries]]
            support.append(images[:shots])
            query.append(images[shots:])
    shape = support[0].shape[1:]
    labels = torch.arange(ways)

    def stack(parts: list[Tensor], each: int) -> tuple[Tensor, Tensor]:
        return torch.stack(parts).reshape(tasks, ways * each, *shape), labels.repeat_interleave(each).expand(tasks, -1)

    return Episodes(*stack(support, shots), *stack(query, queries))


class Backbone(nn.Module):
    """Four blocks of 3x3 convolution (stride 2 in the first three), GroupNorm and GELU; features (n, width * h * w).

    GroupNorm, not BatchNorm, and GELU: their derivatives are right to third order. Small images: no pooling layer.
    """

    def __init__(self, channels: int, size: int, width: int = 16, groups: int = 4):
        super().__init__()
        sizes = [channels, width, width, width, width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if i < 3 else 1, padding=1) for i, (a, b) in enumerate(zip(sizes, sizes[1:]))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(4))
        for _ in range(3):
            size = (size + 1) // 2
        self.features = width * size * size

    def forward(self, images: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms):
            images = gelu(norm(convolution(images)))
        return images.flatten(1)


class Heads(nn.Module):
    """One linear softmax head for each task of a meta-batch, from zero: (tasks, n, features) -> (tasks, n, ways)."""

    def __init__(self, tasks: int, features: int, ways: int = 5):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tasks, features, ways))
        self.bias = nn.Parameter(torch.zeros(tasks, 1, ways))

    def forward(self, features: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, features, self.weight)


def head_loss(reg: float):
    """Lower loss: sum over the tasks of CE on the support set + reg |head|^2 / 2. Block-diagonal: one problem per head."""

    def loss(heads: Heads, backbone: Backbone, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = heads(backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2]))
        penalty = heads.weight.square().sum() + heads.bias.square().sum()
        return cross_entropy(logits.flatten(0, 1), labels.flatten()) * len(labels) + 0.5 * reg * penalty

    return loss


def query_loss(heads: Heads, backbone: Backbone, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Upper loss: mean CE on the query sets."""
    images, labels = batch
    logits = heads(backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2]))
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def build(backbone: Backbone, episodes: Episodes, reg: float = 0.5, ways: int = 5) -> tb.BilevelProblem:
    """The bilevel problem of a meta-batch: x the backbone's parameters, y all of its heads."""
    heads = Heads(len(episodes.support), backbone.features, ways)
    return tb.BilevelProblem(heads, backbone, head_loss(reg), query_loss, *batches(episodes))


def batches(episodes: Episodes) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(lower batch, upper batch) of a meta-batch, as `problem.at` takes them."""
    return (episodes.support, episodes.support_labels), (episodes.query, episodes.query_labels)


@torch.no_grad()
def judge(
    backbone: Backbone, episodes: Episodes, reg: float = 0.5, ways: int = 5, steps: int = 80
) -> tuple[float, float]:
    """(mean query CE, mean query accuracy) with each task's head at its minimiser (accelerated gradient steps)."""

    def features(images: Tensor) -> Tensor:
        return backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    X, Q = features(episodes.support), features(episodes.query)
    X, Q = (torch.cat([F, torch.ones_like(F[..., :1])], dim=2) for F in (X, Q))
    targets = torch.nn.functional.one_hot(episodes.support_labels, ways).to(X.dtype)
    L = 0.5 * X.square().sum((1, 2)).max() / X.shape[1] + reg  # the softmax Hessian is at most 1/2
    momentum = (L.sqrt() - reg**0.5) / (L.sqrt() + reg**0.5)
    W = Z = X.new_zeros(X.shape[0], X.shape[2], ways)
    for _ in range(steps):
        gradient = X.mT @ ((X @ Z).softmax(2) - targets) / X.shape[1] + reg * Z
        new = Z - gradient / L
        Z, W = new + momentum * (new - W), new
    logits = Q @ W
    loss = cross_entropy(logits.flatten(0, 1), episodes.query_labels.flatten()).item()
    return loss, (logits.argmax(2) == episodes.query_labels).float().mean().item()
