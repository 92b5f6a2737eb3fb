"""Small bilevel problems with known answers, written as plain functions of flat tensors.

Every ``Case`` makes the same problem in any dtype, and a ``Reference`` (dense float64 formulas) of it as the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_bilevel as tb
from tests.reference import Reference, cleaning

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """f (upper), g (lower) and a start, float64; ``minimum`` is phi's least value where it is known in closed form."""

    name: str
    f: Function
    g: Function
    x0: Tensor
    y0: Tensor
    minimum: float | None = None

    def problem(self, dtype: torch.dtype = torch.float64, x0: Tensor | None = None) -> tb.BilevelProblem:
        start = self.x0 if x0 is None else x0
        return tb.BilevelProblem.from_functions(self.f, self.g, start.to(dtype), self.y0.to(dtype))

    @property
    def reference(self) -> Reference:
        return Reference(self.f, self.g, self.x0, self.y0)


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(dx: int = 4, dy: int = 3) -> Case:
    """g = |D y - B x|^2 / 2, f = |y - t|^2 / 2 + |x|^2 / 20: y* = D^{-1} B x, and phi is a convex quadratic.

    D is diagonal from 1 to 3; phi is least at x = (T'T + I/10)^{-1} T't with T = D^{-1} B.
    """
    D, B, t = torch.linspace(1, 3, dy, dtype=torch.float64), _randn(1, dy, dx), _randn(2, dy)
    T = B / D[:, None]
    x = torch.linalg.solve(T.T @ T + 0.1 * torch.eye(dx, dtype=torch.float64), T.T @ t)

    def g(x, y):
        return ((D.to(y) * y - B.to(y) @ x) ** 2).sum() / 2

    def f(x, y):
        return ((y - t.to(y)) ** 2).sum() / 2 + (x * x).sum() / 20

    minimum = float(((T @ x - t) ** 2).sum() / 2 + (x * x).sum() / 20)
    return Case("quadratic", f, g, torch.ones(dx, dtype=torch.float64), torch.zeros(dy, dtype=torch.float64), minimum)


EPS, LENGTH = 0.01, 5
ROOT = EPS**0.5  # the W is least at |x| = (LENGTH + 1) ROOT


def w_shape(x: Tensor) -> Tensor:
    """The W of Tripuraneni et al. 2018: C^2, third derivatives within +-2, w''(0) = -2 sqrt(eps), least at +-0.6."""
    t = torch.where(x < 0, -x, x)  # not abs(), whose second derivative of t^2 is lost at 0
    far = t - (LENGTH + 1) * ROOT
    near = -ROOT * t**2 + t**3 / 3
    line = -EPS * t + EPS * ROOT / 3
    bowl = ROOT * far**2 + far**3 / 3 - (3 * LENGTH + 1) * EPS * ROOT / 3
    return torch.where(t <= ROOT, near, torch.where(t <= LENGTH * ROOT, line, bowl))


def saddle(x0: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Case:
    """The W-shaped saddle as a bilevel problem: phi = w(x_3) + x_1^2 / 40 + x_2^2 / 20, strict saddle at exactly 0.

    f = w(x_3) + x_1 y_1 + x_2 y_2 - 10 y_1^2 - 5 y_2^2 and g = minus its y-part. The surrogates equal phi.
    """

    def coupling(x, y):
        return x[0] * y[0] + x[1] * y[1] - 10 * y[0] ** 2 - 5 * y[1] ** 2

    def f(x, y):
        return w_shape(x[2]) + coupling(x, y)

    def g(x, y):
        return -coupling(x, y)

    start = torch.tensor(x0, dtype=torch.float64)
    return Case("saddle", f, g, start, torch.zeros(2, dtype=torch.float64), -(3 * LENGTH + 1) * EPS * ROOT / 3)


def nonconvex(dx: int = 12, dy: int = 8) -> Case:
    """n = 12 with many minima: y* follows sin(B x), f has sines of y and a weak bowl in x."""
    B, A, P = _randn(3, dy, dx) / 2, _randn(4, dy, dy) / dy**0.5, _randn(5, 6, dy)

    def g(x, y):
        return (y * y).sum() / 2 + F.softplus(A.to(y) @ y).sum() - (y * torch.sin(B.to(y) @ x)).sum() * 2

    def f(x, y):
        return torch.sin(P.to(y) @ y).sum() + torch.cos(3 * x).sum() / 5 + (x * x).sum() / 20

    return Case("nonconvex", f, g, _randn(6, dx), torch.zeros(dy, dtype=torch.float64))


def hyper_cleaning() -> Case:
    """Softmax hyper-cleaning, 12 weights sigmoid(x_i), with a weak prior on x so that a finite minimiser exists."""
    made = cleaning().reference

    def f(x, y):
        return made.f(x, y) + 1e-3 * (x * x).mean()

    return Case("hyper_cleaning", f, made.g, torch.zeros_like(made.x), torch.zeros_like(made.y0))


def one_by_one() -> Case:
    """dx = dy = 1: g = (exp(x) + 1) y^2 / 2 - y, f = (y - 1/4)^2 / 2: y* = 1 / (exp(x) + 1), least at x = log 3."""

    def g(x, y):
        return ((x.exp() + 1) * y * y / 2 - y).sum()

    def f(x, y):
        return ((y - 0.25) ** 2).sum() / 2

    zero = torch.zeros(1, dtype=torch.float64)
    return Case("one_by_one", f, g, zero, zero, 0.0)


def ill_conditioned(dx: int = 5, dy: int = 20) -> Case:
    """A lower level of condition 1e4, rotated, with a mild nonlinearity."""
    Q, _ = torch.linalg.qr(_randn(7, dy, dy))
    H = Q @ torch.diag(torch.logspace(-2, 2, dy, dtype=torch.float64)) @ Q.T
    B, t = Q[:, :dx] @ torch.diag(torch.full((dx,), 0.1, dtype=torch.float64)), _randn(8, dy)

    def g(x, y):
        return y @ (H.to(y) @ y) / 2 - y @ (B.to(y) @ x) + torch.cosh(x / 3).sum() * (y * y).sum() / 100

    def f(x, y):
        return ((y - t.to(y)) ** 2).sum() / 2 + (x**4).sum() / 50 + (x * x).sum() / 100

    return Case("ill_conditioned", f, g, torch.ones(dx, dtype=torch.float64), torch.zeros(dy, dtype=torch.float64))


CASES = [quadratic(), saddle(), nonconvex(), hyper_cleaning(), one_by_one(), ill_conditioned()]
