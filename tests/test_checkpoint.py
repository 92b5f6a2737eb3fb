"""Checkpoint files: atomic, plain, and refused when they are not one."""

from __future__ import annotations

import math

import pytest
import torch

from torch_bilevel import OracleCounts, StepReport
from torch_bilevel.checkpoint import load, pack_report, save, to_device, unpack_report
from torch_bilevel.errors import ConfigError


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "run.pt"
    state = {"x": torch.arange(3.0), "list": [1, 2.5, None, True], "nested": {"t": (torch.ones(2, dtype=torch.float64), "s")}}
    save(path, state)
    found = load(path)
    assert torch.equal(found["x"], state["x"])
    assert found["list"] == state["list"]
    assert found["nested"]["t"][0].dtype == torch.float64
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]  # nothing left beside it


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save(path, {"step": 1})

    def broken(state, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save(path, {"step": 2})
    monkeypatch.undo()
    assert load(path) == {"step": 1}


def test_files_that_are_not_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint at"):
        load(tmp_path / "absent.pt")
    path = tmp_path / "run.pt"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        load(path)
    torch.save({"code": print}, path)  # anything that needs unpickling code
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        load(path)


def test_reports_as_plain_numbers():
    report = StepReport(3, 1.5, 0.25, step_norm=0.1, accepted=False, cubic_reg=7.0, counts=OracleCounts(hessians=4),
                        extra={"error": 0.5})  # fmt: skip
    plain = pack_report(report)
    assert plain["counts"]["hessians"] == 4
    assert not isinstance(plain["counts"], OracleCounts)
    back = unpack_report(plain)
    assert repr(back) == repr(report)
    assert math.isnan(back.ratio)


def test_to_device_keeps_the_tree():
    tree = {"a": [torch.ones(2), (1, "x")], "b": None}
    moved = to_device(tree, torch.device("cpu"))
    assert moved["a"][1] == (1, "x")
    assert moved["b"] is None
    assert torch.equal(moved["a"][0], tree["a"][0])
