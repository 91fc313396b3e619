"""CheckpointIndex: where every tensor of a model directory lies, from the files' headers alone.

Works on sparse files of which only some ranges have arrived: it reads headers and file sizes, never tensor
data. Knows which byte ranges a span needs and where a publisher should cut; does not load, transfer or verify
contents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model_shards.errors import CheckpointError, ConfigError, LocalFault
from model_shards.families import span_tensors
from model_shards.fields import read_json_object
from model_shards.packing import locate
from model_shards.safetensors_header import Header, TensorInfo, coalesce, read_header

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS_MAX = 10_000
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class CheckpointIndex:
    """The tensors of one model directory. Names of files are relative to it and never contain a directory."""

    def __init__(
        self, directory: Path, headers: Mapping[str, Header], placed: Mapping[str, str] | None
    ) -> None:
        self._directory = directory
        self._headers = dict(headers)
        self._tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            for name, info in header.tensors.items():
                if placed is not None and placed.get(name) != file:
                    continue
                self._tensors[name] = info
        for name, file in (placed or {}).items():
            if name not in self._tensors:
                raise CheckpointError(
                    file, name, f"{INDEX} places it here, but the file's header has no such tensor"
                )

    @classmethod
    def open(cls, directory: Path) -> CheckpointIndex:
        """Reads the headers of `model.safetensors`, or of the shards its index names. Raises
        CheckpointError."""
        if (directory / SINGLE).exists():
            return cls(directory, {SINGLE: read_header(directory / SINGLE)}, None)
        if not (directory / INDEX).exists():
            raise CheckpointError(SINGLE, None, f"missing from {directory} (and there is no {INDEX})")
        placed = _weight_map(directory / INDEX)
        files = sorted(set(placed.values()))
        if len(files) > SHARDS_MAX:
            raise CheckpointError(INDEX, None, f"names {len(files)} files, at most {SHARDS_MAX} allowed")
        for file in files:
            if not (directory / file).exists():
                raise CheckpointError(file, None, f"missing, though {INDEX} names it")
        return cls(directory, {file: read_header(directory / file) for file in files}, placed)

    def tensor(self, name: str) -> TensorInfo:
        """Where ``name`` lies. Raises CheckpointError if the checkpoint lacks it."""
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(", ".join(self.files()[:3]), name, "missing from the checkpoint")
        return info

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor called ``name``."""
        return name in self._tensors

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def files(self) -> tuple[str, ...]:
        """Names of the weight files, relative to the directory."""
        return tuple(self._headers)

    def header_bytes(self, file: str) -> int:
        """Length of the leading part of ``file`` that is header, in bytes."""
        return self._headers[file].bytes_end

    def check(self, config: ModelConfig) -> None:
        """Every tensor the config implies is there with its shape and a loadable dtype, and no file is cut
        short.

        Raises CheckpointError naming file, tensor and both values.
        """
        for file, header in self._headers.items():
            size = (self._directory / file).stat().st_size
            if size != header.file_bytes:
                what = "truncated" if size < header.file_bytes else "has bytes after its last tensor"
                raise CheckpointError(
                    file, None, f"{what}: {size} bytes, its header says {header.file_bytes}"
                )
        for spec in span_tensors(config, 0, config.layers):
            locate(self, config.packing, spec)

    def span_ranges(self, config: ModelConfig, start: int, end: int) -> dict[str, list[tuple[int, int]]]:
        """Byte ranges of the tensors that span [start, end) needs, by file, sorted and coalesced; headers not
        included.

        Raises CheckpointError for a missing or misshapen tensor, LocalFault for a span outside the model.
        """
        check_span(config, start, end)
        ranges: dict[str, list[tuple[int, int]]] = {}
        for spec in span_tensors(config, start, end):
            for _, info in locate(self, config.packing, spec).pieces.values():
                ranges.setdefault(info.file, []).append((info.start, info.end))
        return {file: coalesce(found) for file, found in ranges.items()}

    def cuts(self) -> dict[str, list[int]]:
        """Offsets at which to cut each file so that pieces follow headers and layers: the header's end, then
        every boundary between one layer (or one tensor outside the layers) and the next. Strictly
        increasing."""
        return {file: self._cuts_of(header) for file, header in self._headers.items()}

    def _cuts_of(self, header: Header) -> list[int]:
        cuts = [header.bytes_end]
        group = None
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
            layer = _LAYER.search(name)
            found = layer.group(1) if layer else name
            if found != group and info.start > cuts[-1]:
                cuts.append(info.start)
            group = found
        return cuts


def check_span(config: ModelConfig, start: int, end: int) -> None:
    """Raises LocalFault unless [start, end) is a non-empty span of the model's layers."""
    if not 0 <= start < end <= config.layers:
        raise LocalFault(f"span [{start}, {end}) is not within the model's layers [0, {config.layers})")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        placed = read_json_object(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(INDEX, None, str(error).removeprefix("config.json: ")) from error
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(INDEX, None, "has no weight_map from tensor names to files")
    for name, file in placed.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}", file):
            raise CheckpointError(INDEX, name, f"file {file!r:.80} is not a plain file name")
    return placed
