"""Search without derivatives: random search, and the tree-structured Parzen estimator (TPE) of Optuna."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from ..bounds import Box
from ..errors import ConfigError, NonFiniteError, NotStronglyConvexError, SolverError
from ..oracles.inexact import at_least
from ..oracles.value import ValueOracle
from ..problem import BilevelProblem
from ..results import StepReport
from .base import Method, Run
from .registry import register
from .second_order import oracle_options


class Proposer(ABC):
    """Chooses the next point of a box from what was tried; a function of that, the seed and nothing else.

    Args:
        box: where to search.
        seed: of the search.
    """

    def __init__(self, box: Box, seed: int):
        self.box, self.seed = box, seed

    @abstractmethod
    def propose(self, tried: list[tuple[Tensor, float]]) -> Tensor:
        """The next x (dx,), after ``tried``: pairs (x, value), value NaN where the lower level failed."""

    def trial_seed(self, tried: list[tuple[Tensor, float]]) -> int:
        """A seed for this proposal alone, so that a resumed search needs no generator's state."""
        return (1_000_003 * self.seed + len(tried)) % 2**32


@final
class Uniform(Proposer):
    """x uniform in the box."""

    def propose(self, tried: list[tuple[Tensor, float]]) -> Tensor:
        lo, hi = self.box.lo, self.box.hi
        generator = torch.Generator().manual_seed(self.trial_seed(tried))
        share = torch.rand(lo.shape, generator=generator, dtype=torch.float64).to(lo)
        return lo + share * (hi - lo)


@final
class Parzen(Proposer):
    """Optuna's TPESampler, asked for one trial at a time.

    Args: startup, candidates, multivariate: of TPESampler.
    """

    def __init__(self, box: Box, seed: int, *, startup: int, candidates: int, multivariate: bool):
        super().__init__(box, seed)
        self.optuna = import_optuna()
        self.options = {"n_startup_trials": startup, "n_ei_candidates": candidates, "multivariate": multivariate}
        Float = self.optuna.distributions.FloatDistribution
        bounds = zip(box.lo.tolist(), box.hi.tolist())
        self.space = {f"x{i}": Float(lo, hi) for i, (lo, hi) in enumerate(bounds)}
        self.study = _quiet(self.optuna, self.optuna.create_study, direction="minimize")
        self.told = 0

    def propose(self, tried: list[tuple[Tensor, float]]) -> Tensor:
        for x, value in tried[self.told :]:
            self.study.add_trial(self._frozen(x, value))
        self.told = len(tried)
        self.study.sampler = _quiet(
            self.optuna, self.optuna.samplers.TPESampler, seed=self.trial_seed(tried), **self.options
        )
        params = self._ask()
        return self.box.lo.new_tensor([params[name] for name in self.space])

    def _ask(self) -> dict[str, float]:
        """What the sampler proposes next. The trial that it makes is closed at once; the caller tells its outcome."""
        trial = _quiet(self.optuna, self.study.ask, self.space)
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return trial.params

    def _frozen(self, x: Tensor, value: float) -> Any:
        params = dict(zip(self.space, x.tolist()))
        state = self.optuna.trial.TrialState.FAIL if value != value else self.optuna.trial.TrialState.COMPLETE
        return self.optuna.trial.create_trial(
            state=state, value=None if value != value else value, params=params, distributions=self.space
        )


def import_optuna() -> Any:
    """The optuna module; ConfigError that says how to get it."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "method 'tpe' needs Optuna, which is not installed: pip install 'torch-bilevel[baselines]' (or optuna>=4.0);"
            " 'random_search' needs nothing"
        ) from error
    return optuna


def _quiet(optuna: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(...) without Optuna's log lines and its warning that ``multivariate`` is experimental."""
    import warnings

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return function(*args, **kwargs)
    finally:
        optuna.logging.set_verbosity(level)


@final
class Search(Method):
    """Settings of a search; see ``RandomSearch`` and ``TPE``, its constructors by name."""

    def __init__(self, name: str, proposer: type[Proposer], options: dict[str, Any], oracle: dict[str, Any]):
        self.name, self.proposer, self.options, self.oracle = name, proposer, options, oracle

    def start(self, problem: BilevelProblem, *, seed: int = 0, bounds: Any = None) -> SearchRun:
        return SearchRun(self, problem, ValueOracle(problem, **self.oracle), seed=seed, bounds=bounds)


@final
class SearchRun(Run):
    """A run of Search: one trial a step; the point held is the best so far, the start among them."""

    def __init__(self, method: Search, problem: BilevelProblem, oracle: ValueOracle, *, seed: int, bounds: Any):
        super().__init__(method, problem, oracle, seed=seed, bounds=bounds)
        if oracle.lower_is_external:
            raise ConfigError(f"{method.name} compares values, which need the lower level solved: not lower='external'")
        if self.box is None or not bool(torch.isfinite(self.box.hi - self.box.lo).all()):
            raise ConfigError(f"{method.name} needs finite bounds=(lo, hi), the box to search, got {bounds!r}")
        self.proposer = method.proposer(self.box, seed, **method.options)
        self.tried: list[tuple[Tensor, float]] = []

    def current(self):
        if self.evaluation is None:
            self.evaluation = self.oracle.evaluate(self.x)
            self.tried.append((self.x, float(self.evaluation.value)))
        return self.evaluation

    def stationarity(self) -> float:
        """NaN: there is no gradient."""
        return float("nan")

    def step(self) -> StepReport:
        best = self.current()
        x = self.proposer.propose(self.tried)
        value, new = float("nan"), None
        try:
            new = self.oracle.evaluate(x)
            value = float(new.value)
        except (NonFiniteError, NotStronglyConvexError, SolverError):
            pass  # a trial that failed: told as one, and another point is tried next
        self.tried.append((x, value))
        self.steps += 1
        better = new is not None and value < float(best.value)
        length = float(torch.linalg.vector_norm(x - self.x))
        if better:
            self.x, self.evaluation = x, new
        report = self.report(step_norm=length, accepted=better)
        report.extra["trial"] = value
        return report

    def set_data(self, problem: BilevelProblem) -> None:
        """Values on other data do not compare: the search begins again beside the best point."""
        super().set_data(problem)
        self._forget()

    def _forget(self) -> None:
        self.tried = []
        self.proposer = self.method.proposer(self.box, self.seed, **self.method.options)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tried": [list(pair) for pair in self.tried]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._forget()
        self.tried = [(x, value) for x, value in state["tried"]]


@register("random_search")
def RandomSearch(**oracle: Any) -> Search:
    """Random search: every trial is uniform in ``bounds``; the best so far is kept.

    The hyperparameters as they are: a weight that varies over decades is searched in its logarithm.

    Args: oracle: options of the lower level, see HyperOracle.

    Cost of a step: one training of the learner (``counts.lower_solves``) and one value of f.

    References: Bergstra and Bengio, JMLR 13, 2012.
    """
    return Search("random_search", Uniform, {}, oracle)


@register("tpe")
def TPE(*, startup: int = 10, candidates: int = 24, multivariate: bool = True, **oracle: Any) -> Search:
    """The tree-structured Parzen estimator, by Optuna (extra ``baselines``), in the box ``bounds``.

    The trials so far are split into good and others, each with a kernel density l(x), b(x); the next trial
    has the largest l / b of ``candidates`` drawn from l.

    Args:
        startup: random trials before (the starting point counts as one), default 10.
        candidates: draws compared, default 24.
        multivariate: one joint density (default, as of Optuna 5), or one for each hyperparameter (five times
            slower at dx = 100).
        oracle: options of the lower level, see HyperOracle.

    Raises:
        ConfigError: Optuna is not installed.

    Cost of a step: one training of the learner and one value of f; and Optuna's own time, which grows with dx
        and with the number of trials (measured: 0.3 s a trial at dx = 1000 over the first 100).
    Deviations: a new sampler seeded with (seed, number of the trial) for every trial, so that a resumed
        search is the uninterrupted one bit for bit.

    References: Bergstra, Bardenet, Bengio, Kegl, NeurIPS 2011; Akiba et al., KDD 2019 (Optuna).
    """
    import_optuna()
    options = {"startup": at_least("startup", startup, 0), "candidates": at_least("candidates", candidates, 1),
               "multivariate": bool(multivariate)}  # fmt: skip
    return Search("tpe", Parzen, options, oracle)


RandomSearch.oracle_options = TPE.oracle_options = oracle_options(ValueOracle)
