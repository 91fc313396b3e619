"""Bytes at a place in a file: read, written, flushed. All calls block, and let other threads run meanwhile.

Large pieces go to the disk past the system's cache where the system can do that and memory lies right (`place`): a
span is written once and read once, and what it would push out of memory belongs to the computer's owner. Nothing is
opened for longer than a call. It knows nothing of chunks. Errors are OSErrors.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

PAGE_BYTES = 4096
_DIRECT_BYTES_MIN = 256 << 10
_DIRECT = getattr(os, "O_DIRECT", 0)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def page_memory(size: int) -> memoryview:
    """New memory of `size` bytes that begins with a page, as direct writes want it."""
    return memoryview(mmap.mmap(-1, size))


def place(memory: memoryview, size: int, offset: int) -> memoryview:
    """The part of page-aligned `memory` for `size` bytes that belong at `offset` of a file."""
    start = offset % PAGE_BYTES
    return memory[start : start + size]


def write_at(path: Path, offset: int, data: memoryview) -> None:
    """All of `data`, into a file that is there."""
    if _DIRECT and len(data) >= _DIRECT_BYTES_MIN:
        start, end = _written_directly(path, offset, data)
        if start < end:
            _write(path, offset, data[:start])
            offset, data = offset + end, data[end:]
    _write(path, offset, data)


def _write(path: Path, offset: int, data: memoryview) -> None:
    if not data:
        return
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        at = 0
        while at < len(data):
            at += file.write(data[at:])


def _written_directly(path: Path, offset: int, data: memoryview) -> tuple[int, int]:
    """Which bytes [start, end) of `data` went to the disk past the cache: whole pages, or none where that cannot be."""
    start = -offset % PAGE_BYTES
    end = start + (len(data) - start) // PAGE_BYTES * PAGE_BYTES
    if data.readonly or (_address(data) + start) % PAGE_BYTES:
        return 0, 0
    try:
        file = os.open(path, os.O_WRONLY | _DIRECT)
    except OSError as error:
        if error.errno in _REFUSED:
            return 0, 0
        raise
    try:
        at = start
        while at < end:
            at += os.pwrite(file, data[at:end], offset + at)
    except OSError as error:
        if error.errno in _REFUSED:
            return 0, 0
        raise
    finally:
        os.close(file)
    return start, end


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def read_at(path: Path, offset: int, into: memoryview) -> bool:
    """Fill `into`; False where the file ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        at = 0
        while at < len(into):
            count = file.readinto(into[at:])
            if not count:
                return False
            at += count
    return True


def flush(path: Path) -> None:
    """What was written to the file is on the disk when this returns."""
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())


def empty(path: Path, size: int) -> None:
    """A file of `size` bytes that takes no room."""
    with path.open("r+b", buffering=0) as file:
        file.truncate(0)
        file.truncate(size)


def punch(path: Path, start: int, end: int) -> bool:
    """Give the room of bytes [start, end) back, as far as they are whole pages; False where the system cannot, and then
    they stay until the file goes."""
    start, end = -(-start // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
    fallocate = _fallocate()
    if fallocate is None or start >= end:
        return False
    with path.open("r+b", buffering=0) as file:
        done: int = fallocate(file.fileno(), _PUNCH_HOLE | _KEEP_SIZE, start, end - start)
    return done == 0


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Linux' own, which Python does not show; elsewhere there is none."""
    if not sys.platform.startswith("linux"):
        return None
    found = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return found
