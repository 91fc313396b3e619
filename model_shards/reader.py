"""Bytes and numbers of safetensors files, by range, through one small staging buffer.

Counts and remembers what it read. Knows files and places; what the numbers mean is for `unpack.py` and
`weights.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from model_shards.checkpoint import CheckpointIndex
from model_shards.dtypes import STORED_DTYPES
from model_shards.errors import CheckpointError
from model_shards.packing import Packing
from model_shards.safetensors_header import TensorInfo

STAGING_BYTES = 1 << 20
log = logging.getLogger(__name__)


class TensorReader:
    """Reads tensors of one checkpoint. ``ranges_read`` records every (file, start, end) that was read, in
    order."""

    def __init__(
        self,
        directory: Path,
        index: CheckpointIndex,
        progress: Callable[[int], None] | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.directory = directory
        self.index = index
        self.packing = packing
        self._progress = progress
        self._files: dict[str, BinaryIO] = {}
        self._staging = bytearray(STAGING_BYTES)
        self._told: set[str] = set()
        self.ranges_read: list[tuple[str, int, int]] = []

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._files.values():
            stream.close()
        self._files.clear()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return sum(end - start for _, start, end in self.ranges_read)

    def read_into(self, name: str, info: TensorInfo, target: torch.Tensor, first: int = 0) -> None:
        """Fills ``target`` (contiguous) with the tensor's numbers from the ``first``-th on, converted to its
        dtype. Raises CheckpointError for a file cut short, or a value that is NaN or infinite (also after
        conversion)."""
        dtype = STORED_DTYPES[info.dtype]
        flat = target.view(-1)
        step = STAGING_BYTES // dtype.itemsize
        begin = info.start + first * dtype.itemsize
        for done in range(0, flat.numel(), step):
            count = min(step, flat.numel() - done)
            at = begin + done * dtype.itemsize
            self._read(info, name, at, at + count * dtype.itemsize)
            source = torch.frombuffer(self._staging, dtype=dtype, count=count)
            if dtype.itemsize == 1 and dtype.is_floating_point:
                source = source.float()  # torch compares no eight-bit floats
            if dtype.is_floating_point:
                check_finite(info, name, source)
            piece = flat[done : done + count]
            piece.copy_(source)
            if target.dtype == torch.float16 != dtype:
                check_finite(info, name, piece, f"after conversion from {info.dtype} to float16")

    def read(self, name: str, info: TensorInfo) -> torch.Tensor:
        """The whole tensor in its own dtype."""
        whole = torch.empty(info.shape, dtype=STORED_DTYPES[info.dtype])
        self.read_into(name, info, whole)
        return whole

    def skipped(self, count: int) -> None:
        """Tells progress of ``count`` bytes that need not be read."""
        if self._progress:
            self._progress(count)

    def tell_once(self, subject: str, reason: str) -> None:
        """Logs that ``subject`` is dequantised for ``reason``; a reason is told once a load."""
        if reason not in self._told:
            self._told.add(reason)
            log.warning("%s (and all like it) is dequantised while loading: %s", subject, reason)

    def _read(self, info: TensorInfo, name: str, start: int, end: int) -> None:
        stream = self._files.get(info.file)
        view = memoryview(self._staging)[: end - start]
        filled = 0
        try:
            if stream is None:
                stream = self._files[info.file] = (self.directory / info.file).open("rb", buffering=0)
            stream.seek(start)
            while filled < len(view):
                got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
                if not got:
                    break
                filled += got
        except OSError as error:
            raise CheckpointError(info.file, name, f"cannot be read: {error.strerror or error}") from error
        if filled < len(view):
            raise CheckpointError(info.file, name, f"truncated: ends at byte {start + filled}, needs {end}")
        self.ranges_read.append((info.file, start, end))
        if self._progress:
            self._progress(end - start)


def check_finite(info: TensorInfo, name: str, values: torch.Tensor, when: str = "") -> None:
    """Raises CheckpointError naming the tensor and the value that is NaN or infinite."""
    low, high = values.aminmax()
    for value in (low.item(), high.item()):
        if not math.isfinite(value):
            raise CheckpointError(
                info.file, name, f"contains {value} {when}".rstrip() + ", expected finite values"
            )
