"""HessianModel: the hyper-Hessian of one snapshot, in the form the cubic step wants it, kept for as long as it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cubic import CubicStep, DenseModel, KrylovModel, gradient_descent_step
from ..errors import ConfigError, nearest
from ..linalg import FunctionOperator, LinearOperator
from ..linalg.lanczos import affordable_basis

KINDS = ("auto", "dense", "krylov", "gradient")
#: negative curvature beyond this share of |H| that a Krylov model is sure to see (with probability 0.99): 16 products
#: at dx = 5000, where 0.01 takes 47. What it misses ``minimize`` finds where the gradient vanishes, and hands to
#: ``include``.
CURVATURE_TOL = 0.1
#: up to this many hyperparameters 'auto' forms the matrix: the eigendecomposition then serves every step of a period
MAX_DENSE = 500
#: up to this many a matrix is corrected by secants; each correction takes an eigendecomposition, n^3, for the n products or
#: so of a Hessian that may be saved (not measured above)
MAX_CORRECTED = 128
#: least weight in the metric of a correction, relative to the largest
FLOOR = 1e-2


def check_kind(kind: str) -> None:
    """ConfigError unless ``kind`` is one of KINDS."""
    if kind not in KINDS:
        raise ConfigError(f"hessian {kind!r} is not known; {nearest(str(kind), KINDS)}")


class HessianModel:
    """Cubic models of one hyper-Hessian, dense (one eigendecomposition) or on a kept Krylov basis.

    Args:
        hessian: operator of size dx; None where ``state`` holds the dense matrix.
        kind: 'dense', 'krylov', 'gradient' (the published matrix-free subsolver, which keeps nothing between steps) or
            'auto' (dense for dx <= 500, and where ``hessian.dense_pays``).
        tol: relative accuracy of Krylov steps, default 1e-2 (steps are tested and M adapts; see docs/methods.md).
        max_basis: Krylov vectors kept, default min(dx, 200), fewer where two such bases would exceed 2 GB.
        eps: 'gradient' only: the accuracy sought of the outer gradient, default 1e-4.
        seed: of the random start vector.
        state: from ``state_dict``.

    With a mask ``free`` (bounds) the model lives on the free variables only: rows and columns of the held ones are
    replaced by |H| on the diagonal and their gradient by zero. A new mask costs a new eigendecomposition or basis.
    """

    def __init__(self, hessian: LinearOperator | None, *, kind: str = "auto", tol: float = 1e-2, max_basis: int | None = None,
                 eps: float = 1e-4, seed: int = 0, state: dict[str, Any] | None = None):  # fmt: skip
        check_kind(kind)
        n, dtype = (hessian.n, hessian.dtype) if hessian is not None else (len(state["matrix"]), state["matrix"].dtype)
        if max_basis is None:
            max_basis = affordable_basis(n, dtype, 200)
        self.tol, self.max_basis, self.eps, self.seed = tol, max_basis, eps, seed
        if kind == "auto":
            dense = n <= MAX_DENSE or getattr(hessian, "dense_pays", False)
            kind = ("dense" if dense else "krylov") if state is None else state["kind"]
        self.kind = kind
        if state is not None and state["kind"] != self.kind:
            raise ConfigError(f"checkpoint of a run with hessian={state['kind']!r}, but this run uses {self.kind!r}")
        self.free: Tensor | None = None
        self.matrix: Tensor | None = None
        if self.kind == "dense":
            self.matrix = hessian.to_dense() if state is None else state["matrix"]
            hessian = None  # its recorded graphs are not needed any more
        elif state is not None:
            self.free = state["free"]
        self.hessian = hessian
        self._model = self._build(None if state is None else state.get("krylov"))

    def _build(self, state: dict[str, Any] | None = None) -> DenseModel | KrylovModel | LinearOperator:
        free = self.free
        if self.kind == "dense":
            H = self.matrix
            if free is not None:
                size = torch.linalg.matrix_norm(H, ord=float("inf"))
                H = torch.where(free[:, None] & free[None, :], H, torch.zeros_like(H))
                H = H + torch.diag(torch.where(free, torch.zeros_like(size), size))
            return DenseModel(H)
        operator = self.hessian
        if free is not None:
            mask = free.to(operator.dtype)
            operator = FunctionOperator(
                operator.n,
                lambda v: mask * self.hessian.matvec(mask * v),
                lambda V: mask[:, None] * self.hessian.matmat(mask[:, None] * V),
                dtype=operator.dtype,
                device=operator.device,
            )
        if self.kind == "gradient":
            return operator
        return KrylovModel(operator, tol=self.tol, curvature_tol=CURVATURE_TOL, max_basis=self.max_basis,
                           seed=self.seed, state=state)  # fmt: skip

    def solve(self, gradient: Tensor, cubic_reg: float, free: Tensor | None = None) -> CubicStep:
        """The cubic step for a (fresh) gradient and M, on the free variables."""
        if free is not None and bool(free.all()):
            free = None
        changed = (free is None) != (self.free is None) or (free is not None and not torch.equal(free, self.free))
        if changed or self._model is None:
            self.free = free
            self._model = self._build()
        if free is not None:
            gradient = torch.where(free, gradient, torch.zeros_like(gradient))
        if self.kind == "dense":
            return self._model.solve(gradient, cubic_reg, generator=torch.Generator().manual_seed(self.seed))
        if self.kind == "gradient":
            return gradient_descent_step(self._model, gradient, cubic_reg, eps=self.eps, seed=self.seed)
        return self._model.solve(gradient, cubic_reg)

    def correct(self, s: Tensor, y: Tensor) -> None:
        """Make a small matrix say H s = y, as the gradients did, by the least change of it.

        In the metric of D, the lengths of the rows of H, so that the units of x matter little: with v = D s and
        r = y - H s,  H += (r v' + v r') / s'v - (s'r / (s'v)^2) v v'.  D = I would be Powell's update.

        Reference: Powell 1970 (PSB); Dennis and Schnabel 1983, section 9.3 (scaled). Cost: no product; the next step makes
            an eigendecomposition.
        """
        if self.matrix is None or len(self.matrix) > MAX_CORRECTED:
            return
        H = self.matrix
        rows = torch.linalg.vector_norm(H, dim=1)
        v = torch.clamp(rows, min=FLOOR * float(rows.max())) * s
        r, sv = y - H @ s, torch.dot(s, v)
        if not bool(sv > 0) or not bool(r.isfinite().all()):
            return
        self.matrix = H + (torch.outer(r, v) + torch.outer(v, r)) / sv - torch.dot(s, r) / sv**2 * torch.outer(v, v)
        self._model = None

    def describe(self) -> str:
        """Its kind and size, in words."""
        if self.kind == "dense":
            return f"dense, {len(self.matrix)} x {len(self.matrix)}"
        size = f", {self._model.basis_size} vectors of {self.hessian.n}" if self.kind == "krylov" else ""
        return self.kind + size

    def include(self, direction: Tensor) -> None:
        """Hold a direction of known negative curvature; a dense model sees all of them anyway."""
        if self.kind == "krylov":
            self._model.include(direction)

    def product(self, s: Tensor) -> Tensor:
        """H s with the Hessian of the snapshot, as corrected; a Krylov model pays one product."""
        return self.matrix @ s if self.matrix is not None else self.hessian.matvec(s)

    def norm(self, gradient: Tensor) -> float:
        """Estimate of |H|: exact for a dense model; |H g| / |g| (one product) before a Krylov basis exists."""
        if self._model is None:
            self._model = self._build()
        if self.kind == "dense" or (self.kind == "krylov" and self._model.basis_size):
            return float(self._model.norm)
        size = torch.linalg.vector_norm(gradient)
        if float(size) > 0:
            v = gradient / size
        else:
            v = torch.randn(gradient.numel(), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
            v = (v / torch.linalg.vector_norm(v)).to(gradient)
        return float(torch.linalg.vector_norm(self.hessian.matvec(v)))

    def state_dict(self) -> dict[str, Any]:
        if self.kind == "dense":
            return {"kind": self.kind, "matrix": self.matrix}
        krylov = self._model.state_dict() if self.kind == "krylov" else None
        return {"kind": self.kind, "free": self.free, "krylov": krylov}
