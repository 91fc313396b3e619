"""A model from the Hugging Face hub, `hf:ORG/REPO[@REVISION]`, brought to this disk so that it can be published.

What is needed first comes first: the list of files, the configuration and tokenizer, and of the weights the headers.
Only what can be served is then fetched, in the order of its layers, by byte ranges that are marked as they come: killed
at any moment, it goes on where it was. Whole files are checked against the hub's SHA-256. The `huggingface_hub` package
says where (HF_ENDPOINT) and who asks (HF_TOKEN); it is imported when it is needed. It knows nothing of the mesh.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from model_shards import CheckpointIndex, ModelConfig, header_range, is_adapter
from node.errors import HubProblem
from node.library import ADAPTER_FILES, SMALL_FILE_BYTES_MAX, read_directory
from node.serve.faults import leaves
from p2p import FetchState, PeerId

T = TypeVar("T")
log = logging.getLogger("shoal.hub")
PREFIX = "hf:"
SOURCE = re.compile(r"hf:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,128}))?")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SMALL_FILES = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template|model\.safetensors\.index)\.json|merges\.txt|chat_template\.jinja|LICENSE[\w.-]*"
)
"""Of the top directory. Weights in other formats, or copies of them in folders, are left where they are."""
PIECE_BYTES = 16 << 20
READ_BYTES = 1 << 20
AT_ONCE = 4
TRIES = 5
RETRY_S = 1.0
THE_HUB = PeerId("the hub")
"""Where bytes come from, in place of a peer."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository. `sha256` is "" for those that the hub keeps in git."""

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository at one commit."""

    name: str
    commit: str
    files: Mapping[str, HubFile]


class Hub:
    """Fetches under `root`. `room(bytes)` raises where so much more is not to be had."""

    def __init__(self, root: Path, room: Callable[[int], None]) -> None:
        self._root = root
        self._room = room
        self._turns = trio.CapacityLimiter(AT_ONCE)
        self._states: list[FetchState] = []

    def fetching(self) -> tuple[FetchState, ...]:
        """What is under way."""
        return tuple(self._states)

    async def fetch(self, source: str, progress: Progress | None = None) -> Path:
        """The directory of a model or an adapter, complete. Raises HubProblem, ModelError for what no node could host,
        and what `room` raises; nothing large is fetched before."""
        name, revision = parse(source)
        repo = await _call(partial(_list, name, revision))
        directory = self._root / name.replace("/", "--") / repo.commit
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not (directory / ".complete").exists():
                await self._complete(repo, directory, progress or (lambda done, total: None))
        except OSError as problem:
            raise HubProblem(
                f"{source} cannot be kept in {directory}: {problem.strerror or problem}"
            ) from None
        return directory

    async def _complete(self, repo: Repo, directory: Path, progress: Progress) -> None:
        state = FetchState(repo.name, "", 0, 0)
        self._states.append(state)
        try:
            for file in repo.files.values():
                small = SMALL_FILES.fullmatch(file.name) and file.size <= SMALL_FILE_BYTES_MAX
                if small and not (directory / file.name).exists():
                    await _call(partial(_whole, repo, file, directory))
            weights = [_Weights(repo, file, directory) for file in _weights(repo, directory)]
            for one in weights:
                await one.fetch_header()
            order = await trio.to_thread.run_sync(_order, directory, [one.file.name for one in weights])
            weights.sort(key=lambda one: order[one.file.name])
            began_s, here = time.monotonic(), sum(one.done_bytes() for one in weights)
            state.done, state.total = here, sum(one.file.size for one in weights)
            self._room(state.total - here)

            def came(count: int) -> None:
                state.done += count
                state.bytes_per_s = (state.done - here) / max(1e-3, time.monotonic() - began_s)
                state.sources[THE_HUB] = state.done - here
                progress(state.done, state.total)

            progress(state.done, state.total)
            for one in weights:
                await self._pieces(one, came)
                await trio.to_thread.run_sync(one.check, abandon_on_cancel=True)
            for one in weights:
                one.marks.unlink(missing_ok=True)
            (directory / ".complete").touch()
        finally:
            self._states.remove(state)

    async def _pieces(self, weights: _Weights, came: Callable[[int], None]) -> None:
        async def fetch(start: int, end: int) -> None:
            async with self._turns:
                await _call(partial(weights.fetch, start, end))
            came(end - start)

        try:
            async with trio.open_nursery() as nursery:
                for start, end in weights.missing():
                    nursery.start_soon(fetch, start, end)
        except BaseExceptionGroup as group:
            raise next(iter(leaves(group))) from None


@dataclass(slots=True)
class _Weights:
    """One file of weights: sparse until all its pieces came. `marks` has one byte a piece."""

    repo: Repo
    file: HubFile
    directory: Path
    path: Path = field(init=False)
    marks: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.directory / self.file.name
        self.marks = self.directory / f".{self.file.name}.pieces"

    async def fetch_header(self) -> None:
        """Make the file with its whole size, the header in its place. Raises CheckpointError for what is none."""
        if self.path.exists():
            return
        first = await _call(partial(_range, self.repo, self.file.name, 0, min(8, self.file.size)))
        _, end = header_range(first, self.file.name)
        header = await _call(partial(_range, self.repo, self.file.name, 0, min(end, self.file.size)))
        part = self.path.with_name(f".{self.file.name}.part")
        with part.open("wb") as out:
            out.write(header)
            out.truncate(self.file.size)
        self.marks.write_bytes(bytes(-(-self.file.size // PIECE_BYTES)))
        part.replace(self.path)

    def missing(self) -> list[tuple[int, int]]:
        """The pieces that did not come, as byte ranges. A lost list of marks means all of them."""
        count = -(-self.file.size // PIECE_BYTES)
        marks = self.marks.read_bytes() if self.marks.exists() else b""
        if len(marks) != count:
            marks = bytes(count)
            self.marks.write_bytes(marks)
        starts = (index * PIECE_BYTES for index in range(count) if not marks[index])
        return [(start, min(start + PIECE_BYTES, self.file.size)) for start in starts]

    def done_bytes(self) -> int:
        return self.file.size - sum(end - start for start, end in self.missing())

    def fetch(self, start: int, end: int) -> None:
        """One piece to its place, then its mark. Blocking."""
        with self.path.open("r+b") as out:
            out.seek(start)
            for data in _stream(self.repo, self.file.name, start, end):
                out.write(data)
        with self.marks.open("r+b") as marks:
            marks.seek(start // PIECE_BYTES)
            marks.write(b"\1")

    def check(self) -> None:
        """The file is what the hub says. Raises HubProblem, and the next time all of it is fetched again. Blocking."""
        if not self.file.sha256:
            return
        with self.path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.file.sha256:
            self.marks.unlink(missing_ok=True)
            raise HubProblem(
                f"{self.file.name} of {self.repo.name} does not have the hash that the hub says; add it again"
            )


def parse(source: str) -> tuple[str, str | None]:
    """(ORG/REPO, revision or None). Raises HubProblem."""
    match = SOURCE.fullmatch(source)
    if match is None:
        raise HubProblem(f"{source[:200]!r} is not hf:ORG/REPO or hf:ORG/REPO@REVISION")
    return match[1], match[2]


def _weights(repo: Repo, directory: Path) -> list[HubFile]:
    """The files that hold the weights, by the index where there is one. Raises HubProblem."""
    if is_adapter(directory):
        names = {ADAPTER_FILES[1]}
    elif SINGLE in repo.files or INDEX not in repo.files:
        names = {SINGLE}
    else:
        try:
            names = set(json.loads((directory / INDEX).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise HubProblem(f"{INDEX} of {repo.name} cannot be read") from None
    lacking = sorted(str(name) for name in names if name not in repo.files or "/" in str(name))
    if lacking:
        raise HubProblem(f"{repo.name} has no {lacking[0][:200]}: only safetensors can be served")
    return [repo.files[name] for name in sorted(names)]


def _order(directory: Path, names: list[str]) -> dict[str, int]:
    """By file the first layer that needs it, the whole model checked before. Raises ModelError."""
    if is_adapter(directory):
        return dict.fromkeys(names, 0)
    config, index = read_directory(directory)
    return {name: _first_layer(config, index, name) for name in names}


def _first_layer(config: ModelConfig, index: CheckpointIndex, name: str) -> int:
    layers = range(config.layers)
    return next((n for n in layers if name in index.span_ranges(config, n, n + 1)), config.layers)


async def _call(work: Callable[[], T]) -> T:
    """Run on a thread, several times where the network fails. Raises HubProblem with one clear line."""
    for left in reversed(range(TRIES)):
        try:
            return await trio.to_thread.run_sync(partial(_clear, work), abandon_on_cancel=True)
        except _Again as problem:
            if not left:
                raise HubProblem(str(problem)) from None
            log.info("trying again: %s", problem)
        await trio.sleep(RETRY_S * (TRIES - left))
    raise AssertionError  # the last try returns or raises


class _Again(Exception):
    """What may go well the next time."""


def _clear(work: Callable[[], T]) -> T:
    """The library's errors, and those of its HTTP client, in plain words."""
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    network: Any = errors.HfHubHTTPError.__mro__[1]  # of whichever HTTP client the library uses
    try:
        return work()
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as problem:
        said = str(problem).strip().splitlines()[-1:] or [type(problem).__name__]
        raise HubProblem(f"{where} does not give it: {said[0][:300]} (HF_TOKEN may be needed)") from None
    except errors.HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", 0)
        if status in (408, 429) or status >= 500:
            raise _Again(f"{where} answered {status}") from None
        raise HubProblem(f"{where} answered {status}: {str(problem).splitlines()[0][:300]}") from None
    except network as problem:
        raise _Again(f"{where} cannot be reached: {problem or type(problem).__name__}") from None
    except (errors.OfflineModeIsEnabled, errors.HFValidationError) as problem:
        raise HubProblem(str(problem)) from None


# ---- requests; all block


def _list(name: str, revision: str | None) -> Repo:
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    files = {}
    for one in info.siblings or ():
        if one.size is not None and "/" not in one.rfilename and not one.rfilename.startswith("."):
            files[one.rfilename] = HubFile(one.rfilename, one.size, one.lfs.sha256 if one.lfs else "")
    if not info.sha or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise HubProblem(f"the hub names no commit of {name}")
    return Repo(name, info.sha, files)


def _whole(repo: Repo, file: HubFile, directory: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(repo.name, file.name, revision=repo.commit, local_dir=directory / ".hub")
    (directory / ".hub" / file.name).replace(directory / file.name)
    shutil.rmtree(directory / ".hub", ignore_errors=True)


def _range(repo: Repo, name: str, start: int, end: int) -> bytes:
    return b"".join(_stream(repo, name, start, end))


def _stream(repo: Repo, name: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes [start, end) of a file as they come; also from a server that knows no ranges."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers: dict[str, Any] = build_hf_headers() | {
        "range": f"bytes={start}-{end - 1}",
        "accept-encoding": "identity",
    }
    url = hf_hub_url(repo.name, name, revision=repo.commit)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
        if response.status_code not in (200, 206):
            response.read()
        hf_raise_for_status(response)
        at = start if response.status_code == 206 else 0
        for data in response.iter_bytes(READ_BYTES):
            piece = data[max(0, start - at) : max(0, end - at)]
            at += len(data)
            if piece:
                yield piece
            if at >= end:
                return
    raise _Again(f"{name} ended at byte {at} of {end}")
