"""Every benchmark runs with --quick and says what it promises; absent peers and data sets are skipped."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from benchmarks import common, gpu, hyper_hessian, hypergradient, preconditioners, products, scaling, secants, whole_run
from benchmarks.floors import closed_form
from benchmarks.peers import TorchOpt
from benchmarks.problems import softmax, solved, synthetic_cleaning
from benchmarks.runs import Judge, torchopt_hypergradient
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.methods.model import HessianModel


def run(module, tmp_path, *options: str) -> dict:
    """The JSON of a --quick run."""
    path = tmp_path / "found.json"
    module.main(["--quick", "--repeats", "1", "--json", str(path), *options])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["quick"] is True
    assert "CPU" in record["machine"]
    return record


def test_hypergradient_reaches_the_error_with_fewer_products_when_warm(tmp_path):
    found = run(hypergradient, tmp_path, "--settings", "softmax", "--cache", str(tmp_path))["softmax"]
    at = found["targets"]["0.0001"]
    assert 0 < at["ours, warm start, Cholesky"]["products"] < at["ours, cold"]["products"]
    assert at["ours, cold"]["seconds"]["median"] > 0
    assert found["equal"]["ours, cold"]["error"] < 1


def test_hyper_hessian_is_the_matrix_that_rows_give(tmp_path):
    found = run(hyper_hessian, tmp_path, "--settings", "australian")["australian"]
    assert found["errors"]["ours, implicit"] < 1e-4  # the penalty's bias: rows are of the penalty function
    assert found["errors"]["ours, penalty (central)"] < 1e-7
    assert found["seconds"]["row by row, indexed"]["median"] > 0


def test_hyper_hessian_in_parts(tmp_path):
    found = run(hyper_hessian, tmp_path, "--settings", "mnist")["mnist"]
    assert found["seconds"]["dense"] > 0
    assert found["symmetric_error"] < 1e-6


def test_products_of_every_learner_and_block(tmp_path):
    found = run(products, tmp_path)
    cases = [case for name, case in found.items() if name.split()[0] in ("softmax", "MLP", "conv,")]
    assert len(cases) == 3
    for case in cases:
        assert all(case[k]["seconds"]["ours"]["median"] > 0 for k in ("1", "4", "16", "64"))


def test_the_closed_form_block_is_our_product():
    setting = softmax(quick=True).to(torch.float64)
    at = Objective(setting.problem(), lower=1.0, counts=OracleCounts()).linearise(setting.x, setting.y, "y")
    point = closed_form(setting).at(setting.x)
    W = torch.randn(setting.dy, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    V = torch.stack([point._matrix(w) for w in W.T])
    expected = torch.stack([point._matrix(w) for w in at.yy(W).T])
    assert float((point.block(V) - expected).norm() / expected.norm()) < 1e-12
    assert float((point.product(W[:, 0]) - expected[0]).norm() / expected.norm()) < 1e-12


def test_scaling_fits_exponents(tmp_path):
    found = run(scaling, tmp_path, "--axes", "dx")["dx"]
    sizes, points = found["sizes"], found["points"]
    seconds = [math.log(p["dense Hessian"]["seconds"]) for p in points]
    slope = statistics.linear_regression([math.log(size) for size in sizes], seconds).slope
    assert found["exponents"]["dense Hessian"]["exponent"]["seconds"] == pytest.approx(slope)
    assert scaling.exponent([1, 10, 100], [2.0, 200.0, 20000.0]) == pytest.approx(2.0)
    assert scaling.exponent([1, 10, 100], [5.0, 7.0, 70.0], from_size=10) == pytest.approx(1.0)
    assert scaling.exponent([1, 10], [None, 1.0]) is None


def test_gpu_says_that_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--quick", "--json", str(tmp_path / "found.json")])
    assert "no CUDA device" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["skipped"] == "no CUDA device"


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu(tmp_path):
    found = run(gpu, tmp_path)
    compared = [value for name, value in found.items() if name.startswith("synthetic")]
    assert all(case["hypergradient"]["difference"] < 1e-3 for case in compared)
    assert len(compared) == 1


def test_a_problem_never_writes_into_its_setting():
    setting = solved(synthetic_cleaning(40, 4, 3))
    x, y = setting.x.clone(), setting.y.clone()
    setting.problem().write(x=x + 1, y=y + 1)
    assert torch.equal(setting.x, x)
    assert torch.equal(setting.y, y)


def test_whole_run_keeps_its_runs_and_compares(tmp_path, monkeypatch):
    options = ("--cache", str(tmp_path), "--methods", "auto", "lbfgs", "f2ba", "--max-steps", "8")
    found = run(whole_run, tmp_path, *options, "--problems", "tiny_cleaning")["tiny_cleaning"]
    assert found["seconds"].keys() == {"auto", "lbfgs", "f2ba"}
    assert any("lbfgs / of auto" in line for line in found["claims"])
    assert min(min(row["gap 0.01"]) for row in found["calls"].values() if row["gap 0.01"][0] is not None) > 0
    monkeypatch.setattr(whole_run.Runs, "run", None)  # everything is kept: nothing is run
    again = run(whole_run, tmp_path, *options, "--problems", "tiny_cleaning")["tiny_cleaning"]
    assert again == found


def test_whole_run_judges_inexact_methods_by_the_exact_value(tmp_path):
    setting = whole_run.tiny_cleaning(None, 0)
    found = whole_run.library_run(setting, "f2ba", 1.0, max_seconds=5.0, max_steps=3, eps=1e-6)
    start = found["records"][0]
    assert start["value"] == pytest.approx(Judge(setting)(setting.x)["value"], rel=1e-9)


def test_adam_on_torchopt_gets_our_hypergradient():
    if TorchOpt.missing() is not None:
        pytest.skip(f"torchopt: {TorchOpt.missing()}")
    setting = solved(synthetic_cleaning(40, 4, 3).to(torch.float64))
    counts = OracleCounts()
    _, gradient = torchopt_hypergradient(setting, setting.x, setting.y, counts)
    expected, _ = hypergradient.reference(_with_before(setting))
    assert float((gradient - expected).norm() / expected.norm()) < 1e-6
    assert counts.lower_products > 2


@pytest.mark.parametrize("setting", [softmax(quick=True), synthetic_cleaning(40, 4, 3)], ids=["log_l2", "weights"])
def test_the_closed_form_floor_computes_the_hypergradient(setting):
    exact = setting.to(torch.float64)
    if exact.y is None:
        exact = solved(exact)
    expected, _ = hypergradient.reference(exact if exact.x_before is not None else _with_before(exact))
    found = closed_form(exact).hypergradient(100)
    assert float((found - expected).norm() / expected.norm()) < 1e-8


def _with_before(setting):
    setting.x_before, setting.y_before = setting.x, setting.y
    return setting


def test_interleaved_takes_turns_and_stops_early():
    order: list[str] = []
    times = common.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4, warmup=0)
    assert order == ["a", "b"] * 4
    assert len(times["a"].all) == 4
    times = common.interleaved({"a": lambda: None}, 100, max_seconds=0.0)
    assert len(times["a"].all) == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (0.5, "0.50"), (1e-7, "1e-07")],
)
def test_numbers_have_two_or_three_digits(value, text):
    assert common.number(value) == text


def test_peak_memory_sees_a_large_array():
    megabytes, _ = common.peak_memory(lambda: torch.ones(20_000_000).sum())
    assert megabytes is None or 70 < megabytes < 160


def test_secants_compares_runs_with_and_without_and_puts_corrections_back():
    correct = HessianModel.correct
    found, missing = secants.compare([secants.saddle], "lazy dlcrn")
    assert HessianModel.correct is correct
    assert missing == 0
    assert found[0][1] < 1  # fewer Hessians
    assert secants.families(3).keys() == secants.families(1).keys()


def test_preconditioners_need_fewer_iterations_the_larger_the_corner(capsys):
    record = preconditioners.main(["--quick", "--threads", "1", "--settings", "softmax", "--repeats", "1"])["softmax"]
    assert record["mixed"]["1e-10"]["float64"]["iterations"] > 0
    iterations = [entry["iterations"] for name, entry in record.items() if name.startswith("Kronecker")]
    assert iterations == sorted(iterations, reverse=True)
    assert iterations[-1] < record["none"]["iterations"]
    assert "| Cholesky |" in capsys.readouterr().out
