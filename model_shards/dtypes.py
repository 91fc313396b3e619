"""Names of dtypes, and tensors as raw little-endian bytes.

The wire and safetensors each have their own spelling; this is the one table. Knows nothing of messages: a
caller hands in dtype name, shape and bytes, already bounded by its own limits.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence

import torch

from model_shards.errors import LocalFault, StepError

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# What a packed checkpoint also stores: eight-bit floats, words of four-bit numbers, zeros, orders, shapes, exponents.
STORED_DTYPES = {
    **SAFETENSORS_DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_named(name: str) -> torch.dtype:
    """The compute dtype called ``name``. Raises LocalFault naming those that work."""
    if name not in COMPUTE_DTYPES:
        raise LocalFault(f"dtype {name!r}, expected one of {', '.join(COMPUTE_DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype that travels."""
    return _NAMES[dtype]


def is_finite(values: torch.Tensor) -> bool:
    """Whether every value is finite. By the extremes, which carry NaN and are found many times faster than
    one by one."""
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def tensor_to_bytes(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    """(dtype name, shape, bytes) of a tensor. The bytes share memory with a contiguous CPU tensor and keep it
    alive."""
    if tensor.dtype not in _NAMES:
        raise LocalFault(f"dtype {tensor.dtype} does not travel, expected one of {', '.join(DTYPES)}")
    flat = tensor.detach().to("cpu").contiguous()
    if sys.byteorder != "little":
        raise LocalFault("tensors travel as little-endian bytes; this machine is big-endian")
    bytes_total = flat.numel() * flat.element_size()
    if not bytes_total:
        return _NAMES[tensor.dtype], tuple(tensor.shape), memoryview(b"")
    view = (ctypes.c_ubyte * bytes_total).from_address(flat.data_ptr())
    view.owner = flat  # type: ignore[attr-defined]  # the memory lives as long as any view of it
    return _NAMES[tensor.dtype], tuple(tensor.shape), memoryview(view).cast("B")


def tensor_from_bytes(
    dtype: str, shape: Sequence[int], data: bytes | bytearray | memoryview, *, device: str = "cpu"
) -> torch.Tensor:
    """The tensor of ``dtype`` and ``shape`` that ``data`` holds. Shares memory with a writable, aligned
    buffer; read-only bytes are copied once. Raises StepError where dtype, shape and length disagree."""
    if dtype not in DTYPES:
        raise StepError("-", f"tensor dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise StepError("-", f"tensor shape {tuple(shape)!r:.80}, expected sizes of at least 0")
    kind = DTYPES[dtype]
    view = memoryview(data).cast("B")
    needed = math.prod(shape) * kind.itemsize
    if view.nbytes != needed:
        raise StepError("-", f"tensor of {view.nbytes} bytes, but {dtype} {list(shape)} takes {needed}")
    if not needed:
        return torch.empty(tuple(shape), dtype=kind, device=device)
    source = bytearray(view) if view.readonly else view
    flat = torch.frombuffer(source, dtype=torch.uint8)
    if flat.data_ptr() % kind.itemsize:
        flat = flat.clone()
    return flat.view(kind).view(tuple(shape)).to(device)
