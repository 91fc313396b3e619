"""A tensor on the wire: a small typed header and raw little-endian bytes in row-major order.

Knows dtypes by name, their sizes, and that the bytes fit the shape. It does not know torch or numpy: what holds
the numbers turns its memory into `data`, and back, without a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int64": 8, "int32": 4, "uint8": 1}
DIMS_MAX = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """`data` holds prod(shape) items of `dtype`, or ValueError. Received data is 16-byte aligned and writable."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if isinstance(self.data, bytearray):
            object.__setattr__(self, "data", memoryview(self.data))
        if isinstance(self.data, memoryview):
            if not self.data.c_contiguous:
                raise ValueError("Tensor.data must be contiguous")
            if self.data.format != "B" or self.data.ndim != 1:
                object.__setattr__(self, "data", self.data.cast("B"))
        elif not isinstance(self.data, bytes):
            raise ValueError(f"Tensor.data must be bytes or a memoryview, got {type(self.data).__name__}")
        wanted = tensor_bytes(self.dtype, self.shape)
        if len(self.data) != wanted:
            raise ValueError(
                f"a {self.dtype} tensor of shape {self.shape} has {wanted} bytes, got {len(self.data)}"
            )

    @property
    def nbytes(self) -> int:
        return len(self.data)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor has. ValueError for an unknown dtype or an impossible shape."""
    item_bytes = ITEM_BYTES.get(dtype)
    if item_bytes is None:
        raise ValueError(f"Tensor.dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype!r}")
    if type(shape) is not tuple or len(shape) > DIMS_MAX:
        raise ValueError(f"Tensor.shape must be a tuple of at most {DIMS_MAX} sizes, got {shape!r}")
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(f"Tensor.shape must hold sizes of at least 0, got {shape!r}")
    return item_bytes * math.prod(shape)
