"""The methods by name. Each is a small constructor; unknown names and options are errors that name the nearest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, check_options, nearest
from .base import Method

_REGISTRY: dict[str, Callable[..., Method]] = {}


def register(name: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator: enter a constructor under ``name``."""

    def enter(constructor: Callable[..., Method]) -> Callable[..., Method]:
        _REGISTRY[name] = constructor
        return constructor

    return enter


def names() -> list[str]:
    """All method names, sorted."""
    return sorted(_REGISTRY)


def options_of(name: str) -> list[str]:
    """The options a method's constructor takes, with those it passes on to its oracle."""
    constructor = _find(name)
    known = []
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            known += getattr(constructor, "oracle_options", ())
        else:
            known.append(parameter.name)
    return list(dict.fromkeys(known))


def make_method(method: Method | str, options: Mapping[str, Any] | None = None) -> Method:
    """A Method from an instance or from a name and options.

    Raises:
        ConfigError: unknown name or option, or options given beside an instance.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"options {sorted(options)} beside a method object: give them to its constructor")
        return method
    constructor = _find(method)
    options = dict(options or {})
    check_options(options, options_of(method), f"method {method!r}")
    return constructor(**options)


def _find(name: str) -> Callable[..., Method]:
    if not isinstance(name, str) or name.lower() not in _REGISTRY:
        raise ConfigError(f"method {name!r} is not known; {nearest(str(name), _REGISTRY)}")
    return _REGISTRY[name.lower()]
