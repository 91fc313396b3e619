"""Weight-only int8 and int4, made while a span loads (int4 also taken over from a packed checkpoint).

int8: one scale a row, symmetric. int4: one scale and one zero a group of GROUP inputs. Both multiply through
torch's packed CPU kernels for few rows in bfloat16, and elsewhere (more rows, other dtypes or devices) by the
weights dequantised for the call. Knows nothing of layers: it stands where a Linear's weight stands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

QUANTS = ("none", "int8", "int4")
GROUP = 64
SMALL_GROUP = 32
# The packed kernels win up to here; beyond, one pass of dequantising costs less than their slower products.
KERNEL_ROWS_MAX = 6
BLOCK_ROWS = 64
CHUNK_ROWS = 1024
CACHED_ELEMENTS = 1 << 19
VECTOR = 32


class Int8Weight:
    """A matrix [rows, width] as int8 with a scale a row: w = q * scale."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.q = torch.empty(rows, width, dtype=torch.int8, device=device)
        self.scale = torch.empty(rows, dtype=dtype, device=device)
        # The kernel reads whole vectors: a width that does not fill them makes it read beyond the matrix.
        self.kernel = dtype == torch.bfloat16 and device.type == "cpu" and width % VECTOR == 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the weight is made of, by name."""
        return {"q": self.q, "scale": self.scale}

    def fill(self, row: int, values: torch.Tensor) -> None:
        """Quantises ``values`` [n, width] float32 into rows from ``row`` on."""
        # The scale is rounded first, so that the integers fit the scale that will be used.
        scale = _usable((values.abs().amax(1) / 127).to(self.scale.dtype))
        self.scale[row : row + len(values)] = scale
        self.q[row : row + len(values)] = (values / scale.float()[:, None]).round_().clamp_(-127, 127)

    def block(self, row: int, count: int) -> Int8Weight:
        """Rows [row, row + count) as a weight of their own, without a copy."""
        part = object.__new__(Int8Weight)
        part.q, part.scale, part.kernel = (
            self.q[row : row + count],
            self.scale[row : row + count],
            self.kernel,
        )
        return part

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, width] -> [n, rows]."""
        if self.kernel and x.shape[0] <= KERNEL_ROWS_MAX:
            return torch._weight_int8pack_mm(x, self.q, self.scale)
        return _by_parts(x, self.q.shape, lambda part: self.q[part].to(x.dtype)) * self.scale

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The given rows [n] -> [n, width], for an embedding."""
        return self.q[rows].to(self.scale.dtype) * self.scale[rows, None]


class Int4Weight:
    """A matrix [rows, width] as 4-bit integers with a scale and a zero a group: w = (q - 8) * scale + zero.

    ``packed`` [rows, width / 2] is in the CPU kernel's order (``blocked``: blocks of 64 rows, input by input)
    or plain: two neighbouring inputs a byte, the first in the low half.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        blocked: bool,
        group: int = 0,
    ) -> None:
        self.group = group or _own_group(width)
        self.blocked = blocked
        self.packed = torch.empty(rows, width // 2, dtype=torch.uint8, device=device)
        self.scales = torch.empty(width // self.group, rows, 2, dtype=dtype, device=device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the weight is made of, by name."""
        return {"packed": self.packed, "scales": self.scales}

    def fill(self, row: int, values: torch.Tensor) -> None:
        """Quantises ``values`` [n, width] float32 into rows from ``row`` on; both in whole blocks where
        blocked."""
        count, width = values.shape
        groups = values.view(count, width // self.group, self.group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = _usable(((high - low) / 15).to(self.scales.dtype))
        zero = (low + scale.float() * 8).to(self.scales.dtype)
        q = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round_().clamp_(0, 15)
        self.scales[:, row : row + count] = torch.stack((scale, zero), -1).transpose(0, 1)
        self._pack(row, q.view(count, width).to(torch.uint8))

    def keep(self, row: int, numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Takes over w = (numbers - zeros) * scales: numbers [n, width] uint8, the others [n, groups] float32
        with groups of a multiple of this weight's. Scale and zero are rounded to the weight's dtype."""
        count, width = numbers.shape
        repeats = width // self.group // scales.shape[1]
        both = torch.stack((scales, (8 - zeros) * scales), -1).repeat_interleave(repeats, 1)
        self.scales[:, row : row + count] = both.transpose(0, 1).to(self.scales.dtype)
        self._pack(row, numbers)

    def _pack(self, row: int, numbers: torch.Tensor) -> None:
        packed = _pack_blocked(numbers) if self.blocked else _pack_plain(numbers)
        self.packed[row : row + len(numbers)] = packed

    def block(self, row: int, count: int) -> Int4Weight:
        """Rows [row, row + count) as a weight of their own; whole blocks where blocked."""
        part = object.__new__(Int4Weight)
        part.group, part.blocked = self.group, self.blocked
        part.packed = self.packed[row : row + count]
        part.scales = self.scales[:, row : row + count].contiguous()
        return part

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, width] -> [n, rows]."""
        if self.blocked and x.shape[0] <= KERNEL_ROWS_MAX:
            return torch._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales)
        return _by_parts(x, self.shape, lambda part: self.dequantised(x.dtype, part))

    def dequantised(self, dtype: torch.dtype, part: slice = slice(None)) -> torch.Tensor:
        """Rows ``part`` (whole blocks where blocked) of [rows, width] in ``dtype``."""
        packed = self.packed[part]
        rows, width = packed.shape[0], 2 * packed.shape[1]
        numbers = _unpack_blocked(packed) if self.blocked else _unpack_plain(packed)
        groups = (numbers.to(dtype) - 8).view(rows, width // self.group, self.group)
        scale, zero = self.scales[:, part].transpose(0, 1).to(dtype).unsqueeze(-1).unbind(2)
        return (groups * scale + zero).view(rows, width)


QuantWeight = Int8Weight | Int4Weight


def new_weight(
    quant: str, pieces: list[int], width: int, dtype: torch.dtype, device: torch.device
) -> QuantWeight:
    """An empty weight for ``pieces`` (rows of each tensor fused into it). int4 needs a width in whole groups;
    a matrix without them is kept as int8."""
    rows = sum(pieces)
    if quant == "int8" or width % SMALL_GROUP:
        return Int8Weight(rows, width, dtype, device)
    return Int4Weight(rows, width, dtype, device, blocked=kernel_takes(pieces, dtype, device))


def kernel_takes(pieces: list[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the packed int4 kernel can work on matrices of these many rows."""
    aligned = all(piece % BLOCK_ROWS == 0 for piece in pieces)
    return aligned and dtype == torch.bfloat16 and device.type == "cpu" and kernel_blocks_known()


def _by_parts(
    x: torch.Tensor, shape: tuple[int, ...], dequantised: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """x [n, width] times a weight [rows, width] whose rows are made only for the call: on a CPU as many at a time as a
    core's cache holds, several times as fast as all at once."""
    rows, width = shape
    step = max(BLOCK_ROWS, CACHED_ELEMENTS // width // BLOCK_ROWS * BLOCK_ROWS)
    if x.device.type != "cpu" or rows <= step:
        return F.linear(x, dequantised(slice(None)))
    found = x.new_empty(x.shape[0], rows)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        found[:, part] = F.linear(x, dequantised(part))
    return found


def _own_group(width: int) -> int:
    return GROUP if width % GROUP == 0 else SMALL_GROUP


def quantised_bytes(quant: str, rows: int, width: int, itemsize: int) -> int:
    """Bytes that a matrix [rows, width] takes once quantised from a dtype of ``itemsize`` bytes."""
    if quant == "none":
        return rows * width * itemsize
    if quant == "int8" or width % SMALL_GROUP:
        return rows * (width + itemsize)
    return int4_bytes(rows, width, _own_group(width), itemsize)


def int4_bytes(rows: int, width: int, group: int, itemsize: int) -> int:
    """Bytes of an Int4Weight with ``group`` inputs a scale and zero of ``itemsize`` bytes each."""
    return rows * (width // 2 + width // group * 2 * itemsize)


@cache
def kernel_blocks_known() -> bool:
    """Whether this machine's int4 kernel packs its blocks in the order this file unpacks: tried once on one
    block."""
    numbers = (
        torch.arange(BLOCK_ROWS * SMALL_GROUP, dtype=torch.int64).mul_(40503).bitwise_right_shift_(5) % 16
    )
    numbers = numbers.view(BLOCK_ROWS, SMALL_GROUP).to(torch.uint8)
    try:
        packed = _pack_blocked(numbers)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(_unpack_blocked(packed), numbers)


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """Scales to divide by: rows of zeros, and those too small for the dtype, get 1."""
    return scale.masked_fill(scale == 0, 1.0)


def _pack_blocked(numbers: torch.Tensor) -> torch.Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32), 1)


def _unpack_blocked(packed: torch.Tensor) -> torch.Tensor:
    rows, half = packed.shape
    blocks = packed.view(rows // BLOCK_ROWS, 2 * half, BLOCK_ROWS // 2)
    both = torch.cat((blocks & 15, blocks >> 4), dim=2)
    return both.transpose(1, 2).reshape(rows, 2 * half)


def _pack_plain(numbers: torch.Tensor) -> torch.Tensor:
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def _unpack_plain(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)
