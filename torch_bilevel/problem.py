"""BilevelProblem: a user's modules and losses as two pure functions f(x, y) and g(x, y) of flat vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .errors import ProblemError, ShapeError
from .flat import Layout
from .functional import Call, math_attention
from .sparse import SparseMatrix, samples

if TYPE_CHECKING:
    from .recorded import LinearCall, Program

Piece = tuple[float, Callable[[Tensor, Tensor], Tensor]]


@dataclass
class Seen:
    """What ``torch_bilevel.recorded`` has seen of a problem's losses.

    Attributes:
        calls: level -> its linear maps, in the order of the loss, as last called.
        chains: kind of objective -> whether all that it does with y goes by its calls, but for what is done entry by entry, so
            that it is evaluated by ``Phi``.
        views: shape, strides and offset of a view of y -> which entries it shows, or None where some twice.
        programs: what is compiled, by term and ``signature``. third: of a lower loss with such a signature that is compiled, its
            layers without correct third derivatives.
        traced: whether the losses are being traced, so that what they are made of must not be remembered.
    """

    calls: dict[str, list[LinearCall]] = field(default_factory=dict)
    chains: dict[str, bool] = field(default_factory=dict)
    views: dict[tuple, Tensor | None] = field(default_factory=dict)
    programs: dict[tuple, Program] = field(default_factory=dict)
    third: dict[tuple, list[tuple[str, str]]] = field(default_factory=dict)
    traced: bool = False

    def __deepcopy__(self, memo: Any) -> Seen:
        """What was seen belongs to the modules that are copied."""
        return Seen()

    def without(self, level: str) -> Seen:
        """For other data of one level; what the losses are stays true."""
        return replace(self, calls={name: calls for name, calls in self.calls.items() if name != level})


class BilevelProblem:
    """min_x f(x, y*(x)) with y*(x) = argmin_y g(x, y): hyperparameters x (dx,), learner parameters y (dy,).

    Args:
        learner: module whose parameters with ``requires_grad`` are y. Frozen parameters and buffers are constants;
            tied parameters count once; buffers are never changed by an evaluation.
        hyper: what x is: a module (its trainable parameters), a dict of tensors, or one tensor. The losses get an
            object of the same kind.
        lower_loss, upper_loss: ``loss(learner, hyper, batch) -> scalar tensor``, written with ordinary module calls.
        lower_batch, upper_batch: any tree of tensors and ``SparseMatrix`` (moved to the problem's device), or a
            re-iterable loader that yields such trees: then the objective is the sum over all its chunks, computed chunk
            by chunk.
        reduction: for loaders. 'mean' (default) weights each chunk by its share of the samples, which gives the
            full-batch loss of a loss that averages; 'sum' adds the chunks' losses, for a loss that sums.
        seed: fixes the random numbers of every evaluation (dropout masks), so that the losses are functions.
        check: evaluate both losses at construction and refuse what cannot be right (see ``doctor``).
        compile: trace the losses, with their gradients and products, and compile them by ``torch.compile``'s compiler: half a
            minute once for all data of the same shapes, faster from then on (docs/performance.md). What is traced stays as it
            was, but for tensors and the modes of modules (``.train()``); loaders and blocks of products are not compiled.

    Attributes:
        x, y: the current values in the user's tensors, flat copies. ``write`` puts values back.
        dx, dy, dtype, device.

    Raises:
        ProblemError: tensors shared by learner and hyper, several dtypes, a loss that ignores what it is given,
            that is random, or is not finite. UnsupportedLayerError: a layer whose products PyTorch has wrong.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> X, t = torch.randn(20, 3), torch.randn(20, 1)
        >>> def lower(learner, hyper, batch):
        ...     X, t = batch
        ...     w = learner.weight
        ...     return ((learner(X) - t) ** 2).mean() + (hyper["log_l2"].exp() * w ** 2).sum()
        >>> def upper(learner, hyper, batch):
        ...     X, t = batch
        ...     return ((learner(X) - t) ** 2).mean()
        >>> learner = torch.nn.Linear(3, 1, bias=False)
        >>> p = tb.BilevelProblem(learner, {"log_l2": torch.zeros(3)}, lower, upper, (X, t), (X, t))
        >>> p.dx, p.dy
        (3, 3)
    """

    #: how messages name the two levels and players; MinimaxProblem has its own words
    words = {
        "x": "hyper", "y": "learner", "upper": "the upper loss", "lower": "the lower loss",
        "data": "pass {level}_batch to BilevelProblem, problem.at(...) or step(...)",
        "neither": "neither loss depends on the hyperparameters it is given",
        "curved": "the lower level has curvature {:.2e} along a random direction: it is not strongly convex here; add L2"
        " regularisation, or use lower='external' with damping",
    }  # fmt: skip

    def __init__(
        self,
        learner: nn.Module,
        hyper: nn.Module | Mapping[str, Tensor] | Tensor,
        lower_loss: Callable,
        upper_loss: Callable,
        lower_batch: Any = None,
        upper_batch: Any = None,
        *,
        reduction: str = "mean",
        seed: int | None = None,
        check: bool = True,
        compile: bool = False,
    ):
        if not isinstance(learner, nn.Module):
            raise ProblemError(f"learner: expected an nn.Module, got {type(learner).__name__}")
        if reduction not in ("mean", "sum"):
            raise ProblemError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        for name, loss in (("lower_loss", lower_loss), ("upper_loss", upper_loss)):
            if not callable(loss):
                raise ProblemError(f"{name}: expected loss(learner, hyper, batch) -> scalar, got {loss!r}")
        self.learner, self.hyper = learner, hyper
        self._y_tensors = {n: p for n, p in learner.named_parameters() if p.requires_grad}
        self._x_tensors = _hyper_tensors(hyper)
        _refuse_shared(dict(learner.named_parameters()), self._x_tensors, self.words)
        self._losses = {"lower": lower_loss, "upper": upper_loss}
        self._functions: dict[str, Callable] | None = None
        self._call = Call(learner, hyper)
        self._set_up(reduction, seed, compile)
        self._batches = {"lower": self._place(lower_batch), "upper": self._place(upper_batch)}
        if check:
            from .doctor import check_problem

            check_problem(self)

    @classmethod
    def from_functions(
        cls,
        f: Callable[[Tensor, Tensor], Tensor],
        g: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        y0: Tensor,
        *,
        seed: int | None = None,
        check: bool = True,
        compile: bool = False,
    ) -> BilevelProblem:
        """The problem of plain functions f(x, y) (upper) and g(x, y) (lower) of flat tensors x (dx,) and y (dy,).

        ``x0`` and ``y0`` are copied; ``problem.x`` and ``problem.y`` hold the current point.
        """
        for name, function in (("f", f), ("g", g)):
            if not callable(function):
                raise ProblemError(f"{name}: expected a function of (x, y), got {function!r}")
        for name, point in (("x0", x0), ("y0", y0)):
            if not isinstance(point, Tensor) or point.dim() != 1:
                got = tuple(point.shape) if isinstance(point, Tensor) else type(point).__name__
                raise ShapeError(f"{name}: expected a flat tensor (n,), got {got}; use .reshape(-1)")
        self = cls.__new__(cls)
        self.learner = self.hyper = None
        self._x_tensors = {"x": x0.detach().clone()}
        self._y_tensors = {"y": y0.detach().clone()}
        self._functions = {"upper": f, "lower": g}
        self._set_up("mean", seed, compile)
        self._batches = {"lower": (), "upper": ()}
        if check:
            from .doctor import check_problem

            check_problem(self)
        return self

    def _set_up(self, reduction: str, seed: int | None, compile: bool) -> None:
        self.x_layout = Layout(self._x_tensors, self.words["x"])
        self.y_layout = Layout(self._y_tensors, self.words["y"])
        if (self.x_layout.dtype, self.x_layout.device) != (self.y_layout.dtype, self.y_layout.device):
            raise ProblemError(
                f"{self.words['x']} is {self.x_layout.dtype} on {self.x_layout.device}, {self.words['y']}"
                f" {self.y_layout.dtype} on {self.y_layout.device}; expected the same: convert one with .to(...)"
            )
        self.dx, self.dy = self.x_layout.size, self.y_layout.size
        self.dtype, self.device = self.y_layout.dtype, self.y_layout.device
        self.reduction, self.seed, self.compile = reduction, seed, compile
        self._totals: dict[str, int] = {}
        self._flattened: tuple | None = None
        self.seen = Seen()

    # -- the user's tensors ---------------------------------------------------------------------------------------

    @property
    def x(self) -> Tensor:
        """(dx,) copy of the current hyperparameters."""
        return self.x_layout.flatten(self._x_tensors)

    @property
    def y(self) -> Tensor:
        """(dy,) copy of the current learner parameters."""
        return self.y_layout.flatten(self._y_tensors)

    @torch.no_grad()
    def write(self, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """Copy x (dx,) and/or y (dy,) into the user's tensors, in place."""
        for flat, layout, tensors in ((x, self.x_layout, self._x_tensors), (y, self.y_layout, self._y_tensors)):
            if flat is not None:
                for name, view in layout.unflatten(layout.check(flat, "write")).items():
                    tensors[name].copy_(view)

    def hyperparameters(self, x: Tensor) -> dict[str, Tensor]:
        """x (dx,) as named tensors in the user's shapes (views)."""
        return self.x_layout.unflatten(x)

    def learner_parameters(self, y: Tensor) -> dict[str, Tensor]:
        """y (dy,) as named tensors in the user's shapes (views), ready for ``torch.func.functional_call``."""
        return self.y_layout.unflatten(y)

    def check_x(self, x: Tensor | None) -> Tensor:
        """x, or the current one for None; ShapeError when it does not fit."""
        return self.x if x is None else self.x_layout.check(x, "x")

    # -- data -----------------------------------------------------------------------------------------------------

    def at(self, lower_batch: Any = None, upper_batch: Any = None) -> BilevelProblem:
        """The same problem (same user tensors) on other data; None keeps the data it has."""
        other = copy.copy(self)
        other._batches, other._totals = dict(self._batches), dict(self._totals)
        for level, batch in (("lower", lower_batch), ("upper", upper_batch)):
            if batch is not None:
                other._batches[level] = self._place(batch)
                other._totals.pop(level, None)
                other.seen = other.seen.without(level)
        return other

    def batch(self, level: str) -> Any:
        """The batch of 'lower' or 'upper' as it is stored (on the problem's device), or None."""
        return self._batches[level]

    def tensors(self) -> list[Tensor]:
        """All tensors of the batches in use, where these are no loaders."""
        return self._flat()[0]

    def to_trace(self, tensors: Sequence[Tensor]) -> BilevelProblem:
        """The same problem with other tensors in its batches, to be evaluated while somebody traces it."""
        other, rest = copy.copy(self), iter(tensors)
        other.compile, other.seen = False, replace(self.seen, calls=dict(self.seen.calls), traced=True)
        other._batches = tree_map(lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf, self._batches)
        return other

    def signature(self) -> tuple:
        """What decides whether a trace of the losses still is one: modes of modules, and of the data all but the numbers."""
        modes = () if self._functions is not None else tuple([module.training for module in self._call.modules])
        return modes, self._flat()[1]

    def _flat(self) -> tuple[list[Tensor], tuple]:
        """The tensors of the batches, and all that is not their numbers; flattened once for the same batches."""
        batches = tuple(self._batches.values())
        if self._flattened is None or any(a is not b for a, b in zip(self._flattened[0], batches)):
            leaves, spec = tree_flatten(self._batches)
            others = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
            self._flattened = batches, ([leaf for leaf in leaves if isinstance(leaf, Tensor)], (str(spec), others))
        return self._flattened[1]

    def data(self) -> tuple[Any, ...]:
        """The batches in use, as ``at`` takes them."""
        return self._batches["lower"], self._batches["upper"]

    def _place(self, batch: Any) -> Any:
        if batch is None or is_loader(batch):
            return batch
        if self.compile and any(map(_is_sparse, tree_leaves(batch, is_leaf=_is_sparse))):
            raise ProblemError("compile: the compiler does not know a SparseMatrix; pass compile=False")
        return tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, batch)

    def exact_oracle(self, **options: Any):
        """The oracle of the exact hyper-objective, by which ``certify`` judges: ImplicitOracle(self, **options)."""
        from .oracles import ImplicitOracle

        return ImplicitOracle(self, **options)

    # -- f and g --------------------------------------------------------------------------------------------------

    def pieces(self, level: str) -> Iterator[Piece]:
        """(weight, function of flat (x, y)) pairs whose weighted sum is the 'upper' or 'lower' objective."""
        batch = self._batches[level]
        if batch is None:
            raise ProblemError(
                f"{self.words[level]} has no data: {self.words['data'].format(level=level)}; a loss that needs none"
                " takes ()"
            )
        if not is_loader(batch):
            yield 1.0, self._function(level, batch)
            return
        total = None
        if self.reduction == "mean":  # counted in a first pass, once per loader
            if level not in self._totals:
                self._totals[level] = _total_samples(batch)
            total = self._totals[level]
        empty = True
        for chunk in batch:
            empty, chunk = False, self._place(chunk)
            weight = 1.0 if total is None else _samples(chunk) / total
            yield weight, self._function(level, chunk)
        if empty:
            raise ProblemError(f"{self.words[level]}: the loader yields no samples")

    def is_single_piece(self, level: str) -> bool:
        """Whether the level's data is one batch (so that its linearisation can be retained)."""
        return not is_loader(self._batches[level])

    def _function(self, level: str, batch: Any) -> Callable[[Tensor, Tensor], Tensor]:
        function = self._functions[level] if self._functions is not None else None

        def call(x: Tensor, y: Tensor) -> Tensor:
            with math_attention():
                if function is not None:
                    value = function(x, y)
                else:
                    tensors = self.x_layout.unflatten(x), self.y_layout.unflatten(y)
                    value = self._call.loss(self._losses[level], *tensors, batch)
            if not isinstance(value, Tensor) or value.dim() != 0:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"{self.words[level]} must return a scalar tensor, got {got}; use .mean() or .sum()")
            return value

        if self.seed is None:
            return call

        def seeded(x: Tensor, y: Tensor) -> Tensor:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed)
                return call(x, y)

        return seeded


def _hyper_tensors(hyper: Any) -> dict[str, Tensor]:
    if isinstance(hyper, nn.Module):
        return {n: p for n, p in hyper.named_parameters() if p.requires_grad}
    if isinstance(hyper, Tensor):
        return {"hyper": hyper}
    if isinstance(hyper, Mapping):
        return dict(hyper)
    raise ProblemError(f"hyper: expected an nn.Module, a dict of tensors or a tensor, got {type(hyper).__name__}")


def _refuse_shared(learner: dict[str, Tensor], hyper: dict[str, Tensor], words: dict[str, str]) -> None:
    storages = {tensor.untyped_storage().data_ptr(): name for name, tensor in learner.items() if tensor.numel()}
    for name, tensor in hyper.items():
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            other = storages[tensor.untyped_storage().data_ptr()]
            raise ProblemError(
                f"{words['x']}[{name!r}] and {words['y']}[{other!r}] share memory; a tensor is either tuned or trained:"
                " clone one"
            )


def _is_sparse(leaf: Any) -> bool:
    return isinstance(leaf, SparseMatrix)


def is_loader(batch: Any) -> bool:
    if isinstance(batch, (Tensor, str, bytes, tuple, list, Mapping)) or not hasattr(batch, "__iter__"):
        return False
    if hasattr(batch, "__next__"):
        raise ProblemError("a batch must be a tree of tensors or a re-iterable loader; got an iterator, which runs dry")
    return True


def _samples(batch: Any) -> int:
    size = samples(batch)
    if size is None:
        raise ProblemError("a loader's batch holds no tensor with a sample dimension; use reduction='sum'")
    return size


def _total_samples(loader: Any) -> int:
    total = sum(_samples(chunk) for chunk in loader)
    if total == 0:
        raise ProblemError("the loader yields no samples")
    return total
