"""Checkpoints of a run: written atomically, loaded without unpickling code, reports as plain numbers."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .counting import OracleCounts
from .errors import ConfigError
from .results import StepReport
from .sparse import SparseMatrix


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) so that a crash leaves the previous file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: the file is not there or is not such a checkpoint.
    """
    if not Path(path).exists():
        raise ConfigError(f"no checkpoint at {path}; start without resume=True")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path} is not a readable checkpoint ({error}); delete it to start anew") from error


def to_device(state: Any, device: torch.device) -> Any:
    """The same tree with every tensor on ``device``."""
    if isinstance(state, (torch.Tensor, SparseMatrix)):
        return state.to(device)
    if isinstance(state, dict):
        return {key: to_device(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_device(value, device) for value in state)
    return state


def pack_report(report: StepReport) -> dict[str, Any]:
    plain = {f.name: getattr(report, f.name) for f in fields(report)}
    return {**plain, "counts": report.counts.as_dict()}


def unpack_report(plain: dict[str, Any]) -> StepReport:
    return StepReport(**{**plain, "counts": OracleCounts(**plain["counts"])})
