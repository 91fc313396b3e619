"""Tensor data from safetensors files into the parameters of a span.

Reads only the byte ranges asked for, through one small staging buffer, straight into its place in a fused
parameter: peak memory is the span plus the buffer (plus one tensor where a kernel needs it whole). Counts
what it read. Knows files and places; what the parameters mean is `layers.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from model_shards.checkpoint import CheckpointIndex
from model_shards.dtypes import SAFETENSORS_DTYPES
from model_shards.errors import CheckpointError
from model_shards.families import TensorSpec
from model_shards.quant import CHUNK_ROWS, QuantWeight, new_weight
from model_shards.safetensors_header import TensorInfo

STAGING_BYTES = 4 << 20


class TensorReader:
    """Reads tensors of one checkpoint. ``ranges_read`` records every (file, start, end) that was read, in
    order."""

    def __init__(
        self, directory: Path, index: CheckpointIndex, progress: Callable[[int], None] | None = None
    ) -> None:
        self._directory = directory
        self._index = index
        self._progress = progress
        self._files: dict[str, BinaryIO] = {}
        self._staging = bytearray(STAGING_BYTES)
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

    def read_into(self, spec: TensorSpec, target: torch.Tensor, first_row: int = 0) -> None:
        """Fills ``target`` (contiguous) with ``spec``'s rows from ``first_row`` on, converted to its dtype.
        Raises CheckpointError for a wrong shape or dtype, a file cut short, or a value that is NaN or
        infinite (also after conversion)."""
        info = self._index.check_tensor(spec)
        dtype = SAFETENSORS_DTYPES[info.dtype]
        flat = target.view(-1)
        step = STAGING_BYTES // dtype.itemsize
        begin = info.start + first_row * math.prod(spec.shape[1:]) * dtype.itemsize
        for first in range(0, flat.numel(), step):
            last = min(first + step, flat.numel())
            self._read(info, spec.name, begin + first * dtype.itemsize, begin + last * dtype.itemsize)
            source = torch.frombuffer(self._staging, dtype=dtype, count=last - first)
            self._check_finite(info, spec.name, source)
            piece = flat[first:last]
            piece.copy_(source)
            if target.dtype == torch.float16 != dtype:
                self._check_finite(info, spec.name, piece, f"after conversion from {info.dtype} to float16")

    def _read(self, info: TensorInfo, name: str, start: int, end: int) -> None:
        stream = self._files.get(info.file)
        view = memoryview(self._staging)[: end - start]
        filled = 0
        try:
            if stream is None:
                stream = self._files[info.file] = (self._directory / info.file).open("rb", buffering=0)
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

    @staticmethod
    def _check_finite(info: TensorInfo, name: str, values: torch.Tensor, when: str = "") -> None:
        low, high = values.aminmax()
        for value in (low.item(), high.item()):
            if not math.isfinite(value):
                raise CheckpointError(
                    info.file, name, f"contains {value} {when}".rstrip() + ", expected finite values"
                )


Part = torch.Tensor | QuantWeight


def load_parts(
    reader: TensorReader,
    specs: Iterable[TensorSpec],
    dtype: torch.dtype,
    device: torch.device,
    quant: str = "none",
) -> dict[str, Part]:
    """The parameters that ``specs`` fill, by part name; parts of several tensors are fused along their rows.
    Norms and wide parts keep float32; matrices are quantised as they come, plain ones excepted."""
    fused: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        fused.setdefault(spec.part, []).append(spec)
    return {part: _load_part(reader, part, found, dtype, device, quant) for part, found in fused.items()}


def is_quantised(spec: TensorSpec) -> bool:
    """Whether ``spec`` belongs to a matrix that quantising changes."""
    return len(spec.shape) == 2 and not spec.plain


def _load_part(
    reader: TensorReader,
    part: str,
    specs: list[TensorSpec],
    dtype: torch.dtype,
    device: torch.device,
    quant: str,
) -> Part:
    if quant != "none" and is_quantised(specs[0]):
        return _load_quantised(reader, specs, dtype, device, quant)
    kept = torch.float32 if specs[0].wide or part.endswith("norm") else dtype
    rows = sum(spec.shape[0] for spec in specs)
    whole = torch.empty((rows, *specs[0].shape[1:]), dtype=kept, device=device)
    for spec in specs:
        reader.read_into(spec, whole[spec.row : spec.row + spec.shape[0]])
    return whole


def _load_quantised(
    reader: TensorReader, specs: list[TensorSpec], dtype: torch.dtype, device: torch.device, quant: str
) -> QuantWeight:
    width = specs[0].shape[1]
    # The vocabulary projection and the embedding keep eight bits: four cost more there than anywhere else.
    kind = "int8" if specs[0].part in ("embed", "head") else quant
    weight = new_weight(kind, [spec.shape[0] for spec in specs], width, dtype, device)
    buffer = torch.empty(min(CHUNK_ROWS, max(spec.shape[0] for spec in specs)), width)
    for spec in specs:
        for first in range(0, spec.shape[0], CHUNK_ROWS):
            values = buffer[: min(CHUNK_ROWS, spec.shape[0] - first)]
            reader.read_into(spec, values, first)
            weight.fill(spec.row + first, values.to(device))
    return weight
