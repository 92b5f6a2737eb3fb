"""What a study is made of: tasks for worker processes, in stages, and a report on their results."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_bilevel.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One call in a worker process.

    Attributes:
        key: unique name within the study, also of the result's file.
        function: `"package.module:function"`, imported in the worker and called as
            `function(**arguments, data_dir=data_dir)`; returns a dict that JSON can hold.
        arguments: what JSON can hold; a kept result is used again only for equal arguments. An argument `seed` is named
            in the report's header.
        memory_gb: what the call needs, for the scheduler.
    """

    key: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    memory_gb: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]+", self.key):
            raise ConfigError(f"task key {self.key!r} must be a file name of letters, digits and . _ + -")
        if self.function.count(":") != 1:
            raise ConfigError(f"task {self.key}: function {self.function!r} must have the form package.module:function")
        if not self.memory_gb > 0:
            raise ConfigError(f"task {self.key}: memory_gb={self.memory_gb} must be positive")


Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A published comparison.

    Attributes:
        name, title: as in E1, and one line.
        stages: each gives the tasks of a stage, `stage(quick, results of the stages before)`: for example the tuning
            grid on a seed of its own, then the runs with the best settings.
        report: `report(results, figures_dir, quick)` draws `figures_dir/NAME_*.png` and returns the body in Markdown; a
            result is what the task returned, or {"failed": message}.
        needs: data sets that must be at hand: names of `experiments.data`, or `"module:function"`, called with
            data_dir, which raises DataError.
        gpu: whether it runs on a GPU only (its quick version runs anywhere).
    """

    name: str
    title: str
    stages: tuple[Callable[[bool, Results], list[Task]], ...]
    report: Callable[[Results, Path, bool], str]
    needs: tuple[str, ...] = ()
    gpu: bool = False
