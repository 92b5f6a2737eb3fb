"""Which linear maps of fixed inputs a loss makes, found by watching it, and the loss with their outputs in its hands."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode

from ..folding import multiply
from .losses import FAST

if TYPE_CHECKING:
    from ..problem import BilevelProblem, Seen

#: products by which an ``OutputHessian`` is found and tested, beside one an output; as many more where x is seen as well
PROBES = 2
#: learner parameters up to which nobody looks for calls: columns are as cheap
SMALL = 20

MATMULS = frozenset((torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__))
#: what else multiplies: done better by other means than ``Phi``
OTHERS = frozenset((
    torch.einsum, torch.bmm, torch.addmm, torch.addmv, torch.baddbmm, torch.tensordot, Tensor.bmm, Tensor.addmm,
    torch.nn.functional.bilinear, torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d,
    torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward,
))  # fmt: skip
ADDS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__))


@dataclass
class LinearCall:
    """z = X V + 1 b': one linear map of fixed inputs, as a loss has called it.

    Attributes:
        shape: of z as the loss got it.
        X: (n, d). weights: (d, K), V = y[weights]. bias: (K,), b = y[bias], or None.
        source: the inputs as the loss gave them, kept so that nothing else comes to lie where they do. signs: by which a later
            call is known to be the same.
    """

    shape: torch.Size
    X: Tensor
    weights: Tensor
    bias: Tensor | None = None
    source: Tensor | None = None
    signs: tuple = ()

    @cached_property
    def index(self) -> Tensor:
        """(d, K) or, with a bias, (d + 1, K): z = ``inputs`` y[index]."""
        return self.weights if self.bias is None else torch.cat([self.weights, self.bias[None]])

    @cached_property
    def inputs(self) -> Tensor:
        """X with a column of ones where there is a bias, kept."""
        return self.X if self.bias is None else torch.cat([self.X, self.X.new_ones(len(self.X), 1)], dim=1)

    @cached_property
    def entries(self) -> Tensor | slice:
        """``weights``, output by output (K d,)."""
        return _as_slice(self.weights.mT.reshape(-1))

    @cached_property
    def offsets(self) -> Tensor | slice | None:
        """``bias``."""
        return None if self.bias is None else _as_slice(self.bias)

    @cached_property
    def single(self) -> LinearCall:
        """The same with X in float32, kept."""
        return self if self.X.dtype is torch.float32 else LinearCall(self.shape, self.X.float(), self.weights, self.bias)

    @cached_property
    def norm(self) -> Tensor:
        """The Frobenius norm of ``inputs``, kept."""
        ones = 0 if self.bias is None else len(self.X)
        return (torch.linalg.vector_norm(self.X) ** 2 + ones).sqrt()

    def is_current(self, data: list[Tensor]) -> bool:
        """Whether its inputs are one of these tensors, not written to since it was seen: else they may be others by now."""
        storage = self.source.untyped_storage().data_ptr()
        held = any(tensor.untyped_storage().data_ptr() == storage for tensor in data)
        return held and self.signs[: len(_sign(self.source)) + 1] == (*_sign(self.source), _version(self.source))

    def on(self, X: Tensor, shape: torch.Size) -> LinearCall:
        """The same entries of y with other inputs."""
        other = replace(self, X=X, shape=shape, source=None, signs=())
        other.__dict__ |= {name: getattr(self, name) for name in ("index", "entries", "offsets")}
        return other

    @property
    def share(self) -> Tensor:
        """What a number in y is worth in z: rounding of it at B (K, K, n) is rounding of 1 in X' B X."""
        return len(self.X) ** 0.5 / self.norm**2

    def outputs(self, V: Tensor) -> Tensor:
        """z for every column: (dy, k) -> (K, k, n)."""
        n, (d, K), k = len(self.X), self.weights.shape, V.shape[1]
        rows = V[self.entries].view(K, d, k).mT.reshape(K * k, d)
        Z = multiply(rows, self.X.mT).view(K, k, n)
        return Z if self.bias is None else Z.add_(V[self.offsets][:, :, None])

    def add_adjoint(self, out: Tensor, W: Tensor) -> Tensor:
        """out + X' W at the entries of y for every column, in place: (dy, k), (K, k, n) -> (dy, k)."""
        n, (d, K), k = len(self.X), self.weights.shape, out.shape[1]
        back = multiply(W.reshape(K * k, n), self.X).view(K, k, d).mT.reshape(K * d, k)
        _add_at(out, self.entries, back)
        return out if self.bias is None else _add_at(out, self.offsets, W.sum(2))

    def by_outputs(self, z: Tensor) -> Tensor:
        """(K, 1, n) of a tensor of the loss's shape; of a stack of them (k, ...), (K, k, n)."""
        K, n = self.weights.shape[1], len(self.X)
        return z.reshape(-1, n, K).permute(2, 0, 1).contiguous()

    def as_called(self, Z: Tensor) -> Tensor:
        """A stack (k, ...) of tensors of the loss's shape, output by output in memory: the inverse of ``by_outputs``."""
        return Z.permute(1, 2, 0).view(Z.shape[1], *self.shape)


class Watch(TorchFunctionMode):
    """Under it, a linear map of fixed inputs by entries of ``y`` answers with a leaf of the right value, which is noted.

    What the loss makes of y beside them is all that still depends on y. A bias, in the call or added to it, is part of the leaf.
    A leaf lies in memory output by output, for samples are many and outputs few; so a ``view`` of what is made of it may be a
    copy. Cross entropies go by ``losses``.

    Args:
        y: (dy,), a tensor of its own that requires a gradient, so that views know their base.
        seen: of the same problem, before. level: whose loss it is; its calls are noted again where they are the same.

    Attributes:
        found: (leaf, call), in their order.
        complete: whether no other linear map had anything to do with y or x, but for dot products.

    Where a call's output is used both with a bias added to it and without, the gradient comes out wrong: test it.
    """

    def __init__(self, y: Tensor, seen: Seen, level: str):
        super().__init__()
        self._eager = ExitStack()
        self.y, self.known, self.complete = y, seen.calls.get(level, []), True
        self._notes: list[dict[str, Any]] = []
        self._views, self._traced = seen.views, seen.traced

    def __enter__(self) -> Watch:
        if "torch._dynamo" in sys.modules:  # what is compiled cannot be watched; under torch.func it would run uncompiled, too
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.close()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is Tensor.view and not kwargs and not isinstance(args[1], torch.dtype):
            return args[0].reshape(*args[1:])
        if peek_interpreter_stack() is None:  # else within a vmap or grad of the loss's own, whose tensors lie nowhere
            out = self._instead(func, args, kwargs)
            if out is not None:
                return out
        out = func(*args, **kwargs)
        if func is torch.nn.functional.linear or func in MATMULS or func in OTHERS:
            first = out[0] if isinstance(out, tuple) else out
            self.complete = self.complete and not (first.requires_grad and first.numel() > 1)
        return out

    def _instead(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """What answers in the place of a function, or None: it does itself."""
        if func is torch.nn.functional.linear or func in MATMULS:
            return self._note(func, args, kwargs)
        if func in FAST and not self._traced:
            return FAST[func](*args, **kwargs)
        return self._with_bias(*args) if func in ADDS and not kwargs else None

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The leaf for X V + b, or None where it is no such call."""
        if len(args) < 2 or not kwargs.keys() <= {"bias"}:
            return None
        X, weight, bias = *args[:2], args[2] if len(args) > 2 else kwargs.get("bias")
        if not isinstance(X, Tensor) or X.layout is not torch.strided or X.requires_grad or X.dim() == 0:
            return None
        index = self._index(weight)
        if index is None or X.dtype != self.y.dtype:
            return None
        by_rows = func is torch.nn.functional.linear and weight.dim() == 2
        index = index.T if by_rows else index
        index = index.reshape(len(index), -1)  # a vector of weights has one output
        if index.shape[0] != X.shape[-1]:
            return None
        offset = None
        if isinstance(bias, Tensor):
            offset = self._index(bias)
            if offset is None and bias.requires_grad:
                return None
        weight = weight.detach().T if by_rows else weight.detach()
        z = multiply(weight.reshape(index.shape).mT, X.detach().reshape(-1, X.shape[-1]).mT).mT
        if isinstance(bias, Tensor):
            z = z + bias.detach()
        shape = X.shape[:-1] + (weight.shape[1:] if weight.dim() > 1 else ())
        note = {"X": X.detach(), "weights": index, "bias": None if offset is None else offset.reshape(-1),
                "signs": [*_sign(X), _version(X), *_sign(args[1])[1:], *(() if offset is None else _sign(bias)[1:])]}  # fmt: skip
        self._notes.append(note)
        return self._answer(note, z.view(shape))

    @staticmethod
    def _answer(note: dict[str, Any], z: Tensor) -> Tensor:
        """A leaf of this value as the loss gets it: a copy, which it may write to."""
        note["leaf"] = z.requires_grad_(True)
        note["answer"] = note["leaf"].clone()
        return note["answer"]

    def _with_bias(self, a: Any, b: Any) -> Tensor | None:
        """z + b, for z a call's answer and b as many entries of y: another leaf in its place."""
        for out, other in ((a, b), (b, a)):
            note = next((note for note in self._notes if note["answer"] is out), None)
            entries = self._index(other) if note is not None else None
            if entries is not None and entries.numel() == note["weights"].shape[1] and note["bias"] is None:
                note["bias"] = entries.reshape(-1)
                note["signs"].extend(_sign(other)[1:])
                return self._answer(note, out.detach() + other.detach())
        return None

    def _index(self, view: Any) -> Tensor | None:
        """Which entries of y a view of it shows, or y itself; or None, as where it was detached."""
        if not isinstance(view, Tensor) or not view.requires_grad or view.dim() > 2:
            return None
        if view is not self.y and view._base is not self.y:
            return None
        key = _sign(view)[1:]
        if key not in self._views:
            entries = torch.tensor(view.storage_offset() - self.y.storage_offset(), device=view.device)
            for size, stride in zip(view.shape, view.stride()):
                entries = entries[..., None] + stride * torch.arange(size, device=view.device)
            self._views[key] = entries if entries.unique().numel() == entries.numel() else None
        return self._views[key]

    @property
    def found(self) -> list[tuple[Tensor, LinearCall]]:
        """(leaf, call) of all calls so far."""
        return [(note["leaf"], self._call(i, note)) for i, note in enumerate(self._notes)]

    def _call(self, i: int, note: dict[str, Any]) -> LinearCall:
        signs, shape = tuple(note["signs"]), note["leaf"].shape
        if self._traced:  # the inputs may be others when what is traced is run
            return self.known[i].on(note["X"].reshape(-1, note["X"].shape[-1]), shape)
        if i < len(self.known) and self.known[i].signs == signs:
            return self.known[i]
        X = note["X"].reshape(-1, note["X"].shape[-1])
        call = LinearCall(shape, X, note["weights"], note["bias"], note["X"], signs)
        _ = call.index, call.entries, call.offsets  # by looking at values, as nobody can who traces
        return call


def _as_slice(index: Tensor) -> Tensor | slice:
    """The same entries by a slice where they follow one another: no gathering, no scattering."""
    size = len(index)
    first = int(index[0]) if size else 0
    return slice(first, first + size) if torch.equal(index, first + torch.arange(size, device=index.device)) else index


def _add_at(out: Tensor, entries: Tensor | slice, rows: Tensor) -> Tensor:
    """out[entries] += rows, where no entry is named twice."""
    if isinstance(entries, slice):
        out[entries] += rows
        return out
    return out.index_add_(0, entries, rows)


def _sign(t: Tensor) -> tuple:
    """Where it lies, and how."""
    return t.data_ptr(), t.shape, t.stride(), t.storage_offset()


def _version(t: Tensor) -> int:
    """How often it was written to."""
    return 0 if t.is_inference() else t._version


def look(problem: BilevelProblem, level: str, x: Tensor, y: Tensor, anew: bool = False) -> list[LinearCall]:
    """The linear maps of fixed inputs in the loss of a level, whose data is one batch.

    Args:
        anew: look again where the inputs may have changed since they were seen: features of a network, say.

    Cost: an evaluation of the loss where it is looked at; not counted, like the checks of a problem.
    """
    known = problem.seen.calls.get(level)
    if known is None or anew and not all(call.is_current(problem.tensors()) for call in known):
        x, y = x.detach().clone().requires_grad_(True), y.detach().clone().requires_grad_(True)
        with torch.enable_grad(), Watch(y, problem.seen, level) as watch:
            next(iter(problem.pieces(level)))[1](x, y)
        problem.seen.calls[level] = [call for _, call in watch.found]
    return problem.seen.calls[level]


def worth_it(calls: list[LinearCall], dy: int) -> bool:
    """Whether a Hessian by these calls saves half of the products with h_yy, or more."""
    return bool(calls) and 2 * (max(call.index.shape[1] for call in calls) + 2 * PROBES) <= dy
