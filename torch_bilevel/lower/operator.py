"""LowerHessian: the Hessian h_yy of a lower-level objective at a recorded point as a linear operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..counting import columns_of
from ..derivatives import Linearisation
from ..linalg import FunctionOperator, LinearOperator
from ..outputs import KroneckerPreconditioner, corner_ranks, products_pay

if TYPE_CHECKING:
    from .systems import LowerSystems


class LowerHessian(LinearOperator):
    """h_yy + damping I at a recorded point; dense by the learner's outputs where that is to be had."""

    def __init__(self, at: Linearisation, systems: LowerSystems):
        super().__init__(at.y.numel(), dtype=at.y.dtype, device=at.y.device, block_size=512)
        self.at, self.systems = at, systems

    def matvec(self, v: Tensor) -> Tensor:
        """(dy,) -> (dy,), or (dy, k) -> (dy, k)."""
        at, shift = self.at, self.systems.damping
        if at.outputs is None or not products_pay(at.outputs.calls):
            result = at.yy(v)
        else:
            self.count_replayed(columns_of(v))
            result = at.outputs.yy(v)
        return result + shift * v if shift else result

    matmat = matvec

    def count_replayed(self, products: int) -> None:
        self.at.objective._count("products", products)

    def find_outputs(self) -> None:
        """Multiply by the outputs' Hessian from now on, where there is one: the same wherever and whenever this is asked."""
        self.systems.outputs(self.at)

    def kronecker_preconditioner(self, rows: int) -> KroneckerPreconditioner | None:
        """By the learner's outputs, with a corner of so many rows. Look at ``.ok``. None: its ladder has none such."""
        if rows not in self.systems.ladder(self.at).kronecker:
            return None
        outputs, damping = self.systems.outputs(self.at), self.systems.damping
        if outputs is None:
            return KroneckerPreconditioner.none()
        rank = corner_ranks(outputs.calls)[rows]
        if self.systems.in_float32(outputs.calls):
            made = outputs.single.preconditioner(rank, damping)
            if made.ok:
                return made
        return outputs.preconditioner(rank, damping)

    @property
    def single(self) -> LinearOperator:
        """The same in float32, by the learner's outputs, which must be known here."""

        def product(v: Tensor) -> Tensor:
            self.count_replayed(columns_of(v))
            return self.at.outputs.single.yy(v) + self.systems.damping * v

        return FunctionOperator(self.n, product, product, dtype=torch.float32, device=self.device, block_size=self.block_size)

    def to_dense(self) -> Tensor:
        """(dy, dy)."""
        outputs = self.systems.outputs(self.at)
        return super().to_dense() if outputs is None else self._damped(outputs.dense_yy())

    def single_to_dense(self) -> Tensor:
        """(dy, dy) in float32, by the learner's outputs, or in its own precision where they do not give it."""
        outputs = self.systems.outputs(self.at)
        return super().to_dense() if outputs is None else self._damped(outputs.single.dense_yy())

    def _damped(self, A: Tensor) -> Tensor:
        A.diagonal().add_(self.systems.damping)
        return A
