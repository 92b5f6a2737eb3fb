"""UpperStep: any torch.optim optimizer, with its scheduler, as the update of the hyperparameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ..errors import ConfigError, nearest

Spec = Any  # a name, a class or factory, or a pair (either, {option: value})


@final
class UpperStep:
    """x -> x after one step of an optimizer with a given gradient.

    Args:
        optimizer: name in torch.optim, class or callable(parameters, lr=...), or a pair of one of these and a
            dict of options. L-BFGS is the method 'lbfgs' (it asks for values along its search).
        lr: learning rate, unless the options hold one.
        scheduler: None, a name in torch.optim.lr_scheduler, class or callable(optimizer), or a pair with
            options; stepped once per update (ReduceLROnPlateau: with the value).
        x: (dx,), for size, dtype and device.

    Raises:
        ConfigError: unknown names or options.
    """

    def __init__(self, optimizer: Spec, lr: float, scheduler: Spec, x: Tensor):
        self.leaf = x.detach().clone().requires_grad_(True)
        make, options = _resolve(optimizer, torch.optim, torch.optim.Optimizer, "upper_optimizer")
        if make is torch.optim.LBFGS:
            raise ConfigError("upper_optimizer: LBFGS searches along values; use method='lbfgs'")
        self.optimizer = _build(make, ([self.leaf],), {"lr": lr, **options}, "upper_optimizer")
        self.scheduler = None
        if scheduler is not None:
            known = torch.optim.lr_scheduler
            make, options = _resolve(scheduler, known, known.LRScheduler, "scheduler")
            self.scheduler = _build(make, (self.optimizer,), options, "scheduler")

    def step(self, x: Tensor, gradient: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
        """The new x (dx,); ``scale`` multiplies the learning rate of this step only."""
        with torch.no_grad():
            self.leaf.copy_(x)
        self.leaf.grad = gradient.detach().clone()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate * scale if scale != 1.0 else rate
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(float(value))
        elif self.scheduler is not None:
            self.scheduler.step()
        return self.leaf.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; a copy, since optimizers update their tensors in place."""
        return copy.deepcopy({
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        })  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        for entry in state["optimizer"]["state"].values():
            if isinstance(entry.get("step"), Tensor):
                entry["step"] = entry["step"].cpu()  # where optimizers keep it
        self.optimizer.load_state_dict(state["optimizer"])
        for saved in state["optimizer"]["state"].values():  # of the one leaf; loading casts to its dtype what has another
            self.optimizer.state[self.leaf].update(saved)
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def _resolve(spec: Spec, module: Any, base: type, what: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(factory, options) of a spec."""
    options: dict[str, Any] = {}
    if isinstance(spec, (tuple, list)):
        if len(spec) != 2 or not isinstance(spec[1], dict):
            raise ConfigError(f"{what}: expected a name, a class or a pair (name, options), got {spec!r}")
        spec, options = spec
    if callable(spec):
        return spec, dict(options)
    known = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    if spec not in known:
        raise ConfigError(f"{what} {spec!r} is not known; {nearest(str(spec), known)}")
    return getattr(module, spec), dict(options)


def _build(make: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], what: str) -> Any:
    try:
        return make(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {getattr(make, '__name__', make)} refused {options}: {error}") from error
