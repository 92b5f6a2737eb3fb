"""The exception tree of the library. Every message says what was expected, what was got and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class BilevelError(Exception):
    """Base of every error raised by torch_bilevel. ``result`` holds whatever was reached before it, or None."""

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


class ConfigError(BilevelError, ValueError):
    """An unknown or ill-typed option, method or key."""


class ShapeError(BilevelError, ValueError):
    """A tensor of the wrong shape, dtype or device."""


class ProblemError(BilevelError, ValueError):
    """The problem as given cannot be differentiated or solved: missing data, shared tensors, randomness."""


class UnsupportedLayerError(ProblemError):
    """A layer whose higher derivatives PyTorch does not have, or has wrong."""


class NotStronglyConvexError(BilevelError):
    """The lower-level objective has a direction of non-positive curvature. ``curvature`` is d'Ad/d'd along it."""

    def __init__(self, message: str, curvature: float = float("nan"), result: Any = None):
        super().__init__(message, result)
        self.curvature = curvature


class SolverError(BilevelError):
    """A solver did not reach its tolerance and the result would not be what was asked for."""


class NonFiniteError(BilevelError):
    """NaN or infinity in a value or gradient. ``result`` is the run up to the last good point."""


def nearest(name: str, options: Iterable[str]) -> str:
    """'did you mean ...?' and the full list, for messages about an unknown name."""
    options = sorted(options)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(options)}"


def check_options(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError on the first key of ``given`` that is not in ``known``."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown option {key!r}; {nearest(key, known)}")
