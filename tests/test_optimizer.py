"""BilevelOptimizer beside a user's loop: every kind of hyper, state bit for bit, and an external learner untouched."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb
from torch_bilevel.errors import ConfigError, NonFiniteError, ProblemError

N, D = 16, 4


def data(seed: int = 0, dtype: torch.dtype = torch.float64):
    gen = torch.Generator().manual_seed(seed)
    X = torch.randn(N, D, generator=gen, dtype=torch.float64)
    t = X @ torch.arange(1.0, D + 1, dtype=torch.float64)[:, None] / D
    return X.to(dtype), (t + 0.3 * torch.randn(N, 1, generator=gen, dtype=torch.float64)).to(dtype)


def value_of(hyper):
    """The log L2 weights (D,), whatever kind of hyper holds them."""
    return hyper.log_l2 if isinstance(hyper, nn.Module) else hyper["log_l2"] if isinstance(hyper, dict) else hyper


def lower_loss(learner, hyper, batch):
    X, t = batch
    return ((learner(X) - t) ** 2).mean() + (value_of(hyper).exp() * learner.weight**2).sum()


def upper_loss(learner, hyper, batch):
    X, t = batch
    return ((learner(X) - t) ** 2).mean() + 1e-2 * (value_of(hyper) ** 2).sum()


class Weights(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.log_l2 = nn.Parameter(torch.zeros(D, dtype=dtype))


def make_hyper(kind: str, dtype: torch.dtype = torch.float64):
    zeros = torch.zeros(D, dtype=dtype)
    return {"module": Weights(dtype), "dict": {"log_l2": zeros}, "tensor": zeros}[kind]


def make(kind: str = "tensor", dtype: torch.dtype = torch.float64, **options):
    """(optimizer, learner, hyper), the same numbers for every kind."""
    torch.manual_seed(1)
    learner = nn.Linear(D, 1, bias=False, dtype=dtype)
    hyper = make_hyper(kind, dtype)
    return tb.BilevelOptimizer(learner, hyper, lower_loss=lower_loss, upper_loss=upper_loss, **options), learner, hyper


TRAIN, VALID = data(0), data(1)


def test_every_kind_of_hyper_goes_the_same_way():
    ends = []
    for kind in ("module", "dict", "tensor"):
        opt, learner, hyper = make(kind)
        reports = [opt.step(TRAIN, VALID) for _ in range(7)]
        assert reports[-1].gradient_norm < 1e-4 < reports[0].gradient_norm
        assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6, 7]
        ends.append(value_of(hyper).detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    # the same minimum as minimize finds, and the learner trained with it
    problem = make("tensor")[0].problem.at(TRAIN, VALID)
    result = tb.minimize(problem, "lfsba")
    torch.testing.assert_close(ends[0], result.x, rtol=0, atol=1e-3)
    torch.testing.assert_close(learner.weight.detach().reshape(-1), result.y, rtol=0, atol=1e-3)


def test_fields_of_a_report():
    opt, _, _ = make()
    report = opt.step(TRAIN, VALID)
    assert report.accepted
    assert report.step_norm > 0
    assert report.cubic_reg > 0
    assert report.counts.hessians == 1
    assert math.isfinite(report.value)
    assert math.isfinite(report.gradient_norm)
    assert opt.step().counts.hessians >= 1  # without arguments: the data of before


def test_data_at_construction_and_missing_data():
    opt, _, _ = make(lower_batch=TRAIN, upper_batch=VALID)
    other, _, _ = make()
    assert opt.step().value == other.step(TRAIN, VALID).value
    with pytest.raises(ProblemError, match="no data"):
        make()[0].step()
    with pytest.raises(ConfigError, match="not a closure"):
        opt.step(lambda: 0.0)


def test_zero_grad_groups_and_scheduler():
    opt, _, hyper = make("module", lr=0.5)
    opt.zero_grad()
    assert opt.param_groups[0]["params"] == [hyper.log_l2]
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    full, _, _ = make("module")
    half, whole = opt.step(TRAIN, VALID), full.step(TRAIN, VALID)
    assert half.step_norm == pytest.approx(0.5 * whole.step_norm, rel=1e-12)
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.25
    assert opt.step(TRAIN, VALID).accepted


def test_scaled_steps_still_converge():
    opt, _, _ = make(lr=0.5)
    for _ in range(25):
        report = opt.step(TRAIN, VALID)
    assert report.gradient_norm < 1e-5


def test_copies_refuse():
    opt, _, _ = make()
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(opt)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(opt)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "lfsbaa"}, ConfigError, "did you mean 'lfsba'"),
        ({"perid": 3}, ConfigError, "did you mean 'period'"),
        ({"lr": 0.0}, ConfigError, "lr: expected a positive number"),
        ({"lower": "externl"}, ConfigError, "did you mean 'external'"),
        ({"lower": {"name": "agd", "step_size": 1}}, ConfigError, "unknown option"),
        ({"method": tb.FSBA(), "lower": "external"}, ConfigError, "method's name"),
        ({"reduction": "max"}, ProblemError, "'mean' or 'sum'"),
    ],
)
def test_construction_errors(options, error, text):
    with pytest.raises(error) as caught:
        make(**options)
    assert text in str(caught.value)


# -- the user's learner --------------------------------------------------------------------------------------------


def test_write_learner():
    opt, learner, hyper = make()
    opt.step(TRAIN, VALID)
    w = learner.weight.detach().clone().requires_grad_(True)
    stationary = ((TRAIN[0] @ w.T - TRAIN[1]) ** 2).mean() + (hyper.exp() * w**2).sum()
    assert float(torch.autograd.grad(stationary, w)[0].norm()) < 1e-2  # of the surrogate's lower end: O(1/penalty)
    opt, learner, _ = make(write_learner=False)
    before = learner.weight.detach().clone()
    report = opt.step(TRAIN, VALID)
    assert torch.equal(learner.weight, before)
    assert report.accepted
    other, learner, _ = make(write_learner=False)
    with torch.no_grad():
        learner.weight.add_(1.0)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(learner.weight, before + 1.0)


@pytest.mark.parametrize("method", ["lfsba", "dlcrn"])
def test_external_learner_is_the_users_alone(method):
    def train(steps: int, ours: bool):
        opt, learner, hyper = make(lower="external", method=method)
        adam = torch.optim.Adam(learner.parameters(), lr=0.05)
        fixed = hyper.clone()
        for _ in range(steps):
            for _ in range(5):
                adam.zero_grad()
                lower_loss(learner, fixed, TRAIN).backward()  # at the first hyper: the two loops must agree
                adam.step()
            if ours:
                before = learner.weight.detach().clone(), learner.weight.grad.clone()
                opt.step(TRAIN, VALID)
                assert torch.equal(learner.weight, before[0])
                assert torch.equal(learner.weight.grad, before[1])
        return learner, adam, hyper

    with_us, without = train(6, True), train(6, False)
    assert torch.equal(with_us[0].weight, without[0].weight)
    for a, b in zip(with_us[1].state_dict()["state"][0].values(), without[1].state_dict()["state"][0].values()):
        assert torch.equal(a, b)
    assert not torch.equal(with_us[2], without[2])


def test_external_learner_and_hyper_improve_together():
    opt, learner, hyper = make(lower="external")
    adam = torch.optim.Adam(learner.parameters(), lr=0.05)
    first = tb.ImplicitOracle(opt.problem.at(TRAIN, VALID)).evaluate().value.item()
    for step in range(40):
        for _ in range(20):
            adam.zero_grad()
            lower_loss(learner, hyper, TRAIN).backward()
            adam.step()
        if step >= 5:
            opt.step(TRAIN, VALID)
    phi = tb.ImplicitOracle(opt.problem.at(TRAIN, VALID))
    best = tb.minimize(make()[0].problem.at(TRAIN, VALID), "dlcrn").value
    last = phi.evaluate(hyper.clone()).value.item()
    assert last < first
    assert last - best < 0.05 * (first - best)


# -- data that change ----------------------------------------------------------------------------------------------


def test_per_sample_weights_by_index_from_a_loader():
    """log_weight[idx] per training sample, batches of indices from a DataLoader; wrong samples lose weight."""
    X, t = data(2)
    spoilt = t.clone()
    spoilt[:4] += 5.0
    log_weight = torch.zeros(N, dtype=torch.float64)

    def lower(learner, hyper, batch):
        X, t, idx = batch
        loss = ((learner(X) - t) ** 2).squeeze(1)
        return (torch.sigmoid(hyper[idx]) * loss).mean() + 1e-2 * (learner.weight**2).sum()

    def upper(learner, hyper, batch):
        return ((learner(batch[0]) - batch[1]) ** 2).mean() + 1e-4 * (hyper**2).sum()

    loader = DataLoader(TensorDataset(X, spoilt, torch.arange(N)), batch_size=8, shuffle=True,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    learner = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    opt = tb.BilevelOptimizer(learner, log_weight, lower_loss=lower, upper_loss=upper)
    for _ in range(4):
        for batch in loader:
            opt.step(tuple(batch), data(1))
    assert float(log_weight[:4].mean()) < float(log_weight[4:].mean())
    # and a whole loader as the full batch equals the batch of all samples
    order = DataLoader(TensorDataset(X, spoilt, torch.arange(N)), batch_size=5)
    values = []
    for batch in (order, (X, spoilt, torch.arange(N))):
        learner = nn.Linear(D, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(learner.weight)
        fresh = tb.BilevelOptimizer(learner, torch.zeros(N, dtype=torch.float64), lower_loss=lower, upper_loss=upper)
        values.append(fresh.step(batch, data(1)).value)
    assert values[0] == pytest.approx(values[1], rel=1e-10)


@pytest.mark.parametrize("level", [0, 1])
def test_a_batch_with_nan_in_the_middle(level):
    opt, _, hyper = make()
    opt.step(TRAIN, VALID)
    good = hyper.clone()
    batches = [TRAIN, VALID]
    batches[level] = (batches[level][0] * math.nan, batches[level][1])
    with pytest.raises(NonFiniteError, match="at step 2; the hyperparameters keep their last good values"):
        opt.step(*batches)
    assert torch.equal(hyper, good)
    for _ in range(6):
        report = opt.step(TRAIN, VALID)  # the next good batch goes on
    assert report.gradient_norm < 1e-4


def test_a_hyper_changed_by_the_user_is_noticed():
    opt, _, hyper = make()
    opt.step(TRAIN, VALID)
    with torch.no_grad():
        hyper.fill_(0.7)
    fresh, _, other = make()
    with torch.no_grad():
        other.fill_(0.7)
    moved, expected = opt.step(TRAIN, VALID), fresh.step(TRAIN, VALID)
    assert moved.accepted
    before = tb.PenaltyOracle(fresh.problem).evaluate(torch.full((D,), 0.7, dtype=torch.float64)).value
    assert moved.value < float(before)
    assert expected.value < float(before)


# -- state ---------------------------------------------------------------------------------------------------------

STATES = {
    "auto": {"method": "auto"},
    "auto-krylov": {"method": "auto", "lower": "external", "hessian": "krylov", "period": 3},
    "lfsba": {},
    "lfsba-float32": {"dtype": torch.float32},
    "lfsba-krylov-3": {"hessian": "krylov", "period": 3},
    "fsba-cg": {"method": "fsba", "solver": "cg"},
    "dlcrn-krylov": {"method": "dlcrn", "hessian": "krylov", "period": "adaptive"},
    "bounds": {"bounds": (-1.0, 1.0), "hessian": "krylov", "period": 2},
    "external": {"lower": "external", "hessian": "krylov", "period": 3},
    "unwritten": {"write_learner": False, "period": 2},
    "scaled": {"lr": 0.7, "period": 2},
}


@pytest.mark.parametrize(
    ("name", "batches"),
    [(name, "changing") for name in STATES]
    + [(name, "full") for name in ("lfsba", "lfsba-krylov-3", "bounds", "external")]
    + [("lfsba-krylov-3", "constructed")],
)
def test_state_resumes_bit_for_bit(name, batches, tmp_path):
    options = dict(STATES[name])
    dtype = options.get("dtype", torch.float64)
    if batches == "constructed":
        options.update(lower_batch=data(0, dtype), upper_batch=data(1, dtype))

    def arguments(step):
        if batches == "constructed":
            return ()
        return (data(0, dtype), data(1, dtype)) if batches == "full" else (data(2 * step, dtype), data(1, dtype))

    full = arguments(0)

    def run(opt, learner, first, last):
        reports = []
        for step in range(first, last):
            with torch.no_grad():
                if options.get("lower") == "external":  # the user's training, seen by the next step
                    learner.weight.add_(0.01 * step)
            reports.append(opt.step(*(full if batches == "full" else arguments(step))))
        return reports

    opt, learner, hyper = make(**options)
    for stop in (1, 3):
        opt, learner, hyper = make(**options)
        run(opt, learner, 0, stop)
        torch.save({"opt": opt.state_dict(), "learner": learner.state_dict()}, tmp_path / "state.pt")
        whole = run(opt, learner, stop, 6)

        fresh, new_learner, new_hyper = make(**options)
        with torch.no_grad():
            new_hyper.add_(3.0)  # all that counts is in the file
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        new_learner.load_state_dict(state["learner"])
        fresh.load_state_dict(state["opt"])
        full = arguments(0)  # equal data, other tensors
        resumed = run(fresh, new_learner, stop, 6)
        assert torch.equal(hyper, new_hyper)
        assert torch.equal(learner.weight, new_learner.weight)
        for a, b in zip(whole, resumed, strict=True):
            assert repr(a.as_dict()) == repr(b.as_dict())


def test_state_before_the_first_step_and_twice_saved():
    opt, _, hyper = make()
    fresh, _, other = make()
    fresh.load_state_dict(opt.state_dict())
    fresh.step(TRAIN, VALID)
    opt.step(TRAIN, VALID)
    assert torch.equal(hyper, other)
    again, _, third = make()
    again.load_state_dict(opt.state_dict())
    final, _, fourth = make()
    final.load_state_dict(again.state_dict())  # saved again before any step
    for o in (opt, final):
        o.step(TRAIN, VALID)
    assert torch.equal(hyper, fourth)
    assert not torch.equal(third, fourth)


def test_states_that_do_not_fit():
    opt, _, _ = make("dict")
    opt.step(TRAIN, VALID)
    state = opt.state_dict()
    with pytest.raises(ConfigError, match="hyper tensors do not match"):
        make("tensor")[0].load_state_dict(state)
    with pytest.raises(ConfigError, match="method 'lfsba'.*'dlcrn'"):
        make("dict", method="dlcrn")[0].load_state_dict(state)
    with pytest.raises(ConfigError, match="not a state_dict"):
        make("dict")[0].load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(ConfigError, match="not a state_dict"):
        make("dict")[0].load_state_dict({**state, "version": 99})


def test_order_of_named_tensors_is_checked():
    def build(names):
        learner = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        hyper = {name: torch.zeros(2, dtype=torch.float64) for name in names}

        def lower(learner, hyper, batch):
            return (learner.weight**2).sum() + (learner.weight[0] * (hyper["a"] + hyper["b"])).sum()

        def upper(learner, hyper, batch):
            return ((learner.weight - 1) ** 2).sum() + (hyper["a"] ** 2).sum()

        return tb.BilevelOptimizer(learner, hyper, lower_loss=lower, upper_loss=upper, lower_batch=(), upper_batch=())

    state = build("ab").state_dict()
    build("ab").load_state_dict(state)
    with pytest.raises(ConfigError, match="do not match"):
        build("ba").load_state_dict(state)
