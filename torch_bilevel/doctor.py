"""doctor: what in a user's model or losses would make its derivatives wrong, found before a run.

Layers are recognised by the backward nodes of a recorded loss, so functional calls count as much as modules do. What
PyTorch has wrong was measured against finite differences in float64 (torch 2.6 to 2.15); tests repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import Node

from .errors import BilevelError, NonFiniteError, ProblemError, UnsupportedLayerError
from .problem import BilevelProblem

if TYPE_CHECKING:
    from .derivatives import Linearisation

CHECKPOINTING = "activation checkpointing has no higher derivatives under torch.func; switch it off"

#: backward node (prefix) -> why second derivatives through it cannot be used
NO_SECOND = {
    "WeightNormInterfaceBackward": "weight_norm: second derivatives are silently wrong in PyTorch; remove it with"
    " torch.nn.utils.parametrize.remove_parametrizations, or write w = g v / |v| yourself",
    "ScaledDotProduct": "fused attention has no double backward (pytorch#116350); the MATH backend, which losses run"
    " under, has: do not choose another with sdpa_kernel inside the loss",
}
#: backward node (prefix) -> why third derivatives through it cannot be used
NO_THIRD = {
    "NativeLayerNormBackward": "LayerNorm: third derivatives are silently wrong by 10-40 % in PyTorch"
    " (pytorch#175754); use RMSNorm or GroupNorm(1, d), or the penalty oracle in float64, which needs none",
    "NativeBatchNormBackward": "BatchNorm or InstanceNorm on batch statistics: third derivatives are wrong or raise"
    " (pytorch#186256); call .eval(), or use the penalty oracle in float64, which needs none",
    "CudnnBatchNormBackward": "BatchNorm on batch statistics: third derivatives are wrong or raise; call .eval()",
}


@dataclass(frozen=True)
class Finding:
    """One thing the doctor found. ``kind``: 'error' (a run refuses), 'warning' or 'third' (implicit Hessian refuses)."""

    kind: str
    text: str
    error: type[BilevelError] = ProblemError


@dataclass(frozen=True)
class DoctorReport:
    """All findings; ``ok`` when none is an error. Printing it gives a line each."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.kind == "error" for finding in self.findings)

    def __str__(self) -> str:
        if not self.findings:
            return "doctor: nothing found"
        names = {"error": "ERROR", "warning": "warning", "third": "implicit Hessian refused"}
        return "\n".join(f"doctor: {names[f.kind]}: {f.text}" for f in self.findings)


def doctor(problem: BilevelProblem) -> DoctorReport:
    """Examine a problem at its current point: data, dependence, randomness, layers, curvature.

    Checks that both losses are finite scalars, deterministic, and connected to the learner and hyperparameters they
    are *given* (a loss that closes over the global tensor has gradient exactly 0); that no layer has wrong second or
    third derivatives; that gradient and product agree with finite differences; and that the lower level shows no
    negative curvature along a random direction.

    Cost: about ten losses and gradients of each level.
    """
    findings = list(_basic(problem))
    if not any(finding.kind == "error" for finding in findings):
        findings += _numerical(problem)
    return DoctorReport(tuple(dict.fromkeys(findings)))


def check_problem(problem: BilevelProblem) -> None:
    """Raise the first error the basic examination finds; cost: two losses per level that has data."""
    for finding in _basic(problem):
        if finding.kind == "error":
            raise finding.error(finding.text)


def refuse_third_derivatives(at: Linearisation) -> None:
    """UnsupportedLayerError if a layer of this lower loss has no correct third derivatives.

    Each time, for .train() and .eval() change it; where nothing shows what was recorded, by another evaluation.
    """
    node, problem = at.recorded_node, at.objective.problem
    if node is not None:
        found = _nodes_in(node, NO_THIRD)
    elif at.objective.is_compiled:
        key = problem.signature()
        if key not in problem.seen.third:
            problem.seen.third[key] = _third(problem)
        found = problem.seen.third[key]
    else:
        found = _third(problem)
    if found:
        raise UnsupportedLayerError(found[0][1])


def has_third_derivatives(problem: BilevelProblem) -> bool:
    """Whether every layer of the lower loss has correct third derivatives."""
    return not _third(problem)


def _third(problem: BilevelProblem) -> list[tuple[str, str]]:
    value, _ = _record(problem, "lower", problem.x, problem.y)
    return _nodes_in(value.grad_fn, NO_THIRD)


def _record(problem: BilevelProblem, level: str, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The first piece of a level's loss, recorded by plain autograd."""
    x, y = x.clone().requires_grad_(True), y.clone().requires_grad_(True)
    _, function = next(iter(problem.pieces(level)))
    with torch.enable_grad(), _no_checkpointing():
        return function(x, y), (x, y)


@contextmanager
def _no_checkpointing() -> Iterator[None]:
    """RuntimeError(CHECKPOINTING) where a segment is checkpointed; not every way leaves a node in the graph."""
    class Refused:
        @staticmethod
        def apply(*args):
            raise RuntimeError(CHECKPOINTING)

    module, original = torch.utils.checkpoint, torch.utils.checkpoint.CheckpointFunction
    module.CheckpointFunction = Refused
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTING):
            yield
    finally:
        module.CheckpointFunction = original


def _basic(problem: BilevelProblem):
    reaches: dict[str, tuple[bool, bool]] = {}
    words = problem.words
    for level in ("lower", "upper"):
        if problem.batch(level) is None:
            continue
        try:
            value, (x, y) = _record(problem, level, problem.x, problem.y)
        except RuntimeError as error:
            if CHECKPOINTING in str(error):
                yield Finding("error", CHECKPOINTING, UnsupportedLayerError)
                return
            raise
        if not bool(torch.isfinite(value)):
            yield Finding("error", f"{words[level]} is {value.item()} at the starting point; check the batch and the"
                          " initial values", NonFiniteError)  # fmt: skip
            return
        again, _ = _record(problem, level, problem.x, problem.y)
        if not bool((value - again).abs() <= 1e-5 * value.abs()):
            yield Finding("error", f"{words[level]} changes between two calls ({value.item():.6g}, {again.item():.6g}):"
                          " a Krylov solve on it is meaningless. Call learner.eval() (dropout), take random numbers out"
                          " of the loss, or pass seed=0 to fix them")  # fmt: skip
        for _, text in _nodes_in(value.grad_fn, NO_SECOND):
            yield Finding("error", text, UnsupportedLayerError)
        for _, text in _nodes_in(value.grad_fn, NO_THIRD):
            yield Finding("third", text, UnsupportedLayerError)
        if not value.requires_grad:
            reaches[level] = (False, False)
        else:
            parts = torch.autograd.grad(value, (x, y), allow_unused=True)
            reaches[level] = (parts[0] is not None, parts[1] is not None)
    hint = ("; use the arguments of the loss, not variables from outside: they are other tensors while it is"
            " differentiated, and nothing under no_grad or .detach()")  # fmt: skip
    if "lower" in reaches and not reaches["lower"][1]:
        yield Finding("error", f"{words['lower']} does not depend on the {words['y']} it is given{hint}")
    if len(reaches) == 2 and not (reaches["lower"][0] or reaches["upper"][0]):
        yield Finding("error", f"{words['neither']}{hint}")
    if "upper" in reaches and not reaches["upper"][1]:
        yield Finding("warning", f"{words['upper']} does not depend on the {words['y']} it is given")


def _numerical(problem: BilevelProblem):
    from .counting import OracleCounts
    from .derivatives import Objective

    if problem.batch("lower") is None:
        return
    g = Objective(problem, lower=1.0, counts=OracleCounts())
    x, y = problem.x, problem.y
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(problem.dy, generator=generator, dtype=torch.float64).to(y)
    u = u / torch.linalg.vector_norm(u)
    h = torch.finfo(y.dtype).eps ** (1 / 3) * (1.0 + float(torch.linalg.vector_norm(y)))
    loose = 1e-4 if y.dtype == torch.float64 else 5e-2
    at = g.linearise(x, y, "y")
    product = at.yy(u)
    plus, minus = g.gradient(x, y + h * u, "y"), g.gradient(x, y - h * u, "y")
    slope, expected = float((plus[0] - minus[0]) / (2 * h)), float(torch.dot(at.gy, u))
    size = float(torch.linalg.vector_norm(at.gy)) + h
    if not abs(slope - expected) <= loose * size:
        yield Finding("error", f"{problem.words['lower']}'s gradient disagrees with finite differences ({expected:.4g} against"
                      f" {slope:.4g}): a layer's backward is wrong, or the loss is not smooth",
                      UnsupportedLayerError)  # fmt: skip
    difference = (plus[2] - minus[2]) / (2 * h)
    if not float(torch.linalg.vector_norm(product - difference)) <= loose * (
        float(torch.linalg.vector_norm(difference)) + size
    ):
        yield Finding("warning", f"{problem.words['lower']}'s second derivatives disagree with finite differences: a layer's"
                      " double backward is wrong, or the loss has kinks (ReLU, max) near this point")  # fmt: skip
    curvature = float(torch.dot(u, product))
    if not curvature > 0:
        yield Finding("warning", problem.words["curved"].format(curvature))


def _nodes_in(last: Node | None, table: dict[str, str]) -> list[tuple[str, str]]:
    """(node, text) for every backward node from the last one on that the table names."""
    found, seen, stack = {}, set(), [last]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        for prefix, text in table.items():
            if name.startswith(prefix) and getattr(node, "_saved_training", True):
                found[prefix] = text
        stack += [parent for parent, _ in node.next_functions]
    return list(found.items())
