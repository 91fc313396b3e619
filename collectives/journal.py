"""What must survive a crash: the last value of each key, in one append-only file that a kill at any instant may tear.

A record is its lengths, a checksum, the key and the value; what follows the first bad record is cut off when the file
is opened, because it was never confirmed. `put` returns once the value is on the disk; values that are put together
share one fsync. It does not know what the values mean. Without a path it keeps them in memory only, for tests and for
runs that accept that a restarted member is a newcomer.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import trio

from collectives.errors import JournalError

MAGIC = b"shoal rounds 1\n\n"
KEY_BYTES_MAX = 1024
VALUE_BYTES_MAX = 16 << 20
_HEAD = struct.Struct("!HII")  # bytes of the key, bytes of the value, checksum of lengths, key and value


class Journal:
    """Made by `Journal.open`; one process at a time uses a file. After a failed write it refuses all others, because
    nobody can tell what of them reached the disk."""

    def __init__(
        self, path: Path | None, values: dict[str, bytes], file: BinaryIO | None, file_bytes: int
    ) -> None:
        self._path = path
        self._values = values
        self._file = file
        self._file_bytes = file_bytes
        self._live_bytes = sum(_record_bytes(key, value) for key, value in values.items())
        self._queued: list[bytes] = []
        self._lock = trio.Lock()
        self._generation = 0  # of the records queued now; those of lower generations are on the disk
        self._failure: JournalError | None = None
        self.compact_bytes_min = 1 << 20

    @classmethod
    def open(cls, path: Path | None) -> Journal:
        """Read what is there. Raises JournalError for a file that is not one of ours or cannot be used."""
        if path is None:
            return cls(None, {}, None, 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                _spare(path).unlink()
            raw = path.read_bytes() if path.exists() else b""
            values, good = _parse(raw)
            # A file shorter than its first line was torn while it was made: nothing had been confirmed.
            if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
                raise JournalError(f"{path} is not a journal of rounds")
            file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            if good < len(MAGIC):
                file.write(MAGIC)
                good = len(MAGIC)
            file.truncate(good)
            file.seek(good)
            os.fsync(file.fileno())
            sync_directory(path.parent)
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be opened: {error}") from error
        return cls(path, values, file, good)

    def get(self, key: str) -> bytes | None:
        """The last value put, durable or about to be."""
        return self._values.get(key)

    def names(self) -> tuple[str, ...]:
        return tuple(self._values)

    async def put(self, key: str, value: bytes) -> None:
        """Durable when it returns. Raises JournalError; a cancelled put may or may not have happened."""
        if self._failure is not None:
            raise JournalError(str(self._failure))
        name = key.encode()
        if len(name) > KEY_BYTES_MAX or len(value) > VALUE_BYTES_MAX:
            raise JournalError(f"{key[:60]!r}: {len(value)} bytes are more than a journal's record holds")
        old = self._values.get(key)
        self._live_bytes += len(value) - (len(old) if old is not None else -_HEAD.size - len(name))
        self._values[key] = bytes(value)
        if self._file is None:
            await trio.lowlevel.checkpoint()
            return
        self._queued.append(_record(name, value))
        mine = self._generation
        async with self._lock:
            if self._generation > mine:
                if self._failure is not None:
                    raise JournalError(str(self._failure))
                return  # whoever held the lock took this record along
            await self._flush(self._file)

    async def _flush(self, file: BinaryIO) -> None:
        records, self._queued = b"".join(self._queued), []
        self._generation += 1
        compact = self._file_bytes + len(records) > max(self.compact_bytes_min, 8 * self._live_bytes)
        values = dict(self._values) if compact else None

        def write() -> tuple[BinaryIO, int]:
            if values is not None and self._path is not None:
                return _rewritten(self._path, values, file)
            file.write(records)
            os.fsync(file.fileno())
            return file, self._file_bytes + len(records)

        with trio.CancelScope(shield=True):
            try:
                self._file, self._file_bytes = await trio.to_thread.run_sync(write)
            except OSError as error:
                self._failure = JournalError(f"the journal {self._path} cannot be written: {error}")
                raise self._failure from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._failure = JournalError(f"the journal {self._path} is closed")


def _record_bytes(key: str, value: bytes) -> int:
    return _HEAD.size + len(key.encode()) + len(value)


def _record(name: bytes, value: bytes) -> bytes:
    lengths = struct.pack("!HI", len(name), len(value))
    check = zlib.crc32(value, zlib.crc32(name, zlib.crc32(lengths)))
    return _HEAD.pack(len(name), len(value), check) + name + value


def _parse(raw: bytes) -> tuple[dict[str, bytes], int]:
    """The values, and how many bytes of the file are good."""
    values: dict[str, bytes] = {}
    if raw[: len(MAGIC)] != MAGIC:
        return values, 0
    at = len(MAGIC)
    while at + _HEAD.size <= len(raw):
        name_bytes, value_bytes, _ = _HEAD.unpack_from(raw, at)
        end = at + _HEAD.size + name_bytes + value_bytes
        if name_bytes > KEY_BYTES_MAX or value_bytes > VALUE_BYTES_MAX or end > len(raw):
            break
        name = raw[at + _HEAD.size : at + _HEAD.size + name_bytes]
        value = raw[at + _HEAD.size + name_bytes : end]
        if _record(name, value) != raw[at:end]:
            break
        try:
            values[name.decode()] = value
        except UnicodeDecodeError:
            break
        at = end
    return values, at


def _spare(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _rewritten(path: Path, values: dict[str, bytes], old: BinaryIO) -> tuple[BinaryIO, int]:
    """A new file with the last values alone takes the old one's place, whole or not at all."""
    data = MAGIC + b"".join(_record(key.encode(), value) for key, value in values.items())
    spare = _spare(path)
    file = spare.open("w+b", buffering=0)
    file.write(data)
    os.fsync(file.fileno())
    if os.name == "nt":  # an open file cannot be replaced there
        file.close()
        old.close()
        os.replace(spare, path)
        file = path.open("r+b", buffering=0)
        file.seek(0, os.SEEK_END)
    else:
        os.replace(spare, path)
        old.close()
        sync_directory(path.parent)
    return file, len(data)


def sync_directory(directory: Path) -> None:
    """So that a new name survives a power cut; where directories cannot be opened, the system does it alone."""
    if os.name == "nt":
        return
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
