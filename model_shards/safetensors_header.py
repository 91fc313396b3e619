"""The safetensors header, parsed by hand and strictly (format: huggingface.co/docs/safetensors).

bytes in, tensor places out, or a CheckpointError naming file and tensor. Lengths are checked before anything
is read or allocated; duplicate keys, overlaps, holes and sizes that contradict shapes are refused. Does not
read tensor data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shards.errors import CheckpointError

HEADER_BYTES_MAX = 100_000_000  # the format's own ceiling
TENSORS_MAX = 1_000_000
DIMENSIONS_MAX = 8
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place: bytes [start, end) of ``file``, counted from the file's beginning."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """``bytes_end`` is 8 plus the header's length; ``file_bytes`` what the file must measure in all."""

    tensors: dict[str, TensorInfo]
    bytes_end: int
    file_bytes: int


def header_range(first_bytes: bytes, file: str = "model.safetensors") -> tuple[int, int]:
    """The byte range [0, 8 + n) that holds the whole header, from a file's first 8 bytes. Raises
    CheckpointError."""
    if len(first_bytes) < 8:
        raise CheckpointError(file, None, f"truncated: {len(first_bytes)} bytes, a header needs at least 8")
    length = int.from_bytes(first_bytes[:8], "little")
    if not 2 <= length <= HEADER_BYTES_MAX:
        raise CheckpointError(file, None, f"header of {length} bytes, must be from 2 to {HEADER_BYTES_MAX}")
    return 0, 8 + length


def read_header(path: Path) -> Header:
    """Reads and parses the header of one file, and nothing else of it. Raises CheckpointError."""
    try:
        with path.open("rb") as stream:
            _, end = header_range(stream.read(8), path.name)
            body = stream.read(end - 8) if end <= path.stat().st_size else b""
    except OSError as error:
        raise CheckpointError(path.name, None, f"cannot be read: {error.strerror or error}") from error
    if len(body) != end - 8:
        raise CheckpointError(path.name, None, f"truncated: the header alone ends at byte {end}")
    return parse_header(body, path.name)


def parse_header(body: bytes, file: str) -> Header:
    """Parses the JSON part of a header. Pure and total: a Header or a CheckpointError."""
    try:
        entries = json.loads(body.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, None, f"header is not JSON: {error}") from error
    if not isinstance(entries, _Pairs):
        raise CheckpointError(file, None, "header is not a JSON object")
    if len(entries) > TENSORS_MAX:
        raise CheckpointError(file, None, f"{len(entries)} tensors, at most {TENSORS_MAX} allowed")
    tensors: dict[str, TensorInfo] = {}
    data_start = 8 + len(body)
    for name, entry in entries:
        if name in tensors:
            raise CheckpointError(file, name, "appears twice in the header")
        if name != "__metadata__":
            tensors[name] = _tensor(file, name, entry, data_start)
    return Header(tensors, data_start, _check_layout(file, tensors, data_start))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that duplicate keys can be seen."""


def _tensor(file: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    if len(fields) != 3 or len(entry) != 3 or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(file, name, "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(file, name, f"dtype {dtype!r:.40}, expected one of {', '.join(ITEM_BYTES)}")
    if not _counts(shape) or len(shape) > DIMENSIONS_MAX:
        raise CheckpointError(file, name, f"shape {shape!r:.80}, expected at most {DIMENSIONS_MAX} sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(file, name, f"data_offsets {offsets!r:.80}, expected [begin, end]")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        held = offsets[1] - offsets[0]
        raise CheckpointError(file, name, f"holds {held} bytes, but {dtype} {list(shape)} takes {needed}")
    return TensorInfo(file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_layout(file: str, tensors: dict[str, TensorInfo], data_start: int) -> int:
    """Tensors must fill the data part one after another without holes; returns where the file must end."""
    at = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
            raise CheckpointError(file, name, f"starts at byte {info.start}, expected {at}: {what}")
        at = info.end
    return at


def coalesce(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorts half-open ranges and joins those that touch; empty ones vanish."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
