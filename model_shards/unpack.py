"""Rows of a logical matrix out of whatever its checkpoint stores: plain, stacked and transposed, or packed.

The layouts (bit by bit, for ``q`` unsigned four-bit numbers and ``w = (q - zero) * scale``):
GPTQ packs eight inputs a word, lowest bits first, [width / 8, rows], and zeros eight rows a word; AWQ packs
eight rows a word in the order 0 2 4 6 1 3 5 7, [width, rows / 8]; compressed-tensors eight inputs a word,
[rows, width / 8], eight added to its signed numbers; MXFP4 (OCP Microscaling 1.0) two inputs a byte as E2M1,
with a power of two for 32 of them; DeepSeek's FP8 (arXiv 2412.19437, 3.3) E4M3 times a scale for a block of rows and
inputs.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from model_shards.errors import CheckpointError
from model_shards.families import TensorSpec
from model_shards.packing import MXFP4_GROUP, Packing, Stored, locate
from model_shards.reader import TensorReader, check_finite

WORD = 8  # four-bit numbers in 32 bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
E8M0_NAN = 255


class Source(Protocol):
    """The rows of one logical matrix [rows, width]."""

    def read(self, first: int, target: torch.Tensor) -> None:
        """Fills ``target`` [n, width] with rows from ``first`` on."""


def open_source(reader: TensorReader, spec: TensorSpec, stored: Stored | None = None) -> Source:
    """Where ``spec``'s rows come from. Raises CheckpointError for what is missing or misshapen."""
    stored = stored or locate(reader.index, reader.packing, spec)
    if stored.method == "mxfp4":
        return Mxfp4Rows(reader, spec, stored)
    if stored.method == "fp8" and reader.packing is not None:
        return Fp8Rows(reader, spec, stored, reader.packing.block)
    if stored.method != "plain" and reader.packing is not None:
        return PackedRows(reader, spec, stored, reader.packing)
    return StackedRows(reader, spec, stored) if spec.stack else PlainRows(reader, spec, stored)


class PlainRows:
    """Rows as they lie; also tensors of one dimension."""

    def __init__(self, reader: TensorReader, spec: TensorSpec, stored: Stored) -> None:
        self._reader = reader
        self._name, self._info = stored.main
        self._width = spec.shape[1] if len(spec.shape) > 1 else 1

    def read(self, first: int, target: torch.Tensor) -> None:
        self._reader.read_into(self._name, self._info, target, first * self._width)


class StackedRows:
    """Matrices stored transposed in one tensor [stack, width, rows of one]; one of them is held at a time."""

    def __init__(self, reader: TensorReader, spec: TensorSpec, stored: Stored) -> None:
        self._reader = reader
        self._name, self._info = stored.main
        _, self._width, self._rows = self._info.shape
        self._held = -1
        self._matrix = torch.empty(0)

    def read(self, first: int, target: torch.Tensor) -> None:
        done = 0
        while done < len(target):
            number, row = divmod(first + done, self._rows)
            count = min(len(target) - done, self._rows - row)
            if number != self._held:
                self._matrix = torch.empty(self._width, self._rows, dtype=target.dtype)
                at = number * self._width * self._rows
                self._reader.read_into(self._name, self._info, self._matrix, at)
                self._held = number
            target[done : done + count] = self._matrix[:, row : row + count].T
            done += count


class Mxfp4Rows:
    """E2M1 numbers times a power of two a group of 32 inputs."""

    def __init__(self, reader: TensorReader, spec: TensorSpec, stored: Stored) -> None:
        self._reader = reader
        self._words, self._scales = stored.pieces["words"], stored.pieces["scales"]
        self._width = spec.shape[1]
        self._table = torch.tensor(E2M1)
        self._powers = torch.tensor([math.ldexp(1.0, power - E8M0_BIAS) for power in range(E8M0_NAN)])

    def read(self, first: int, target: torch.Tensor) -> None:
        count, groups = len(target), self._width // MXFP4_GROUP
        words = torch.empty(count, self._width // 2, dtype=torch.uint8)
        self._reader.read_into(*self._words, words, first * (self._width // 2))
        powers = torch.empty(count, groups, dtype=torch.uint8)
        self._reader.read_into(*self._scales, powers, first * groups)
        if (powers == E8M0_NAN).any():
            raise CheckpointError(
                self._scales[1].file, self._scales[0], "contains nan, expected finite values"
            )
        scales = self._powers[powers.int()]
        numbers = torch.stack((words & 15, words >> 4), -1).view(count, groups, MXFP4_GROUP)
        values = self._table[numbers.int()] * scales.unsqueeze(-1)
        target.copy_(values.view(count, self._width))
        if target.dtype != torch.float32:
            check_finite(self._words[1], self._words[0], target, f"after conversion to {target.dtype}")


class Fp8Rows:
    """E4M3 numbers times the scale of their block: ``w[i, j] * scale[i // rows, j // inputs]``."""

    def __init__(
        self, reader: TensorReader, spec: TensorSpec, stored: Stored, block: tuple[int, int]
    ) -> None:
        self._reader = reader
        self._values = stored.pieces["values"]
        self._width = spec.shape[1]
        self._block = block
        self._scales = reader.read(*stored.pieces["scales"]).float()

    def read(self, first: int, target: torch.Tensor) -> None:
        name, info = self._values
        values = torch.empty(len(target), self._width)
        self._reader.read_into(name, info, values, first * self._width)
        tall, wide = self._block
        own = self._scales[torch.arange(first, first + len(target)) // tall]
        for at in range(own.shape[1]):
            values[:, at * wide : (at + 1) * wide] *= own[:, at, None]
        target.copy_(values)
        # A finite number times a finite scale may be beyond what is computed in.
        check_finite(info, name, target, f"times its scale in {target.dtype}")


class PackedRows:
    """Four-bit numbers with ``scales`` and ``zeros`` [rows, groups] float32.

    GPTQ and AWQ keep the rows of a matrix across their words, so their words (half a byte a weight) are held
    whole while it is read. ``order`` [width] says which group an input belongs to, None where that is plain.
    """

    def __init__(self, reader: TensorReader, spec: TensorSpec, stored: Stored, packing: Packing) -> None:
        self._reader, self._packing, self._stored = reader, packing, stored
        self._rows, self._width = spec.shape
        self._words: torch.Tensor | None = None
        self._check_shape(spec)
        by_row = packing.method == "compressed-tensors"
        scales = reader.read(*stored.pieces["scales"]).float()
        self.scales = scales if by_row else scales.T.contiguous()
        self.zeros = self._read_zeros()
        self.order = self._read_order()

    def numbers(self, first: int, count: int) -> torch.Tensor:
        """q [count, width] uint8 of rows from ``first`` on (both in eights, the last rows excepted)."""
        name, info = self._stored.pieces["words"]
        if self._packing.method == "compressed-tensors":
            words = torch.empty(count, info.shape[1], dtype=torch.int32)
            self._reader.read_into(name, info, words, first * info.shape[1])
            return _nibbles(words).flatten(1)[:, : self._width]
        if self._words is None:
            self._words = self._reader.read(name, info)
        if self._packing.method == "gptq":
            return _nibbles(self._words[:, first : first + count].T.contiguous()).flatten(1)
        rows = _awq_rows(self._words[:, first // WORD : -(-(first + count) // WORD)])
        return rows.T.contiguous()

    def read(self, first: int, target: torch.Tensor) -> None:
        """Fills ``target`` with dequantised rows from ``first`` on."""
        count = len(target)
        values = self.numbers(first, count).float()
        order = self.order if self.order is not None else self._plain_order()
        rows = slice(first, first + count)
        values -= self.zeros[rows][:, order]
        values *= self.scales[rows][:, order]
        target.copy_(values)
        if target.dtype == torch.float16:
            name, info = self._stored.main
            check_finite(info, name, target, "after conversion to float16")

    def _plain_order(self) -> torch.Tensor:
        if not self._packing.group:
            return torch.zeros(self._width, dtype=torch.int64)
        return torch.arange(self._width) // self._packing.group

    def _read_zeros(self) -> torch.Tensor:
        groups = self.scales.shape[1]
        if "zeros" not in self._stored.pieces:
            return torch.full((self._rows, groups), 8.0)
        stored = self._reader.read(*self._stored.pieces["zeros"])
        if stored.dtype == torch.int8:
            return stored.float() + 8
        if self._packing.method == "compressed-tensors":
            return _nibbles(stored.T.contiguous()).flatten(1)[:, : self._rows].T.float().contiguous()
        if self._packing.method == "awq":
            return _awq_rows(stored).T.float().contiguous()
        zeros = _nibbles(stored).flatten(1)
        if self._packing.zeros_less_one:
            zeros = (zeros + 1) & 15
        return zeros.T.float().contiguous()

    def _read_order(self) -> torch.Tensor | None:
        if "order" not in self._stored.pieces:
            return None
        name, info = self._stored.pieces["order"]
        order = self._reader.read(name, info).long()
        if torch.equal(order, self._plain_order()) or bool((order == -1).all()):
            return None
        groups = self.scales.shape[1]
        low, high = int(order.min()), int(order.max())
        if low < 0 or high >= groups:
            wrong = low if low < 0 else high
            raise CheckpointError(info.file, name, f"contains group {wrong}, expected 0 to {groups - 1}")
        return order

    def _check_shape(self, spec: TensorSpec) -> None:
        if "shape" in self._stored.pieces:
            name, info = self._stored.pieces["shape"]
            found = self._reader.read(name, info).tolist()
            if found != list(spec.shape):
                raise CheckpointError(
                    info.file, name, f"says {found}, config.json implies {list(spec.shape)}"
                )


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n, m, 8], lowest bits first."""
    low_first = words.contiguous().view(torch.uint8)  # little-endian, as the reader checks
    pairs = torch.stack((low_first & 15, low_first >> 4), -1)
    return pairs.view(*words.shape, WORD)


def _awq_rows(words: torch.Tensor) -> torch.Tensor:
    """AWQ's words [n, m] -> numbers [n, 8 m] in the order of the rows."""
    place = torch.tensor([AWQ_ORDER.index(row) for row in range(WORD)])
    return _nibbles(words)[..., place].flatten(1)
