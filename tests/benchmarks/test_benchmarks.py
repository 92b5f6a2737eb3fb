"""Every benchmark runs with --quick and says what it promises to say; peers and data sets that are absent are skipped."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import common, hyper_hessian, hypergradient
from benchmarks.floors import closed_form
from benchmarks.problems import softmax, synthetic_cleaning


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
    assert 0 < at["ours, warm"]["products"] < at["ours, cold"]["products"]
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


@pytest.mark.parametrize("setting", [softmax(quick=True), synthetic_cleaning(40, 4, 3)], ids=["log_l2", "weights"])
def test_the_closed_form_floor_computes_the_hypergradient(setting):
    exact = setting.to(torch.float64)
    if exact.y is None:
        from benchmarks.problems import solved

        exact = solved(exact)
    expected, _ = hypergradient.reference(exact if exact.x_before is not None else _with_before(exact))
    found = closed_form(exact).hypergradient(300)
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
