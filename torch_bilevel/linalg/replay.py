"""Iterations recorded as CUDA graphs: one launch a step instead of some hundred.

On a GPU the steps of a Krylov method on a small or middling system take the time of their launches, not of their
arithmetic: 1.4 ms of Python for 0.1 ms of work. A recorded step is replayed without Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_streams: dict[int, torch.cuda.Stream] = {}


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work on a CUDA stream that is not the default one, where nothing can be recorded; on a CPU nothing changes.

    What was asked of the current stream before is done first, and what follows waits for what is done here.
    """
    if device.type != "cuda":
        yield
        return
    outside = torch.cuda.current_stream(device)
    if outside != torch.cuda.default_stream(device):
        yield
        return
    inside = _streams.setdefault(outside.device_index, torch.cuda.Stream(device))
    inside.wait_stream(outside)
    try:
        with torch.cuda.stream(inside):
            yield
    finally:
        outside.wait_stream(inside)


class Replay:
    """A step that changes tensors in place, recorded; calling it does the step again.

    The step must ask nothing of the host and keep what it changes at the same place. ``make`` finds out whether it can be
    recorded. Products by recorded autograd graphs can be, where the gradient was recorded on the same stream.
    """

    _pools: dict[int, tuple[tuple[int, int], torch.cuda.CUDAGraph]] = {}

    def __init__(self, step: Callable[[], None], device: torch.device):
        # not ``torch.cuda.graph``, which empties the caches first, and that takes longer than some hundred steps. The
        # graphs of a device share their memory, kept by the latest: between replays nothing lives in it.
        self._graph = torch.cuda.CUDAGraph()
        index = torch.cuda.current_stream(device).device_index
        pool, _ = self._pools.get(index, (torch.cuda.graph_pool_handle(), None))
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        finally:
            self._graph.capture_end()
        self._pools[index] = pool, self._graph

    def __call__(self) -> None:
        self._graph.replay()

    @classmethod
    def make(cls, step: Callable[[], None], device: torch.device) -> Replay | None:
        """Do the step once and record it; None where it cannot be recorded, and then it was done in part, wholly or not at all.

        On the default stream nothing can be: see ``own_stream``.
        """
        if not can_record(device):
            return None
        before = torch.cuda.get_sync_debug_mode()
        try:
            _check_synchronisation("error")  # found out now, for a synchronisation spoils a recording
            step()
        except RuntimeError:
            return None
        finally:
            _check_synchronisation(before)
        try:
            return cls(step, device)
        except RuntimeError:  # a synchronisation that PyTorch does not know of
            return None


def _check_synchronisation(mode: str | int) -> None:
    """PyTorch's mode, without its remark that it does not find all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def can_record(device: torch.device) -> bool:
    """Whether the current stream can be recorded."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    return torch.cuda.current_stream(device) != torch.cuda.default_stream(device)
