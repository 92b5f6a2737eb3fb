"""The referee: bilevel derivatives by dense float64 linear algebra, written from the formulas alone.

It imports nothing from the package. f(x, y) and g(x, y) are functions of flat float64 tensors; every Hessian
is dense, by ``torch.func``, every system is solved by ``torch.linalg.solve``, every lower level by Newton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacrev

Function = Callable[[Tensor, Tensor], Tensor]


def argmin(h: Callable[[Tensor], Tensor], y0: Tensor, iterations: int = 100) -> Tensor:
    """A strict local minimiser: Newton's method with dense Hessians and halved steps, to the end.

    ArithmeticError when it ends where the gradient is not zero to rounding or the Hessian not positive.
    """
    y, slope = y0.double(), grad(h)
    for _ in range(iterations):
        gradient, H = slope(y), jacrev(slope)(y)
        step, rate = torch.linalg.solve(H, gradient), 1.0
        while rate > 1e-3 and not slope(y - rate * step).norm() < gradient.norm():
            rate /= 2
        if not rate > 1e-3:
            break
        y = y - rate * step
    if not (gradient.norm() <= 1e-12 and torch.linalg.eigvalsh(H)[0] > 0):
        raise ArithmeticError(f"the referee found no minimiser: |gradient| = {float(gradient.norm()):.1e}")
    return y


def blocks(h: Function, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h_xx, h_xy, h_yx, h_yy), dense; h_xy is (dx, dy)."""
    n = x.numel()
    H = hessian(lambda z: h(z[:n], z[n:]))(torch.cat([x, y]))
    return H[:n, :n], H[:n, n:], H[n:, :n], H[n:, n:]


def schur(h: Function, x: Tensor, y: Tensor) -> Tensor:
    """S[h] = h_xx - h_xy h_yy^{-1} h_yx."""
    xx, xy, yx, yy = blocks(h, x, y)
    return xx - xy @ torch.linalg.solve(yy, yx)


@dataclass(frozen=True)
class Reference:
    """A bilevel problem for the referee: f, g, a point x (dx,) and a start y0 (dy,), float64 on the CPU."""

    f: Function
    g: Function
    x: Tensor
    y0: Tensor

    def solution(self, x: Tensor | None = None, sigma: float = 0.0) -> Tensor:
        """argmin_y g(x, y) + sigma f(x, y)."""
        x = self.x if x is None else x
        return argmin(lambda y: self.g(x, y) + sigma * self.f(x, y), self.y0)

    def implicit(self, x: Tensor | None = None) -> SimpleNamespace:
        """y*, value, gradient and Hessian of phi(x) = f(x, y*(x)).

        v = g_yy^{-1} f_y, L = f - <v, g_y>, Y = -g_yy^{-1} g_yx: f_x - g_xy v and [I; Y]' hess L [I; Y].
        """
        x = self.x if x is None else x
        y = self.solution(x)
        _, xy, yx, yy = blocks(self.g, x, y)
        v = torch.linalg.solve(yy, grad(self.f, 1)(x, y))
        Y = -torch.linalg.solve(yy, yx)

        def lagrangian(x, y):
            return self.f(x, y) - torch.dot(v, grad(self.g, 1)(x, y))

        xx, xy_, yx_, yy_ = blocks(lagrangian, x, y)
        L = torch.cat([torch.cat([xx, xy_], 1), torch.cat([yx_, yy_], 1)])
        T = torch.cat([torch.eye(x.numel(), dtype=x.dtype), Y])
        gradient = grad(self.f)(x, y) - xy @ v
        return SimpleNamespace(y=y, v=v, value=self.f(x, y), gradient=gradient, hessian=T.T @ L @ T)

    def penalty(self, penalty: float, scheme: str, x: Tensor | None = None) -> SimpleNamespace:
        """The difference quotient of h_sigma(x) = min_y g + sigma f, as published: naive, dense, float64."""
        x = self.x if x is None else x
        ends = (-1 / penalty, 1 / penalty) if scheme == "central" else (0.0, 1 / penalty)
        values, gradients, hessians, points = [], [], [], []
        for sigma in ends:
            def h(x, y, sigma=sigma):
                return self.g(x, y) + sigma * self.f(x, y)

            y = self.solution(x, sigma)
            points.append(y)
            values.append(h(x, y))
            gradients.append(grad(h)(x, y))
            hessians.append(schur(h, x, y))
        delta = ends[1] - ends[0]
        value, gradient, H = ((b - a) / delta for a, b in (values, gradients, hessians))
        return SimpleNamespace(value=value, gradient=gradient, hessian=H, points=points)


def fd_hessian(gradient: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    """(dx, dx) by central differences of a gradient, error O(h^2) + rounding / h."""
    columns = []
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e[i] = h
        columns.append((gradient(x + e) - gradient(x - e)) / (2 * h))
    return torch.stack(columns, 1)


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64 on the CPU; NaN when anything is."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).norm() / expected.norm())


def smooth(dx: int = 6, dy: int = 8, seed: int = 0) -> Reference:
    """A random smooth problem; g_yy is the identity plus terms that vary with x and y, f is not convex.

    g = |y|^2/2 + sum softplus(C y + D x) + <y, tanh(E x)> + sum exp(W x / 2) y^2 / 10,
    f = sum sin(P y + Q x) + |R y - t|^2 / 4 + log-sum-exp(S x + U y).
    """
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64) / shape[-1] ** 0.5

    C, D, E, W = randn(10, dy), randn(10, dx), randn(dy, dx), randn(dy, dx)
    P, Q, R, S, U = randn(5, dy), randn(5, dx), randn(7, dy), randn(4, dx), randn(4, dy)
    t = torch.randn(7, generator=gen, dtype=torch.float64)
    x = torch.randn(dx, generator=gen, dtype=torch.float64)
    y0 = torch.randn(dy, generator=gen, dtype=torch.float64)
    held = [C, D, E, W, P, Q, R, S, U, t]

    def constants(z):
        return [c.to(z) for c in held]

    def g(x, y):
        C, D, E, W, *_ = constants(y)
        return ((y * y).sum() / 2 + 2 * F.softplus(C @ y + D @ x).sum() + (y * torch.tanh(E @ x)).sum()
                + (torch.exp(W @ x / 2) * y * y).sum() / 10)  # fmt: skip

    def f(x, y):
        *_, P, Q, R, S, U, t = constants(y)
        waves, squares = torch.sin(P @ y + Q @ x).sum(), ((R @ y - t) ** 2).sum() / 4
        return waves + squares + torch.logsumexp(S @ x + U @ y, 0)

    return Reference(f, g, x, y0)


@dataclass(frozen=True)
class Cleaning:
    """Softmax hyper-cleaning: one weight sigmoid(x_i) per training sample, y = (W (c, d), b (c,)) flattened.

    g = mean_i sigmoid(x_i) CE(W a_i + b, t_i) + l2 |y|^2,   f = mean CE on clean data.
    """

    A: Tensor
    t: Tensor
    A_clean: Tensor
    t_clean: Tensor
    classes: int
    l2: float = 0.01

    @property
    def reference(self) -> Reference:
        c, d = self.classes, self.A.shape[1]

        def loss(y, A, t):
            W, b = y[: c * d].view(c, d), y[c * d :]
            logits = A.to(y) @ W.T + b
            return torch.logsumexp(logits, 1) - logits[torch.arange(len(t)), t]

        def g(x, y):
            return (torch.sigmoid(x) * loss(y, self.A, self.t)).mean() + self.l2 * (y * y).sum()

        def f(x, y):
            return loss(y, self.A_clean, self.t_clean).mean()

        gen = torch.Generator().manual_seed(5)
        x = torch.randn(len(self.t), generator=gen, dtype=torch.float64) / 2
        y0 = torch.randn(c * d + c, generator=gen, dtype=torch.float64) / 5
        return Reference(f, g, x, y0)


def cleaning(samples: int = 12, features: int = 4, classes: int = 3, seed: int = 0) -> Cleaning:
    """Clustered data with a third of the training labels wrong."""
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=gen, dtype=torch.float64)

    def draw(n):
        t = torch.arange(n) % classes
        return centres[t] + 0.7 * torch.randn(n, features, generator=gen, dtype=torch.float64), t

    A, t = draw(samples)
    noisy = torch.rand(samples, generator=gen) < 1 / 3
    A_clean, t_clean = draw(samples)
    return Cleaning(A, torch.where(noisy, (t + 1) % classes, t), A_clean, t_clean, classes)
