"""fp32, as it is, and bf16, rounded to nearest even.

Both carry NaN and infinity. fp32 copies nothing: its encoding is the memory of the values. It assumes a little-endian
machine, as torch's own wheels do.
"""

from __future__ import annotations

import numpy as np
import torch

from collectives.codecs.base import SLAB, Buffer, Codec, bytes_of, register, room_for, values_of


class Fp32:
    """4 bytes an element, exact."""

    name = "fp32"
    relative_error = 0.0
    heavy_error = 0.0
    stable = True
    fixed = True

    @property
    def result(self) -> Codec:
        return self

    def bytes_for(self, n: int) -> int:
        return 4 * n

    def encode(self, x: torch.Tensor) -> memoryview:
        return values_of(x).view(np.uint8).data

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        raw = bytes_of(data, 4 * n, self.name)
        if out is None and raw.flags.writeable:
            return torch.from_numpy(raw.view(np.float32))
        target = room_for(n, out)
        np.copyto(target.numpy(), raw.view(np.float32))
        return target


class Bf16:
    """2 bytes an element; |error| <= 2**-8 |x| for every element."""

    name = "bf16"
    relative_error = 0.0025
    heavy_error = 0.0025
    stable = True
    fixed = True

    @property
    def result(self) -> Codec:
        return self

    def bytes_for(self, n: int) -> int:
        return 2 * n

    def encode(self, x: torch.Tensor) -> memoryview:
        values = torch.from_numpy(values_of(x))
        data = torch.empty(len(values), dtype=torch.bfloat16)
        for start in range(0, len(values), SLAB):
            data[start : start + SLAB].copy_(values[start : start + SLAB])
        return data.view(torch.uint8).numpy().data

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        raw = bytes_of(data, 2 * n, self.name).view(np.uint16)
        target = room_for(n, out)
        bits = target.numpy().view(np.uint32)
        for start in range(0, n, SLAB):
            np.left_shift(raw[start : start + SLAB], 16, out=bits[start : start + SLAB], dtype=np.uint32)
        return target


FP32 = register(Fp32())
BF16 = register(Bf16())
