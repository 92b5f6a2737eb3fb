"""Supervised reference learners: weighted, L2-regularised multinomial logistic regression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torch_bilevel.errors import SolverError


@dataclass(frozen=True)
class Trained:
    """A trained learner, the true gradient norm of its objective, and whether that met the tolerance."""

    learner: nn.Linear
    gradient_norm: float
    converged: bool


def train_softmax(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    reg: float,
    weights: Tensor | None = None,
    tolerance: float | None = None,
    max_iter: int = 2000,
) -> Trained:
    """The linear softmax layer w that minimises (1/n) sum_i c_i CE_i(w) + reg |w|^2, by L-BFGS from 0.

    |w|^2 includes the bias.

    Args:
        inputs: (n, d). labels: (n,) int64.
        classes: number of classes.
        reg: coefficient of |w|^2, positive (then the objective is strongly convex).
        weights: (n,) sample weights c; None for all 1. The sum is divided by n, not by the sum of c, so that
            a sample of weight 0 changes the balance against reg as it does in the lower level of
            hyper-cleaning.
        tolerance: on the gradient norm, default 1e-6 in float64 and 2e-3 in float32 (a line search on values
            cannot see much below the root of the rounding error). The error of w is at most tolerance / (2
            reg).
        max_iter: L-BFGS iterations, looked at in blocks of 20.

    Returns:
        Trained; `converged` is False, and nothing is raised, when the tolerance was not met.
    """
    tolerance = tolerance or (1e-6 if inputs.dtype == torch.float64 else 2e-3)
    learner = zero_linear(inputs.shape[1], classes, inputs.dtype, inputs.device)
    parameters = list(learner.parameters())

    def objective() -> Tensor:
        losses = cross_entropy(learner(inputs), labels, reduction="none")
        mean = losses.mean() if weights is None else (weights * losses).mean()
        return mean + reg * sum(p.square().sum() for p in parameters)

    def gradient_norm() -> float:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective(), parameters)]).norm().item()

    chunk = 20  # iterations between looks at the true gradient norm; the optimizer keeps its history
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=chunk,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    norm, value, before = gradient_norm(), objective().item(), float("inf")
    for _ in range(-(-max_iter // chunk)):
        if not tolerance < norm < float("inf") or not value < before:  # reached, not finite, or at rounding
            break
        optimizer.step(closure)
        norm, value, before = gradient_norm(), objective().item(), value
    learner.zero_grad()
    return Trained(learner, norm, norm <= tolerance)


def newton_softmax(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    reg: float,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-11,
    max_iter: int = 50,
) -> nn.Linear:
    """The minimiser of `train_softmax` to rounding, by Newton's method with the Hessian in closed form: small learners.

    Hessian: (1/n) sum_i c_i (diag(p_i) - p_i p_i') (x) z_i z_i' + 2 reg I, with z_i = (inputs_i, 1).

    Args:
        inputs, labels, classes, reg, weights: see `train_softmax`; float64.
        start: (classes, d + 1), weight and bias of a nearby solution; None for 0.
        tolerance: on the gradient norm. max_iter: of Newton steps, each halved until the objective does not rise.

    Raises: SolverError when the tolerance is not met. Cost: n (classes (d + 1))^2 a step.
    """
    n = len(labels)
    z = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    c = torch.ones_like(z[:, 0]) if weights is None else weights.detach()
    target = nn.functional.one_hot(labels, classes).to(z.dtype)
    W = torch.zeros(classes, z.shape[1], dtype=z.dtype, device=z.device) if start is None else start.clone()

    def objective(W: Tensor) -> float:
        return float((c * cross_entropy(z @ W.T, labels, reduction="none")).mean() + reg * W.square().sum())

    for _ in range(max_iter):
        p = (z @ W.T).softmax(1)
        gradient = (c[:, None] * (p - target)).T @ z / n + 2 * reg * W
        if float(gradient.norm()) <= tolerance:
            return _linear(W)
        blocks = torch.einsum("n,nk,kl->nkl", c, p, torch.eye(classes, dtype=z.dtype, device=z.device))
        blocks = blocks - c[:, None, None] * p[:, :, None] * p[:, None, :]
        H = torch.einsum("nkl,ni,nj->kilj", blocks, z, z).reshape(W.numel(), W.numel()) / n
        H.diagonal().add_(2 * reg)
        step = torch.linalg.solve(H, gradient.reshape(-1)).reshape(W.shape)
        value, length = objective(W), 1.0
        while length > 1e-3 and not objective(W - length * step) <= value * (1 + 1e-14):
            length *= 0.5
        W = W - length * step
    raise SolverError(f"Newton's method: gradient norm {float(gradient.norm()):.1e} after {max_iter} steps")


def _linear(W: Tensor) -> nn.Linear:
    """The softmax layer with weight and bias (classes, d + 1)."""
    learner = zero_linear(W.shape[1] - 1, W.shape[0], W.dtype, W.device)
    with torch.no_grad():
        learner.weight.copy_(W[:, :-1])
        learner.bias.copy_(W[:, -1])
    return learner


def zero_linear(features: int, classes: int, dtype: torch.dtype, device: torch.device | str) -> nn.Linear:
    """A linear softmax layer (classes x (features + 1) unknowns) that starts at zero."""
    learner = nn.Linear(features, classes, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
    return learner


def sgd_start(learner: nn.Linear, inputs: Tensor, labels: Tensor, reg: float, steps: int, lr: float) -> None:
    """`steps` full-batch gradient steps on mean CE + reg |w|^2, in place: the published start."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(learner(inputs), labels)
        (loss + reg * sum(p.square().sum() for p in learner.parameters())).backward()
        optimizer.step()
    learner.zero_grad()


@torch.no_grad()
def evaluate(learner: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in [0, 1]) of a classifier."""
    logits = learner(inputs)
    return cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).to(torch.float64).mean().item()


@dataclass(frozen=True)
class Detection:
    """How well `weight > threshold` finds the clean samples; NaN where a ratio has no samples below it."""

    precision: float
    recall: float
    f1: float


def detect_clean(weights: Tensor, corrupted: Tensor, threshold: float = 0.5) -> Detection:
    """Precision, recall and F1 of "weight > threshold" as a detector of samples that are not corrupted.

    Args:
        weights: (n,) learned sample weights in [0, 1].
        corrupted: (n,) bool, label differs from the true one.
    """
    kept, clean = weights.cpu() > threshold, ~corrupted.cpu()
    hits = (kept & clean).sum().item()

    def ratio(below: int, factor: int = 1) -> float:
        return factor * hits / below if below else float("nan")

    n_kept, n_clean = kept.sum().item(), clean.sum().item()
    return Detection(ratio(n_kept), ratio(n_clean), ratio(n_kept + n_clean, 2))
