"""The problems that benchmarks share, each as modules for us and as plain functions of parameter lists for peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import torch_bilevel as tb
from benchmarks.common import Skip
from experiments.data import DataError, corrupt, make_split
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.lower import LowerSystems, make_lower

Data = tuple[Tensor, Tensor]


@dataclass
class Setting:
    """One bilevel problem at one point, with the outer step that led there.

        lower: (1/n) sum_i c_i CE_i + penalty        upper: mean CE

    Attributes:
        sizes: layers of the learner, tanh between them. bias: whether they have one.
        hyper: 'weights': c = sigmoid(x), penalty = reg |y|^2. 'log_l2': c = 1, and sum exp(x_j) W_kj^2 more.
        train, valid: (inputs, labels).
        x, x_before (dx,); y, y_before (dy,): the lower solutions there.
        anchor, proximal: g also has proximal * |y - anchor|^2, which makes it strongly convex where a deep
            learner's loss is not (as in implicit MAML).
    """

    name: str
    sizes: tuple[int, ...]
    bias: bool
    hyper: str
    reg: float
    train: Data
    valid: Data
    x: Tensor
    y: Tensor | None = None
    x_before: Tensor | None = None
    y_before: Tensor | None = None
    anchor: Tensor | None = None
    proximal: float = 0.0

    def learner(self) -> nn.Sequential:
        """The learner, with y in it."""
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(self.sizes, self.sizes[1:])):
            layers += [nn.Tanh()] if i else []
            layers.append(nn.Linear(a, b, bias=self.bias, dtype=self.x.dtype))
        module = nn.Sequential(*layers)
        if self.y is None:
            with torch.no_grad():
                for p in module.parameters():
                    p.zero_() if len(self.sizes) == 2 or p.dim() == 1 else nn.init.xavier_normal_(p)
        else:
            torch.nn.utils.vector_to_parameters(self.y.clone(), module.parameters())  # clone: it makes views
        return module.to(self.x.device)

    def parameters(self, y: Tensor | None = None) -> list[Tensor]:
        """y as a list of tensors shaped as the learner's, leaves that require grad."""
        y, parts, at = self.y if y is None else y, [], 0
        for a, b in zip(self.sizes, self.sizes[1:]):
            for shape in ((b, a), (b,)) if self.bias else ((b, a),):
                size = b * a if len(shape) == 2 else b
                parts.append(y[at : at + size].view(shape).clone().requires_grad_(True))
                at += size
        return parts

    def logits(self, params: Sequence[Tensor], inputs: Tensor) -> Tensor:
        step = 2 if self.bias else 1
        for i in range(0, len(params), step):
            inputs = linear(inputs.tanh() if i else inputs, params[i], params[i + 1] if self.bias else None)
        return inputs

    def lower(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """g, ()."""
        return self._lower(self.logits(params, self.train[0]), params, x, self.train[1])

    def upper(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """f, ()."""
        return cross_entropy(self.logits(params, self.valid[0]), self.valid[1])

    def _lower(self, logits: Tensor, params: Sequence[Tensor], x: Tensor, labels: Tensor) -> Tensor:
        penalty = self.reg * sum(p.square().sum() for p in params)
        if self.anchor is not None:
            penalty = penalty + self.proximal * sum((p - a).square().sum() for p, a in zip(params, self._anchors()))
        if self.hyper == "log_l2":
            return cross_entropy(logits, labels) + (x.exp() * params[0].square()).sum() + penalty
        return (x.sigmoid() * cross_entropy(logits, labels, reduction="none")).mean() + penalty

    def _anchors(self) -> list[Tensor]:
        if "_parts" not in self.__dict__:
            self._parts = [p.detach() for p in self.parameters(self.anchor)]
        return self._parts

    def problem(self, x: Tensor | None = None, compile: bool = False) -> tb.BilevelProblem:
        """As a user of torch_bilevel writes it: a module, a tensor, two losses."""

        def lower_loss(learner: nn.Module, hyper: Tensor, batch: Data) -> Tensor:
            return self._lower(learner(batch[0]), tuple(learner.parameters()), hyper, batch[1])

        def upper_loss(learner: nn.Module, hyper: Tensor, batch: Data) -> Tensor:
            return cross_entropy(learner(batch[0]), batch[1])

        start = (self.x if x is None else x).clone()
        return tb.BilevelProblem(self.learner(), start, lower_loss, upper_loss, self.train, self.valid, compile=compile)

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> Setting:
        """The same numbers in another dtype, or on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            return t.to(device or t.device, (dtype if t.is_floating_point() else None) or t.dtype)

        points = {key: move(getattr(self, key)) for key in ("x", "y", "x_before", "y_before", "anchor")}
        return replace(self, train=tuple(map(move, self.train)), valid=tuple(map(move, self.valid)), **points)

    @property
    def dy(self) -> int:
        return sum(a * b + (b if self.bias else 0) for a, b in zip(self.sizes, self.sizes[1:]))


def images(n: int, side: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthetic images (n, side^2), float64, with a falling spectrum, and labels of a noisy linear rule."""
    gen = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(side, dtype=torch.float64)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt() * side + 1
    noise = torch.fft.fft2(torch.randn(n, side, side, generator=gen, dtype=torch.float64))
    inputs = torch.fft.ifft2(noise / radius**1.5).real.reshape(n, -1)
    inputs = (inputs - inputs.mean()) / inputs.std()
    teacher = torch.randn(side * side, classes, generator=gen, dtype=torch.float64)
    scores = inputs @ teacher
    scores = scores / scores.std() + torch.randn(n, classes, generator=gen, dtype=torch.float64) / 2
    return inputs, scores.argmax(1)


def softmax(quick: bool = False, n: int = 5000, side: int = 28, classes: int = 10) -> Setting:
    """A 5000 x 784 softmax layer without bias (7,840 unknowns), synthetic images, one log L2 weight per feature."""
    n, side = (200, 7) if quick else (n, side)
    inputs, labels = images(2 * n, side, classes, 0)
    train, valid = (inputs[:n].float(), labels[:n]), (inputs[n:].float(), labels[n:])
    gen = torch.Generator().manual_seed(1)
    x_before = -5 + torch.randn(side * side, generator=gen)
    step = 0.1 * torch.randn(side * side, generator=gen)
    setting = Setting(f"softmax {n} x {side * side}", (side * side, classes), False, "log_l2", 1e-3, train, valid,
                      x_before + step, x_before=x_before)  # fmt: skip
    return solved(setting)


def synthetic_cleaning(n: int, side: int, classes: int, reg: float = 1e-2) -> Setting:
    """Hyper-cleaning of n synthetic images, a third of them mislabelled, at random weights; float32."""
    inputs, labels = images(2 * n, side, classes, 4)
    labels[:n], _ = corrupt(labels[:n], 1 / 3, "uniform", classes, 0)
    x = torch.randn(n, generator=torch.Generator().manual_seed(5))
    return Setting(f"synthetic cleaning {n} x {side * side} x {classes}", (side * side, classes), True, "weights", reg,
                   (inputs[:n].float(), labels[:n]), (inputs[n:].float(), labels[n:]), x)  # fmt: skip


def mlp(cache: Path, quick: bool = False, proximal: float = 0.01) -> Setting:
    """784-256-128-10 with tanh (235,146 unknowns), 5000 synthetic images, one weight per sample, trained by L-BFGS.

    The lower loss has a proximal term around the learner trained at x_before without it. Kept in ``cache``.
    """
    n, side, hidden, iterations = (100, 5, (8,), 30) if quick else (5000, 28, (256, 128), 100)
    inputs, labels = images(2 * n, side, 10, 2)
    labels[:n], _ = corrupt(labels[:n], 0.3, "uniform", 10, 0)
    train, valid = (inputs[:n].float(), labels[:n]), (inputs[n:].float(), labels[n:])
    gen = torch.Generator().manual_seed(3)
    x_before = torch.randn(n, generator=gen)
    x = x_before + 0.1 * torch.randn(n, generator=gen)
    sizes = (side * side, *hidden, 10)
    layers = "-".join(map(str, sizes))
    setting = Setting(f"MLP {layers}", sizes, True, "weights", 1e-3, train, valid, x, x_before=x_before,
                      proximal=proximal)  # fmt: skip
    path = cache / f"mlp-{n}-{layers}.pt"
    if not path.is_file():
        torch.manual_seed(0)
        anchor = train_learner(setting, x_before, torch.nn.utils.parameters_to_vector(setting.learner().parameters()),
                               iterations)  # fmt: skip
        near = replace(setting, anchor=anchor)
        y_before = train_learner(near, x_before, anchor, iterations)
        path.parent.mkdir(parents=True, exist_ok=True)
        y = train_learner(near, x, y_before, iterations)
        torch.save({"anchor": anchor, "y_before": y_before, "y": y}, path)
    return replace(setting, **torch.load(path, weights_only=True))


def mnist(data_dir: str | None, cache: Path, quick: bool = False, seed: int = 0, steps: int = 12) -> Setting:
    """MNIST-5000 hyper-cleaning (50 % uniform noise, reg 1e-3) at the weights that L-BFGS has learned in 12 steps.

    The weights are kept in ``cache``, so that every later run measures at the same point. ``quick``: 200 digits.
    """
    dataset, sizes = ("digits", (200, 100, 100)) if quick else ("mnist", (None, None, None))
    setting = cleaning(dataset, data_dir, sizes, seed, reg=1e-3)
    path = cache / f"{dataset}-{len(setting.x)}-{seed}-{steps}.pt"
    if not path.is_file():
        xs: list[Tensor] = []

        def follow(report: Any, x: Tensor, y: Tensor) -> None:
            if not xs or not torch.equal(xs[-1], x):
                xs.append(x.clone())

        tb.minimize(setting.problem(), "lbfgs", max_steps=steps, gradient_tol=0.0, callback=follow)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"before": xs[-2], "x": xs[-1]}, path)
    kept = torch.load(path, weights_only=True)
    name = f"{dataset}-{len(setting.x)} at learned weights"
    return solved(replace(setting, name=name, x=kept["x"], x_before=kept["before"]))


def cleaning(
    dataset: str, data_dir: str | None, sizes: tuple[int | None, ...], seed: int, reg: float, noise: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Setting:  # fmt: skip
    """Hyper-cleaning with a linear softmax learner and x = 0 (every weight 1/2), as ``experiments.hyper_cleaning``."""
    try:
        split = make_split(dataset, data_dir, sizes, None, None, seed, dtype)
    except DataError as error:
        raise Skip(str(error)) from error
    noisy, _ = corrupt(split.train.labels, noise, "uniform", split.classes, seed)
    features = split.train.inputs.shape[1]
    return Setting(f"{dataset} hyper-cleaning", (features, split.classes), True, "weights", reg,
                   (split.train.inputs, noisy), (split.val.inputs, split.val.labels),
                   torch.zeros(len(noisy), dtype=dtype))  # fmt: skip


def per_feature_l2(dataset: str, data_dir: str | None, sizes: tuple[int, int, int], seed: int) -> Setting:
    """One log L2 weight per feature of a softmax classifier, float64, from exp(-6); ill-conditioned.

    A penalty of 1e-3 on everything keeps the lower level strongly convex at whatever x.
    """
    try:
        split = make_split(dataset, data_dir, sizes, None, None, seed)
    except DataError as error:
        raise Skip(str(error)) from error
    features = split.train.inputs.shape[1]
    return Setting(f"{dataset} L2 per feature", (features, split.classes), True, "log_l2", 1e-3,
                   (split.train.inputs, split.train.labels), (split.val.inputs, split.val.labels),
                   torch.full((features,), -6.0, dtype=torch.float64))  # fmt: skip


def solved(setting: Setting) -> Setting:
    """With the lower solutions at x and x_before, by Newton-CG: the same for every contestant."""
    problem, solver = setting.problem(), make_lower(None)
    g = Objective(problem, lower=1.0, counts=OracleCounts())
    before = setting.x if setting.x_before is None else setting.x_before
    y_before = solver.solve(g, before, problem.y, systems=LowerSystems(solver="cg")).y
    y = solver.solve(g, setting.x, y_before, systems=LowerSystems(solver="cg")).y
    return replace(setting, y=y, y_before=y_before if setting.x_before is not None else None)


def train_learner(setting: Setting, x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """y (dy,) after so many L-BFGS iterations on g(x, .): for learners whose lower level is not convex."""
    params = setting.parameters(start.detach())
    optimizer = torch.optim.LBFGS(params, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-7, tolerance_change=0.0)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = setting.lower(params, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in params])


def curvature(setting: Setting, params: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """v -> g_yy v by double backward on the parameter list: the usual hand-written product."""
    gradients = torch.autograd.grad(setting.lower(params, setting.x), params, create_graph=True)
    return lambda v: torch.autograd.grad(gradients, params, v, retain_graph=True)
