"""The published comparisons that `python -m experiments reproduce NAME` runs: modules with a STUDY each."""

from __future__ import annotations

import importlib

from experiments.studies.base import Study, Task
from torch_bilevel.errors import ConfigError, nearest

STUDIES = ("E1", "E2", "E2_GPU", "E3", "E4", "E7")

__all__ = ["STUDIES", "Study", "Task", "load_study"]


def load_study(name: str) -> Study:
    """The study called `name` (any case); ConfigError that names the nearest one, or says that it has no module yet."""
    if name.upper() not in STUDIES:
        raise ConfigError(f"unknown study {name!r}; {nearest(name.upper(), STUDIES)}")
    module = f"experiments.studies.{name.lower()}"
    try:
        return importlib.import_module(module).STUDY
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"study {name.upper()} has no module {module} in this version") from error
