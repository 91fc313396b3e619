"""One checkpoint: a folder of safetensors and a manifest that is written last; whole, or not there.

A folder is filled under a name that no reader looks at, every file and the folder are flushed, and only then it gets
its own name. The manifest holds each key's SHA-256, so that whatever was cut, mixed or altered is seen when it is read.
It knows nothing of runs and optimizers: a state is named tensors and a small JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from collectives.errors import CheckpointProblem
from collectives.journal import sync_directory
from collectives.state import Snapshot, StateEntry, StateManifest, byte_view, manifest_problem

FORMAT = 1
MANIFEST = "manifest.json"
FILE_BYTES_MAX = 1 << 30
PIECE_BYTES = 1 << 20
META_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 256 << 20
HEADER_BYTES_MAX = 100_000_000
"""What readers of safetensors accept."""
_NAME = re.compile(r"(\d{12})-([0-9a-f]{16})")
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
Meta = Mapping[str, Any]
Between = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Refused:
    """A folder that looks like a checkpoint and is not whole, and why."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A whole checkpoint. `snapshot.tensors` by key; `meta` is what was saved beside them. `refused`: newer folders
    that were passed over."""

    snapshot: Snapshot
    meta: dict[str, Any]
    path: Path
    refused: tuple[Refused, ...] = ()

    @property
    def epoch(self) -> int:
        return self.snapshot.epoch


def write(root: Path, snapshot: Snapshot, meta: Meta, between: Between = lambda: None) -> Path:
    """Put a state on the disk under `root`; its folder. What is there already, whole, is left as it is.

    `between` is called after each piece of PIECE_BYTES; what it raises ends the writing and leaves nothing behind.
    Raises CheckpointProblem, also where the disk is full; then what was there before is untouched."""
    path = root / name_of(snapshot)
    document = _manifest(snapshot, meta)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with contextlib.suppress(CheckpointProblem):
                read(path)
                return path
            remove(path)
        made = root / f".new-{path.name}-{secrets.token_hex(4)}"
        made.mkdir()
        try:
            _fill(made, snapshot, document, between)
            made.rename(path)
        except BaseException:  # whatever ended it leaves no half of a checkpoint
            shutil.rmtree(made, ignore_errors=True)
            raise
        sync_directory(root)
    except OSError as error:
        raise CheckpointProblem(path, f"cannot be written: {error.strerror or error}") from error
    return path


def _fill(made: Path, snapshot: Snapshot, document: bytes, between: Between) -> None:
    for name, keys in _files(snapshot):
        _write_file(made / name, [_header(snapshot, keys), *_views(snapshot, keys)], between)
    _write_file(made / MANIFEST, [memoryview(document)], between)
    sync_directory(made)


def _write_file(path: Path, views: Sequence[memoryview], between: Between) -> None:
    with path.open("xb", buffering=0) as file:
        for view in views:
            at = 0
            while at < len(view):
                at += file.write(view[at : at + PIECE_BYTES]) or 0
                between()
        os.fsync(file.fileno())


def read(path: Path) -> Loaded:
    """The checkpoint in this folder, every byte checked. Raises CheckpointProblem for anything that is not whole."""
    match = _NAME.fullmatch(path.name)
    try:
        if match is None or (path / MANIFEST).stat().st_size > MANIFEST_BYTES_MAX:
            raise CheckpointProblem(path, "is no checkpoint's folder")
        document = _checked(path, (path / MANIFEST).read_bytes())
        manifest, files = _state_of(path, document)
        if int(match[1]) != document["epoch"] or match[2] != manifest.digest().hex()[:16]:
            raise CheckpointProblem(path, "holds another state than its name says")
        tensors: dict[str, torch.Tensor] = {}
        by_key = {entry.key: entry for entry in manifest.entries}
        for name in sorted(set(files.values())):
            with safe_open(path / name, framework="pt") as opened:
                for key in [key for key, file in files.items() if file == name]:
                    tensors[key] = _tensor(path, opened, by_key[key])
    except FileNotFoundError as error:
        raise CheckpointProblem(path, f"lacks {Path(str(error.filename)).name}") from error
    except OSError as error:
        raise CheckpointProblem(path, f"cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointProblem(path, f"is cut or altered: {error}") from error
    return Loaded(Snapshot(document["epoch"], manifest, tensors), document["meta"], path)


def _tensor(path: Path, opened: Any, entry: StateEntry) -> torch.Tensor:
    tensor: torch.Tensor = opened.get_tensor(entry.key).clone()
    if str(tensor.dtype).removeprefix("torch.") != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise CheckpointProblem(path, f"{entry.key!r} has another type or shape than the manifest says")
    if StateEntry.of(entry.key, tensor).sha256 != entry.sha256:
        raise CheckpointProblem(path, f"{entry.key!r} does not have its SHA-256")
    return tensor


def newest(root: Path) -> Loaded | None:
    """The newest whole checkpoint under `root`, or None. Broken ones that look newer are named in `refused`, and left
    where they are."""
    refused = []
    for path in folders(root):
        try:
            loaded = read(path)
        except CheckpointProblem as problem:
            refused.append(Refused(path, problem.reason))
        else:
            return Loaded(loaded.snapshot, loaded.meta, path, tuple(refused))
    return None


def folders(root: Path) -> list[Path]:
    """Folders with a checkpoint's name, the newest first; none of them was looked into."""
    try:
        found = [path for path in root.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: path.name, reverse=True)


def epoch_of(path: Path) -> int:
    """Of a folder that `folders` gave."""
    return int(path.name.partition("-")[0])


def name_of(snapshot: Snapshot) -> str:
    """A checkpoint's folder name: its epoch and the beginning of its digest."""
    return f"{snapshot.epoch:012d}-{snapshot.digest.hex()[:16]}"


def remove(path: Path) -> None:
    """Take a checkpoint away: first its name, so that a kill leaves no half of one behind. Raises OSError."""
    gone = path.with_name(f".old-{path.name}-{secrets.token_hex(4)}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what a killed writer left. Only while nobody else writes there."""
    with contextlib.suppress(FileNotFoundError):
        for path in list(root.iterdir()):
            if path.name.startswith((".new-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)


def _files(snapshot: Snapshot) -> Iterator[tuple[str, list[StateEntry]]]:
    """File names and the keys in each: those of wide types first, so that every tensor is aligned."""
    group: list[StateEntry] = []
    number = nbytes = 0
    for entry in sorted(snapshot.manifest.entries, key=lambda e: (-_itemsize(snapshot, e), e.key)):
        if group and nbytes + entry.nbytes > FILE_BYTES_MAX:
            yield _file_name(number), group
            group, nbytes, number = [], 0, number + 1
        group.append(entry)
        nbytes += entry.nbytes
    yield _file_name(number), group


def _file_name(number: int) -> str:
    return f"state-{number:05d}.safetensors"


def _itemsize(snapshot: Snapshot, entry: StateEntry) -> int:
    return snapshot.tensors[entry.key].element_size()


def _views(snapshot: Snapshot, entries: Sequence[StateEntry]) -> list[memoryview]:
    return [byte_view(snapshot.tensors[entry.key]) for entry in entries if entry.nbytes]


def _header(snapshot: Snapshot, entries: Sequence[StateEntry]) -> memoryview:
    """A safetensors header, as the format's specification has it: eight bytes of length, then JSON padded to eight."""
    header: dict[str, Any] = {}
    at = 0
    for entry in entries:
        dtype = _NAMES.get(snapshot.tensors[entry.key].dtype)
        if dtype is None or entry.key == "__metadata__":
            raise CheckpointProblem(entry.key, f"a {entry.dtype} tensor of that name cannot be saved")
        header[entry.key] = {
            "dtype": dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_MAX:
        raise CheckpointProblem("the state", f"{len(entries)} keys are more than one file's header holds")
    return memoryview(len(text).to_bytes(8, "little") + text)


def _manifest(snapshot: Snapshot, meta: Meta) -> bytes:
    files = {entry.key: name for name, entries in _files(snapshot) for entry in entries}
    try:
        said = json.dumps(dict(meta), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointProblem("meta", f"is not JSON: {error}") from error
    if len(said) > META_BYTES_MAX:
        raise CheckpointProblem("meta", f"{len(said)} bytes are more than {META_BYTES_MAX}")
    document: dict[str, Any] = {
        "format": FORMAT,
        "epoch": snapshot.epoch,
        "meta": json.loads(said),
        "state": snapshot.digest.hex(),
        "keys": [
            {
                "key": e.key,
                "dtype": e.dtype,
                "shape": list(e.shape),
                "sha256": e.sha256.hex(),
                "file": files[e.key],
            }
            for e in snapshot.manifest.entries
        ],
        "chunks": snapshot.manifest.chunks.hex(),
    }
    return json.dumps({**document, "check": _check(document)}, indent=1).encode()


def _check(document: Mapping[str, Any]) -> str:
    return blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _checked(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
        check = document.pop("check")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointProblem(path, "its manifest is cut or altered") from error
    if check != _check(document):
        raise CheckpointProblem(path, "its manifest is altered")
    if document.get("format") != FORMAT:
        raise CheckpointProblem(path, f"has format {document.get('format')!r}, this version reads {FORMAT}")
    return dict(document)


def _state_of(path: Path, document: Mapping[str, Any]) -> tuple[StateManifest, dict[str, str]]:
    try:
        entries = tuple(
            StateEntry(
                str(e["key"]), str(e["dtype"]), tuple(map(int, e["shape"])), bytes.fromhex(e["sha256"])
            )
            for e in document["keys"]
        )
        manifest = StateManifest(entries, bytes.fromhex(document["chunks"]))
        files = {str(e["key"]): Path(str(e["file"])).name for e in document["keys"]}
        problem = manifest_problem(manifest)
        epoch_ok = type(document["epoch"]) is int and isinstance(document["meta"], dict)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointProblem(path, "its manifest is malformed") from error
    if problem is not None or not epoch_ok or manifest.digest().hex() != document.get("state"):
        raise CheckpointProblem(path, f"its manifest is malformed{': ' + problem if problem else ''}")
    return manifest, files
