"""MinimaxProblem: min_x max_y f(x, y) as a bilevel problem whose lower objective is -f."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import ProblemError
from .problem import BilevelProblem


class MinimaxProblem(BilevelProblem):
    """min_x P(x) with P(x) = max_y f(x, y), f strongly concave in y.

        grad P = f_x(x, y*),    hess P = f_xx - f_xy f_yy^{-1} f_yx at (x, y*),    y* = argmax_y f(x, y).
    It is the bilevel problem with upper objective f and lower objective g = -f, so everything that takes a
    BilevelProblem takes it: x is what the min player's parameters hold ("hyperparameters"), y what the max player's
    do ("learner"). Its exact oracle is MinimaxOracle, which needs second derivatives only.

    Args:
        min_player, max_player: an nn.Module (its trainable parameters), a dict of tensors, or one tensor. The loss gets
            objects of the same kinds.
        loss: ``loss(min_player, max_player, batch) -> scalar tensor``, the f that one minimises and the other
            maximises.
        batch: a tree of tensors or a re-iterable loader, as for BilevelProblem; ``()`` for a loss that needs no data.
        reduction, seed, check, compile: see BilevelProblem.

    Raises: as BilevelProblem.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = torch.full((1,), 3.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> problem = tb.MinimaxProblem(x, y, lambda x, y, batch: (x * y - y**2 / 2).sum(), ())
        >>> result = tb.minimize(problem, method="lmcn")  # P(x) = x^2 / 2
        >>> abs(result.x.item()) < 1e-6
        True
    """

    words = {
        **BilevelProblem.words,
        "x": "min_player", "y": "max_player", "upper": "the loss", "lower": "the loss",
        "data": "pass batch to MinimaxProblem, problem.at(batch) or step(batch)",
        "neither": "the loss does not depend on the min_player it is given",
        "curved": "minus the loss has curvature {:.2e} along a random direction of max_player: the loss is not strongly"
        " concave in y here; subtract (mu/2) |y|^2 from it",
    }  # fmt: skip

    def __init__(
        self,
        min_player: nn.Module | Mapping[str, Tensor] | Tensor,
        max_player: nn.Module | Mapping[str, Tensor] | Tensor,
        loss: Callable,
        batch: Any = None,
        *,
        reduction: str = "mean",
        seed: int | None = None,
        check: bool = True,
        compile: bool = False,
    ):
        if not callable(loss):
            raise ProblemError(f"loss: expected loss(min_player, max_player, batch) -> scalar, got {loss!r}")
        learner = max_player if isinstance(max_player, nn.Module) else _Tensors(max_player)
        self.min_player, self.max_player = min_player, max_player

        def f(learner: Any, hyper: Any, batch: Any) -> Tensor:
            return loss(hyper, learner.value if isinstance(learner, _Tensors) else learner, batch)

        def g(learner: Any, hyper: Any, batch: Any) -> Tensor:
            return -f(learner, hyper, batch)

        super().__init__(learner, min_player, g, f, batch, batch, reduction=reduction, seed=seed, check=check,
                         compile=compile)  # fmt: skip
        self._batches["upper"] = self._batches["lower"]

    @classmethod
    def from_functions(  # type: ignore[override]
        cls, f: Callable[[Tensor, Tensor], Tensor], x0: Tensor, y0: Tensor, *, seed: int | None = None, check: bool = True,
        compile: bool = False,
    ) -> MinimaxProblem:  # fmt: skip
        """The problem of a plain function f(x, y) of flat tensors x (dx,), minimised, and y (dy,), maximised."""
        if not callable(f):
            raise ProblemError(f"f: expected a function of (x, y), got {f!r}")
        self = super().from_functions(f, lambda x, y: -f(x, y), x0, y0, seed=seed, check=check, compile=compile)
        self.min_player = self.max_player = None
        return self

    def at(self, batch: Any = None, upper_batch: Any = None) -> MinimaxProblem:
        """The same problem (same user tensors) on another batch; None keeps the data it has."""
        if upper_batch is not None and upper_batch is not batch:
            raise ProblemError("a minimax problem has one loss and so one batch: at(batch)")
        other = copy.copy(self)
        if batch is not None:
            placed = self._place(batch)
            other._batches = {"lower": placed, "upper": placed}
            other.seen = self.seen.without("lower").without("upper")
        return other

    def data(self) -> tuple[Any, ...]:
        """The batch in use, as ``at`` takes it."""
        return (self._batches["lower"],)

    def exact_oracle(self, **options: Any):
        """MinimaxOracle(self, **options)."""
        from .oracles import MinimaxOracle

        return MinimaxOracle(self, **options)


class _Tensors(nn.Module):
    """A tensor or a dict of tensors in a module's clothes, sharing their memory."""

    def __init__(self, tensors: Mapping[str, Tensor] | Tensor):
        super().__init__()
        if not isinstance(tensors, (Tensor, Mapping)):
            raise ProblemError(
                f"max_player: expected an nn.Module, a dict of tensors or a tensor, got {type(tensors).__name__}"
            )
        self.single = isinstance(tensors, Tensor)
        for name, tensor in ({"value": tensors} if self.single else tensors).items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ProblemError(f"max_player[{name!r}]: expected a floating-point tensor, got {got}")
            self.register_parameter(f"player_{name}", nn.Parameter(tensor.detach()))

    @property
    def value(self) -> Any:
        found = {name.removeprefix("player_"): tensor for name, tensor in self._parameters.items()}
        return found["value"] if self.single else found
