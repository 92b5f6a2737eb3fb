"""Named tensors <-> one flat vector. The only place that flattens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import ProblemError, ShapeError

FLOATING = (torch.float64, torch.float32, torch.bfloat16)


class Layout:
    """Where each named tensor lies in a flat vector of length ``size``.

    Args:
        tensors: name -> tensor, at least one, all of one floating dtype and one device.
        what: 'learner' or 'hyper', for messages.

    Raises:
        ProblemError: no tensors, an empty one, integer or half-precision ones, or several dtypes or devices.
    """

    def __init__(self, tensors: Mapping[str, Tensor], what: str):
        if not tensors:
            raise ProblemError(f"{what}: nothing to optimise; expected at least one tensor with requires_grad=True")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ProblemError(f"{what}[{name!r}]: expected a tensor, got {type(tensor).__name__}")
            if tensor.numel() == 0:
                raise ProblemError(f"{what}[{name!r}] is empty (shape {tuple(tensor.shape)})")
            if tensor.dtype not in FLOATING:
                raise ProblemError(
                    f"{what}[{name!r}] has dtype {tensor.dtype}; expected float64, float32 or bfloat16"
                    " (second-order products overflow in float16)"
                )
        dtypes = {t.dtype for t in tensors.values()}
        devices = {t.device for t in tensors.values()}
        if len(dtypes) > 1 or len(devices) > 1:
            found = ", ".join(f"{n}: {t.dtype} on {t.device}" for n, t in tensors.items())
            raise ProblemError(f"{what}: expected one dtype and one device, got {found}; convert with .to(...)")
        self.what = what
        self.names = tuple(tensors)
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.sizes = tuple(math.prod(shape) for shape in self.shapes.values())
        self.size = sum(self.sizes)
        self.dtype = dtypes.pop()
        self.device = devices.pop()

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(size,) copy of the named tensors, detached."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views into ``flat`` (size,); differentiable."""
        parts = flat.split(self.sizes) if len(self.sizes) > 1 else (flat,)
        return {name: part.view(self.shapes[name]) for name, part in zip(self.names, parts)}

    def check(self, flat: Tensor, name: str) -> Tensor:
        """``flat`` itself, if it is a (size,) tensor of this dtype and device; ShapeError otherwise."""
        if not isinstance(flat, Tensor):
            raise ShapeError(f"{name}: expected a tensor of shape ({self.size},), got {type(flat).__name__}")
        if tuple(flat.shape) != (self.size,):
            raise ShapeError(
                f"{name}: expected shape ({self.size},), all {self.what} tensors flattened, got {tuple(flat.shape)}"
            )
        if flat.dtype != self.dtype or flat.device != self.device:
            raise ShapeError(
                f"{name}: expected {self.dtype} on {self.device}, got {flat.dtype} on {flat.device}; use .to(...)"
            )
        return flat.detach()
