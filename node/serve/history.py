"""What a stage handed on for its live sessions, by position, so that a replacement can be fed from it.

A shelf bounds all histories of a node together: beyond its memory the oldest rows of the longest history go to a
nameless file, beyond its disk they are forgotten, and a mended chain computes them again. Knows bytes, not engines.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from model_shards import tensor_from_bytes, tensor_to_bytes

SPILL_BYTES = 4 << 20
"""So much goes to the disk at a time: a write of this size into the system's cache takes milliseconds."""


@dataclass(slots=True)
class _Rows:
    """Rows of `count` positions from `start` on, as bytes here or at `offset` of the history's file."""

    start: int
    count: int
    nbytes: int
    data: bytes | None
    offset: int = 0


@dataclass(slots=True)
class Shelf:
    """At most `memory_bytes_max` bytes of rows in memory and `disk_bytes_max` in files in `directory` (None: where the
    system keeps temporary files)."""

    memory_bytes_max: int = 256 << 20
    disk_bytes_max: int = 4 << 30
    directory: Path | None = None
    memory_bytes: int = field(default=0, init=False)
    disk_bytes: int = field(default=0, init=False)
    histories: list[History] = field(default_factory=list, init=False)

    def open(self) -> History:
        """A history that begins at position 0."""
        history = History(self)
        self.histories.append(history)
        return history

    def make_room(self) -> None:
        """Move the oldest rows of whoever holds most until the bound is kept."""
        while self.memory_bytes > self.memory_bytes_max:
            max(self.histories, key=lambda one: one.memory_bytes).spill()


class History:
    """The outputs [n, hidden] of positions [start, end), all of one dtype and width."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._rows: list[_Rows] = []
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._file_bytes = 0
        self._dtype, self._width = "", 0
        self.start = self.end = 0
        self.memory_bytes = 0

    def begin(self, position: int) -> None:
        """Nothing is kept; what is kept next begins at `position`."""
        self.truncate(self.start)
        self.start = self.end = position

    def add(self, position: int, hidden: torch.Tensor) -> None:
        """The outputs of positions from `position` on, which must be the next ones."""
        dtype, shape, view = tensor_to_bytes(hidden)
        self.add_bytes(position, dtype, shape, bytes(view))

    def add_bytes(self, position: int, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """The same as bytes, of which no copy is made."""
        if position != self.end:
            self.begin(position)
        self._dtype, self._width = dtype, shape[1]
        self._rows.append(_Rows(position, shape[0], len(data), data))
        self.end = position + shape[0]
        self._count(len(data))
        if self._shelf.memory_bytes > self._shelf.memory_bytes_max:
            self._shelf.make_room()

    def truncate(self, position: int) -> None:
        """Forget positions from `position` on; rows that reach over it are forgotten whole."""
        while self._rows and self._rows[-1].start + self._rows[-1].count > position:
            gone = self._rows.pop()
            self.end = gone.start
            if gone.data is not None:
                self._count(-gone.nbytes)
        self._in_memory = min(self._in_memory, len(self._rows))
        self.end = min(self.end, max(position, self.start))

    def spans(self, position: int) -> list[tuple[int, int]]:
        """[start, end) of what was kept together, from `position` on."""
        found = [(max(row.start, position), row.start + row.count) for row in self._rows]
        return [(start, end) for start, end in found if start < end]

    def read(self, start: int, end: int) -> torch.Tensor:
        """The rows [end - start, hidden] of positions [start, end), all of them kept. Raises OSError."""
        at = bisect_right(self._rows, start, key=lambda row: row.start) - 1
        found = []
        while at < len(self._rows) and (row := self._rows[at]).start < end:
            found.append(self._tensor(row)[max(0, start - row.start) : end - row.start])
            at += 1
        return found[0] if len(found) == 1 else torch.cat(found)

    def spill(self) -> None:
        """The oldest rows in memory to the disk, or, where it takes no more, out of the history."""
        moved: list[_Rows] = []
        size = 0
        while self._in_memory + len(moved) < len(self._rows) and size < SPILL_BYTES:
            row = self._rows[self._in_memory + len(moved)]
            moved.append(row)
            size += row.nbytes
        if self._shelf.disk_bytes + size <= self._shelf.disk_bytes_max and self._write(moved):
            self._in_memory += len(moved)
        else:
            # A hole is of no use: what lies before it goes too.
            del self._rows[: self._in_memory + len(moved)]
            self._in_memory = 0
            self.start = self._rows[0].start if self._rows else self.end
            self._drop_file()
        self._count(-size)

    def close(self) -> None:
        """Forget everything; the history is of no use any more."""
        self.begin(0)
        self._drop_file()
        if self in self._shelf.histories:
            self._shelf.histories.remove(self)

    def _write(self, rows: list[_Rows]) -> bool:
        offset = self._file_bytes
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._shelf.directory)  # noqa: SIM115 - see close
            self._file.seek(offset)
            for row in rows:
                self._file.write(row.data or b"")
            self._file.flush()
        except OSError:
            return False
        for row in rows:
            row.offset, row.data = offset, None
            offset += row.nbytes
        self._shelf.disk_bytes += offset - self._file_bytes
        self._file_bytes = offset
        return True

    def _tensor(self, row: _Rows) -> torch.Tensor:
        data = row.data
        if data is None:
            if self._file is None:
                raise OSError("the history's file is gone")
            self._file.seek(row.offset)
            data = self._file.read(row.nbytes)
            if len(data) != row.nbytes:
                raise OSError(f"a history has {len(data)} of {row.nbytes} bytes")
        return tensor_from_bytes(self._dtype, (row.count, self._width), data)

    def _drop_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        self._shelf.disk_bytes -= self._file_bytes
        self._file_bytes = 0

    def _count(self, nbytes: int) -> None:
        self.memory_bytes += nbytes
        self._shelf.memory_bytes += nbytes
