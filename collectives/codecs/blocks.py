"""int8 and int4 with one scale a block, from its largest magnitude: no value is clipped however heavy the tail.

Encoding of n values: the scales of all blocks, then the values. int8: blocks of 256, float32 scales, a byte a value.
int4: blocks of 32, bfloat16 scales, two values a byte: value i in the low half and value i + ceil(n/2) in the high half
of byte i, two's complement. Blocks whose largest magnitude is below 1e-35 become zero. Relative errors measured on
Gaussian and Student-t3 values: int8 0.7 % and 1.7 to 1.9 %, int4 9.7 % and 13 to 15 %.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from collectives.codecs.base import F32, SLAB, Buffer, Codec, bytes_of, register, room_for, values_of
from collectives.codecs.errors import CodecFault
from collectives.errors import NonFinite

_TINY = np.float32(1e-35)

I8 = npt.NDArray[np.int8]


def _absmax(x: F32, block: int, work: F32) -> F32:
    """Largest magnitude of each block, the last one perhaps short; NaN and infinity show through. `work` [SLAB]."""
    blocks = -(-len(x) // block)
    found = torch.empty(blocks, dtype=torch.float32)
    for start in range(0, len(x), SLAB):
        part = x[start : start + SLAB]
        size = np.abs(part, out=work[: len(part)])
        whole = len(part) // block
        first = start // block
        if whole:
            rows = torch.from_numpy(size[: whole * block]).view(whole, block)
            torch.amax(rows, 1, out=found[first : first + whole])
        if whole * block < len(part):
            found[first + whole] = float(size[whole * block :].max())
    result: F32 = found.numpy()
    return result


def _quantise(x: F32, inverse: F32, block: int, work: F32, out: I8) -> None:
    """out = round(x * inverse of its block), to nearest even."""
    for start in range(0, len(x), SLAB):
        part = x[start : start + SLAB]
        size = work[: len(part)]
        whole = len(part) // block
        first = start // block
        if whole:
            rows = torch.from_numpy(size[: whole * block]).view(whole, block)
            source = torch.from_numpy(part[: whole * block]).view(whole, block)
            torch.mul(source, torch.from_numpy(inverse[first : first + whole])[:, None], out=rows)
        if whole * block < len(part):
            np.multiply(part[whole * block :], inverse[first + whole], out=size[whole * block :])
        np.rint(size, out=size)
        np.copyto(out[start : start + SLAB], size, casting="unsafe")


def _spread(values: I8, scales: F32, block: int, out: F32) -> None:
    """out = value * scale of its block."""
    whole = len(values) // block
    for start in range(0, whole * block, SLAB):
        end = min(start + SLAB, whole * block)
        rows = torch.from_numpy(out[start:end]).view(-1, block)
        source = torch.from_numpy(values[start:end]).view(-1, block)
        torch.mul(source, torch.from_numpy(scales[start // block : end // block])[:, None], out=rows)
    if whole * block < len(values):
        with np.errstate(over="ignore"):  # hostile scales; infinity is dealt with by whoever adds up
            np.multiply(values[whole * block :], scales[whole], out=out[whole * block :])


def _inverse(scales: F32) -> F32:
    """1 / scale, and 0 for 0."""
    out = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=out, where=scales > 0)
    return out


def _checked(largest: F32, name: str, most: float) -> F32:
    """`largest` within `most`, a little less than float32's largest: levels * scale must be finite after rounding."""
    if not np.isfinite(largest).all():
        raise NonFinite(f"{name}: the values hold NaN or infinity")
    np.minimum(largest, np.float32(most), out=largest)
    largest[largest < _TINY] = 0
    return largest


class Int8:
    """1.016 bytes a value; |error| <= absmax / 254 of its block."""

    name = "int8"
    relative_error = 0.0075
    heavy_error = 0.021
    stable = False
    fixed = True
    block = 256

    @property
    def result(self) -> Codec:
        return self

    def bytes_for(self, n: int) -> int:
        return 4 * -(-n // self.block) + n

    def encode(self, x: torch.Tensor) -> memoryview:
        values = values_of(x)
        work = np.empty(min(SLAB, len(values)), np.float32)
        scales = _checked(_absmax(values, self.block, work), self.name, 3.4028e38)
        scales /= np.float32(127)
        data = np.empty(self.bytes_for(len(values)), np.uint8)
        split = 4 * len(scales)
        data[:split] = scales.view(np.uint8)
        _quantise(values, _inverse(scales), self.block, work, data[split:].view(np.int8))
        return data.data

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        raw = bytes_of(data, self.bytes_for(n), self.name)
        target = room_for(n, out)
        split = 4 * -(-n // self.block)
        scales = _scales(raw[:split].copy().view(np.float32), self.name)
        _spread(_writable(raw[split:]).view(np.int8), scales, self.block, target.numpy())
        return target


class Int4:
    """0.5625 bytes a value; |error| <= absmax / 13.9 of its block."""

    name = "int4"
    relative_error = 0.105
    heavy_error = 0.16
    stable = False
    fixed = True
    block = 32

    @property
    def result(self) -> Codec:
        return self

    def bytes_for(self, n: int) -> int:
        return 2 * -(-n // self.block) + (n + 1) // 2

    def encode(self, x: torch.Tensor) -> memoryview:
        values = values_of(x)
        work = np.empty(min(SLAB, len(values)), np.float32)
        largest = _checked(_absmax(values, self.block, work), self.name, 3.38e38)
        short = torch.from_numpy(largest / np.float32(7)).to(torch.bfloat16)
        scales = short.to(torch.float32).numpy()
        half = (len(values) + 1) // 2
        levels = np.empty(2 * half, np.int8)
        levels[len(values) :] = 0
        _quantise(values, _inverse(scales), self.block, work, levels[: len(values)])
        data = np.empty(self.bytes_for(len(values)), np.uint8)
        split = 2 * len(scales)
        data[:split] = short.view(torch.int16).numpy().view(np.uint8)
        packed = data[split:]
        bits = levels.view(np.uint8)
        np.left_shift(bits[half:], 4, out=packed)
        np.bitwise_and(bits[:half], 15, out=bits[:half])
        np.bitwise_or(packed, bits[:half], out=packed)
        return data.data

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        raw = bytes_of(data, self.bytes_for(n), self.name)
        target = room_for(n, out)
        split = 2 * -(-n // self.block)
        wide = raw[:split].copy().view(np.uint16).astype(np.uint32)
        scales = _scales((wide << np.uint32(16)).view(np.float32), self.name)
        packed = raw[split:]
        half = len(packed)
        levels = np.empty(2 * half, np.int8)
        low = levels[:half]
        np.left_shift(packed, 4, out=low.view(np.uint8))
        np.right_shift(low, 4, out=low)
        np.right_shift(packed.view(np.int8), 4, out=levels[half:])
        _spread(levels[:n], scales, self.block, target.numpy())
        return target


def _scales(scales: F32, name: str) -> F32:
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise CodecFault(f"{name}: a scale is negative or no number")
    return scales


def _writable(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """torch warns of read-only memory, though it is only read here."""
    return raw if raw.flags.writeable else raw.copy()


INT8 = register(Int8())
INT4 = register(Int4())
