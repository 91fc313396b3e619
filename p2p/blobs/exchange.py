"""Chunks between peers: serving what the store has, and fetching what is wanted from several peers at once.

Knows the three methods that peers speak, who is asked for what (`picking` decides), and what to do with a peer that is
slow, gone or wrong. It does not know which peers should have something: `peers` says so, again and again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import trio

from p2p.blobs.errors import BlobUnavailable
from p2p.blobs.manifest import CHUNK_BYTES_MAX, MANIFEST_BYTES_MAX, Manifest
from p2p.blobs.picking import Picker
from p2p.blobs.store import BlobStore
from p2p.errors import CallFailed, LocalFault, ProtocolViolation, RemoteFault, RpcRefusal
from p2p.identity import PeerId
from p2p.rpc import Rpc
from p2p.rpc_types import Call, Method
from p2p.tensor import Tensor

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Ranges = Mapping[str, Sequence[tuple[int, int]]]

RUN_CHUNKS_MAX = 256
_BITS_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class ManifestWanted:
    manifest_id: str


@dataclass(frozen=True, slots=True)
class Bytes:
    """Raw bytes as a payload, never through the serialiser."""

    data: Tensor


@dataclass(frozen=True, slots=True)
class HaveWanted:
    manifest_id: str


@dataclass(frozen=True, slots=True)
class Have:
    """One bit a chunk, lowest bit first; `known` is false where the peer never heard of the manifest."""

    known: bool
    bits: bytes


@dataclass(frozen=True, slots=True)
class ChunksWanted:
    """`count` chunks by global number, from `first` on."""

    manifest_id: str
    first: int
    count: int


MANIFEST = Method(
    "blobs.manifest",
    ManifestWanted,
    Bytes,
    payload_bytes_max=MANIFEST_BYTES_MAX,
    deadline_s=120.0,
    lane="bulk",
)
HAVE = Method("blobs.have", HaveWanted, Have, body_bytes_max=_BITS_BYTES_MAX, deadline_s=10.0, lane="bulk")
CHUNKS = Method(
    "blobs.chunks", ChunksWanted, Bytes, payload_bytes_max=2 * CHUNK_BYTES_MAX, deadline_s=60.0, lane="bulk"
)


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """`requests_per_source` runs of at most `run_bytes_max` are asked of a peer at once; `served_per_peer_max` and
    `served_max` are served. A fetch gives up `patience_s` after the last byte came."""

    requests_per_source: int = 6
    sources_max: int = 8
    run_bytes_max: int = 1 << 20
    served_per_peer_max: int = 16
    served_max: int = 64
    readers_max: int = 4
    busy_retry_after_s: float = 0.5
    refresh_s: float = 1.0
    stalled_s: float = 5.0
    rest_s: float = 2.0
    patience_s: float = 15.0

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise LocalFault(
                    f"ExchangeConfig.{one.name} must be positive, got {getattr(self, one.name)!r}"
                )
        if self.run_bytes_max > CHUNK_BYTES_MAX:
            raise LocalFault(f"ExchangeConfig.run_bytes_max must be at most {CHUNK_BYTES_MAX}")


class BlobExchange:
    """Serves `store` over `rpc` from the moment it is made."""

    def __init__(self, rpc: Rpc, store: BlobStore, config: ExchangeConfig | None = None) -> None:
        self.store = store
        self.config = config or ExchangeConfig()
        self._rpc = rpc
        self._me = rpc.host.peer_id
        self._serving: Counter[PeerId] = Counter()
        self._readers = trio.CapacityLimiter(self.config.readers_max)
        self._writers = trio.CapacityLimiter(self.config.readers_max)
        rpc.serve(MANIFEST, self._serve_manifest)
        rpc.serve(HAVE, self._serve_have)
        rpc.serve(CHUNKS, self._serve_chunks)

    # ---- serving

    async def _serve_manifest(self, call: Call, request: ManifestWanted) -> Bytes:
        manifest = self._known(request.manifest_id)
        return _bytes(await trio.to_thread.run_sync(manifest.encode, limiter=self._readers))

    async def _serve_have(self, call: Call, request: HaveWanted) -> Have:
        bits = self.store.bits(request.manifest_id)
        return Have(bits is not None, bits or b"")

    async def _serve_chunks(self, call: Call, request: ChunksWanted) -> Bytes:
        manifest = self._known(request.manifest_id)
        first, count = request.first, request.count
        if not (1 <= count <= RUN_CHUNKS_MAX and 0 <= first <= manifest.chunk_count - count):
            raise RpcRefusal("invalid", f"chunks [{first}, {first + count}) of {manifest.chunk_count}")
        lengths = [manifest.chunk(number)[1].length for number in range(first, first + count)]
        if sum(lengths) > 2 * CHUNK_BYTES_MAX:
            raise RpcRefusal("invalid", f"{sum(lengths)} bytes are more than one request may ask for")
        busy = self._serving[call.peer] >= self.config.served_per_peer_max
        if busy or self._serving.total() >= self.config.served_max:
            raise RpcRefusal("busy", "too many chunks are being served", self.config.busy_retry_after_s)
        self._serving[call.peer] += 1
        try:
            read = partial(self._read, manifest, range(first, first + count))
            return _bytes(await trio.to_thread.run_sync(read, limiter=self._readers))
        finally:
            self._serving[call.peer] -= 1
            if not self._serving[call.peer]:
                del self._serving[call.peer]

    def _read(self, manifest: Manifest, numbers: range) -> bytes:
        try:
            return b"".join([self.store.read_chunk(manifest.id, number) for number in numbers])
        except LocalFault as problem:
            logger.warning("cannot serve chunks of %s: %s", manifest.name, problem)
            raise RpcRefusal("unavailable", f"chunks of {manifest.name} cannot be read here") from None

    def _known(self, manifest_id: str) -> Manifest:
        manifest = self.store.manifest(manifest_id)
        if manifest is None:
            raise RpcRefusal("not_found", f"no manifest {manifest_id[:80]!r} here")
        return manifest

    # ---- fetching

    async def fetch_manifest(self, manifest_id: str, peers: Iterable[PeerId]) -> Manifest:
        """The manifest with that id, from the store or the first peer that has it; then it is in the store.

        Raises BlobUnavailable with each peer's reason.
        """
        known = self.store.manifest(manifest_id)
        if known is not None:
            return known
        reasons: dict[str, str] = {}
        for peer in peers:
            if peer == self._me:
                continue
            try:
                reply = await self._rpc.call(peer, MANIFEST, ManifestWanted(manifest_id))
                manifest = await trio.to_thread.run_sync(Manifest.decode, reply.data.data)
                if manifest.id != manifest_id:
                    raise ProtocolViolation(f"{peer} sent another manifest than {manifest_id}")
            except RemoteFault as fault:
                logger.info("no manifest %s from %s: %s", manifest_id, peer, fault)
                reasons[peer] = str(fault)
                continue
            await trio.to_thread.run_sync(self.store.remember, manifest)
            return manifest
        raise BlobUnavailable(f"manifest {manifest_id}", "anything", reasons)

    async def fetch(
        self,
        manifest: Manifest,
        wanted: Ranges,
        peers: Callable[[], Iterable[PeerId]],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Bring the chunks of `wanted` (file -> byte ranges [start, end)) to the store, and flush them to the disk.

        What is here already is not fetched again. `peers` is asked again every second. `progress(done, total)` counts
        bytes of whole chunks. Raises BlobUnavailable when nothing came for `patience_s` seconds, ResourceLimit when
        the quota or the disk is full, LocalFault for ranges outside the manifest.
        """
        await trio.to_thread.run_sync(self.store.open, manifest)
        numbers = {
            number
            for name, ranges in wanted.items()
            for start, end in ranges
            for number in manifest.numbers(name, start, end)
        }
        fetch = _Fetch(self, manifest, numbers, peers, progress)
        if fetch.picker.missing:
            self.store.check_room(sum(fetch.length(number) for number in fetch.picker.missing))
            try:
                await fetch.run()
            except BaseExceptionGroup as group:
                raise _first(group) from None
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self.store.sync, manifest.id)
        else:
            fetch.tell()


def _bytes(data: bytes) -> Bytes:
    return Bytes(Tensor("uint8", (len(data),), data))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a fetch: the first exception inside."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner


@dataclass(eq=False)
class _Fetch:
    """One fetch at work: a task that keeps looking for sources, and a few for each of them."""

    exchange: BlobExchange
    manifest: Manifest
    numbers: set[int]
    peers: Callable[[], Iterable[PeerId]]
    progress: Progress | None
    picker: Picker = field(init=False)

    def __post_init__(self) -> None:
        config = self.exchange.config
        store = self.exchange.store
        missing = [number for number in self.numbers if not store.has_chunk(self.manifest.id, number)]
        self.picker = Picker(
            missing,
            self.length,
            self.exchange._me,
            run_bytes_max=config.run_bytes_max,
            run_chunks_max=RUN_CHUNKS_MAX,
            stalled_s=config.stalled_s,
        )
        self._config = config
        self._changed = trio.Event()
        self._reasons: dict[str, str] = {}
        self._working: set[str] = set()
        self._asking: set[str] = set()
        self._total = sum(map(self.length, self.numbers))
        self._done = self._total - sum(map(self.length, missing))
        self._last_s = trio.current_time()

    def length(self, number: int) -> int:
        return self.manifest.chunk(number)[1].length

    def tell(self) -> None:
        if self.progress is not None:
            self.progress(self._done, self._total)

    async def run(self) -> None:
        self.tell()
        async with trio.open_nursery() as nursery:
            while self.picker.missing:
                self._look_for_sources(nursery)
                self._check_patience()
                with trio.move_on_after(self._config.refresh_s):
                    while self.picker.missing:
                        await self._changed.wait()
            nursery.cancel_scope.cancel()

    def _check_patience(self) -> None:
        if trio.current_time() - self._last_s < self._config.patience_s:
            return
        numbers = self.picker.unavailable() or sorted(self.picker.missing)
        entry, chunk = self.manifest.chunk(numbers[0])
        missing = f"bytes [{chunk.offset}, {chunk.end})"
        more_bytes = sum(map(self.length, numbers)) - chunk.length
        if more_bytes:
            missing += f" and {more_bytes} bytes more"
        raise BlobUnavailable(entry.name, missing, self._reasons)

    def _look_for_sources(self, nursery: trio.Nursery) -> None:
        """Ask every named peer what it has; those that have something get workers."""
        for peer in self.peers():
            if peer == self.exchange._me or peer in self._asking or peer in self.picker.bad:
                continue
            if len(self._asking) < self._config.sources_max and not self.picker.complete(peer):
                self._asking.add(peer)
                nursery.start_soon(self._ask, nursery, peer)

    async def _ask(self, nursery: trio.Nursery, peer: PeerId) -> None:
        try:
            have = await self.exchange._rpc.call(peer, HAVE, HaveWanted(self.manifest.id))
        except RemoteFault as fault:
            self._reasons[peer] = str(fault)
            return
        finally:
            self._asking.discard(peer)
        if not have.known:
            self._reasons[peer] = f"{peer} does not know it"
            return
        self.picker.offer(peer, have.bits)
        self._wake()
        room = len(self._working) < self._config.sources_max
        if room and peer not in self._working and self.picker.useful(peer):
            self._working.add(peer)
            nursery.start_soon(self._work_with, peer)

    async def _work_with(self, peer: PeerId) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._config.requests_per_source):
                    nursery.start_soon(self._work, peer)
        finally:
            self._working.discard(peer)

    async def _work(self, peer: PeerId) -> None:
        """Runs of chunks from one peer, for as long as it is a source."""
        while self.picker.useful(peer):
            run = self.picker.pick(peer, trio.current_time())
            if run is None:
                with trio.move_on_after(self._config.refresh_s):
                    await self._changed.wait()
                continue
            try:
                await self._fetch_run(peer, run)
            except ProtocolViolation as violation:
                logger.warning("%s is no source of %s any more: %s", peer, self.manifest.name, violation)
                self._reasons[peer] = str(violation)
                self.picker.drop(peer, bad=True)
            except CallFailed as failed:
                self._refused(peer, run, failed)
            except RemoteFault as fault:
                logger.info("%s does not deliver %s now: %s", peer, self.manifest.name, fault)
                self._reasons[peer] = str(fault)
                self.picker.drop(peer, bad=False)
            finally:
                self.picker.returned(peer, run)
                self._wake()

    def _refused(self, peer: PeerId, run: range, failed: CallFailed) -> None:
        self._reasons[peer] = str(failed)
        if failed.code == "busy":
            wait_s = min(max(failed.retry_after_s or self._config.rest_s, 0.05), 30.0)
            self.picker.rest(peer, trio.current_time() + wait_s)
        else:
            self.picker.refuse(peer, run)

    async def _fetch_run(self, peer: PeerId, run: range) -> None:
        wanted = ChunksWanted(self.manifest.id, run.start, len(run))
        reply = await self.exchange._rpc.call(peer, CHUNKS, wanted)
        data = memoryview(reply.data.data)
        lengths = [self.length(number) for number in run]
        if len(data) != sum(lengths):
            raise ProtocolViolation(f"{peer} sent {len(data)} bytes where {sum(lengths)} were asked for")
        pieces = []
        at = 0
        for length in lengths:
            pieces.append(data[at : at + length])
            at += length
        write = partial(self.exchange.store.write_chunks, self.manifest, run.start, pieces)
        await trio.to_thread.run_sync(write, limiter=self.exchange._writers)
        came = [number for number in run if number in self.picker.missing]
        self.picker.done(came)
        self._done += sum(map(self.length, came))
        self._last_s = trio.current_time()
        self.tell()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
