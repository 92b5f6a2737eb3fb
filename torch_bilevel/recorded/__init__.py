"""Gradients recorded at a point, and products with the Hessian behind them.

``Graph`` records any function by ``torch.func``. ``Phi`` records one that sees y through linear maps of fixed inputs (a linear
layer on data, or on the features of a frozen network), which nobody declares: ``Watch`` finds them where the loss is evaluated.
Then h(x, y) = phi(x, y, A y), and by the chain rule gradients and products take two products with the data each, in the
order and by the library that are fastest, and what is done to the outputs. ``Compiled`` is either of them, traced and compiled.
"""

from .calls import LinearCall, look, worth_it
from .compiled import Compiled, Program
from .graph import Graph, Recorded
from .phi import Phi

__all__ = ["Compiled", "Graph", "LinearCall", "Phi", "Program", "Recorded", "look", "worth_it"]
