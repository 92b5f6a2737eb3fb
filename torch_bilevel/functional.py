"""A user's loss, run on his own modules with other tensors in the place of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Call:
    """Runs a loss on the user's own modules with other tensors in the place of their parameters."""

    def __init__(self, learner: nn.Module, hyper: Any):
        self.pair = Pair(learner, hyper if isinstance(hyper, nn.Module) else None)
        self.hyper_kind = "module" if isinstance(hyper, nn.Module) else "dict" if isinstance(hyper, Mapping) else "tensor"
        self.modules = list(self.pair.modules())
        self.has_rnn = any(isinstance(module, nn.RNNBase) for module in self.modules)

    def loss(self, loss: Callable, x: dict[str, Tensor], y: dict[str, Tensor], batch: Any) -> Tensor:
        tensors = {f"learner.{name}": tensor for name, tensor in y.items()}
        for name, buffer in self.pair.named_buffers():
            tensors[name] = buffer.clone()
        hyper = None
        if self.hyper_kind == "module":
            tensors.update({f"hyper.{name}": tensor for name, tensor in x.items()})
        else:
            hyper = x if self.hyper_kind == "dict" else x["hyper"]
        if not self.has_rnn:
            return functional_call(self.pair, tensors, (loss, hyper, batch))
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's RNN has no double backward (pytorch#5261)
            return functional_call(self.pair, tensors, (loss, hyper, batch))


class Pair(nn.Module):
    def __init__(self, learner: nn.Module, hyper: nn.Module | None):
        super().__init__()
        self.learner, self.hyper = learner, hyper
        # A plain Module() starts in training mode; the children keep the user's modes.

    def forward(self, loss: Callable, hyper: Any, batch: Any) -> Tensor:
        return loss(self.learner, self.hyper if hyper is None else hyper, batch)


@contextmanager
def math_attention() -> Iterator[None]:
    """Attention by plain operations: the fused kernels have no double backward (pytorch#116350).

    As ``sdpa_kernel(SDPBackend.MATH)``, at a quarter of its 20 us, so that every loss can run under it.
    """
    cuda = torch.backends.cuda
    flash, efficient = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    cudnn, math = cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()
    try:
        _allow_attention(False, False, False, True)
        yield
    finally:
        _allow_attention(flash, efficient, cudnn, math)


def _allow_attention(flash: bool, efficient: bool, cudnn: bool, math: bool) -> None:
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(cudnn)
    cuda.enable_math_sdp(math)
