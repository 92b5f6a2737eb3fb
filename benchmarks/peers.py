"""Hypergradients by other libraries, each through its own code, at a given lower solution and with K steps.

Every peer is a class with ``missing()`` (why it cannot be used, or None), and ``hypergradient(steps) -> (dx,)`` that
does all that
must be done anew at a new point: losses, gradients, solve, cross product. ``steps`` is the library's own iteration
setting; ``products(steps)`` says how many Hessian products that costs.
"""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems import Setting, curvature

warnings.filterwarnings("ignore", category=FutureWarning)


class Peer(ABC):
    """A contestant at the setting's (x, y)."""

    name, module = "", ""
    #: how the answer converges: 'cg' to the solution, 'unrolled' slowly
    kind = "cg"

    def __init__(self, setting: Setting):
        self.setting = setting

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be used here; None where it can."""
        try:
            importlib.import_module(cls.module)
        except Exception as error:  # a peer built for another torch or numpy fails in its own way
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'on import'}"
        return None

    def products(self, steps: int) -> int:
        return steps

    @abstractmethod
    def hypergradient(self, steps: int) -> Tensor:
        """(dx,), by ``steps`` iterations of its linear solver (or of its unrolled lower level)."""


class TorchOpt(Peer):
    """torchopt.diff.implicit.custom_root with its CG (the default normal equations square the condition number)."""

    name, module = "TorchOpt, CG", "torchopt"
    start: tuple[Tensor, ...] | None = None

    def products(self, steps: int) -> int:
        return steps + 1  # its CG starts with a product with x0

    def hypergradient(self, steps: int) -> Tensor:
        import torchopt
        from torchopt.diff.implicit import custom_root

        s = self.setting
        solve = torchopt.linear_solve.solve_cg(rtol=0.0, maxiter=steps, init=self.start)
        optimality = torch.func.grad(s.lower, argnums=0)
        solution = tuple(p.detach() for p in s.parameters())

        @custom_root(lambda params, x: optimality(params, x), argnums=1, solve=solve)
        def solver(params: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            return solution

        x = s.x.clone().requires_grad_(True)
        return torch.autograd.grad(s.upper(solver(solution, x), x), x)[0]


class TorchOptWarm(TorchOpt):
    """The same, started at the adjoint of the outer step before (its sign as TorchOpt has it)."""

    name = "TorchOpt, CG, started at the last adjoint"

    def __init__(self, setting: Setting, adjoint: Tensor):
        super().__init__(setting)
        self.start = tuple(-p.detach() for p in setting.parameters(adjoint))


class Betty(Peer):
    """betty.hypergradient.cg of the release, called on the attributes that it reads of its two problems."""

    name, module = "Betty, CG", "betty"

    def hypergradient(self, steps: int) -> Tensor:
        from betty.hypergradient.cg import cg

        s = self.setting
        x, params = s.x.clone().requires_grad_(True), s.parameters()
        lower = SimpleNamespace(
            paths=[], cur_batch=None, config=SimpleNamespace(cg_iterations=steps, cg_alpha=1.0),
            training_step_exec=lambda batch: s.lower(params, x),
            parameters=lambda: params, trainable_parameters=lambda: params,
        )  # fmt: skip
        upper = SimpleNamespace(trainable_parameters=lambda: [x])
        vector = torch.autograd.grad(s.upper(params, x), params)
        return cg(vector, lower, upper)[0]


class Boat(Peer):
    """boat_torch.na_ol.cg.CG with tolerance 0."""

    name, module = "BOAT, CG", "boat_torch.na_ol.cg"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.model = setting.learner()

    def hypergradient(self, steps: int) -> Tensor:
        from boat_torch.na_ol.cg import CG

        s = self.setting
        x, params = s.x.clone().requires_grad_(True), s.parameters()
        config = {"gm_op": ["NGD"], "lower_level_opt": torch.optim.SGD(params, lr=1.0),
                  "CG": {"tolerance": 0.0, "k": steps}, "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0}}  # fmt: skip
        solver = CG(ll_objective=lambda feed, ul, ll, params: s.lower(params, x),
                    ul_objective=lambda feed, ul, ll, params: s.upper(params, x),
                    ll_model=self.model, ul_model=self.model, ll_var=params, ul_var=[x],
                    solver_config=config)  # fmt: skip
        solver.compute_gradients({}, {}, self.model, lower_model_params=params, hparams=[x])
        return x.grad


class Curvlinops(Peer):
    """CG on curvlinops' HessianLinearOperator (GPyTorch's CG); the cross product by autograd."""

    name, module = "curvlinops, CG", "curvlinops"

    class _Loss(nn.Module):
        """A learner whose output is its lower loss: the operator knows only sums over losses of outputs."""

        def __init__(self, setting: Setting):
            super().__init__()
            self.setting, self.net = setting, setting.learner()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.setting.lower(tuple(self.net.parameters()), self.setting.x)

    class _Identity(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return output

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.loss = self._Loss(setting)

    def hypergradient(self, steps: int) -> Tensor:
        from curvlinops import CGInverseLinearOperator, HessianLinearOperator

        s = self.setting
        params = [p for p in self.loss.net.parameters()]
        H = HessianLinearOperator(self.loss, self._Identity(), params, [s.train], check_deterministic=False)
        inverse = CGInverseLinearOperator(H, eps=0.0, tolerance=0.0, max_iter=steps, max_tridiag_iter=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "CG terminated in k iterations": it was told to
            v = inverse @ list(torch.autograd.grad(s.upper(params, s.x), params))
        x = s.x.clone().requires_grad_(True)
        leaves = s.parameters()
        gradients = torch.autograd.grad(s.lower(leaves, x), leaves, create_graph=True)
        return -torch.autograd.grad(gradients, x, [part.detach() for part in v])[0]


class Jaxopt(Peer):
    """jaxopt.implicit_diff.root_vjp under jit, with jaxopt's CG; its compilation is not timed. In true float32.

    It uses all cores that the process may use, whatever its flags say: ``common.hold_to_cores``.
    """

    name, module = "jaxopt (jit), CG", "jaxopt"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU float32 would be TF32, ours is not
        from jaxopt import implicit_diff, linear_solve

        def array(t: Tensor) -> Any:
            return jnp.asarray(t.detach().cpu().numpy())

        s, step = setting, 2 if setting.bias else 1
        (X, t), (Xv, tv) = [tuple(map(array, part)) for part in (s.train, s.valid)]

        anchors = None if s.anchor is None else [array(p) for p in s.parameters(s.anchor)]

        def losses(params: list, inputs: Any, labels: Any) -> Any:
            for i in range(0, len(params), step):
                inputs = (jnp.tanh(inputs) if i else inputs) @ params[i].T
                inputs = inputs + params[i + 1] if s.bias else inputs
            picked = jnp.take_along_axis(inputs, labels[:, None], 1)[:, 0]
            return jax.nn.logsumexp(inputs, axis=1) - picked

        def lower(params: list, x: Any) -> Any:
            ce, penalty = losses(params, X, t), s.reg * sum((p**2).sum() for p in params)
            if anchors is not None:
                penalty = penalty + s.proximal * sum(((p - a) ** 2).sum() for p, a in zip(params, anchors))
            if s.hyper == "log_l2":
                return ce.mean() + (jnp.exp(x) * params[0] ** 2).sum() + penalty
            return (jax.nn.sigmoid(x) * ce).mean() + penalty

        self.x, self.params = array(s.x), [array(p) for p in s.parameters()]

        def hypergradient(params: list, x: Any, steps: int) -> Any:
            cotangent = jax.grad(lambda p: losses(p, Xv, tv).mean())(params)
            solve = partial(linear_solve.solve_cg, tol=0.0, maxiter=steps)
            return implicit_diff.root_vjp(jax.grad(lower), params, (x,), cotangent, solve)[0]

        self.call = jax.jit(hypergradient)

    def products(self, steps: int) -> int:
        return steps + 1  # its CG starts with a product with x0

    def hypergradient(self, steps: int) -> Tensor:
        import numpy as np

        found = np.array(self.call(self.params, self.x, steps).block_until_ready())
        return torch.from_numpy(found).to(self.setting.x.device)


class Higher(Peer):
    """K gradient steps unrolled from the lower solution by higher, step 1/L: iterative differentiation (ITD)."""

    name, module, kind = "higher, unrolled", "higher", "unrolled"

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.model = setting.learner()
        self.lr = 1.0 / largest_curvature(setting)

    def hypergradient(self, steps: int) -> Tensor:
        import higher

        s, x = self.setting, self.setting.x.clone().requires_grad_(True)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)
        with higher.innerloop_ctx(self.model, optimizer, track_higher_grads=True) as (model, inner):
            for _ in range(steps):
                inner.step(s.lower(tuple(model.parameters()), x))
            return torch.autograd.grad(s.upper(tuple(model.parameters()), x), x)[0]


PEERS: tuple[type[Peer], ...] = (TorchOpt, Betty, Boat, Curvlinops, Jaxopt, Higher)


def largest_curvature(setting: Setting, iterations: int = 20) -> float:
    """L of g in y, from above by 5 %, by power iteration."""
    params = setting.parameters()
    product = curvature(setting, params)
    gen = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=gen).to(p) for p in params]
    size = 1.0
    for _ in range(iterations):
        norm = torch.sqrt(sum((p * p).sum() for p in v))
        v = product([p / norm for p in v])
        size = float(torch.sqrt(sum((p * p).sum() for p in v)))
    return 1.05 * size
