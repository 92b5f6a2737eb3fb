"""What the mathematics costs at least, written by hand for softmax layers: the floors that benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import once
from benchmarks.problems import Setting
from torch_bilevel.folding import multiply


class ClosedForm:
    """g of a linear softmax layer at one (x, y), W as (classes, features): products by two matrix products.

        g_WW V = (c (P Z - P <P, Z>)) X / n + 2 (exp(x) + reg) V,     Z = V X',   P, Z (classes, n)
    Classes come first: with few of them, V X' and Q X are several times faster than X V' and X' Q'.
    """

    def __init__(self, setting: Setting, x: Tensor):
        self.setting = setting
        inputs, labels = setting.train
        self.X = self._with_ones(inputs)
        W = self._matrix(setting.y)
        self.P = torch.softmax(W @ self.X.T, 0)
        n, (features, _) = len(inputs), setting.sizes
        weights = setting.hyper == "weights"
        c = x.sigmoid() if weights else torch.ones_like(labels, dtype=x.dtype)
        self.cP = (c / n) * self.P
        self.diagonal = torch.full((W.shape[1],), 2 * setting.reg, dtype=x.dtype, device=x.device)
        if not weights:
            self.diagonal[:features] += 2 * x.exp()
        self.W, self.x = W, x

    def _with_ones(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) if self.setting.bias else inputs

    def _matrix(self, y: Tensor) -> Tensor:
        """(classes * features [+ classes],) as the library has it -> (classes, features [+ 1])."""
        features, classes = self.setting.sizes
        weight = y[: features * classes].view(classes, features)
        return torch.cat([weight, y[features * classes :].view(-1, 1)], 1) if self.setting.bias else weight

    def curvature(self, V: Tensor) -> Tensor:
        """g_WW V for V (classes, features)."""
        Q = self.cP * multiply(V, self.X.T)
        return multiply(Q - self.P * Q.sum(0), self.X) + self.diagonal * V

    def block(self, V: Tensor) -> Tensor:
        """g_WW V for V (k, classes, features)."""
        k, classes, features = V.shape
        Q = self.cP * multiply(V.view(-1, features), self.X.T).view(k, classes, -1)
        Q = Q - self.P * Q.sum(1, keepdim=True)
        return multiply(Q.view(k * classes, -1), self.X).view(V.shape) + self.diagonal * V

    def product(self, w: Tensor) -> Tensor:
        """The same for a flat vector; the answer is left as a matrix."""
        return self.curvature(self._matrix(w))

    def hypergradient(self, steps: int) -> Tensor:
        """-g_xW v after ``steps`` of plain CG on g_WW v = f_W."""
        s = self.setting
        inputs, labels = s.valid
        Xv = self._with_ones(inputs)
        R = torch.softmax(self.W @ Xv.T, 0)
        R[labels, torch.arange(len(labels))] -= 1
        r = R @ Xv / len(labels)
        v, p, rr = torch.zeros_like(r), r, (r * r).sum()
        for _ in range(steps):
            Ap = self.curvature(p)
            alpha = rr / (p * Ap).sum()
            v, r = v + alpha * p, r - alpha * Ap
            new = (r * r).sum()
            p, rr = r + new / rr * p, new
        if s.hyper == "log_l2":
            return -2 * self.x.exp() * (self.W * v)[:, : s.sizes[0]].sum(0)
        residual = self.P.clone()
        labels = s.train[1]
        residual[labels, torch.arange(len(labels))] -= 1
        c = self.x.sigmoid()
        return -(c * (1 - c) / len(labels)) * (residual * (v @ self.X.T)).sum(0)


class ClosedFormAt:
    """Makes everything at the point anew at each call, as every contestant has to."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def at(self, x: Tensor) -> ClosedForm:
        return ClosedForm(self.setting, x)

    def hypergradient(self, steps: int) -> Tensor:
        return self.at(self.setting.x).hypergradient(steps)


def closed_form(setting: Setting) -> ClosedFormAt | None:
    """For a linear softmax layer; None for others."""
    return ClosedFormAt(setting) if len(setting.sizes) == 2 else None


def mlp_matmuls(inputs: Tensor, sizes: tuple[int, ...], k: int) -> Callable[[], None]:
    """The matrix products of k Hessian products of an MLP by the R-operator, and nothing else.

    A layer with input h, weights W, direction V and error e: Rz = h V' + Rh W'; RdW = e' Rh + Re' h; Re = Re W + e V.
    The first layer has no Rh and needs no Re of its input.
    """
    n, gen = len(inputs), torch.Generator().manual_seed(0)
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        h, W, V = (torch.randn(*shape, generator=gen).to(inputs) for shape in ((n, a), (b, a), (k, b, a)))
        e, Re, Rh = (torch.randn(*shape, generator=gen).to(inputs) for shape in ((n, b), (k * n, b), (k * n, a)))
        layers.append((h, W, V.reshape(k * b, a), e, Re, Rh))

    def run() -> None:
        for i, (h, W, V, e, Re, Rh) in enumerate(layers):
            multiply(h, V.T)
            multiply(Re.view(k, n, -1).permute(1, 0, 2).reshape(n, -1).T, h)
            if i:
                multiply(Rh, W.T)
                multiply(e.T, Rh.view(k, n, -1).permute(1, 0, 2).reshape(n, -1))
                multiply(Re, W)
                torch.matmul(e, V.view(k, e.shape[1], -1))

    return run


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int | None = None, repeats: int = 5) -> float:
    """Operations per second of a large square matrix product, by the library that is faster here: the best of a few."""
    size = size or (4096 if device == "cuda" else 2048)
    A = torch.randn(size, size, dtype=dtype, device=device)
    multiply(A, A)
    return 2 * size**3 / min(once(lambda: multiply(A, A))[0] for _ in range(repeats))


def hessian_operations(n: int, n_val: int, features: int, classes: int) -> dict[str, float]:
    """Operations of a dense hyper-Hessian of softmax hyper-cleaning (features with the bias counted), by part.

    g_yy = X'D_kl X for every pair of classes, symmetric;   its Cholesky factor;   Y = -g_yy^{-1} g_yx;
    L_yy Y, by products (two matrix products a level and column) or by a dense L_yy, whichever is less;   Y'(L_yy Y)
    """
    dy, pairs = features * classes, classes * (classes + 1) / 2
    dense = pairs * n * features**2
    by_products = n * 4.0 * dy * (n + n_val)
    by_matrix = dense + pairs * n_val * features**2 + 2.0 * dy**2 * n
    return {
        "g_yy": dense,
        "Cholesky": dy**3 / 3,
        "solves": 2.0 * dy**2 * n,
        "products": min(by_products, by_matrix),
        "Y'(L_yy Y)": 1.0 * dy * n**2,
    }
