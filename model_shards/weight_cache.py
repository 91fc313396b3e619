"""Quantised weights on disk, so that a span that was quantised once loads at the speed of the disk.

One entry a fused matrix, under a hash of what it was made from (identity of the source files, places, packing)
and how (settings). An entry is written aside and renamed; it ends with a hash of its bytes, and one that is torn
or foreign counts as absent. Knows tensors and files; what is worth caching is `weights.py`'s to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from model_shards.dtypes import tensor_to_bytes
from model_shards.errors import CheckpointError, LocalFault
from model_shards.safetensors_header import Header, header_range, parse_header

FORMAT = 1  # raised whenever an entry's meaning changes: also how a weight is quantised
CHUNK_BYTES = 4 << 20
HEADER_BYTES_MAX = 1 << 16
DIGEST_BYTES = 32
SUFFIX, PART_SUFFIX = ".safetensors", ".part"
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.[A-Za-z0-9_]+\.part")
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"} | {
    torch.int8: "I8",
    torch.uint8: "U8",
}
log = logging.getLogger(__name__)


def file_identity(path: Path) -> str:
    """Changes whenever the file's contents may have: length, times to the nanosecond, and inode. A time that
    was set back does not hide a change, as that itself is a change of status."""
    found = path.stat()
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_ino}"


class WeightCache:
    """Entries in ``directory``, together at most ``bytes_max`` bytes: the longest unused go first.

    Files that are not named as its own are neither counted nor touched. Nothing here fails a load: what cannot
    be read is made again, what cannot be written is logged. ``identity`` says which contents a source file
    has, where the caller knows better than `file_identity` (a hash, say). Several processes may share it.
    """

    def __init__(
        self, directory: Path, bytes_max: int, *, identity: Callable[[Path], str] = file_identity
    ) -> None:
        if bytes_max < 0:
            raise LocalFault(f"bytes_max is {bytes_max}, expected at least 0")
        self.directory = directory
        self.bytes_max = bytes_max
        self._identity = identity

    def key(self, settings: Mapping[str, object], files: Mapping[str, Path]) -> str:
        """The name of what is made with ``settings`` (JSON values) from ``files``."""
        made_from = {name: self._identity(path) for name, path in files.items()}
        text = json.dumps([FORMAT, dict(settings), made_from], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def fetch(self, key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Fills ``tensors`` in place from the entry ``key``; False (contents undefined) where there is no
        whole one."""
        path = self.directory / (key + SUFFIX)
        try:
            with path.open("rb", buffering=0) as stream:
                _read_entry(stream, path, key, tensors)
            os.utime(path)
        except FileNotFoundError:
            return False
        except (OSError, CheckpointError) as error:
            log.warning("a cached weight is made again: %s", error)
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        return True

    def store(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes the entry ``key``, after older ones have made room. One larger than the cache is not kept."""
        body = _header(tensors)
        size = 8 + len(body) + sum(tensor.nbytes for tensor in tensors.values()) + DIGEST_BYTES
        if size > self.bytes_max:
            return
        part: Path | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            handle, name = tempfile.mkstemp(PART_SUFFIX, f".{key}.", self.directory)
            part = Path(name)
            with os.fdopen(handle, "wb") as stream:
                _write_entry(stream, body, key, tensors)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self.directory / (key + SUFFIX))
        except OSError as error:
            log.warning("a quantised weight is not cached: %s", error)
            if part is not None:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def bytes_used(self) -> int:
        """Bytes of all entries, unfinished ones included."""
        return sum(size for _, _, size in self._entries())

    def _make_room(self, wanted: int) -> None:
        entries = sorted(self._entries())
        used = sum(size for _, _, size in entries)
        for _, path, size in entries:
            if used + wanted <= self.bytes_max:
                return
            path.unlink(missing_ok=True)
            used -= size

    def _entries(self) -> Iterator[tuple[int, Path, int]]:
        """(time of last use, path, bytes) of every file of ours."""
        try:
            with os.scandir(self.directory) as found:
                for entry in found:
                    if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        stat = entry.stat(follow_symlinks=False)
                        yield stat.st_mtime_ns, Path(entry.path), stat.st_size
        except OSError:
            return


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries, at = {}, 0
    shapes = {
        name: (_DTYPES[tensor.dtype], list(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }
    shapes["digest"] = ("U8", [DIGEST_BYTES], DIGEST_BYTES)
    for name, (dtype, shape, size) in shapes.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return json.dumps(entries).encode()


def _write_entry(stream: BinaryIO, body: bytes, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    digest = hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES)
    stream.write(len(body).to_bytes(8, "little") + body)
    for tensor in tensors.values():
        flat = tensor.view(-1).view(torch.uint8)
        for first in range(0, flat.numel(), CHUNK_BYTES):
            _, _, data = tensor_to_bytes(flat[first : first + CHUNK_BYTES])
            digest.update(data)
            stream.write(data)
    stream.write(digest.digest())


def _read_entry(stream: BinaryIO, path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills ``tensors``; raises CheckpointError unless the entry is whole and is the one called for."""
    header = _read_header(stream, path)
    wanted = parse_header(_header(tensors), path.name)
    shapes = [
        {name: (info.dtype, info.shape) for name, info in found.tensors.items()} for found in (header, wanted)
    ]
    if shapes[0] != shapes[1] or list(header.tensors) != list(wanted.tensors):
        raise CheckpointError(path.name, None, "holds other tensors than its name promises")
    digest = hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES)
    staging = bytearray(min(CHUNK_BYTES, max((tensor.nbytes for tensor in tensors.values()), default=0)))
    for name, tensor in tensors.items():
        flat = tensor.view(-1).view(torch.uint8)
        for first in range(0, flat.numel(), len(staging) or 1):
            piece = flat[first : first + len(staging)]
            view = memoryview(staging)[: piece.numel()]
            _fill(stream, view, path, name)
            digest.update(view)
            piece.copy_(torch.frombuffer(staging, dtype=torch.uint8, count=piece.numel()))
    told = bytearray(DIGEST_BYTES)
    _fill(stream, memoryview(told), path, "digest")
    if bytes(told) != digest.digest():
        raise CheckpointError(path.name, None, "its bytes do not have the hash that it ends with")


def _read_header(stream: BinaryIO, path: Path) -> Header:
    _, end = header_range(stream.read(8), path.name)
    if end > HEADER_BYTES_MAX:
        raise CheckpointError(path.name, None, f"header of {end} bytes, must be at most {HEADER_BYTES_MAX}")
    header = parse_header(stream.read(end - 8), path.name)
    size = os.fstat(stream.fileno()).st_size
    if size != header.file_bytes or header.bytes_end != end:
        raise CheckpointError(path.name, None, f"{size} bytes, its header says {header.file_bytes}")
    return header


def _fill(stream: BinaryIO, view: memoryview, path: Path, name: str) -> None:
    filled = 0
    while filled < len(view):
        got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(path.name, name, "truncated")
        filled += got
