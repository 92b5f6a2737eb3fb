"""Lower-level solvers: y*(x) = argmin_y h(x, y)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, check_options, nearest
from .gradient import AGD, GradientDescent
from .newton_cg import NewtonCG
from .solver import LowerResult, LowerSolver, LowerStatus
from .systems import LowerSystems
from .torch_optimizer import External, TorchOptimizer

NAMES = {
    "newton_cg": NewtonCG,
    "agd": AGD,
    "gradient_descent": GradientDescent,
    "torch": TorchOptimizer,
    "external": External,
}


def make_lower(spec: LowerSolver | str | Mapping[str, Any] | None) -> LowerSolver:
    """A LowerSolver from an instance, a name, a mapping {'name': ..., option: ...}, or None (NewtonCG)."""
    if spec is None:
        return NewtonCG()
    if isinstance(spec, LowerSolver):
        return spec
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if name not in NAMES:
        raise ConfigError(f"lower solver {name!r} is not known; {nearest(str(name), NAMES)}")
    if name != "torch":
        check_options(options, inspect.signature(NAMES[name]).parameters, f"lower solver {name!r}")
    return NAMES[name](**options)


__all__ = [
    "AGD", "External", "GradientDescent", "LowerResult", "LowerSolver", "LowerStatus", "LowerSystems", "NewtonCG",
    "TorchOptimizer", "make_lower",
]  # fmt: skip
