"""Figures are written and show what they were given."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from experiments import figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figure objects, kept open so that their contents can be looked at."""
    kept = []
    monkeypatch.setattr(figures.plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 200


def test_curves(tmp_path: Path, drawn: list) -> None:
    records = [
        {"seconds": i, "calls": 2 * i, "value": 1 / (i + 1), "accuracy": None if i == 0 else 0.5}
        for i in range(4)
    ]
    path = figures.curves(
        tmp_path / "new" / "curves.png",
        {"a": records, "b": records[:2]},
        {"value": "objective", "accuracy": "accuracy"},
        {"seconds": "s", "calls": "calls"},
        {"accuracy": {"reference": 0.9}},
        ["value"],
    )
    assert is_png(path)
    top, bottom = drawn[0].axes[1], drawn[0].axes[3]  # against calls
    assert (top.get_yscale(), bottom.get_yscale()) == ("log", "linear")
    assert top.lines[0].get_xdata().tolist() == [0, 2, 4, 6]
    assert top.lines[1].get_ydata().tolist() == [1, 0.5]
    assert bottom.lines[0].get_xdata().tolist() == [2, 4, 6]  # without the record that has no accuracy
    assert bottom.lines[2].get_label() == "reference"


def test_curves_without_records(tmp_path: Path) -> None:
    assert is_png(figures.curves(tmp_path / "c.png", {"a": []}, {"value": "f"}, {"seconds": "s"}))


def test_weight_histogram(tmp_path: Path, drawn: list) -> None:
    weights, corrupted = torch.tensor([0.01, 0.99, 0.98, 0.5]), torch.tensor([True, False, False, True])
    assert is_png(figures.weight_histogram(tmp_path / "h.png", weights.requires_grad_(), corrupted))
    axis = drawn[0].axes[0]
    heights = sorted(bar.get_height() for bar in axis.patches if bar.get_height() > 0)
    assert heights == [1, 1, 2]
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["clean (2)", "corrupted (2)"]


def test_lowest_weights(tmp_path: Path, drawn: list) -> None:
    images = torch.rand(5, 4, 4)
    weights = torch.tensor([0.9, 0.1, 0.3, 0.05, 0.7])
    path = figures.lowest_weights(
        tmp_path / "l.png",
        images,
        weights,
        torch.tensor([0, 1, 2, 3, 4]),
        torch.tensor([0, 1, 7, 8, 4]),
        count=3,
        per_row=2,
    )
    assert is_png(path)
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == ["3 (is 8)\n0.05", "1\n0.10", "2 (is 7)\n0.30", ""]
    assert (drawn[0].axes[0].images[0].get_array().data == images[3].numpy()).all()


def test_bands_follow_the_best_point_so_far(tmp_path):
    from experiments.figures import _best_so_far, bands

    records = [{"work": 1, "loss": 3.0, "accuracy": 0.1}, {"work": 4, "loss": 1.0, "accuracy": 0.7},
               {"work": 9, "loss": 2.0, "accuracy": 0.9}]  # fmt: skip
    at = [_best_so_far(records, "work", "accuracy", "loss", limit) for limit in (0.5, 3, 4, 20)]
    assert at == [0.1, 0.1, 0.7, 0.7]  # the lower loss, not the later point
    panels = [("work", "loss", "work", "loss"), ("work", "accuracy", "work", "accuracy")]
    path = bands(tmp_path / "bands.png", {"a": [{"records": records}] * 3, "none": []}, panels, best="loss")
    assert path.stat().st_size > 5000
