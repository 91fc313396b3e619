"""Tensors as raw bytes and back, sharing memory where it is safe."""

from __future__ import annotations

import gc

import pytest
import torch

from model_shards import LocalFault, StepError, tensor_from_bytes, tensor_to_bytes

DTYPES = ["bfloat16", "float16", "float32", "int64", "int32", "uint8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_tensor_survives_the_trip(dtype, shape, kind):
    tensor = (torch.randn(shape) * 50).to(getattr(torch, dtype))
    name, sizes, data = tensor_to_bytes(tensor)
    assert (name, sizes) == (dtype, shape)
    assert data.nbytes == tensor.numel() * tensor.element_size()
    back = tensor_from_bytes(name, sizes, kind(data))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_the_layout_is_row_major_little_endian():
    _, _, data = tensor_to_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).t())
    assert bytes(data) == b"\1\0\0\0\3\0\0\0\2\0\0\0\4\0\0\0"
    _, _, data = tensor_to_bytes(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert bytes(data) == b"\x80\x3f\x00\xc0"


def test_no_copy_where_none_is_needed():
    tensor = torch.zeros(4)
    _, _, data = tensor_to_bytes(tensor)
    tensor[1] = 1.0
    assert bytes(data[4:8]) == b"\0\0\x80\x3f"
    buffer = bytearray(16)
    view = tensor_from_bytes("float32", (4,), buffer)
    buffer[4:8] = b"\0\0\x80\x3f"
    assert view.tolist() == [0, 1, 0, 0]


def test_read_only_bytes_stay_untouched():
    data = bytes(8)
    tensor_from_bytes("float32", (2,), data)[0] = 5.0
    assert data == bytes(8)


def test_the_bytes_outlive_the_tensor():
    tensor = torch.arange(1000)
    _, _, data = tensor_to_bytes(tensor)
    expected = bytes(data)
    del tensor
    gc.collect()
    torch.full((1000,), 7)
    assert bytes(data) == expected


def test_a_buffer_out_of_step_is_realigned():
    buffer = memoryview(bytearray(9))[1:]
    assert tensor_from_bytes("float32", (2,), buffer).data_ptr() % 4 == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "length", "what"),
    [
        ("float64", (1,), 8, "float64"),
        ("float32", (2,), 7, "7 bytes"),
        ("float32", (2,), 12, "12 bytes"),
        ("float32", (-2,), 8, "shape"),
        ("float32", (True,), 4, "shape"),
        ("float32", (1 << 40, 1 << 40), 8, "takes"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_made(dtype, shape, length, what):
    with pytest.raises(StepError, match=what):
        tensor_from_bytes(dtype, shape, bytes(length))


def test_a_dtype_that_does_not_travel_is_our_own_fault():
    with pytest.raises(LocalFault, match="float64"):
        tensor_to_bytes(torch.zeros(1, dtype=torch.float64))
