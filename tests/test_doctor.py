"""What PyTorch has wrong is refused by name; what it has right is right, to third order."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_bilevel as tb
from tests.reference import error

D = torch.float64
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=D)
T = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=D)


def problem_of(learner, data=(X, T), **options):
    """Least squares with learned weights (dx = 6), a pull to the first parameters makes it convex."""
    learner = learner.double()
    start = [p.detach().clone() for p in learner.parameters()]

    def lower(m, h, b):
        pull = sum(((p - p0) ** 2).sum() for p, p0 in zip(m.parameters(), start))
        return ((m(b[0]) - b[1]) ** 2 * h.exp()[:, None]).mean() + 30 * pull

    def upper(m, h, b):
        return ((m(b[0]) - 2 * b[1]) ** 2).mean() + 0.1 * (h**2).sum()

    return tb.BilevelProblem(learner, torch.linspace(-1, 1, 6, dtype=D), lower, upper, data, data, **options)


def fd_of_gradient(oracle, x, u, h=1e-4):
    return (oracle.evaluate(x + h * u).gradient - oracle.evaluate(x - h * u).gradient) / (2 * h)


class Reshape(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, X):
        return X.reshape(-1, *self.shape)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, X):
        return self.head(self.rnn(X.reshape(-1, 2, 2))[0][:, -1])


class OwnAttention(nn.Module):
    """A user's class that calls the fused attention of torch.nn.functional."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(2, 6), nn.Linear(2, 2)

    def forward(self, X):
        q, k, v = self.qkv(X.reshape(-1, 2, 2)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))


class HiddenAttention(nn.Sequential):
    """A subclass of a plain container, with a fused attention in its forward."""

    def forward(self, X):
        h = self[0](X).reshape(-1, 1, 2, 2)
        return self[1](F.scaled_dot_product_attention(h, h, h).reshape(-1, 4))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, X):
        return self.head(self.layer(torch.stack([X, X.roll(1, 0)], 1)).mean(1))


def tiny(*middle):
    return nn.Sequential(nn.Linear(4, 2), *middle, nn.Linear(2, 2))


def wide(*middle):
    return nn.Sequential(nn.Linear(4, 3), *middle, nn.Linear(3, 2))


def evaluated_batch_norm():
    norm = nn.BatchNorm1d(2)
    norm.running_mean += 0.2
    norm.running_var *= 1.5
    return tiny(norm, nn.Tanh()).eval()


RIGHT = {
    "tanh": lambda: tiny(nn.Tanh()),
    "GELU": lambda: tiny(nn.GELU()),
    "SiLU": lambda: tiny(nn.SiLU()),
    "RMSNorm": lambda: tiny(nn.RMSNorm(2)),
    "GroupNorm": lambda: wide(nn.GroupNorm(1, 3)),
    "BatchNorm in eval mode": evaluated_batch_norm,
    "conv": lambda: nn.Sequential(Reshape(1, 2, 2), nn.Conv2d(1, 2, 2, padding=1), nn.GELU(), nn.AvgPool2d(3),
                                  nn.Flatten(), nn.Linear(2, 2)),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention in a user's class": OwnAttention,
    "attention in a subclass of Sequential": lambda: HiddenAttention(nn.Linear(4, 4), nn.Linear(4, 2)),
}  # fmt: skip

WRONG_TO_THIRD = {
    "LayerNorm": (lambda: wide(nn.LayerNorm(3)), "LayerNorm"),
    "layer_norm by function": (lambda: Functional(lambda z: F.layer_norm(z, (4,))), "LayerNorm"),
    "BatchNorm in training": (lambda: tiny(nn.BatchNorm1d(2), nn.Tanh()).train(), "BatchNorm"),
    "InstanceNorm": (lambda: nn.Sequential(nn.Linear(4, 12), Reshape(2, 6), nn.InstanceNorm1d(2),
                                           nn.Flatten(), nn.Linear(12, 2)), "InstanceNorm"),
    "TransformerEncoderLayer": (Transformer, "LayerNorm"),
}  # fmt: skip


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

    def forward(self, X):
        return self.b(self.function(self.a(X)))


@pytest.mark.parametrize("name", RIGHT)
def test_right_to_third_order(name):
    """The implicit Hessian, which takes third derivatives, against finite differences of the gradient."""
    torch.manual_seed(2)
    problem = problem_of(RIGHT[name]())
    oracle = tb.ImplicitOracle(problem, lower_tol=1e-13)
    ev = oracle.evaluate()
    u = torch.linspace(1, 2, 6, dtype=D)
    U = torch.stack([u, -u.flip(0)], 1)
    products = ev.hessian.matmat(U)
    assert error(ev.hessian.matvec(u), products[:, 0]) <= 1e-8
    assert error(products[:, 0], fd_of_gradient(oracle, problem.x, U[:, 0])) <= 1e-5
    assert error(products[:, 1], fd_of_gradient(oracle, problem.x, U[:, 1])) <= 1e-5
    assert error(ev.gradient, fd_of_value(oracle, problem.x)) <= 1e-6


def fd_of_value(oracle, x, h=1e-4):
    steps = h * torch.eye(x.numel(), dtype=D)
    return torch.stack([oracle.evaluate(x + e).value - oracle.evaluate(x - e).value for e in steps]) / (2 * h)


@pytest.mark.parametrize("name", WRONG_TO_THIRD)
def test_wrong_to_third_order_is_refused_and_the_penalty_hessian_is_right(name):
    torch.manual_seed(2)
    make, message = WRONG_TO_THIRD[name]
    problem = problem_of(make())
    implicit = tb.ImplicitOracle(problem).evaluate()
    assert implicit.gradient.isfinite().all()  # needs second derivatives only
    with pytest.raises(tb.UnsupportedLayerError, match=f"{message}.*penalty oracle in float64"):
        _ = implicit.hessian
    oracle = tb.PenaltyOracle(problem, 50.0, "forward", lower_tol=1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ev = oracle.evaluate()
        u = torch.linspace(1, 2, 6, dtype=D)
        product = ev.hessian.matvec(u)
    assert error(product, fd_of_gradient(oracle, problem.x, u)) <= 1e-5
    report = tb.doctor(problem)
    assert report.ok
    assert "implicit Hessian refused" in str(report)
    assert message in str(report)


def in_single_precision(problem):
    data = (X.float(), T.float())
    losses = problem._losses.values()
    return tb.BilevelProblem(problem.learner.float(), problem.hyper.float(), *losses, data, data)


def test_the_trap_itself_third_derivatives_of_layer_norm():
    """If this fails PyTorch has been repaired: the entry in doctor.NO_THIRD may go for that version."""
    z = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=D)
    c = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=D)

    def own(z):
        return (z - z.mean()) / torch.sqrt(z.var(unbiased=False) + 1e-5)

    def third(norm):
        first = torch.func.grad(lambda z: (norm(z) ** 3 * c).sum())
        second = torch.func.grad(lambda z: torch.dot(first(z), c))
        return torch.func.grad(lambda z: torch.dot(second(z), c))(z)

    assert error(third(lambda z: F.layer_norm(z, (5,))), third(own)) > 1e-3


def test_float32_penalty_hessian_with_layer_norm_says_that_it_rounds():
    """A quadrature needs third derivatives; without them float32 takes the plain difference and warns."""
    torch.manual_seed(2)
    problem = problem_of(wide(nn.LayerNorm(3)))
    exact = tb.PenaltyOracle(problem, 1e3, "forward").evaluate()
    ev = tb.PenaltyOracle(in_single_precision(problem), 1e3, "forward").evaluate()
    assert error(ev.gradient, exact.gradient) <= 1e-4
    with pytest.warns(UserWarning, match="rounding errors of about 1e-04"):
        H = ev.hessian.to_dense()
    assert error(H, exact.hessian.to_dense()) <= 1e-1  # the warning's 1e-4 is relative to g_xx, not to H


# -- refused altogether ---------------------------------------------------------------------------------


def test_weight_norm_is_refused_by_name():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    learner = nn.Sequential(first, nn.Tanh(), nn.Linear(2, 2))
    with pytest.raises(tb.UnsupportedLayerError, match="weight_norm.*wrong.*remove_parametrizations"):
        problem_of(learner)
    nn.utils.parametrize.remove_parametrizations(learner[0], "weight")
    problem_of(learner)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 2), nn.Tanh()), nn.Linear(2, 2)
        self.reentrant = reentrant

    def forward(self, X):
        return self.head(checkpoint(self.body, X, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", [False, True])
def test_activation_checkpointing_is_refused(first, reentrant):
    """As the first segment, whose input needs no gradient, reentrant checkpointing leaves no trace."""
    learner = Checkpointed(reentrant)
    with pytest.raises(tb.UnsupportedLayerError, match="activation checkpointing.*switch it off"):
        problem_of(learner if first else nn.Sequential(nn.Linear(4, 4), learner))
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"  # put back


def test_attention_under_the_math_backend_only():
    """Fused attention has no double backward: the library picks MATH; a user who forces FLASH is told."""
    problem = problem_of(OwnAttention())
    tb.PenaltyOracle(problem, 10.0, "forward").evaluate().hessian.matvec(problem.x)

    class Forced(OwnAttention):
        def forward(self, X):
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
                return super().forward(X)

    with pytest.raises(tb.UnsupportedLayerError, match="fused attention has no double backward"):
        problem_of(Forced())


def test_attention_called_in_the_loss_of_plain_layers():
    """The loss itself, not a module, calls the fused attention."""
    learner = nn.Linear(4, 4, dtype=D)

    def lower(m, h, b):
        z = m(b).reshape(-1, 1, 2, 2)
        l2 = (h.exp() * (m.weight**2).sum(1)).sum() + (m.bias**2).sum()
        return ((F.scaled_dot_product_attention(z, z, z) - 1) ** 2).mean() + l2

    def upper(m, h, b):
        return (m(b) ** 2).mean()

    problem = tb.BilevelProblem(learner, torch.zeros(4, dtype=D), lower, upper, X, X)
    oracle = tb.ImplicitOracle(problem, lower_tol=1e-13)
    u = torch.linspace(1, 2, 4, dtype=D)
    product = oracle.evaluate().hessian.matvec(u)
    assert error(product, fd_of_gradient(oracle, problem.x, u)) <= 1e-5


def test_attention_in_a_hyper_module():
    class Weigher(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(4, 4)

        def forward(self, X):
            z = self.key(X)[None, None]
            return F.scaled_dot_product_attention(z, z, z)[0, 0].mean(1)

    torch.manual_seed(2)
    hyper = Weigher().double()

    def lower(m, h, b):
        l2 = sum((p * p).sum() for p in m.parameters())
        return (((m(b[0]) - b[1]) ** 2).sum(1) * h(b[0]).exp()).mean() + l2

    def upper(m, h, b):
        return ((m(b[0]) - b[1]) ** 2).mean()

    problem = tb.BilevelProblem(nn.Linear(4, 2, dtype=D), hyper, lower, upper, (X, T), (X + 0.1, T))
    oracle = tb.ImplicitOracle(problem, lower_tol=1e-13)
    u = torch.linspace(1, 2, problem.dx, dtype=D)
    product = oracle.evaluate().hessian.matvec(u)
    assert error(product, fd_of_gradient(oracle, problem.x, u)) <= 1e-5


def test_a_change_of_mode_is_seen():
    """Third derivatives are right in eval mode, wrong in training: asked anew for every Hessian."""
    torch.manual_seed(2)
    problem = problem_of(evaluated_batch_norm())
    oracle = tb.ImplicitOracle(problem)
    assert oracle.evaluate().hessian.matvec(problem.x).isfinite().all()
    problem.learner.train()
    with pytest.raises(tb.UnsupportedLayerError, match="BatchNorm"):
        _ = oracle.evaluate().hessian


def test_dropout_in_training_is_refused_and_evaluation_mode_is_not():
    learner = tiny(nn.Dropout(0.5), nn.Tanh())
    with pytest.raises(tb.ProblemError, match="changes between two calls.*learner.eval.*seed=0"):
        problem_of(learner.train())
    problem_of(learner.eval())
    problem_of(learner.train(), seed=0)


def test_a_loader_that_shuffles_is_deterministic_enough_but_noise_is_not():
    with pytest.raises(tb.ProblemError, match="take random numbers out"):
        problem_of(Functional(lambda z: z + 0.1 * torch.randn_like(z)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_batch_with_nan_is_refused(poison):
    bad = X.clone()
    bad[2, 1] = poison
    with pytest.raises(tb.NonFiniteError, match="lower loss is (nan|inf) at the starting point; check"):
        problem_of(tiny(nn.Tanh()), data=(bad, T)) if poison != poison else problem_of(tiny(), data=(bad, T))


def test_check_false_leaves_everything_to_the_user():
    problem_of(tiny(nn.Dropout(0.5), nn.Tanh()).train(), check=False)


# -- the report -----------------------------------------------------------------------------------------


def texts(report, kind):
    return [finding.text for finding in report.findings if finding.kind == kind]


def test_a_healthy_problem():
    report = tb.doctor(problem_of(tiny(nn.Tanh())))
    assert report.ok
    assert str(report) == "doctor: nothing found"


def test_missing_data_is_no_finding_of_the_levels_that_have_some():
    problem = problem_of(nn.Linear(4, 2))
    report = tb.doctor(tb.BilevelProblem(problem.learner, problem.hyper, *problem._losses.values()))
    assert report.ok


def test_negative_curvature_is_a_warning():
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum(), lambda x, y: -(y**2).sum() + (x * y).sum(), torch.ones(3, dtype=D),
        torch.ones(3, dtype=D),
    )  # fmt: skip
    report = tb.doctor(problem)
    assert report.ok
    (text,) = texts(report, "warning")
    assert "curvature -2.00e+00" in text
    assert "not strongly convex" in text
    assert "L2" in text


def test_a_wrong_backward_is_found_by_finite_differences():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(y):
            return y**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, cotangent):
            return 3 * ctx.saved_tensors[0] * cotangent

    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum(), lambda x, y: Wrong.apply(y).sum() + (x * y).sum(), torch.ones(3, dtype=D),
        torch.ones(3, dtype=D),
    )  # fmt: skip
    report = tb.doctor(problem)
    assert not report.ok
    assert "disagrees with finite differences" in texts(report, "error")[0]
    assert str(report).startswith("doctor: ERROR: ")


def test_a_kink_is_a_warning():
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum(), lambda x, y: (y**2).sum() + 10 * torch.relu(y - x).sum(),
        torch.ones(3, dtype=D), torch.ones(3, dtype=D),
    )  # fmt: skip
    assert any("kinks" in text or "not smooth" in text for text in
               texts(tb.doctor(problem), "warning") + texts(tb.doctor(problem), "error"))  # fmt: skip


def test_an_upper_loss_without_the_learner_is_a_warning():
    x, y = torch.ones(3, dtype=D), torch.zeros(3, dtype=D)
    problem = tb.BilevelProblem.from_functions(lambda x, y: x.sum(), lambda x, y: ((y - x) ** 2).sum(), x, y)
    assert "upper loss does not depend on the learner" in texts(tb.doctor(problem), "warning")[0]


def test_float32_problems_are_healthy_too():
    problem = problem_of(tiny(nn.Tanh()))
    report = tb.doctor(in_single_precision(problem))
    assert str(report) == "doctor: nothing found"
