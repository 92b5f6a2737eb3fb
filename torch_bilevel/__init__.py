"""torch_bilevel: second-order bilevel optimization and hyperparameter tuning by gradients in PyTorch."""

__version__ = "0.1.0"

from . import cubic, errors, linalg, lower, methods, oracles
from .certify import Certificate, certify
from .counting import OracleCounts
from .doctor import DoctorReport, doctor
from .errors import (
    BilevelError,
    ConfigError,
    NonFiniteError,
    NotStronglyConvexError,
    ProblemError,
    ShapeError,
    SolverError,
    UnsupportedLayerError,
)
from .methods import (
    AID,
    DLCRN,
    F2BA,
    F2SA,
    FSBA,
    GDA,
    IFSBA,
    IMCN,
    ITD,
    LBFGS,
    LFSBA,
    LMCN,
    MCN,
    PAID,
    PRAHGD,
    RAHGD,
    SGD,
    SLCRN,
    TPE,
    Adam,
    LazySLCRN,
    RandomSearch,
    StocBiO,
    make_method,
)
from .methods import names as method_names
from .minimax import MinimaxProblem
from .minimize import minimize
from .optimizer import BilevelOptimizer, MinimaxOptimizer
from .oracles import Evaluation, ImplicitOracle, MinimaxOracle, PenaltyOracle, SingleLoopOracle
from .problem import BilevelProblem
from .results import Result, Status, StepReport
from .sparse import SparseMatrix

__all__ = [
    "GDA", "IMCN", "LMCN", "MCN", "MinimaxOptimizer", "MinimaxOracle", "MinimaxProblem",
    "AID", "Adam", "F2BA", "F2SA", "ITD", "LBFGS", "PAID", "PRAHGD", "RAHGD", "SGD", "StocBiO",
    "BilevelError", "BilevelOptimizer", "BilevelProblem", "Certificate", "ConfigError", "DLCRN", "DoctorReport",
    "Evaluation", "FSBA", "IFSBA", "ImplicitOracle", "LFSBA", "LazySLCRN", "NonFiniteError", "NotStronglyConvexError",
    "OracleCounts", "PenaltyOracle", "ProblemError", "RandomSearch", "Result", "SLCRN", "ShapeError", "SingleLoopOracle",
    "SolverError", "SparseMatrix", "Status", "StepReport", "TPE",
    "UnsupportedLayerError", "certify", "cubic", "doctor", "errors", "linalg", "lower", "make_method", "method_names",
    "methods", "minimize", "oracles",
]  # fmt: skip
