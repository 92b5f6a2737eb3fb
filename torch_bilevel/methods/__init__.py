"""Methods: how the next hyperparameters are chosen."""

from .accelerated import PRAHGD, RAHGD
from .auto import AUTO
from .base import Method, Run
from .cubic_newton import CubicNewton
from .first_order import AID, F2BA, F2SA, ITD, PAID, SGD, Adam, StocBiO
from .gda import GDA
from .lbfgs import LBFGS
from .minimax import IMCN, LMCN, MCN
from .registry import make_method, names, options_of, register
from .regularisation import FittedRegularisation, FixedRegularisation
from .schedule import AdaptiveRefresh, FixedPeriod
from .search import TPE, RandomSearch
from .second_order import DLCRN, FSBA, IFSBA, LFSBA, SLCRN, LazySLCRN

__all__ = [
    "AID", "AUTO", "Adam", "F2BA", "F2SA", "ITD", "LBFGS", "PAID", "PRAHGD", "RAHGD", "SGD", "StocBiO",
    "GDA", "IMCN", "LMCN", "MCN", "RandomSearch", "TPE",
    "AdaptiveRefresh", "CubicNewton", "DLCRN", "FSBA", "FittedRegularisation", "FixedPeriod", "FixedRegularisation",
    "IFSBA", "LFSBA", "LazySLCRN", "SLCRN", "Method", "Run", "make_method", "names", "options_of", "register",
]  # fmt: skip
