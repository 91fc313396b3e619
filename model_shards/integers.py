"""Matrices of 8-bit integers multiplied by oneDNN's integer kernels, where that is faster.

Only the weights are rounded to eight bits. A row of activations goes in as two rows of them, x = s * (high + low / 254)
with s its largest value over 127: fifteen bits, more than the eight of a bfloat16 that is near its row's largest. The
sums are of whole numbers and therefore exact, so a row has the same bits in whatever company. Knows one matrix.
"""

from __future__ import annotations

from functools import cache

import torch

from model_shards.packed import PACKED_MIN

WIDTH_MAX = 1 << 16  # sums of 127 * 127 stay below 2 ** 31
# As many rows at a time: twice as many, and the sums in float32 no longer fit a core's cache.
PIECE_ROWS = 16
_HIGH = 127
_LOW = 254
_LEAST = 1e-30  # scales to divide by: rows of zeros


class PackedInt8:
    """A matrix [rows, width] = q * scale on the CPU, q int8 in oneDNN's order, scale [rows] bfloat16."""

    __slots__ = ("_multiply", "_zeros", "packed", "scale", "shape")

    def __init__(self, q: torch.Tensor, scale: torch.Tensor) -> None:
        self.shape: tuple[int, int] = (q.shape[0], q.shape[1])
        self.packed = torch.ops.onednn.qlinear_prepack(q, None)
        self.scale = scale
        self._zeros = torch.zeros(1, dtype=torch.int64)
        self._multiply = torch.ops.onednn.qlinear_pointwise.default

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scale.nbytes)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [n, width] -> [n, rows], plus ``bias`` [rows]."""
        count, scales = x.shape[0], self.scale.float()
        if count <= PIECE_ROWS:
            found = self._piece(x, scales)
        else:
            found = x.new_empty(count, self.shape[0])
            for first in range(0, count, PIECE_ROWS):
                found[first : first + PIECE_ROWS] = self._piece(x[first : first + PIECE_ROWS], scales)
        return found if bias is None else found + bias

    def _piece(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        scale, halves = halved(x)
        sums: torch.Tensor = self._multiply(
            halves, 1.0, 0, self.packed, scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        high, low = sums[: len(x)], sums[len(x) :]
        return high.add_(low, alpha=1 / _LOW).mul_(scale).to(x.dtype)


def halved(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale [n, 1] float32, [2 n, width] int8: the high halves of all rows, then the low ones) of x [n, width]."""
    count, width = x.shape
    wide = x.float()
    scale = wide.abs().amax(1, True).mul_(1 / _HIGH).clamp_(min=_LEAST)
    wide.div_(scale)
    both = wide.new_empty(2, count, width)
    high = torch.round(wide, out=both[0])
    torch.sub(wide, high, out=both[1]).mul_(_LOW).round_()
    return scale, both.view(2 * count, width).to(torch.int8)


@cache
def integers_pay() -> bool:
    """Whether int8 matrices are packed here: where the processor has tiles (measured there at up to twice the pace of
    the weight-only kernel, sixteen rows at little more than one), and where this torch's sums are exact, tried once."""
    try:
        if not torch.cpu._is_amx_tile_supported():
            return False
        q = torch.full((PACKED_MIN, 4 * PACKED_MIN), 127, dtype=torch.int8)
        q[1::2] = -127
        x = torch.full((1, 4 * PACKED_MIN), 3.0, dtype=torch.bfloat16)
        return torch.equal(
            PackedInt8(q, torch.ones(PACKED_MIN, dtype=torch.bfloat16)).matmul(x)[0],
            x[0, 0] * q.bfloat16().sum(1),
        )
    except (AttributeError, RuntimeError, TypeError):  # another torch has other names or refuses
        return False


def packs_integers(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of an int8 matrix with rows of ``dtype`` is faster packed."""
    fits = min(shape) >= PACKED_MIN and shape[1] <= WIDTH_MAX
    return fits and dtype == torch.bfloat16 and device.type == "cpu" and integers_pay()
