"""Oracles: value, gradient and Hessian of the hyper-objective."""

from .aid import AIDOracle
from .evaluation import Evaluation, HyperOracle, LowerSolution
from .finite_difference import FiniteDifferenceOracle
from .hessian import HyperHessian
from .implicit import ImplicitOracle
from .minimax import MinimaxOracle, SchurComplement
from .penalty import PenaltyOracle
from .single_loop import SingleLoopOracle
from .stochastic import StochasticOracle
from .unrolled import UnrolledOracle
from .value import ValueOracle

__all__ = [
    "AIDOracle", "Evaluation", "FiniteDifferenceOracle", "HyperHessian", "HyperOracle", "ImplicitOracle",
    "LowerSolution", "MinimaxOracle", "PenaltyOracle", "SchurComplement", "SingleLoopOracle", "StochasticOracle",
    "UnrolledOracle", "ValueOracle",
]  # fmt: skip
