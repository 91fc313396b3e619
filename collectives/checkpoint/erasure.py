"""A k-of-n code over stripes of bytes: any k of the n pieces of a stripe give it back.

The code is Reed and Solomon's over GF(256), systematic: the first k pieces are the stripe itself. `reedsolo` defines it
(field and parities); it is linear, so its parities of the unit vectors are a matrix, and numpy multiplies whole stripes
by that at hundreds of megabytes a second. It knows nothing of peers, files and hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import reedsolo

from collectives.errors import LocalFault

N_MAX = 64
_PRIMITIVE = 0x11D
_BLOCK = 1 << 16
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Code:
    """`n` pieces of which any `k` suffice."""

    def __init__(self, k: int, n: int) -> None:
        if not 0 < k <= n <= N_MAX:
            raise LocalFault(f"a code needs 0 < k <= n <= {N_MAX}, got k {k} and n {n}")
        self.k = k
        self.n = n
        self._rows = _generator(k, n)

    def piece_bytes(self, stripe_bytes: int) -> int:
        """Of each piece of a stripe of so many bytes."""
        return -(-stripe_bytes // self.k)

    def encode(self, stripe: bytes | memoryview) -> list[bytes]:
        """The n pieces of a stripe; where k does not divide it, zeros follow it."""
        size = self.piece_bytes(len(stripe))
        padded = np.zeros(self.k * size, dtype=np.uint8)
        padded[: len(stripe)] = np.frombuffer(stripe, dtype=np.uint8)
        data = padded.reshape(self.k, size)
        return [data[i].tobytes() for i in range(self.k)] + [
            _combine(row, data).tobytes() for row in self._rows[self.k :]
        ]

    def decode(self, pieces: Mapping[int, bytes | memoryview], stripe_bytes: int) -> Bytes:
        """The stripe [stripe_bytes] out of any k pieces by their numbers. Raises LocalFault for fewer, or for pieces
        of other sizes."""
        size = self.piece_bytes(stripe_bytes)
        numbers = sorted(pieces)[: self.k]
        if len(numbers) < self.k or any(not 0 <= i < self.n or len(pieces[i]) != size for i in numbers):
            raise LocalFault(f"{self.k} pieces of {size} bytes are needed")
        held = np.stack([np.frombuffer(pieces[i], dtype=np.uint8) for i in numbers])
        if numbers == list(range(self.k)):
            return held.reshape(-1)[:stripe_bytes]
        inverse = _inverse(self._rows[numbers])
        out = np.empty((self.k, size), dtype=np.uint8)
        for i in range(self.k):
            out[i] = held[numbers.index(i)] if i in numbers else _combine(inverse[i], held)
        return out.reshape(-1)[:stripe_bytes]


def _combine(row: Bytes, data: Bytes) -> Bytes:
    """Sum over i of row[i] * data[i], in the field; row [k], data [k, size] -> [size]."""
    products = _products()
    out = np.zeros(data.shape[1], dtype=np.uint8)
    for at in range(0, len(out), _BLOCK):
        part = out[at : at + _BLOCK]
        for factor, source in zip(row, data, strict=True):
            if factor:
                part ^= products[factor].take(source[at : at + _BLOCK])
    return out


@cache
def _products() -> Bytes:
    """All products in the field, [256, 256]."""
    log_of, exp_of, _ = reedsolo.init_tables(_PRIMITIVE)
    logs, powers = np.array(log_of, dtype=np.int64), np.array(exp_of, dtype=np.uint8)
    table: Bytes = powers[(logs[:, None] + logs[None, :]) % 255]
    table[0, :] = table[:, 0] = 0
    return table


@cache
def _generator(k: int, n: int) -> Bytes:
    """The code's matrix, [n, k]: piece = row times the stripe's k parts."""
    rows = np.zeros((n, k), dtype=np.uint8)
    rows[:k] = np.eye(k, dtype=np.uint8)
    if n > k:
        library = reedsolo.RSCodec(n - k, nsize=n, prim=_PRIMITIVE)
        for i in range(k):
            unit = bytearray(k)
            unit[i] = 1
            rows[k:, i] = np.frombuffer(library.encode(unit), dtype=np.uint8)[k:]
    return rows


def _inverse(matrix: Bytes) -> Bytes:
    """Of a square matrix over the field, by Gauss and Jordan. Any k rows of the generator have one."""
    products, k = _products(), len(matrix)
    inverses = np.argmax(products == 1, axis=1).astype(np.uint8)
    work = np.concatenate([matrix, np.eye(k, dtype=np.uint8)], axis=1)
    for column in range(k):
        pivot = column + int(np.flatnonzero(work[column:, column])[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = products[inverses[work[column, column]]].take(work[column])
        for row in range(k):
            if row != column and work[row, column]:
                work[row] ^= products[work[row, column]].take(work[column])
    return work[:, k:].copy()
