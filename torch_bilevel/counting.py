"""OracleCounts: what a computation cost, in calls rather than seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import Tensor


@dataclass
class OracleCounts:
    """Number of oracle calls. Products are counted per vector, so a block of k columns counts k.

    Attributes:
        evaluations: values-with-gradient of the hyper-objective.
        upper_values, lower_values: losses computed without derivatives.
        upper_gradients, lower_gradients: gradients of f and of g (with their value).
        upper_products, lower_products: second-derivative products with one vector; a product with the Hessian of
            <v, g_y> (third derivatives) counts as one lower product.
        solves: linear systems solved with a Hessian of the lower level, per right-hand side.
        factorisations: Cholesky factors (or Nystrom sketches) of it made.
        hessians: how often the hyper-Hessian, or its Krylov model, was made anew.
        lower_solves: minimisations of a lower-level objective.
    """

    evaluations: int = 0
    upper_values: int = 0
    lower_values: int = 0
    upper_gradients: int = 0
    lower_gradients: int = 0
    upper_products: int = 0
    lower_products: int = 0
    solves: int = 0
    factorisations: int = 0
    hessians: int = 0
    lower_solves: int = 0
    parent: OracleCounts | None = field(default=None, repr=False, compare=False)

    def add(self, **increments: int) -> None:
        """Add to the named counts, here and in every parent."""
        for name, increment in increments.items():
            setattr(self, name, getattr(self, name) + increment)
        if self.parent is not None:
            self.parent.add(**increments)

    def child(self) -> OracleCounts:
        """New counts, starting at zero, whose increments are added here too."""
        return OracleCounts(parent=self)

    def as_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parent"}

    def copy(self) -> OracleCounts:
        """The numbers as they are now, detached from any parent."""
        return OracleCounts(**self.as_dict())

    def load(self, numbers: dict[str, int]) -> None:
        """Overwrite the counts (not the parent's), for resuming a run."""
        for name, number in numbers.items():
            setattr(self, name, number)

    @property
    def gradients(self) -> int:
        """Upper plus lower gradients."""
        return self.upper_gradients + self.lower_gradients

    @property
    def oracle_calls(self) -> int:
        """Gradients plus products of both levels: the usual axis of a comparison by work."""
        return self.gradients + self.upper_products + self.lower_products


def columns_of(v: Tensor) -> int:
    """Vectors in v: 1 for (n,), k for (n, k)."""
    return 1 if v.dim() == 1 else v.shape[1]
