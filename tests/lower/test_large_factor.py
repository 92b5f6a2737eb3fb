"""A factor too large to save is made again where it was born: the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import pytest
import torch

import torch_bilevel as tb
from tests.problems import hyper_cleaning
from torch_bilevel.lower import kept


@pytest.mark.parametrize("method", ["lfsba", "dlcrn"])
def test_resume_makes_a_large_factor_once_and_agrees(monkeypatch, tmp_path, method):
    monkeypatch.setattr(kept, "MAX_AUTO_FACTOR", 4)  # every factor of this problem now counts as large

    def go(steps, **options):
        return tb.minimize(hyper_cleaning().problem(), method, hessian="krylov", max_steps=steps, gradient_tol=1e-12,
                           **options)  # fmt: skip

    whole = go(8)
    assert whole.counts.factorisations >= 1
    go(4, checkpoint=tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["run"]["oracle"]["systems"]["kept"]
    assert saved["L"] is None
    assert saved["born"] is not None

    made = []
    original = kept.CholeskyFactor.__init__
    monkeypatch.setattr(
        kept.CholeskyFactor, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1]
    )
    go(4, checkpoint=tmp_path / "run.pt", resume=True)
    # once where it was born; once more where the snapshot that is rebuilt had asked for a newer one by then
    assert 1 <= len(made) <= 2
    resumed = go(8, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(resumed.x, whole.x)
    assert resumed.counts.as_dict() == whole.counts.as_dict()
