"""Fixtures of the cubic tests: devices, counting operators, random problems and an independent reference."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


class CountingOperator:
    """A dense (n, n) or diagonal (n,) Hessian behind the operator interface, counting its products."""

    def __init__(self, H: Tensor) -> None:
        self.H, self.n, self.dtype, self.device, self.count = H, H.shape[0], H.dtype, H.device, 0

    def matvec(self, v: Tensor) -> Tensor:
        assert v.shape == (self.n,)
        assert v.dtype == self.dtype
        assert v.device == self.device
        self.count += 1
        return self.H * v if self.H.ndim == 1 else self.H @ v

    def matmat(self, V: Tensor) -> Tensor:
        assert V.shape[0] == self.n
        assert V.dtype == self.dtype
        assert V.device == self.device
        self.count += V.shape[1]
        return self.H[:, None] * V if self.H.ndim == 1 else self.H @ V

    def to_dense(self) -> Tensor:
        self.count += self.n
        return torch.diag(self.H) if self.H.ndim == 1 else self.H


@pytest.fixture
def counting() -> type[CountingOperator]:
    return CountingOperator


def random_symmetric(n: int, generator: torch.Generator) -> Tensor:
    A = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return (A + A.T) / 2


def rotation(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


def random_problems(count: int = 400, n: int = 8) -> list[SimpleNamespace]:
    """Random indefinite problems, with Hessian, gradient and M each scaled by 10^u, u uniform in (-4, 4)."""
    problems = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        h, g, m = (10 ** (8 * torch.rand(3, dtype=torch.float64, generator=generator) - 4)).tolist()
        H = h * random_symmetric(n, generator)
        problems.append(
            SimpleNamespace(H=H, g=g * torch.randn(n, dtype=torch.float64, generator=generator), M=m)
        )
    return problems


def model_value(H: Tensor, g: Tensor, M: float, s: Tensor) -> float:
    H, g, s = (x.detach().cpu().double() for x in (H, g, s))
    return float(g @ s + s @ H @ s / 2 + M / 6 * s.norm() ** 3)


def reference_value(H: Tensor, g: Tensor, M: float) -> float:
    """The minimum by weak duality:  m(s) >= max over shift of  -g'(H + shift)^-1 g/2 - (2/3) shift^3/M^2.

    The bound follows from (M/6)|s|^3 = max_shift shift |s|^2/2 - (2/3) shift^3/M^2 and is tight. It is
    maximized by bisecting its derivative in shift - max(0, -lambda_min), without the library's secular
    equation.
    """
    values, Q = torch.linalg.eigh(H.detach().cpu().double())
    b = Q.T @ g.detach().cpu().double()
    floor = max(0.0, -float(values[0]))
    d = values + floor

    def ratio(power: int, t: float) -> Tensor:
        return torch.where(b == 0, 0.0, b**2 / torch.where(b == 0, 1.0, d + t) ** power)

    low, high = -300.0, math.log10((M * float(b.norm())) ** 0.5 + float(values.abs().max()) + 1e-30) + 1
    for _ in range(200):
        middle = (low + high) / 2
        t = 10**middle
        if float(ratio(2, t).sum()) / 2 - 2 * ((floor + t) / M) ** 2 > 0:
            low = middle
        else:
            high = middle
    t = 10**high
    return -float(ratio(1, t).sum()) / 2 - 2 / 3 * (floor + t) * ((floor + t) / M) ** 2


def optimality(H: Tensor, g: Tensor, M: float, s: Tensor) -> tuple[float, float]:
    """(stationarity, curvature), both scaled to rounding units: |(H + shift)s + g| over the sizes of its
    terms, and how far lambda_min(H + shift) is below 0 over |H| + shift."""
    H, g, s = (x.detach().cpu().double() for x in (H, g, s))
    values = torch.linalg.eigvalsh(H)
    shift, norm = M / 2 * s.norm(), values.abs().max()
    scale = g.norm() + (norm + shift) * s.norm()
    defect = (H @ s + shift * s + g).norm()
    stationarity = float(defect / scale) if float(scale) > 0 else float(defect)
    size = float(norm + shift)
    return stationarity, max(0.0, -float(values[0] + shift)) / size if size > 0 else 0.0


def naive_lu_step(H: Tensor, g: Tensor, M: float) -> Tensor:
    """What not to do: Newton on |s| = 2 shift/M from shift = 0 with s by LU, which ignores H + shift >= 0."""
    shift, s = 0.0, torch.zeros_like(g)
    for _ in range(100):
        shifted = H + shift * torch.eye(len(g), dtype=g.dtype)
        s = torch.linalg.solve(shifted, -g)
        slope = -float(s @ torch.linalg.solve(shifted, s)) / float(s.norm()) - 2 / M
        new = max(0.0, shift - (float(s.norm()) - 2 * shift / M) / slope)
        if abs(new - shift) <= 1e-14 * abs(shift):
            break
        shift = new
    return s


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers above, for test modules (which cannot import one another)."""
    return SimpleNamespace(
        random_symmetric=random_symmetric,
        rotation=rotation,
        random_problems=random_problems,
        model_value=model_value,
        reference_value=reference_value,
        optimality=optimality,
        naive_lu_step=naive_lu_step,
    )
