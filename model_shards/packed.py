"""Matrices in the order that oneDNN's bfloat16 kernels read, where that is faster.

Up to 32 rows such a product costs about what one row does, and each row gets the bits it has alone. Knows one matrix;
which matrices of a model are worth it is `weights.py`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

PACKED_MIN = 64


class PackedWeight:
    """A bfloat16 matrix [rows, width] on the CPU, in oneDNN's order; the given tensor may be dropped afterwards."""

    __slots__ = ("_multiply", "packed", "shape")

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [n, width] -> [n, rows], plus ``bias`` [rows]."""
        found: torch.Tensor = self._multiply(x, self.packed, bias, "none", [], "")
        return found


@dataclass(frozen=True, slots=True)
class PackedStack:
    """Matrices of one shape, one an expert."""

    weights: list[PackedWeight]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


@cache
def packing_pays() -> bool:
    """Whether packed matrices are used here: where the processor has tiles for bfloat16 (measured there at half as much
    again as the plain product for few rows), and where this torch packs as it should, tried once on a small matrix."""
    try:
        if not torch.cpu._is_amx_tile_supported():
            return False
        weight = torch.arange(PACKED_MIN * PACKED_MIN).view(PACKED_MIN, -1).bfloat16()
        tried = PackedWeight(weight)
        one = torch.eye(PACKED_MIN, dtype=torch.bfloat16)
        return torch.equal(tried.packed.to_dense(), weight) and torch.equal(tried.matmul(one), weight.T)
    except (AttributeError, RuntimeError, TypeError):  # another torch has other names or refuses
        return False


def packs(weight: object) -> bool:
    """Whether a product with ``weight`` is faster packed."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and min(weight.shape) >= PACKED_MIN
        and packing_pays()
    )
