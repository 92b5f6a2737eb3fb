"""BilevelOptimizer and MinimaxOptimizer: the outer variables' optimizers, beside the user's own training loop."""

from __future__ import annotations

import hashlib
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .checkpoint import to_device
from .errors import BilevelError, ConfigError
from .linalg import own_stream
from .lower import External, make_lower
from .methods import Method, Run, make_method, options_of
from .minimax import MinimaxProblem
from .problem import BilevelProblem, is_loader
from .results import StepReport

STATE_VERSION = 1


class _ProblemOptimizer(torch.optim.Optimizer, ABC):
    """What BilevelOptimizer and MinimaxOptimizer share: one run of a method, stepped on the user's data."""

    def __init__(
        self, problem: BilevelProblem, method: str | Method, options: dict[str, Any], *, lower: Any,
        write_learner: bool, bounds: Any, lr: float | None, seed: int,
    ):  # fmt: skip
        if lr is not None and not lr > 0:
            raise ConfigError(f"lr: expected a positive number or None (the method's own), got {lr!r}")
        if lr is not None and isinstance(method, str) and "lr" in options_of(method):
            options = {**options, "lr": lr}
        self.problem = problem
        self.external = isinstance(make_lower(lower), External)
        self.write_learner = write_learner and not self.external
        self.method = self._method(method, lower, options)
        self._method_lr = getattr(self.method, "lr", 1.0)
        self._bounds, self._seed = bounds, seed
        self._run: Run | None = None
        self._saved: dict[str, Any] | None = None  # state of a run that waits for its data, which the next step brings
        self._data: tuple[str, ...] | list[Any] | None = None
        self._given = False  # whether data came through step
        super().__init__(list(problem._x_tensors.values()), {"lr": self._method_lr if lr is None else lr})

    def _method(self, method: str | Method, lower: Any, options: dict[str, Any]) -> Method:
        if lower is None or isinstance(method, Method):
            if self.external:
                raise ConfigError("lower='external' goes with a method's name; give a Method object its own lower=...")
            return make_method(method, options)
        if self.external and method in ("fsba", "lfsba", "auto"):
            # without inner solves there is no penalised lower level: the implicit oracle takes its place
            options = {"period": 1 if method == "fsba" else "adaptive", **options}
            method = "dlcrn"
        return make_method(method, {**options, "lower": lower})

    def _step(self, *batches: Any) -> StepReport:
        """One outer iteration on the given data (None: the data of before)."""
        if callable(batches[0]) and not isinstance(batches[0], Tensor) and not hasattr(batches[0], "__iter__"):
            raise ConfigError("step takes data (lower_batch, upper_batch, or a minimax problem's batch), not a closure")
        with own_stream(self.problem.device):
            return self._iterate(*batches)

    def _iterate(self, *batches: Any) -> StepReport:
        problem = self.problem.at(*batches)
        leaves = _leaves(problem)
        if self._run is None:
            if any(batch is not None for batch in batches):
                from .doctor import check_problem

                check_problem(problem)
            self._run = self._start(problem, leaves)
        run = self._run
        self._given = self._given or any(batch is not None for batch in batches)
        if self.external or not self._same(leaves):
            run.set_data(problem)
        self.problem, self._data = problem, leaves
        x = problem.x
        if not torch.equal(x, run.x):
            run.move_to(x)
        run.scale = float(self.param_groups[0]["lr"]) / self._method_lr
        try:
            report = run.step()
        except BilevelError as error:
            error.args = (f"{error} [at step {run.steps + 1}; the hyperparameters keep their last good values]",)
            raise
        problem.write(x=run.x)
        if self.write_learner:
            problem.write(y=run.current().y)
        return report

    def _start(self, problem: BilevelProblem, leaves: list[Any]) -> Run:
        """A new run, or the saved one on the data it was saved with."""
        if self._saved is None:
            return self.method.start(problem, seed=self._seed, bounds=self._bounds)
        batches = self._saved["batches"]
        if not self._same(leaves):
            if batches is not None:
                problem = self.problem.at(*batches)
            elif self.problem.batch("lower") is not None:
                problem = self.problem  # with the data given at construction
        run = self.method.start(problem, seed=self._seed, bounds=self._bounds)
        run.load_state_dict(self._saved["run"])
        self._saved = None
        return run

    def _same(self, leaves: list[Any]) -> bool:
        if isinstance(self._data, tuple):  # restored: known by its fingerprint
            return self._data == _fingerprint(leaves)
        return self._data is not None and len(leaves) == len(self._data) and all(
            a is b for a, b in zip(leaves, self._data)
        )  # fmt: skip

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Everything needed to go on bit for bit; names and shapes of the tensors are kept and checked on loading.

        The data given to the last ``step`` are in it where a matrix-free Hessian was made on them (not a loader: give
        that again).
        """
        layouts = (self.problem.x_layout, self.problem.y_layout)
        data = self._data
        return {
            "version": STATE_VERSION,
            "shapes": [{name: list(shape) for name, shape in layout.shapes.items()} for layout in layouts],
            "lr": self.param_groups[0]["lr"],
            "method_lr": self._method_lr,
            "x": self.problem.x,
            "y": self.problem.y,
            "data": None if data is None else list(data if isinstance(data, tuple) else _fingerprint(data)),
            "run": self._saved if self._run is None else {"run": self._run.state_dict(), "batches": self._batches()},
        }

    def _batches(self) -> list[Any] | None:
        """The data of the last step, where the next one may bring others and the kept Hessian needs these."""
        batches = list(self.problem.data())
        if not self._run.keeps_data or not self._given or any(is_loader(batch) for batch in batches):
            return None
        return batches

    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore ``state_dict``, the values of hyperparameters and (if it is ours) learner included.

        Raises:
            ConfigError: another version, method, or names and shapes that do not match this optimizer's.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ConfigError(f"not a state_dict of {type(self).__name__} (or of another version)")
        layouts = (self.problem.x_layout, self.problem.y_layout)
        for layout, saved in zip(layouts, state["shapes"]):
            own = {name: list(shape) for name, shape in layout.shapes.items()}
            if own != saved or list(own) != list(saved):
                raise ConfigError(f"state_dict: {layout.what} tensors do not match: saved {saved}, here {own}")
        if state["method_lr"] != self._method_lr:
            raise ConfigError(
                f"state_dict: saved with lr={state['method_lr']}, here lr={self._method_lr}; construct with the same"
            )
        if state["run"] is not None and state["run"]["run"]["method"] != self.method.name:
            raise ConfigError(f"state_dict of method {state['run']['run']['method']!r}, here {self.method.name!r}")
        state = to_device(state, self.problem.device)
        self.param_groups[0]["lr"] = state["lr"]
        self.problem.write(x=state["x"], y=state["y"] if self.write_learner else None)
        self._data = None if state["data"] is None else tuple(state["data"])
        self._run, self._saved = None, state["run"]

    def __deepcopy__(self, memo: Any) -> _ProblemOptimizer:
        raise TypeError(f"a {type(self).__name__} is tied to its modules and cannot be copied; use state_dict()")

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} is tied to its modules and cannot be pickled; save its state_dict()")


@final
class BilevelOptimizer(_ProblemOptimizer):
    """Tunes ``hyper`` so that the learner trained with it does well on the upper loss.

    One ``step(lower_batch, upper_batch)`` is one outer iteration of ``method``: it may solve the lower level (from
    the learner's current parameters), make or reuse a hyper-Hessian, and move the hyperparameters, in place.

    Args:
        model: the learner. hyper: nn.Module, dict of tensors, or tensor.
        lower_loss, upper_loss: ``loss(learner, hyper, batch) -> scalar``.
        method: name or Method object; ``options`` go to the named constructor.
        lower: who solves the lower level. None or a lower solver: the optimizer does, and writes the solution into
            the learner (with ``write_learner=False``: leaves the learner alone, solving only for its own use).
            'external': the user's loop trains the learner; the implicit oracle is used at its current parameters,
            no step is tested, and M follows the gradients of successive steps.
        bounds: (lo, hi) for the hyperparameters. lr: of a first-order method, default its own; the scale of a
            second-order method's steps, default 1.0. Schedulers may change it (``param_groups[0]['lr']``).
        lower_batch, upper_batch: data for a ``step()`` without arguments. seed: of the method's random choices.
        reduction, problem_seed, compile: see BilevelProblem.

    Raises:
        ConfigError, ProblemError: at construction, for whatever can be seen there.

    Example: see the README; it runs in the tests.
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: nn.Module | Mapping[str, Tensor] | Tensor,
        *,
        lower_loss: Callable,
        upper_loss: Callable,
        method: str | Method = "lfsba",
        lower: Any = None,
        write_learner: bool = True,
        bounds: tuple[Any, Any] | None = None,
        lr: float | None = None,
        lower_batch: Any = None,
        upper_batch: Any = None,
        reduction: str = "mean",
        problem_seed: int | None = None,
        compile: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        problem = BilevelProblem(
            model, hyper, lower_loss, upper_loss, lower_batch, upper_batch, reduction=reduction, seed=problem_seed,
            compile=compile,
        )  # fmt: skip
        super().__init__(
            problem, method, options, lower=lower, write_learner=write_learner, bounds=bounds, lr=lr, seed=seed
        )

    def step(self, lower_batch: Any = None, upper_batch: Any = None) -> StepReport:  # type: ignore[override]
        """One outer iteration on the given data (None: the data of before), hyperparameters updated in place.

        Returns:
            StepReport: value, gradient_norm, step_norm, accepted, cubic_reg, counts, ...

        Raises:
            ProblemError: no data. NonFiniteError, NotStronglyConvexError, SolverError: the hyperparameters keep their
            last good values.
        """
        return self._step(lower_batch, upper_batch)


@final
class MinimaxOptimizer(_ProblemOptimizer):
    """Trains ``min_player`` against the best response of ``max_player``: min_x max_y f(x, y), f strongly concave in y.

    One ``step(batch)`` is one outer iteration of ``method``: it maximises over the max player's parameters (from where
    they are), makes or reuses a Hessian of P(x) = max_y f(x, y), and moves the min player's parameters, in place.

    Args:
        min_player, max_player: nn.Module, dict of tensors, or tensor.
        loss: ``loss(min_player, max_player, batch) -> scalar``, minimised by one and maximised by the other.
        method: 'lmcn' (default), 'mcn', 'imcn', 'gda', or any method for bilevel problems; ``options`` go to it.
        lower: who maximises. None or a lower solver: the optimizer does, and writes the maximiser into max_player
            (with ``write_max_player=False``: leaves it alone); 'external': the user's loop trains the max player.
        batch: data for a ``step()`` without arguments. Others: see BilevelOptimizer.

    Raises:
        ConfigError, ProblemError: at construction, for whatever can be seen there.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> model, attack = torch.nn.Linear(3, 1), torch.zeros(3)
        >>> def loss(model, attack, batch):
        ...     X, t = batch
        ...     return ((model(X + 0.1 * attack) - t) ** 2).mean() - attack.square().sum()
        >>> opt = tb.MinimaxOptimizer(model, attack, loss, method="lmcn")
        >>> batch = torch.randn(20, 3), torch.randn(20, 1)
        >>> first = opt.step(batch)
        >>> opt.step(batch).value <= first.value
        True
    """

    def __init__(
        self,
        min_player: nn.Module | Mapping[str, Tensor] | Tensor,
        max_player: nn.Module | Mapping[str, Tensor] | Tensor,
        loss: Callable,
        *,
        method: str | Method = "lmcn",
        lower: Any = None,
        write_max_player: bool = True,
        bounds: tuple[Any, Any] | None = None,
        lr: float | None = None,
        batch: Any = None,
        reduction: str = "mean",
        problem_seed: int | None = None,
        compile: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        problem = MinimaxProblem(
            min_player, max_player, loss, batch, reduction=reduction, seed=problem_seed, compile=compile
        )
        super().__init__(
            problem, method, options, lower=lower, write_learner=write_max_player, bounds=bounds, lr=lr, seed=seed
        )

    def step(self, batch: Any = None) -> StepReport:  # type: ignore[override]
        """One outer iteration on the given data (None: the data of before), both players updated in place.

        Returns:
            StepReport: value (P(x); f(x, y) for 'gda'), gradient_norm, step_norm, accepted, cubic_reg, counts, ...

        Raises:
            ProblemError: no data. NonFiniteError, NotStronglyConvexError (f not strongly concave in y), SolverError:
                the
            min player keeps its last good values.
        """
        return self._step(batch)


def _leaves(problem: BilevelProblem) -> list[Any]:
    return [leaf for level in ("lower", "upper") for leaf in tree_leaves(problem.batch(level))]


def _fingerprint(leaves: list[Any]) -> tuple[str, ...]:
    """A hash per tensor of the data, so that a restored optimizer knows whether it sees the same batch again."""
    found = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found.append(hashlib.blake2b(raw, digest_size=16).hexdigest() + str(tuple(leaf.shape)))
        else:
            found.append(repr(type(leaf)))
    return tuple(found)
