"""Where parked sessions leave their KV cache: one nameless file each, gone with the process.

A file, not memory: what is parked must not count against the memory that a node lends. Knows bytes and tensors; who is
parked and when is decided elsewhere.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from model_shards.dtypes import tensor_from_bytes, tensor_to_bytes
from model_shards.errors import NoRoom

RETRY_AFTER_S = 5.0


@dataclass(slots=True, eq=False, weakref_slot=True)
class Parked:
    """Tensors in a file; ``layout`` has dtype, shape and bytes of each."""

    file: IO[bytes]
    layout: list[tuple[str, tuple[int, ...], int]]

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(count for _, _, count in self.layout)


@dataclass(slots=True)
class ParkingLot:
    """At most ``bytes_max`` bytes of parked tensors in files in ``directory`` (None: where the system keeps temporary
    files)."""

    bytes_max: int
    directory: Path | None = None
    used: int = field(default=0, init=False)

    def put(self, tensors: Sequence[torch.Tensor]) -> Parked:
        """Writes ``tensors`` down. Raises NoRoom, with nothing kept, where the limit or the disk says no."""
        wanted = sum(tensor.nbytes for tensor in tensors)
        if self.used + wanted > self.bytes_max:
            raise NoRoom(
                f"{wanted} bytes to park, {self.bytes_max - self.used} of {self.bytes_max} are free",
                RETRY_AFTER_S,
            )
        try:
            file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 - lives as long as what it holds
        except OSError as error:
            raise NoRoom(f"cannot park: {error}", RETRY_AFTER_S) from error
        parked = Parked(file, [])
        weakref.finalize(parked, file.close)  # an engine that is dropped drops what it parked
        try:
            for tensor in tensors:
                dtype, shape, data = tensor_to_bytes(tensor)
                file.write(data)
                parked.layout.append((dtype, shape, len(data)))
            file.flush()
        except OSError as error:
            file.close()
            raise NoRoom(f"cannot park: {error}", RETRY_AFTER_S) from error
        self.used += parked.nbytes
        return parked

    def read(self, parked: Parked) -> Iterable[torch.Tensor]:
        """The tensors in the order they were put, one at a time, on the CPU. Raises OSError."""
        parked.file.seek(0)
        for dtype, shape, count in parked.layout:
            data = parked.file.read(count)
            if len(data) != count:
                raise OSError(f"a parked cache has {len(data)} of {count} bytes")
            yield tensor_from_bytes(dtype, shape, data)

    def drop(self, parked: Parked) -> None:
        """Forgets what was put."""
        parked.file.close()
        self.used -= parked.nbytes
