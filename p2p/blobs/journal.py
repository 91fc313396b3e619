"""Which chunks of a manifest are on this disk, in a file that survives a process killed at any moment.

Appends records of eight bytes: a chunk's number (or a marker) and a checksum bound to the manifest. What follows the
first bad record is cut off. A `synced` marker says that all data before it was flushed to the disk, so that only
chunks after it need to be hashed again when the file is opened. It does not know where the data is.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection
from pathlib import Path

_RECORD = struct.Struct("!II")
_SYNCED = 0xFFFF_FFFF
_FORGET = 0x8000_0000


class Journal:
    """Use from one thread at a time. Raises OSError as the file system does."""

    def __init__(self, path: Path, manifest_id: str, chunk_count: int) -> None:
        self._path = path
        self._key = manifest_id.encode()
        self._count = chunk_count
        self.present: set[int] = set()
        self.unsynced: set[int] = set()
        self._load()

    def _load(self) -> None:
        raw = self._path.read_bytes() if self._path.exists() else b""
        good = 0
        for at in range(0, len(raw) - _RECORD.size + 1, _RECORD.size):
            value, check = _RECORD.unpack_from(raw, at)
            number = value & ~_FORGET
            if check != self._check(value) or (value != _SYNCED and number >= self._count):
                break
            if value == _SYNCED:
                self.unsynced.clear()
            elif value & _FORGET:
                self.present.discard(number)
                self.unsynced.discard(number)
            else:
                self.present.add(number)
                self.unsynced.add(number)
            good = at + _RECORD.size
        if good != len(raw):
            with self._path.open("r+b") as file:
                file.truncate(good)

    def add(self, numbers: range | list[int]) -> None:
        """Mark chunks whose data has been written."""
        self._append(*numbers)
        self.present.update(numbers)
        self.unsynced.update(numbers)

    def forget(self, numbers: Collection[int]) -> None:
        """Unmark chunks whose data turned out to be bad, or is about to go."""
        self._append(*(number | _FORGET for number in numbers))
        self.present.difference_update(numbers)
        self.unsynced.difference_update(numbers)

    def synced(self, numbers: Collection[int]) -> None:
        """The data of these chunks is on the disk. What was marked meanwhile is marked again after the word."""
        later = self.unsynced - set(numbers)
        self._append(_SYNCED, *sorted(later), flush=True)
        self.unsynced = later

    def _append(self, *values: int, flush: bool = False) -> None:
        records = b"".join(_RECORD.pack(value, self._check(value)) for value in values)
        with self._path.open("ab") as file:
            file.write(records)
            file.flush()
            if flush:
                os.fsync(file.fileno())

    def _check(self, value: int) -> int:
        return zlib.crc32(value.to_bytes(4, "big"), zlib.crc32(self._key))
