"""topk: the largest values of each block of 4096, with two bits each, for use with error feedback; and sparse8, for
means of such vectors.

topk keeps at most 1 in 32 values. Each is its sign and one of two magnitudes, the means of the block's smaller and
larger kept values (SparseLoCo, arXiv 2508.15706, keeps 1 to 3 % at two bits). What it leaves out is the caller's to add
to the next vector: see collectives.reduce.Feedback.

Encoding, with b blocks and m kept values: u16 count of each block, float32 pairs of magnitudes, 12-bit positions two in
three bytes, two bits a value (1 larger, 2 negative), four to a byte. sparse8: u32 count, a bitmap of what is not zero,
and int8 of those values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from collectives.codecs.base import SLAB, Buffer, Codec, register, room_for, values_of
from collectives.codecs.blocks import INT8
from collectives.codecs.errors import CodecFault
from collectives.errors import NonFinite

BLOCK = 4096
KEEP = BLOCK // 32
U8 = npt.NDArray[np.uint8]


class TopK:
    """About 0.057 bytes a value. `relative_error` is what one vector loses; with error feedback it comes later."""

    name = "topk"
    relative_error = 0.91
    heavy_error = 0.85
    stable = False
    fixed = False

    @property
    def result(self) -> Codec:
        return SPARSE8

    def bytes_for(self, n: int) -> int:
        kept = (n // BLOCK) * KEEP + min(n % BLOCK, KEEP)
        return _size(-(-n // BLOCK), kept)

    def encode(self, x: torch.Tensor) -> memoryview:
        values = values_of(x)
        blocks = -(-len(values) // BLOCK)
        if len(values) < blocks * BLOCK:
            values = np.concatenate([values, np.zeros(blocks * BLOCK - len(values), np.float32)])
        rows = values.reshape(blocks, BLOCK)
        where = _largest(rows)
        block = where >> 12
        kept = values[where]
        size = np.abs(kept)
        counts = np.bincount(block, minlength=blocks)
        means = _means(size, block, counts)
        large = size > means[block]
        magnitudes = np.empty((blocks, 2), np.float32)
        for row in (0, 1):
            chosen = large == bool(row)
            magnitudes[:, row] = _means(
                size[chosen], block[chosen], np.bincount(block[chosen], minlength=blocks)
            )
        codes = large.astype(np.uint8) | (np.signbit(kept).astype(np.uint8) << 1)
        parts = [counts.astype(np.uint16).view(np.uint8), magnitudes.reshape(-1).view(np.uint8)]
        parts += [_pack12((where & (BLOCK - 1)).astype(np.uint16)), _pack2(codes)]
        return np.concatenate(parts).data

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        raw = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        target = room_for(n, out)
        blocks = -(-n // BLOCK)
        if len(raw) < 10 * blocks:
            raise CodecFault(f"topk: {len(raw)} bytes for {blocks} blocks")
        counts = raw[: 2 * blocks].copy().view(np.uint16).astype(np.int64)
        kept = int(counts.sum())
        if (counts > KEEP).any() or len(raw) != _size(blocks, kept):
            raise CodecFault(f"topk: {len(raw)} bytes for {kept} values of {blocks} blocks")
        magnitudes = raw[2 * blocks : 10 * blocks].copy().view(np.float32)
        if not (np.isfinite(magnitudes).all() and (magnitudes >= 0).all()):
            raise CodecFault("topk: a magnitude is negative or no number")
        split = 10 * blocks + _bytes12(kept)
        block = np.repeat(np.arange(blocks), counts)
        where = block * BLOCK + _unpack12(raw[10 * blocks : split], kept)
        codes = _unpack2(raw[split:], kept)
        if kept and (int(where[-1]) >= n or (np.diff(where) <= 0).any()):
            raise CodecFault("topk: positions do not rise, or are out of range")
        values = magnitudes[2 * block + (codes & 1)]
        np.negative(values, out=values, where=codes >= 2)
        dense = target.numpy()
        dense.fill(0)
        dense[where] = values
        return target


class Sparse8:
    """An eighth of a byte a value and 1.016 bytes more for each that is not zero."""

    name = "sparse8"
    relative_error = 0.0075
    heavy_error = 0.021
    stable = False
    fixed = False

    @property
    def result(self) -> Codec:
        return self

    def bytes_for(self, n: int) -> int:
        return 4 + (n + 7) // 8 + INT8.bytes_for(n)

    def encode(self, x: torch.Tensor) -> memoryview:
        values = values_of(x)
        mask = values != 0
        kept = INT8.encode(torch.from_numpy(values[mask]))
        count = np.array([np.count_nonzero(mask)], "<u4").view(np.uint8)
        return np.concatenate([count, np.packbits(mask), np.frombuffer(kept, np.uint8)]).data

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        raw = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        target = room_for(n, out)
        split = 4 + (n + 7) // 8
        if len(raw) < split:
            raise CodecFault(f"sparse8: {len(raw)} bytes for {n} values")
        count = int(raw[:4].copy().view("<u4")[0])
        if count > n:
            raise CodecFault(f"sparse8: {count} of {n} values")
        mask = np.unpackbits(raw[4:split], count=n).view(np.bool_)
        if np.count_nonzero(mask) != count:
            raise CodecFault(f"sparse8: the bitmap does not have {count} bits")
        dense = target.numpy()
        dense.fill(0)
        dense[mask] = INT8.decode(raw[split:].data, count).numpy()
        return target


def _largest(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Flat positions, rising, of the KEEP largest values of each row that are not zero; of equal ones the first.
    NonFinite if there is NaN or infinity."""
    found: list[npt.NDArray[np.int64]] = []
    step = max(1, SLAB // BLOCK)
    for start in range(0, len(rows), step):
        size = np.abs(rows[start : start + step])
        tops = np.partition(size, BLOCK - KEEP, axis=1)[:, BLOCK - KEEP :]
        if not np.isfinite(tops).all():
            raise NonFinite("topk: the values hold NaN or infinity")
        least = np.maximum(tops[:, :1], np.float32(1e-35))
        mask = size >= least
        for row in np.flatnonzero(np.count_nonzero(mask, axis=1) > KEEP):
            equal = np.flatnonzero(size[row] == least[row])
            mask[row, equal[KEEP - np.count_nonzero(size[row] > least[row]) :]] = False
        found.append(np.flatnonzero(mask) + start * BLOCK)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _means(
    size: npt.NDArray[np.float32], block: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    sums = np.bincount(block, weights=size, minlength=len(counts))
    return (sums / np.maximum(counts, 1)).astype(np.float32)


def _size(blocks: int, kept: int) -> int:
    return 10 * blocks + _bytes12(kept) + (kept + 3) // 4


def _bytes12(count: int) -> int:
    return 3 * ((count + 1) // 2)


def _pack12(values: npt.NDArray[np.uint16]) -> U8:
    pairs = np.zeros(2 * ((len(values) + 1) // 2), np.uint16)
    pairs[: len(values)] = values
    first, second = pairs[0::2], pairs[1::2]
    out = np.empty((len(first), 3), np.uint8)
    out[:, 0] = first & 255
    out[:, 1] = (first >> 8) | ((second & 15) << 4)
    out[:, 2] = second >> 4
    return out.reshape(-1)


def _unpack12(raw: U8, count: int) -> npt.NDArray[np.int64]:
    triples = raw.reshape(-1, 3).astype(np.int64)
    out = np.empty(2 * len(triples), np.int64)
    out[0::2] = triples[:, 0] | (triples[:, 1] & 15) << 8
    out[1::2] = triples[:, 1] >> 4 | triples[:, 2] << 4
    return out[:count]


def _pack2(codes: U8) -> U8:
    four = np.zeros(4 * ((len(codes) + 3) // 4), np.uint8)
    four[: len(codes)] = codes
    return (four[0::4] | four[1::4] << 2 | four[2::4] << 4 | four[3::4] << 6).astype(np.uint8, copy=False)


def _unpack2(raw: U8, count: int) -> U8:
    out = np.empty(4 * len(raw), np.uint8)
    for place in range(4):
        out[place::4] = raw >> (2 * place) & 3
    return out[:count]


SPARSE8 = register(Sparse8())
TOPK = register(TopK())
