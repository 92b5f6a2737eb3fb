"""minimize: stopping, callbacks, errors that lose nothing, and a kill that a resumed run does not notice."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_bilevel as tb
from tests.problems import CASES, hyper_cleaning, nonconvex, one_by_one, quadratic, saddle
from torch_bilevel.errors import (
    BilevelError,
    ConfigError,
    NonFiniteError,
    NotStronglyConvexError,
    ProblemError,
    ShapeError,  # fmt: skip
)

METHODS = ("fsba", "lfsba", "dlcrn")


# -- defaults need no tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype"), [("auto", torch.float64), ("auto", torch.float32), ("lfsba", torch.float64)]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_defaults_converge_everywhere(case, method, dtype):
    # float32: 1e-5 is three digits above the rounding of a gradient of terms of size 1 to 10
    problem = case.problem(dtype)
    result = tb.minimize(problem, method, gradient_tol=1e-6 if dtype == torch.float64 else 1e-5)
    assert result.status.converged, str(result)
    assert result.status is tb.Status.SECOND_ORDER
    assert result.x.dtype == dtype
    dense = case.reference.implicit(result.x.double())
    # bias of the surrogate at penalty 1e3 (central: about 1e-6 relative), and rounding in float32
    assert float(dense.gradient.norm()) <= 1e-4
    assert float(torch.linalg.eigvalsh(dense.hessian)[0]) >= -1e-4
    if case.minimum is not None:
        assert float(dense.value) == pytest.approx(case.minimum, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "krylov"])
def test_every_method_reaches_a_minimum(method, kind):
    case = nonconvex()
    result = tb.minimize(case.problem(), method, hessian=kind)
    assert result.status is tb.Status.SECOND_ORDER
    dense = case.reference.implicit(result.x)
    assert float(dense.gradient.norm()) <= (1e-6 if method == "dlcrn" else 1e-4)  # the surrogate's bias
    assert float(torch.linalg.eigvalsh(dense.hessian)[0]) > 0


def test_float32_below_its_rounding_stalls_and_says_so():
    for case in (quadratic(), nonconvex()):
        result = tb.minimize(case.problem(torch.float32), "dlcrn", gradient_tol=1e-12, max_steps=100)
        assert result.status is tb.Status.STALLED, result.status
        assert not result.status.converged
        assert result.history[-1].step < 80


# -- what a run returns --------------------------------------------------------------------------------------------


def test_result_history_and_users_tensors():
    problem = nonconvex().problem()
    result = tb.minimize(problem, "lfsba")
    assert torch.equal(problem.x, result.x)
    assert torch.equal(problem.y, result.y)
    assert [report.step for report in result.history] == list(range(len(result.history)))
    assert result.history[-1].value == result.value
    assert result.history[-1].gradient_norm == result.gradient_norm
    for before, after in zip(result.history, result.history[1:]):
        earlier, later = before.counts.as_dict(), after.counts.as_dict()
        assert all(later[name] >= earlier[name] for name in earlier)
        assert after.seconds >= before.seconds
    names = {"upper_gradients", "lower_gradients", "upper_products", "lower_products", "solves", "factorisations",
             "hessians"}  # fmt: skip
    assert names <= set(result.counts.as_dict())
    assert "lfsba" in str(result)
    assert str(result.counts.hessians) in str(result)
    reference = nonconvex().reference
    torch.testing.assert_close(result.y, reference.solution(result.x), rtol=1e-6, atol=1e-6)  # the surrogate's bias


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_with_one_seed_are_equal(method):
    runs = [tb.minimize(saddle().problem(), method, hessian="krylov", seed=3) for _ in range(2)]
    assert torch.equal(runs[0].x, runs[1].x)
    assert torch.equal(runs[0].y, runs[1].y)
    assert [r.value for r in runs[0].history] == [r.value for r in runs[1].history]
    assert runs[0].counts == runs[1].counts


def test_progress_bar(capsys):
    tb.minimize(one_by_one().problem(), "lfsba", progress=True)
    assert "lfsba" in capsys.readouterr().err
    tb.minimize(one_by_one().problem())
    assert capsys.readouterr().err == ""


def test_callback_extras_and_stop():
    seen = []

    def callback(report, x, y):
        seen.append((report.step, x.clone(), y.clone()))
        if report.step == 2:
            return False
        return {"test_error": 0.5 * report.step}

    result = tb.minimize(nonconvex().problem(), "fsba", callback=callback)
    assert result.status is tb.Status.CALLBACK
    assert not result.status.converged
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [report.extra.get("test_error") for report in result.history] == [0.0, 0.5, None]
    assert result.history[1].as_dict()["test_error"] == 0.5
    assert torch.equal(seen[-1][1], result.x)
    assert seen[0][2].shape == (8,)


def test_limits():
    assert tb.minimize(nonconvex().problem(), max_steps=0).status is tb.Status.MAX_STEPS
    result = tb.minimize(nonconvex().problem(), max_steps=3)
    assert result.status is tb.Status.MAX_STEPS
    assert result.history[-1].step == 3
    result = tb.minimize(nonconvex().problem(), max_seconds=0.0)
    assert result.status is tb.Status.MAX_SECONDS
    assert result.history[-1].step == 0


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "lfsb"}, "did you mean 'lfsba'"),
        ({"method": 7}, "is not known"),
        ({"method": "lfsba", "perriod": 3}, "did you mean 'period'"),
        ({"method": "fsba", "penalti": 3}, "did you mean 'penalty'"),
        ({"method": "fsba", "period": 3}, "unknown option 'period'"),
        ({"method": "dlcrn", "penalty": 3.0}, "unknown option 'penalty'"),
        ({"period": 0}, "period: expected an int >= 1 or 'adaptive', got 0"),
        ({"period": "adaptiv"}, "period"),
        ({"penalty": -1.0}, "penalty: expected a positive number"),
        ({"scheme": "backward"}, "scheme: expected 'central' or 'forward'"),
        ({"hessian": "dens"}, "did you mean 'dense'"),
        ({"method": "auto", "hessian": "dens"}, "did you mean 'dense'"),
        ({"method": "auto", "perid": 2}, "did you mean 'period'"),
        ({"adaptive": False}, "adaptive=False needs cubic_reg"),
        ({"cubic_reg": -1.0}, "cubic_reg: expected a positive number"),
        ({"lower": "newton"}, "did you mean 'newton_cg'"),
        ({"lower": {"name": "agd", "step_size": 1.0}}, "unknown option 'step_size'"),
        ({"solver": "cgg"}, "did you mean 'cg'"),
        ({"max_steps": -1}, "max_steps: expected an int >= 0, got -1"),
        ({"max_steps": 2.5}, "max_steps: expected an int"),
        ({"gradient_tol": -1.0}, "gradient_tol"),
        ({"stop_rule": "steps"}, "stop_rule: expected one of gradient, step"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"resume": True}, "resume=True needs checkpoint=PATH"),
        ({"bounds": (1.0, 0.0)}, "lo < hi"),
        ({"bounds": 3.0}, "expected a pair"),
        ({"bounds": (torch.zeros(3), 1.0)}, "bounds"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(ConfigError) as caught:
        tb.minimize(one_by_one().problem(), **{"method": "lfsba", **options})
    assert text in str(caught.value)


def test_options_beside_a_method_object():
    with pytest.raises(ConfigError, match="give them to its constructor"):
        tb.minimize(one_by_one().problem(), tb.FSBA(), penalty=3.0)


def test_wrong_shapes_of_x():
    problem = quadratic().problem()
    with pytest.raises(ShapeError, match=r"expected shape \(4,\)"):
        tb.PenaltyOracle(problem).evaluate(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="float64"):
        tb.certify(problem, torch.zeros(4))


def test_a_lower_level_that_is_not_convex():
    one = torch.ones(1, dtype=torch.float64)
    problem = tb.BilevelProblem.from_functions(
        lambda x, y: (y**2).sum(), lambda x, y: torch.cos(y).sum() + (x * y).sum() / 10, one, 0.1 * one
    )
    with pytest.raises(NotStronglyConvexError) as caught:
        tb.minimize(problem, "dlcrn")
    assert "step 0" in str(caught.value)
    assert caught.value.curvature < 0
    assert caught.value.result.status is tb.Status.FAILED
    assert torch.equal(problem.x, one)


def _linear_problem(poison: bool = False) -> tb.BilevelProblem:
    gen = torch.Generator().manual_seed(0)
    X, t = torch.randn(12, 3, generator=gen).double(), torch.randn(12, 1, generator=gen).double()
    learner = torch.nn.Linear(3, 1, bias=False).double()
    hyper = {"log_l2": torch.zeros(3, dtype=torch.float64)}

    def lower(learner, hyper, batch):
        return ((learner(batch[0]) - batch[1]) ** 2).mean() + (hyper["log_l2"].exp() * learner.weight**2).sum()

    def upper(learner, hyper, batch):
        return ((learner(batch[0]) - batch[1]) ** 2).mean() + (hyper["log_l2"] ** 2).sum() / 100

    return tb.BilevelProblem(learner, hyper, lower, upper, (X[:6], t[:6]), (X[6:], t[6:]))


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("method", METHODS)
def test_data_with_nan(method, level):
    problem = _linear_problem()
    before = problem.x, problem.y
    X, t = problem.batch(level)
    spoilt = problem.at(**{f"{level}_batch": (X * math.nan, t)})
    with pytest.raises(NonFiniteError) as caught:
        tb.minimize(spoilt, method)
    result = caught.value.result
    assert result.status is tb.Status.NON_FINITE
    assert "step 0" in str(caught.value)
    assert torch.equal(result.x, before[0])
    assert torch.equal(problem.x, before[0])
    assert bool(torch.isfinite(problem.y).all())


def _with_nan_beyond(radius: float) -> tb.BilevelProblem:
    """phi = x^4/4 - x - log(radius^2 - x^2) / 1000, NaN beyond the radius; the Newton step from 0.05 goes far beyond."""

    def f(x, y):
        return (y**4 / 4 - y - torch.log(radius**2 - y**2) / 1000).sum()

    start = torch.full((1,), 0.05, dtype=torch.float64)
    return tb.BilevelProblem.from_functions(f, lambda x, y: ((y - x) ** 2).sum() / 2, start, start)


def test_nan_at_a_trial_point_shortens_the_step():
    result = tb.minimize(_with_nan_beyond(1.5), "dlcrn", cubic_reg=1e-6)
    assert result.status is tb.Status.SECOND_ORDER
    assert float(result.x) == pytest.approx(1.0, abs=1e-3)
    assert not result.history[1].accepted
    assert all(math.isfinite(report.value) for report in result.history)


def test_nan_at_a_trial_point_ends_a_fixed_run_at_its_last_good_point():
    problem = _with_nan_beyond(1.5)
    with pytest.raises(NonFiniteError) as caught:
        tb.minimize(problem, "dlcrn", cubic_reg=1e-6, adaptive=False)
    assert "last good point" in str(caught.value)
    assert "step 0" in str(caught.value)
    result = caught.value.result
    assert float(result.x) == 0.05 == float(problem.x)
    assert len(result.history) == 1
    assert math.isfinite(result.value)


def test_keyboard_interrupt_keeps_the_point():
    problem = nonconvex().problem()
    seen = []

    def callback(report, x, y):
        seen.append(x.clone())
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tb.minimize(problem, callback=callback)
    assert torch.equal(problem.x, seen[-1])


# -- killed and resumed --------------------------------------------------------------------------------------------

SETTINGS = {
    "auto": {"method": "auto"},
    "auto-krylov": {"method": "auto", "hessian": "krylov"},
    "fsba": {"method": "fsba"},
    "fsba-krylov": {"method": "fsba", "hessian": "krylov"},
    "fsba-published": {"method": "fsba", "adaptive": False, "cubic_reg": 300.0, "scheme": "forward", "penalty": 10.0,
                       "lower": {"name": "agd", "steps": 20, "step": 0.2, "momentum": 0.3}},
    "lfsba": {"method": "lfsba"},
    "lfsba-3": {"method": "lfsba", "period": 3},
    "lfsba-3-krylov": {"method": "lfsba", "period": 3, "hessian": "krylov"},
    "lfsba-fixed": {"method": "lfsba", "period": 2, "adaptive": False, "cubic_reg": 300.0},
    "lfsba-cg": {"method": "lfsba", "solver": "cg", "hessian": "krylov"},
    "lfsba-minres": {"method": "lfsba", "solver": "minres"},
    "lfsba-loose": {"method": "lfsba", "hessian": "krylov", "lower": {"name": "newton_cg", "tol": 1e-3}},
    "dlcrn": {"method": "dlcrn"},
    "dlcrn-4-krylov": {"method": "dlcrn", "period": 4, "hessian": "krylov"},
    "dlcrn-cg": {"method": "dlcrn", "solver": "cg"},
    "dlcrn-bounds": {"method": "dlcrn", "bounds": (-0.5, 0.5), "hessian": "krylov", "period": 2},
}  # fmt: skip


def _same_run(whole: tb.Result, resumed: tb.Result) -> None:
    assert torch.equal(whole.x, resumed.x)
    assert torch.equal(whole.y, resumed.y)
    assert whole.status is resumed.status
    assert len(whole.history) == len(resumed.history)
    for a, b in zip(whole.history, resumed.history):
        first, second = a.as_dict(), b.as_dict()
        first.pop("seconds"), second.pop("seconds")
        assert repr(first) == repr(second)  # repr: NaN compares equal, every bit of a float is shown
    assert whole.counts == resumed.counts
    assert repr((whole.cubic_reg, whole.min_eigenvalue)) == repr((resumed.cubic_reg, resumed.min_eigenvalue))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in SETTINGS]
    + [(name, torch.float32) for name in ("auto", "lfsba", "dlcrn-cg")],
)
def test_resume_bit_for_bit(name, dtype, tmp_path):
    case, path = nonconvex(6, 5), tmp_path / "run.pt"
    options = {"max_steps": 8, "gradient_tol": 1e-5, **SETTINGS[name]}

    def keep(report, x, y):  # the file of step k is written after the callback of step k
        if report.step in (3, 6):
            shutil.copy(path, tmp_path / f"run{report.step - 1}.pt")

    whole = tb.minimize(case.problem(dtype), checkpoint=path, callback=keep, **options)
    for step in (2, 5):
        fresh = case.problem(dtype)
        fresh.write(x=fresh.x + 1, y=fresh.y - 1)  # all that counts is in the file
        _same_run(whole, tb.minimize(fresh, checkpoint=tmp_path / f"run{step}.pt", resume=True, **options))


@pytest.mark.parametrize("name", ["lfsba", "dlcrn-4-krylov"])
def test_resume_of_hyper_cleaning(name, tmp_path):
    options = {"max_steps": 6, **SETTINGS[name]}
    whole = tb.minimize(hyper_cleaning().problem(), **options)
    path = tmp_path / "run.pt"

    def stop(report, x, y):
        return False if report.step == 3 else None

    part = tb.minimize(hyper_cleaning().problem(), checkpoint=path, callback=stop, **options)
    assert part.status is tb.Status.CALLBACK
    _same_run(whole, tb.minimize(hyper_cleaning().problem(), checkpoint=path, resume=True, **options))


KILLED = """
import os, sys
import torch_bilevel as tb
from tests.problems import nonconvex

def die(report, x, y):
    if report.step == 5:
        os._exit(9)

tb.minimize(nonconvex().problem(), "lfsba", hessian="krylov", max_steps=10, checkpoint=sys.argv[1], callback=die)
"""


def test_hard_kill_and_resume(tmp_path):
    path = tmp_path / "folder" / "run.pt"
    root = Path(__file__).resolve().parents[1]
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n{KILLED}"  # bits need equal thread counts
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=120, check=False,
                          env={**os.environ, "PYTHONPATH": str(root)})  # fmt: skip
    assert done.returncode == 9
    options = {"hessian": "krylov", "max_steps": 10}
    resumed = tb.minimize(nonconvex().problem(), "lfsba", checkpoint=path, resume=True, **options)
    _same_run(tb.minimize(nonconvex().problem(), "lfsba", **options), resumed)


def test_resume_without_a_file_starts(tmp_path):
    path = tmp_path / "run.pt"
    result = tb.minimize(one_by_one().problem(), checkpoint=path, resume=True)
    assert result.status is tb.Status.SECOND_ORDER
    assert path.exists()
    again = tb.minimize(one_by_one().problem(), checkpoint=path, resume=True)  # a finished run stays finished
    _same_run(result, again)


def test_checkpoint_every(tmp_path):
    path = tmp_path / "run.pt"
    options = {"method": "fsba", "checkpoint": path, "checkpoint_every": 3}
    tb.minimize(nonconvex().problem(), max_steps=5, **options)
    assert torch.load(path, weights_only=True)["run"]["steps"] == 3
    whole = tb.minimize(nonconvex().problem(), "fsba", max_steps=8)
    _same_run(whole, tb.minimize(nonconvex().problem(), max_steps=8, resume=True, **options))


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "run.pt"
    tb.minimize(nonconvex().problem(), "lfsba", max_steps=3, checkpoint=path)
    with pytest.raises(ConfigError, match="method 'lfsba'.*'dlcrn'"):
        tb.minimize(nonconvex().problem(), "dlcrn", checkpoint=path, resume=True)
    with pytest.raises(BilevelError, match=r"checkpoint x: expected shape \(4,\)"):
        tb.minimize(quadratic().problem(), "lfsba", checkpoint=path, resume=True)
    with pytest.raises(BilevelError, match="float32"):
        tb.minimize(nonconvex().problem(torch.float32), "lfsba", checkpoint=path, resume=True)
    with pytest.raises(ConfigError, match="hessian"):
        tb.minimize(nonconvex().problem(), "lfsba", checkpoint=path, resume=True, hessian="krylov")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        tb.minimize(nonconvex().problem(), "lfsba", checkpoint=path, resume=True)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="not a checkpoint of minimize"):
        tb.minimize(nonconvex().problem(), "lfsba", checkpoint=path, resume=True)


def test_missing_data_says_so():
    problem = _linear_problem()
    bare = tb.BilevelProblem(problem.learner, problem.hyper, problem._losses["lower"], problem._losses["upper"])
    with pytest.raises(ProblemError, match="no data"):
        tb.minimize(bare)


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    path = tmp_path / "run.pt"
    tb.minimize(nonconvex().problem(), "lfsba", max_steps=2, checkpoint=path)
    state = torch.load(path, weights_only=True)
    state["run"]["version"] = 1
    torch.save(state, path)
    with pytest.raises(ConfigError, match="state version 1.*start anew"):
        tb.minimize(nonconvex().problem(), "lfsba", max_steps=4, checkpoint=path, resume=True)
