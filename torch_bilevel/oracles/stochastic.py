"""StochasticOracle: the mini-batch hypergradient of stocBiO."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..counting import OracleCounts
from ..derivatives import Linearisation, Objective
from ..problem import BilevelProblem, _samples
from .inexact import InexactOracle, at_least, positive


@final
class StochasticOracle(InexactOracle):
    """grad phi ~ f_x - g_xy v on mini-batches: y by T steps of SGD, v by a Neumann series.

        v = lr sum_{q=0}^{Q} (I - lr A_q) ... (I - lr A_1) f_y,   A_q = g_yy on its own batch
    A batch is a chunk of the problem's loader, drawn with replacement in proportion to its weight in the full
    loss (mean reduction; with 'sum' uniformly, times the number of chunks), so that every factor is unbiased.
    Data that is one batch is used whole: then nothing is random.

    Args:
        lower_steps, lower_lr: T and the step length (default 1/L of the full lower loss), see InexactOracle.
        adjoint_steps: Q, default 10. adjoint_lr: default ``lower_lr``.
        seed: of the draws; their state is saved with the oracle's.

    Cost of an evaluation: T lower gradients, one upper, one recorded lower gradient for each batch met in v
        and g_xy v, Q + 1 products: all on mini-batches, and counted so. Memory: the loaders' chunks, and the
        graphs recorded.

    References: Ji, Yang, Liang, ICML 2021, arXiv 2010.07962 (stocBiO, Algorithms 2 and 3).
    """

    def __init__(
        self,
        problem,
        *,
        lower_steps: int = 10,
        lower_lr: float | None = None,
        adjoint_steps: int = 10,
        adjoint_lr: float | None = None,
        seed: int = 0,
    ):
        super().__init__(problem, lower_steps=lower_steps, lower_lr=lower_lr)
        self.adjoint_steps = at_least("adjoint_steps", adjoint_steps, 0)
        self.adjoint_lr = positive("adjoint_lr", adjoint_lr, optional=True)
        self.generator = torch.Generator().manual_seed(seed)
        self._chunks: dict[str, tuple[Any, list[Any], Tensor]] = {}

    def _differentiate(self, x: Tensor, counts: OracleCounts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        y = self.start()
        lr = self._step_length(Objective(self.problem, lower=1.0, counts=counts), x, y)
        counts.add(lower_solves=1)
        for _ in range(self.lower_steps):
            y = y - lr * self._draw("lower", counts)[1].gradient(x, y, "y")[2]
        value, fx, term = self._draw("upper", counts)[1].gradient(x, y)
        recorded: dict[int, Linearisation] = {}
        lr = self.adjoint_lr if self.adjoint_lr is not None else lr
        total = term
        for _ in range(self.adjoint_steps):
            term = term - lr * self._recorded(recorded, x, y, counts).yy(term)
            total = total + term
        gradient = fx - self._recorded(recorded, x, y, counts).xy(lr * total)
        self.warm = {"y": y}
        return value, gradient, {"y": y}

    def _recorded(self, recorded: dict[int, Linearisation], x: Tensor, y: Tensor, counts) -> Linearisation:
        """The recorded lower gradient on a newly drawn batch, made once per batch."""
        index, objective = self._draw("lower", counts)
        if index not in recorded:
            recorded[index] = objective.linearise(x, y, "y")
        return recorded[index]

    def _draw(self, level: str, counts: OracleCounts) -> tuple[int, Objective]:
        """A chunk's number and the objective of that level on it, unbiased for the full one."""
        problem = self.problem
        if problem.is_single_piece(level):
            return 0, Objective(problem, **{level: 1.0}, counts=counts)
        chunks, weights = self._loaded(problem, level)
        index = int(torch.multinomial(weights, 1, generator=self.generator))
        scale = 1.0 if problem.reduction == "mean" else float(len(chunks))
        return index, Objective(problem.at(**{f"{level}_batch": chunks[index]}), **{level: scale}, counts=counts)

    def _loaded(self, problem: BilevelProblem, level: str) -> tuple[list[Any], Tensor]:
        """The loader's chunks and the chance of each."""
        loader = problem.batch(level)
        if level not in self._chunks or self._chunks[level][0] is not loader:
            chunks = list(loader)
            sizes = [float(_samples(c)) for c in chunks] if problem.reduction == "mean" else [1.0] * len(chunks)
            self._chunks[level] = (loader, chunks, torch.tensor(sizes, dtype=torch.float64))
        return self._chunks[level][1:]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
