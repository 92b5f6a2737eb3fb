"""Shared by all tests: where the optional data sets are, and a run of tests that leaves global state as it
found it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test under the gpu marker needs a CUDA device: said once, here."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device; CUDA under the gpu marker."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with MNIST/raw, FashionMNIST/raw and libsvm; the test is skipped where there is none."""
    candidates = [os.environ.get("TORCH_BILEVEL_DATA"), ROOT.parent / "shared" / "data", ROOT / "data"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "libsvm").is_dir():
            return Path(candidate)
    pytest.skip(
        "no data sets here: set TORCH_BILEVEL_DATA to a folder with MNIST/raw, FashionMNIST/raw and libsvm"
    )


@pytest.fixture(autouse=True)
def _global_state():
    """Every test starts from the same seed and leaves the default dtype alone."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
