"""Moving a state: a server of snapshots' chunks, and a fetch from many peers at once.

Each peer has a few requests under way and takes the next missing chunk; one that sends a wrong chunk is asked no more,
one that stalls is overtaken. A fetch keeps its chunks in a file, where it is given a directory, and goes on with them
after a restart. It never waits for a round, nor a round for it. What a state means and when it is published is not
known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import mmap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio

from collectives.errors import BadContribution, RemoteFault
from collectives.state import CHUNK_BYTES, Assembly, Shelf, Snapshot, StateManifest, decode_manifest
from p2p import Call, CallFailed, Method, P2pError, Rpc, RpcRefusal, Tensor

log = logging.getLogger("shoal.collectives")

HEAD_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 64 << 20
PAUSE_S = 0.2
STRAGGLERS_S = 0.1
INLINE_BYTES_MAX = 4 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AskHead:
    """What is your newest state of this chain? `overtaken_s`: how long the last transfer took, if rounds have gone on
    without whoever asks since then; else 0."""

    run: str
    tag: str
    overtaken_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Head:
    """`decision`: a message of agreement. Whoever takes over the state learns by it that its epoch is decided: those
    who know may be gone afterwards."""

    epoch: int
    digest: bytes
    nbytes: int
    decision: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class AskManifest:
    run: str
    tag: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    encoded: bytes


@dataclass(frozen=True, slots=True)
class AskChunk:
    run: str
    tag: str
    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class StateChunk:
    data: Tensor


HEAD = Method("collectives/state/head", AskHead, Head, body_bytes_max=HEAD_BYTES_MAX, deadline_s=5.0)
MANIFEST = Method(
    "collectives/state/manifest", AskManifest, Manifest, body_bytes_max=MANIFEST_BYTES_MAX, deadline_s=120.0,
    lane="bulk",
)  # fmt: skip
CHUNK = Method(
    "collectives/state/chunk", AskChunk, StateChunk, body_bytes_max=4096, payload_bytes_max=CHUNK_BYTES,
    deadline_s=120.0, lane="bulk",
)  # fmt: skip


class StateServer:
    """Answers for the shelves of a node; `shelf(run, tag)` gives None for chains it does not know. `expect(run, tag,
    peer, took_s)` hears of those who were overtaken; `decision(run, tag)` packs what is known to be decided."""

    def __init__(
        self,
        rpc: Rpc,
        shelf: Callable[[str, str], Shelf | None],
        expect: Callable[[str, str, str, float], None] = lambda run, tag, peer, took_s: None,
        decision: Callable[[str, str], bytes] = lambda run, tag: b"",
    ) -> None:
        self._shelf = shelf
        self._decision = decision
        self._expect = expect
        rpc.serve(HEAD, self._head)
        rpc.serve(MANIFEST, self._manifest)
        rpc.serve(CHUNK, self._chunk)

    async def _head(self, call: Call, ask: AskHead) -> Head:
        await trio.lowlevel.checkpoint()
        shelf = self._shelf(ask.run, ask.tag)
        if ask.overtaken_s > 0:
            self._expect(ask.run, ask.tag, str(call.peer), ask.overtaken_s)
        if shelf is None or shelf.newest is None:
            raise RpcRefusal("absent", "no state of this chain is published here")
        newest = shelf.newest
        shelf.get(newest.digest, trio.current_time())
        return Head(newest.epoch, newest.digest, newest.manifest.nbytes, self._decision(ask.run, ask.tag))

    def _snapshot(self, run: str, tag: str, digest: bytes) -> Snapshot:
        shelf = self._shelf(run, tag)
        snapshot = None if shelf is None else shelf.get(digest, trio.current_time())
        if snapshot is None:
            raise RpcRefusal("absent", "this state is not kept here")
        return snapshot

    async def _manifest(self, call: Call, ask: AskManifest) -> Manifest:
        await trio.lowlevel.checkpoint()
        return Manifest(self._snapshot(ask.run, ask.tag, ask.digest).manifest.encode())

    async def _chunk(self, call: Call, ask: AskChunk) -> StateChunk:
        await trio.lowlevel.checkpoint()
        snapshot = self._snapshot(ask.run, ask.tag, ask.digest)
        if not 0 <= ask.index < snapshot.manifest.chunk_count:
            raise RpcRefusal("absent", f"the state has {snapshot.manifest.chunk_count} chunks")
        pieces = snapshot.chunk(ask.index)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return StateChunk(Tensor("uint8", (len(data),), data))


async def ask_heads(
    rpc: Rpc, peers: Sequence[str], run: str, tag: str, within_s: float, overtaken_s: float = 0.0
) -> dict[str, Head]:
    """What each peer holds that answers in time; once most have, the others get a moment only."""
    heads: dict[str, Head] = {}
    left = len(peers)
    enough = trio.Event()

    async def ask(peer: str) -> None:
        nonlocal left
        with contextlib.suppress(P2pError):
            heads[peer] = await rpc.call(peer, HEAD, AskHead(run, tag, overtaken_s), deadline_s=within_s)
        left -= 1
        if left == 0 or 2 * len(heads) > len(peers):
            enough.set()

    if not peers:
        return heads
    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(ask, peer)
        await enough.wait()
        if left:
            await trio.sleep(STRAGGLERS_S)
        nursery.cancel_scope.cancel()
    return heads


def choose_head(heads: dict[str, Head], epoch_min: int) -> Head | None:
    """The newest state that more than half of those who are as far hold; None if there is none yet."""
    epochs = sorted({head.epoch for head in heads.values() if head.epoch >= epoch_min}, reverse=True)
    for epoch in epochs:
        votes = Counter(head.digest for head in heads.values() if head.epoch == epoch)
        digest, count = votes.most_common(1)[0]
        if 2 * count > votes.total():
            return next(head for head in heads.values() if head.epoch == epoch and head.digest == digest)
    return None


class Fetch:
    """One state being fetched. What came is kept when `run` fails, in a `directory` also when the process does."""

    def __init__(
        self,
        rpc: Rpc,
        run: str,
        tag: str,
        head: Head,
        directory: Path | None = None,
        *,
        requests_per_peer: int = 4,
        stalled_s: float = 3.0,
    ) -> None:
        self.bytes_received = 0
        self.bytes_recalled = 0
        self.received_from: Counter[str] = Counter()
        self.bad: set[str] = set()
        self._rpc, self._run, self._tag, self._head = rpc, run, tag, head
        self._files = None if directory is None else _Files(directory, run, tag, head.digest)
        self._requests_per_peer = requests_per_peer
        self._stalled_s = stalled_s
        self._whole: Assembly | None = None
        self._asked: dict[int, float] = {}
        self._done = trio.Event()
        self._peers_left = 0

    async def run(self, sources: Sequence[str]) -> Snapshot:
        """The whole state. Raises collectives' RemoteFault when every source was lost, ran out of it or lied; call it
        again with other sources and it goes on where it was."""
        if self._whole is None:
            manifest = await self._manifest(sources)
            self._whole = Assembly(
                manifest, None if self._files is None else self._files.map(manifest.nbytes)
            )
            if self._files is not None:
                await aside(manifest.nbytes, self._whole.recall)
                self.bytes_recalled = self._held_bytes(self._whole)
        whole = self._whole
        try:
            await self._collect(whole, sources)
        finally:
            if self._files is not None:
                self._files.flush()
        if whole.missing:
            raise RemoteFault(
                f"{len(whole.missing)} chunks of the state are not to be had from {len(sources)} peers"
            )
        snapshot = await aside(whole.manifest.nbytes, lambda: whole.finish(self._head.epoch))
        self._whole = None
        if self._files is not None:
            self._files.remove()
        return snapshot

    def _held_bytes(self, whole: Assembly) -> int:
        return whole.manifest.nbytes - sum(whole.manifest.chunk_bytes(index) for index in whole.missing)

    async def _manifest(self, sources: Sequence[str]) -> StateManifest:
        stored = None if self._files is None else self._files.manifest()
        if stored is not None:
            with contextlib.suppress(BadContribution):
                return decode_manifest(stored, self._head.digest, "this disk")
        for peer in sources:
            try:
                ask = AskManifest(self._run, self._tag, self._head.digest)
                encoded = (await self._rpc.call(peer, MANIFEST, ask)).encoded
                manifest = decode_manifest(encoded, self._head.digest, peer)
            except (P2pError, BadContribution) as problem:
                log.info("no manifest of the state from %s: %s", peer, problem)
                continue
            if self._files is not None:
                self._files.keep_manifest(encoded)
            return manifest
        raise RemoteFault(f"none of {len(sources)} peers gave the manifest of the state")

    async def _collect(self, whole: Assembly, sources: Sequence[str]) -> None:
        """Until nothing is missing, or nobody is left to ask."""
        self._asked = {}
        self._done = trio.Event()
        good = [peer for peer in sources if peer not in self.bad]
        self._peers_left = len(good)
        if not whole.missing or not good:
            return
        async with trio.open_nursery() as nursery:
            for number, peer in enumerate(good):
                # Each begins elsewhere, so that joiners who come together do not all ask for the same.
                cursor = _Cursor(whole, number * whole.manifest.chunk_count // len(good))
                nursery.start_soon(self._ask_peer, peer, whole, cursor)
            await self._done.wait()
            nursery.cancel_scope.cancel()

    async def _ask_peer(self, peer: str, whole: Assembly, cursor: _Cursor) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(self._requests_per_peer):
                nursery.start_soon(self._work, peer, whole, cursor, nursery.cancel_scope)
        self._peers_left -= 1
        if not self._peers_left:
            self._done.set()

    async def _work(self, peer: str, whole: Assembly, cursor: _Cursor, scope: trio.CancelScope) -> None:
        while whole.missing and peer not in self.bad:
            index = cursor.next(self._asked, trio.current_time() - self._stalled_s)
            if index is None:
                with trio.move_on_after(self._stalled_s / 4):
                    await self._done.wait()
                continue
            self._asked[index] = trio.current_time()
            try:
                ask = AskChunk(self._run, self._tag, self._head.digest, index)
                answer = await self._rpc.call(peer, CHUNK, ask)
            except CallFailed as refusal:
                self._asked.pop(index, None)
                if refusal.code != "busy":
                    log.info("%s has no more of the state: %s", peer, refusal)
                    scope.cancel()
                    return
                await trio.sleep(PAUSE_S)
                continue
            except P2pError as problem:
                self._asked.pop(index, None)
                log.info("lost %s while fetching the state: %s", peer, problem)
                scope.cancel()
                return
            self._take(peer, whole, index, answer.data)
        if not whole.missing:
            self._done.set()

    def _take(self, peer: str, whole: Assembly, index: int, data: Tensor) -> None:
        self.bytes_received += len(data.data)
        if whole.add(index, data.data):
            self.received_from[peer] += len(data.data)
        else:
            log.warning("%s sent a wrong chunk of the state; it is not asked again", peer)
            self.bad.add(peer)
            self._asked.pop(index, None)


class _Cursor:
    """Which chunk one peer is asked for next."""

    def __init__(self, whole: Assembly, first: int) -> None:
        count = whole.manifest.chunk_count
        self._whole = whole
        self._fresh = itertools.chain(range(first, count), range(first))

    def next(self, asked: Mapping[int, float], stalled_s: float) -> int | None:
        """One that nobody was asked for; else one that was asked for before `stalled_s`."""
        for index in self._fresh:
            if index in self._whole.missing and index not in asked:
                return index
        return next((i for i in sorted(self._whole.missing) if asked.get(i, -math.inf) < stalled_s), None)


class _Files:
    """The chunks and the manifest of one unfinished state. Older ones of the same chain are removed."""

    def __init__(self, directory: Path, run: str, tag: str, digest: bytes) -> None:
        chain = hashlib.sha256(f"{run}\0{tag}".encode()).hexdigest()[:16]
        stem = f"{chain}-{digest.hex()[:32]}"
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob(f"{chain}-*"):
            if old.stem != stem:
                old.unlink()
        self._data = directory / f"{stem}.state"
        self._manifest = directory / f"{stem}.manifest"
        self._map: mmap.mmap | None = None

    def manifest(self) -> bytes | None:
        return self._manifest.read_bytes() if self._manifest.exists() else None

    def keep_manifest(self, encoded: bytes) -> None:
        spare = self._manifest.with_suffix(".new")
        spare.write_bytes(encoded)
        spare.replace(self._manifest)

    def map(self, nbytes: int) -> memoryview | None:
        """Writable memory that is the file's."""
        if nbytes == 0:
            return None
        with self._data.open("r+b" if self._data.exists() else "w+b") as file:
            file.truncate(nbytes)
            self._map = mmap.mmap(file.fileno(), nbytes)
        return memoryview(self._map)

    def flush(self) -> None:
        if self._map is not None:
            self._map.flush()

    def remove(self) -> None:
        """The state is whole and elsewhere."""
        self._map = None  # closed with its last view
        for path in (self._data, self._manifest):
            with contextlib.suppress(OSError):  # Windows keeps a mapped file; the next fetch removes it
                path.unlink()


async def aside(nbytes: int, work: Callable[[], T]) -> T:
    """Do `work` over that many bytes: in a thread if it would hold the loop up."""
    if nbytes <= INLINE_BYTES_MAX:
        await trio.lowlevel.checkpoint()
        return work()
    return await trio.to_thread.run_sync(work)
