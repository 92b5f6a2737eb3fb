"""The first-order methods: loops written here, cost per iteration, saddles, seeds, bounds, exact resume, both faces."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.func import grad

import torch_bilevel as tb
from tests.problems import nonconvex, quadratic, saddle
from tests.reference import blocks, error, smooth
from torch_bilevel.methods.perturbation import Escape, Perturbation, uniform_ball
from torch_bilevel.methods.upper_step import UpperStep

LOWER = {"lower_steps": 3, "lower_lr": 0.15}
ALL = {
    "aid": {"adjoint_steps": 2, **LOWER},
    "itd": LOWER,
    "f2ba": LOWER,
    "f2sa": {"order": 3, **LOWER},
    "paid": {"adjoint_steps": 2, "below": 1e3, "wait": 2, **LOWER},
    "rahgd": {"adjoint_steps": 2, "restart_radius": 0.02, **LOWER},
    "prahgd": {"adjoint_steps": 2, "restart_radius": 0.02, **LOWER},
    "stocbio": {"adjoint_steps": 2, **LOWER},
    "adam": {},
    "sgd": {"momentum": 0.9},
    "lbfgs": {},
}
INEXACT = [name for name in ALL if name not in ("adam", "sgd", "lbfgs")]


def smooth_problem():
    ref = smooth()
    return tb.BilevelProblem.from_functions(ref.f, ref.g, ref.x, ref.y0, check=False)


def iterates(problem, method, steps, seed=0, bounds=None, **options):
    """x after each step, with the run."""
    run = tb.make_method(method, options).start(problem, seed=seed, bounds=bounds)
    points = []
    for _ in range(steps):
        run.step()
        points.append(run.x)
    return points, run


def test_every_name_is_registered():
    assert set(ALL) <= set(tb.method_names())
    for name, options in ALL.items():
        assert tb.make_method(name, {"lr": 0.5, **options}).name == name


# -- against loops written here ------------------------------------------------------------------------------


def cg(A, b, v, steps):
    r = b - A @ v
    p = r
    for _ in range(steps):
        alpha = (r @ r) / (p @ A @ p)
        v, new = v + alpha * p, r - alpha * A @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    return v


class Loop:
    """The published AID hypergradient with its warm starts, dense."""

    def __init__(self, ref, T, K, lr, momentum=0.0):
        self.ref, self.T, self.K, self.lr, self.momentum = ref, T, K, lr, momentum
        self.y, self.v = ref.y0, torch.zeros_like(ref.y0)

    def __call__(self, x):
        f, g = self.ref.f, self.ref.g
        y = z = self.y
        for _ in range(self.T):
            new = z - self.lr * grad(g, 1)(x, z)
            y, z = new, new + self.momentum * (new - y)
        self.y = y
        _, xy, _, yy = blocks(g, x, self.y)
        self.v = cg(yy, grad(f, 1)(x, self.y), self.v, self.K)
        return grad(f)(x, self.y) - xy @ self.v


@pytest.mark.parametrize(("T", "K"), [(1, 2), (3, 4)])
def test_aid_is_its_published_loop(T, K):
    ref = smooth()
    points, _ = iterates(smooth_problem(), "aid", 4, lr=0.07, lower_steps=T, lower_lr=0.15, adjoint_steps=K)
    gradient, x = Loop(ref, T, K, 0.15), ref.x
    for found in points:
        x = x - 0.07 * gradient(x)
        assert error(found, x) < 1e-10


def test_f2ba_is_its_published_loop():
    ref, penalty, lr = smooth(), 5.0, 0.15
    points, _ = iterates(smooth_problem(), "f2ba", 4, lr=0.05, lower_steps=2, lower_lr=lr, penalty=penalty)
    x, y, z = ref.x, ref.y0, ref.y0
    for found in points:
        for _ in range(2):
            z = z - lr * grad(ref.g, 1)(x, z)
            y = y - lr / penalty * (grad(ref.f, 1)(x, y) + penalty * grad(ref.g, 1)(x, y))
        x = x - 0.05 * (grad(ref.f)(x, y) + penalty * (grad(ref.g)(x, y) - grad(ref.g)(x, z)))
        assert error(found, x) < 1e-10


def test_itd_is_its_published_loop():
    ref, lr = smooth(), 0.15
    points, _ = iterates(smooth_problem(), "itd", 3, lr=0.05, lower_steps=3, lower_lr=lr)
    x, y = ref.x, ref.y0
    for found in points:
        def unrolled(x, y=y):
            for _ in range(3):
                y = y - lr * grad(ref.g, 1)(x, y)
            return ref.f(x, y), y

        slope, y = grad(lambda x: unrolled(x), has_aux=True)(x)
        x = x - 0.05 * slope
        assert error(found, x) < 1e-10


def test_rahgd_is_its_published_loop():
    ref, lr, momentum, B = smooth(), 0.03, 0.8, 0.12
    points, run = iterates(
        smooth_problem(), "rahgd", 12, lr=lr, momentum=momentum, restart_radius=B, lower_momentum=0.5,
        lower_steps=3, lower_lr=0.15, adjoint_steps=3,
    )  # fmt: skip
    gradient, restarts, k, travelled = Loop(ref, 3, 3, 0.15, 0.5), 0, 0, 0.0
    x = w = ref.x
    for found in points:
        new = w - lr * gradient(w)
        k += 1
        travelled += float((new - x) @ (new - x))
        w = new + momentum * (new - x)
        if k * travelled > B**2:
            restarts, k, travelled, w = restarts + 1, 0, 0.0, new
        x = new
        assert error(found, w) < 1e-10
    assert 0 < restarts < 12
    assert run.restarts == restarts


def test_paid_adds_ball_noise_where_the_gradient_is_small():
    ref = smooth()
    options = {"lower_steps": 2, "lower_lr": 0.15, "adjoint_steps": 2, "lr": 0.02}
    points, _ = iterates(smooth_problem(), "paid", 4, seed=7, below=1e3, wait=2, radius=0.1, decrease=0.0, **options)
    generator = torch.Generator().manual_seed(7)
    gradient, x, values = Loop(ref, 2, 2, 0.15), ref.x, []
    for step, found in enumerate(points):
        slope = gradient(x)
        values.append(ref.f(x, gradient.y))
        if step == 0 or (step == 2 and values[2] < values[0]):
            x = x + uniform_ball(x, 0.1, generator)
        x = x - 0.02 * slope
        assert error(found, x) < 1e-10
    quiet, _ = iterates(smooth_problem(), "paid", 4, below=1e-9, radius=0.1, **options)
    plain, _ = iterates(smooth_problem(), "aid", 4, **options)
    assert all(torch.equal(a, b) for a, b in zip(quiet, plain))


def test_adam_and_sgd_are_torch_s_on_the_exact_gradient():
    case = quadratic()
    for method, make, options in (
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05), {}),
        ("adam", lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9), {"optimizer": ("RMSprop", {"alpha": 0.9})}),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.7), {"momentum": 0.7}),
    ):
        points, _ = iterates(case.problem(), method, 6, lr=0.05, scheduler=("StepLR", {"step_size": 2}), **options)
        x = torch.nn.Parameter(case.x0.clone())
        optimizer = make([x])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        for found in points:
            x.grad = case.reference.implicit(x.detach()).gradient
            optimizer.step()
            scheduler.step()
            assert error(found, x) < 1e-8  # the library's lower solve and adjoint are at 1e-10


# -- convergence and cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in ALL if name != "lbfgs"])
def test_converges_on_a_quadratic(method):
    case = quadratic()
    options = {"lr": 0.3} if method != "f2ba" else {"lr": 0.3, "penalty": 1e3}
    options.update({"order": 2} if method == "f2sa" else {})
    if method not in ("adam", "sgd"):
        options.update(lower_steps=12)
    result = tb.minimize(case.problem(), method, max_steps=250, gradient_tol=1e-2, **options)
    assert result.status is tb.Status.GRADIENT_TOLERANCE
    exact = case.reference.implicit(result.x)
    assert exact.gradient.norm() < 2e-2
    assert result.value - case.minimum < 2e-3


T, K = 3, 2
PER_STEP = {
    "aid": dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 2),
    "paid": dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 2),
    "rahgd": dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 2),
    "prahgd": dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 2),
    "stocbio": dict(lower_gradients=T + 1, upper_gradients=1, lower_products=K + 1),
    "itd": dict(lower_gradients=T, upper_gradients=1, lower_products=T),
    "f2ba": dict(lower_gradients=2 * T + 2, upper_gradients=T + 1),
    "f2sa": dict(lower_gradients=4 * T + 4, upper_gradients=3 * T + 3),
}


@pytest.mark.parametrize("method", INEXACT)
def test_cost_of_an_iteration(method):
    result = tb.minimize(nonconvex().problem(), method, max_steps=4, gradient_tol=0.0, lr=1e-3, **ALL[method])
    solves = {"f2ba": 2, "f2sa": 4}.get(method, 1)
    for before, after in zip(result.history, result.history[1:]):
        spent = {k: v - before.counts.as_dict()[k] for k, v in after.counts.as_dict().items()}
        expected = {"evaluations": 1, "lower_solves": solves, **PER_STEP[method]}
        assert {k: v for k, v in spent.items() if v} == expected
    assert result.counts.hessians == 0


def test_reports_are_of_the_point_held():
    ref = smooth()
    result = tb.minimize(smooth_problem(), "aid", max_steps=3, gradient_tol=0.0, lr=0.01, **LOWER)
    gradient, x = Loop(ref, 3, 10, 0.15), ref.x
    for report in result.history:
        slope = gradient(x)
        assert report.value == pytest.approx(float(ref.f(x, gradient.y)), rel=1e-12)
        assert report.gradient_norm == pytest.approx(float(slope.norm()), rel=1e-9)
        if report.step < 3:
            assert result.history[report.step + 1].step_norm == pytest.approx(0.01 * float(slope.norm()), rel=1e-9)
            x = x - 0.01 * slope


# -- saddles and seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in ALL if name not in ("paid", "prahgd")])
def test_unperturbed_methods_stay_at_an_exact_saddle(method):
    result = tb.minimize(saddle().problem(), method, gradient_tol=1e-8)
    assert result.status is tb.Status.GRADIENT_TOLERANCE
    assert len(result.history) == 1
    points, run = iterates(saddle().problem(), method, 4, lr=1.0)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in points)
    if method == "lbfgs":
        assert run.step().stalled


@pytest.mark.parametrize("method", ["paid", "prahgd"])
@pytest.mark.parametrize("seed", [0, 1])
def test_perturbed_methods_leave_an_exact_saddle(method, seed):
    case = saddle()
    options = {"wait": 60} if method == "paid" else {"epoch": 60, "restart_radius": 10.0}
    result = tb.minimize(case.problem(), method, max_steps=400, gradient_tol=1e-4, seed=seed, lr=2.0, lower_steps=4,
                         adjoint_steps=2, **options)  # fmt: skip
    assert result.status is tb.Status.GRADIENT_TOLERANCE
    assert len(result.history) > 60
    assert abs(abs(float(result.x[2])) - 0.6) < 1e-2
    assert result.value - case.minimum < 1e-6
    again = tb.minimize(case.problem(), method, max_steps=20, gradient_tol=1e-4, seed=seed, lr=2.0, lower_steps=4,
                        adjoint_steps=2, **options)  # fmt: skip
    assert [r.value for r in again.history] == [r.value for r in result.history[:21]]
    other = tb.minimize(case.problem(), method, max_steps=20, gradient_tol=1e-4, seed=seed + 2, lr=2.0, lower_steps=4,
                        adjoint_steps=2, **options)  # fmt: skip
    assert other.history[-1].value != again.history[-1].value


def test_noise_is_uniform_in_the_ball():
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(5, dtype=torch.float64)
    draws = torch.stack([uniform_ball(like, 2.0, generator) for _ in range(2000)])
    lengths = draws.norm(dim=1)
    assert lengths.max() <= 2.0
    assert ((lengths / 2.0) ** 5).mean() == pytest.approx(0.5, abs=0.03)
    assert draws.mean(0).abs().max() < 0.1


def test_escape_waits_judges_and_starts_again():
    x = torch.zeros(3)
    escape = Escape(Perturbation(radius=0.1, below=1e-2, wait=3, decrease=1e-3), seed=0)
    assert escape.settled(1.0, 0.1)
    assert not escape.settled(1.0, 1e-3)
    assert escape.noise(x, 1.0, 0.1) is None  # a large gradient
    assert escape.noise(x, 1.0, 1e-3) is not None
    for _ in range(2):
        assert not escape.settled(1.0, 1e-3)
        assert escape.noise(x, 1.0, 1e-3) is None  # waiting
    assert escape.settled(1.0, 1e-3)
    assert not escape.settled(0.99, 1e-3)  # the noise helped: this is another point
    assert not escape.settled(math.nan, 1e-3)
    assert escape.noise(x, 1.0, 1e-3) is None  # settled
    assert escape.noise(x, 0.99, 1e-3) is not None
    for _ in range(3):
        escape.noise(x, 0.99, 0.1)
    assert escape.noise(x, 0.99, 1e-3) is not None  # a large gradient after the wait: the next point is a new one
    assert Perturbation(below=1e-2).needed == pytest.approx(1e-3)


# -- bounds, resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(ALL))
def test_bounds_are_kept(method):
    case = nonconvex()
    lo, hi = -0.3, 0.4
    options = {**ALL[method], **({"radius": 0.5} if method in ("paid", "prahgd") else {})}
    points, run = iterates(case.problem(), method, 5, bounds=(lo, hi), lr=0.3, **options)
    assert all(bool(((x >= lo) & (x <= hi)).all()) for x in points)
    assert any(bool(((x == lo) | (x == hi)).any()) for x in points)
    ev = run.current()
    expected = (run.x - (run.x - ev.gradient).clamp(lo, hi)).norm()
    assert run.report().gradient_norm == pytest.approx(float(expected))


def same(a, b):
    for left, right in zip(a.history, b.history):
        left, right = left.as_dict(), right.as_dict()
        for plain in (left, right):
            plain.pop("seconds")
        assert repr(left) == repr(right)
    assert len(a.history) == len(b.history)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.y, b.y)


@pytest.mark.parametrize(
    ("method", "extra"),
    [(name, {}) for name in ALL]
    + [("aid", {"upper_optimizer": ("Adam", {"amsgrad": True}), "scheduler": ("CosineAnnealingLR", {"T_max": 6})}),
       ("itd", {"upper_optimizer": ["SGD", {"momentum": 0.9}], "scheduler": "ReduceLROnPlateau"})],
)  # fmt: skip
def test_resume_is_the_uninterrupted_run_bit_for_bit(method, extra, tmp_path):
    def run(steps, **kwargs):
        options = {"lr": 0.05, **ALL[method], **extra}
        return tb.minimize(nonconvex().problem(), method, max_steps=steps, gradient_tol=0.0, seed=3, **options, **kwargs)

    whole = run(7)
    run(3, checkpoint=tmp_path / "run.pt")
    same(run(7, checkpoint=tmp_path / "run.pt", resume=True), whole)


def test_a_state_dict_is_a_copy():
    _, run = iterates(nonconvex().problem(), "adam", 2)
    state = run.state_dict()
    kept = copy.deepcopy(state)
    run.step()
    moment = state["upper"]["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, kept["upper"]["optimizer"]["state"][0]["exp_avg"])


# -- the upper step ------------------------------------------------------------------------------------------


def test_upper_step_scales_one_step_only():
    x, g = torch.zeros(2), torch.tensor([1.0, -2.0])
    upper = UpperStep("SGD", 0.1, None, x)
    assert torch.allclose(upper.step(x, g, g.sum(), scale=3.0), -0.3 * g)
    assert torch.allclose(upper.step(x, g, g.sum()), -0.1 * g)
    assert torch.equal(x, torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"upper_optimizer": "Adm"}, "did you mean 'Adam'"),
        ({"upper_optimizer": "LBFGS"}, "method='lbfgs'"),
        ({"upper_optimizer": ("SGD", {"momentun": 0.9})}, "upper_optimizer"),
        ({"upper_optimizer": ("SGD", 0.9)}, "pair"),
        ({"scheduler": "CosineAnealingLR"}, "did you mean"),
        ({"scheduler": "CosineAnnealingLR"}, "T_max"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"adjoin": "cg"}, "did you mean 'adjoint'"),
    ],
)
def test_bad_settings_are_errors_at_construction(options, match):
    with pytest.raises(tb.ConfigError, match=match):
        tb.make_method("aid", options)


def test_bad_settings_of_the_perturbed_and_restarted_methods():
    for method, options in (
        ("paid", {"radius": 0.0}), ("paid", {"wait": 0}), ("paid", {"below": math.nan}), ("paid", {"decrease": -1.0}),
        ("rahgd", {"momentum": 1.0}), ("rahgd", {"restart_radius": -1.0}), ("prahgd", {"radius": None}),
        ("prahgd", {"epoch": 0}), ("lbfgs", {"memory": 0}), ("f2ba", {"order": 2}), ("itd", {"lower": "newton_cg"}),
    ):  # fmt: skip
        with pytest.raises(tb.ConfigError, match=next(iter(options))):
            tb.make_method(method, options)


# -- BilevelOptimizer ----------------------------------------------------------------------------------------


def learner_and_losses(seed=0):
    gen = torch.Generator().manual_seed(seed)
    data = [(torch.randn(9, 3, generator=gen), torch.randn(9, 1, generator=gen)) for _ in range(2)]
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.2, -0.4, 0.6]]))
        model.bias.zero_()

    def lower(learner, hyper, batch):
        penalty = (hyper["l2"].exp() * learner.weight**2).sum() + 0.1 * (learner.bias**2).sum()
        return ((learner(batch[0]) - batch[1]) ** 2).mean() + penalty

    def upper(learner, hyper, batch):
        return ((learner(batch[0]) - batch[1]) ** 2).mean()

    return model, {"l2": torch.full((3,), -1.0)}, lower, upper, data


def optimizer_on(method="aid", **options):
    model, hyper, lower, upper, data = learner_and_losses()
    opt = tb.BilevelOptimizer(model, hyper, lower_loss=lower, upper_loss=upper, method=method, **options)
    return opt, hyper, model, data


@pytest.mark.parametrize("method", list(ALL))
def test_bilevel_optimizer_takes_the_same_steps_as_minimize(method):
    opt, hyper, model, data = optimizer_on(method, lr=0.2, **ALL[method])
    reports = [opt.step(*data) for _ in range(3)]
    model2, hyper2, lower, upper, _ = learner_and_losses()
    problem = tb.BilevelProblem(model2, hyper2, lower, upper, *data)
    result = tb.minimize(problem, method, max_steps=3, gradient_tol=0.0, lr=0.2, **ALL[method])
    assert [r.value for r in reports] == [r.value for r in result.history[1:]]
    assert torch.equal(hyper["l2"], hyper2["l2"])
    assert not torch.equal(hyper["l2"], torch.full((3,), -1.0))


def test_bilevel_optimizer_s_lr_is_the_method_s_and_schedulers_change_it():
    opt, hyper, _, data = optimizer_on("aid", lr=0.2, lower_steps=5)
    assert opt.param_groups[0]["lr"] == 0.2
    assert optimizer_on("aid")[0].param_groups[0]["lr"] == 0.1  # the method's own default
    assert optimizer_on("lfsba")[0].param_groups[0]["lr"] == 1.0
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    start = hyper["l2"].clone()
    first = opt.step(*data)
    scheduler.step()
    gradient_norm = first.gradient_norm
    second = opt.step(*data)
    assert second.step_norm == pytest.approx(0.1 * gradient_norm, rel=1e-5)
    assert not torch.equal(start, hyper["l2"])


@pytest.mark.parametrize("method", ["aid", "adam", "prahgd", "lbfgs"])
def test_bilevel_optimizer_resumes_bit_for_bit(method, tmp_path):
    first, hyper, _, data = optimizer_on(method, lr=0.2, lower_batch=None)
    for _ in range(2):
        first.step(*data)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    expected = [first.step(*data).value for _ in range(3)]
    second, hyper2, _, data = optimizer_on(method, lr=0.2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.step(*data).value for _ in range(3)] == expected
    assert torch.equal(hyper["l2"], hyper2["l2"])
    with pytest.raises(tb.ConfigError, match="lr"):
        optimizer_on(method, lr=0.3)[0].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_beside_a_learner_that_the_user_trains_a_step_costs_one_evaluation():
    for method in ("aid", "adam", "rahgd"):
        opt, _, model, data = optimizer_on(method, lr=0.1, lower="external")
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            inner.zero_grad()
            ((model(data[0][0]) - data[0][1]) ** 2).mean().backward()
            inner.step()
            weight = model.weight.detach().clone()
            report = opt.step(*data)
            assert torch.equal(model.weight, weight)
        assert report.counts.evaluations == 3
    with pytest.raises(tb.ConfigError, match="external"):
        optimizer_on("lbfgs", lower="external")[0].step(*data)


def test_changed_hyperparameters_restart_the_momentum():
    opt, hyper, _, data = optimizer_on("rahgd", lr=0.1, restart_radius=100.0)
    for _ in range(3):
        opt.step(*data)
    hyper["l2"].fill_(-2.0)
    opt.step(*data)
    assert opt._run.k == 1
