"""Hessians of losses that see the learner through linear maps of fixed inputs, assembled from those of its outputs.

A linear layer on data (or on the features of a frozen network) makes z = X V of the inputs X (n, d) and of weights V
that are entries of y; a loss that treats its samples one by one then has

    h_yy = A' B A + diag(d),   h_yx = A' C,      A: y -> z,  B: one (K, K) block a sample,  C: one x_i a sample,

with X' diag(B_kl) X for each pair of outputs: K products and n d^2 K^2 multiplications instead of K d products. Nobody
declares this: the calls are found by watching the loss, B and d by derivatives of the loss in z and y apart, and the form is
believed if they give the true gradient by the chain rule and multiply a random vector as the true derivatives do.
"""

from .hessian import OutputHessian
from .kronecker import KroneckerPreconditioner
from .prices import (
    corner_ranks,
    dense_multiplications,
    eigenvectors,
    factor_application,
    finding_price,
    in_products,
    kronecker_application,
    kronecker_price,
    one_product,
    price,
    products_pay,
    products_to_find,
    single_factor_pays,
    single_pays,
    times_multiplications,
)

__all__ = [
    "KroneckerPreconditioner", "OutputHessian", "corner_ranks", "dense_multiplications", "eigenvectors",
    "factor_application", "finding_price", "in_products", "kronecker_application", "kronecker_price", "one_product", "price",
    "products_pay", "products_to_find", "single_factor_pays", "single_pays", "times_multiplications",
]  # fmt: skip
