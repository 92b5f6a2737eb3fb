"""Layout: named tensors to one flat vector and back."""

from __future__ import annotations

import pytest
import torch

from torch_bilevel.errors import ProblemError, ShapeError
from torch_bilevel.flat import Layout


def tensors(dtype=torch.float64):
    return {"w": torch.arange(6, dtype=dtype).view(2, 3), "scalar": torch.tensor(7.0, dtype=dtype),
            "b": torch.tensor([8.0, 9.0], dtype=dtype)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip_keeps_order_shape_and_dtype(dtype):
    given = tensors(dtype)
    layout = Layout(given, "learner")
    flat = layout.flatten(given)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert flat.dtype == dtype == layout.dtype
    back = layout.unflatten(flat)
    assert list(back) == ["w", "scalar", "b"]
    assert layout.size == 9
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_flatten_copies_and_unflatten_views():
    given = tensors()
    layout = Layout(given, "learner")
    flat = layout.flatten(given)
    flat[0] = 100.0
    assert given["w"][0, 0] == 0
    layout.unflatten(flat)["w"][1, 2] = -1.0
    assert flat[5] == -1.0


def test_not_contiguous_tensors_flatten_in_reading_order():
    given = {"w": torch.arange(6.0).view(2, 3).T}
    flat = Layout(given, "learner").flatten(given)
    assert flat.tolist() == [0, 3, 1, 4, 2, 5]


def test_unflatten_is_differentiable_and_flatten_is_not():
    given = {name: tensor.requires_grad_(True) for name, tensor in tensors().items()}
    layout = Layout(given, "learner")
    assert not layout.flatten(given).requires_grad
    flat = layout.flatten(given).requires_grad_(True)
    parts = layout.unflatten(flat)
    (parts["w"].sum() + 3 * parts["scalar"]).backward()
    assert flat.grad.tolist() == [1, 1, 1, 1, 1, 1, 3, 0, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "nothing to optimise"), ({"w": torch.zeros(0, 3)}, "is empty"),
     ({"w": torch.zeros(2).int()}, "dtype"), ({"w": torch.zeros(2, dtype=torch.cfloat)}, "dtype"),
     ({"w": torch.zeros(2).half()}, "overflow in float16"),
     ({"w": [1.0]}, "expected a tensor, got list"),
     ({"w": torch.zeros(2), "b": torch.zeros(2).double()}, "expected one dtype.*b: torch.float64"),
     ({"w": torch.zeros(2), "b": torch.zeros(2, device="meta")}, "one device")],
)  # fmt: skip
def test_what_cannot_be_laid_out_is_refused(given, message):
    with pytest.raises(ProblemError, match=message):
        Layout(given, "hyper")


@pytest.mark.parametrize(
    ("flat", "message"),
    [(torch.zeros(8).double(), r"expected shape \(9,\), all learner tensors flattened, got \(8,\)"),
     (torch.zeros(9, 1).double(), "expected shape"), (torch.zeros(9), "expected torch.float64"),
     ([0.0] * 9, "got list"), (torch.zeros(9, device="meta").double(), "on meta")],
)  # fmt: skip
def test_a_vector_that_does_not_fit_is_refused(flat, message):
    with pytest.raises(ShapeError, match=message):
        Layout(tensors(), "learner").check(flat, "y")
