"""One fetch at work: who is asked for what (`picking` decides), over which lane, and what becomes of the answers.

A task keeps looking for sources; each source has a link of its own, or where none can be had a few calls. Chunks are
checked and written on threads, straight from the buffers they came in. It does not know what is wanted or why.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import trio

from p2p.blobs.errors import BlobUnavailable
from p2p.blobs.files import PAGE_BYTES, page_memory, place
from p2p.blobs.manifest import Manifest
from p2p.blobs.picking import Picker
from p2p.blobs.protocol import (
    CHUNKS,
    HAVE,
    RUN_CHUNKS_MAX,
    SERVICE,
    ChunksWanted,
    ExchangeConfig,
    HaveWanted,
    Part,
)
from p2p.blobs.store import BlobStore
from p2p.errors import (
    CallFailed,
    DeadlineExceeded,
    EndOfChannel,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
    ResourceLimit,
    Unreachable,
)
from p2p.identity import PeerId
from p2p.links import Link, Links
from p2p.messages import pack_value, unpack_value
from p2p.rpc import Rpc

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source that sent bad bytes: which, of what, why, and when (Unix seconds)."""

    peer: PeerId
    name: str
    manifest_id: str
    reason: str
    at_s: float


@dataclass(eq=False, slots=True)
class FetchState:
    """How far a fetch is. Bytes; `sources` says how many came from whom, `paths` by what: direct, stream or calls."""

    name: str
    manifest_id: str
    done: int
    total: int
    bytes_per_s: float = 0.0
    sources: dict[PeerId, int] = field(default_factory=dict)
    paths: dict[PeerId, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tools:
    """What all fetches of a node share."""

    rpc: Rpc
    links: Links | None
    store: BlobStore
    config: ExchangeConfig
    me: PeerId
    writers: trio.CapacityLimiter
    dropped: Callable[[Dropped], None]
    shunned: Callable[[str, PeerId], str]
    """Why a peer is not asked for a manifest now; "" where it may be."""


class Fetch:
    """Brings `numbers`, chunks of `manifest`, to the store. Raises BlobUnavailable, ResourceLimit and LocalFault."""

    def __init__(
        self,
        tools: Tools,
        manifest: Manifest,
        numbers: set[int],
        peers: Callable[[], Iterable[PeerId]],
        progress: Progress | None,
    ) -> None:
        store, config = tools.store, tools.config
        missing = [number for number in numbers if not store.has_chunk(manifest.id, number)]
        self.manifest = manifest
        self.numbers = numbers
        self.picker = Picker(
            missing,
            self.length,
            tools.me,
            run_bytes_max=config.run_bytes_max if tools.links is None else config.link_run_bytes_max,
            run_chunks_max=RUN_CHUNKS_MAX,
            stalled_s=config.stalled_s,
        )
        total = sum(map(self.length, numbers))
        self.missing_bytes = sum(map(self.length, missing))
        self.state = FetchState(manifest.name, manifest.id, total - self.missing_bytes, total)
        self._tools = tools
        self._config = config
        self._peers = peers
        self._progress = progress
        self._changed = trio.Event()
        self._reasons: dict[str, str] = {}
        self._working: set[PeerId] = set()
        self._asking: set[PeerId] = set()
        self._buffers: deque[memoryview | None] = deque([None] * config.buffers_max)
        self._freed = trio.lowlevel.ParkingLot()
        self._last_s = self._began_s = trio.current_time()

    def length(self, number: int) -> int:
        return self.manifest.chunk(number)[1].length

    def _offset(self, run: range) -> int:
        return self.manifest.chunk(run.start)[1].offset

    def tell(self) -> None:
        if self._progress is not None:
            self._progress(self.state.done, self.state.total)

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

    # ---- sources

    def _look_for_sources(self, nursery: trio.Nursery) -> None:
        """Ask every named peer what it has; those that have something get to work."""
        for peer in self._peers():
            if peer == self._tools.me or peer in self._asking or peer in self.picker.bad:
                continue
            shunned = self._tools.shunned(self.manifest.id, peer)
            if shunned:
                self._reasons[peer] = shunned
            elif len(self._asking) < self._config.sources_max and not self.picker.complete(peer):
                self._asking.add(peer)
                nursery.start_soon(self._ask, nursery, peer)

    async def _ask(self, nursery: trio.Nursery, peer: PeerId) -> None:
        try:
            have = await self._tools.rpc.call(peer, HAVE, HaveWanted(self.manifest.id))
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
        """Runs of chunks from one peer, for as long as it is a source."""
        links = self._tools.links
        try:
            if links is not None and await self._work_on_link(peer, links):
                return
            self.state.paths[peer] = "calls"
            async with trio.open_nursery() as nursery:
                for _ in range(self._config.requests_per_source):
                    nursery.start_soon(self._work_by_calls, peer)
        finally:
            self._working.discard(peer)

    # ---- on a link

    async def _work_on_link(self, peer: PeerId, links: Links) -> bool:
        """False where no link can be had: its peer is asked by calls then."""
        opened = False
        asked: set[range] = set()
        try:
            async with links.open(peer, SERVICE, window_bytes=self._config.link_window_bytes) as link:
                opened = True
                async with trio.open_nursery() as nursery:
                    await self._runs_on(link, asked, nursery)
        except* (Unreachable, ResourceLimit, DeadlineExceeded, PeerLost, EndOfChannel) as group:
            if opened:
                if group.subgroup(ResourceLimit) is not None:
                    raise  # this node's own disk
                fault = first_of(group)
                logger.info("%s does not deliver %s now: %s", peer, self.manifest.name, fault)
                self._reasons[peer] = str(fault)
                self.picker.drop(peer, bad=False)
        except* ProtocolViolation as group:
            self._bad(peer, first_of(group))
            opened = True
        finally:
            for run in asked:
                self.picker.returned(peer, run)
            self._wake()
        return opened

    async def _runs_on(self, link: Link, asked: set[range], nursery: trio.Nursery) -> None:
        """Receive in order what is asked ahead, until the peer has nothing more that is missing. Another task asks:
        what comes while nobody waits for it is copied once more."""
        to_come, coming = trio.open_memory_channel[range](self._config.link_ahead)
        nursery.start_soon(self._ask_on, link, asked, to_come)
        with contextlib.suppress(trio.EndOfChannel):
            while True:
                try:
                    run = coming.receive_nowait()
                except trio.WouldBlock:
                    run = await coming.receive()
                await self._receive_on(link, run, asked, nursery)

    async def _ask_on(self, link: Link, asked: set[range], to_come: trio.MemorySendChannel[range]) -> None:
        with to_come:
            while self.picker.useful(link.peer):
                run = self.picker.pick(link.peer, trio.current_time())
                if run is None:
                    with trio.move_on_after(self._config.refresh_s):
                        await self._changed.wait()
                    continue
                asked.add(run)
                await link.send(pack_value(ChunksWanted(self.manifest.id, run.start, len(run))))
                await to_come.send(run)

    async def _receive_on(self, link: Link, run: range, asked: set[range], nursery: trio.Nursery) -> None:
        size = sum(map(self.length, run))
        buffer = await self._buffer(size)
        kept = False
        try:
            with trio.move_on_after(self._config.run_deadline_s) as scope:
                header, payload = await link.receive(partial(_into, place(buffer, size, self._offset(run))))
            if scope.cancelled_caught:
                raise PeerLost(link.peer, f"{link.peer} gave nothing in {self._config.run_deadline_s:g} s")
            part = unpack_value(Part, header)
            if (part.first, part.count) != (run.start, len(run)):
                raise ProtocolViolation(f"{link.peer} answered what was not asked")
            if part.code:
                failed = CallFailed(part.code, part.message, link.peer, part.retry_after_s or None)
                self._refused(link.peer, run, failed)
                self._returned(link.peer, run, asked)
            elif len(payload) != size:
                raise ProtocolViolation(f"{link.peer} sent {len(payload)} bytes where {size} were asked for")
            else:
                self.state.paths[link.peer] = link.path
                kept = True
                nursery.start_soon(self._keep_from_link, link.peer, run, asked, buffer, payload)
        finally:
            if not kept:
                self._give_back(buffer)

    def _returned(self, peer: PeerId, run: range, asked: set[range]) -> None:
        asked.discard(run)
        self.picker.returned(peer, run)
        self._wake()

    async def _keep_from_link(
        self, peer: PeerId, run: range, asked: set[range], buffer: memoryview, payload: memoryview
    ) -> None:
        try:
            await self._keep(peer, run, payload)
        finally:
            self._give_back(buffer)
            self._returned(peer, run, asked)

    async def _buffer(self, size: int) -> memoryview:
        """One of the buffers that this fetch may have, with room for that much at any place of a page."""
        while not self._buffers:
            await self._freed.park()
        buffer = self._buffers.popleft()
        if buffer is None or len(buffer) < size + PAGE_BYTES:
            buffer = page_memory(max(size, self._config.link_run_bytes_max) + PAGE_BYTES)
        return buffer

    def _give_back(self, buffer: memoryview) -> None:
        self._buffers.appendleft(buffer)
        self._freed.unpark()

    # ---- by calls

    async def _work_by_calls(self, peer: PeerId) -> None:
        while self.picker.useful(peer):
            run = self.picker.pick(peer, trio.current_time())
            if run is None:
                with trio.move_on_after(self._config.refresh_s):
                    await self._changed.wait()
                continue
            try:
                await self._call_for(peer, run)
            except ProtocolViolation as violation:
                self._bad(peer, violation)
            except CallFailed as failed:
                self._refused(peer, run, failed)
            except RemoteFault as fault:
                logger.info("%s does not deliver %s now: %s", peer, self.manifest.name, fault)
                self._reasons[peer] = str(fault)
                self.picker.drop(peer, bad=False)
            finally:
                self.picker.returned(peer, run)
                self._wake()

    async def _call_for(self, peer: PeerId, run: range) -> None:
        wanted = ChunksWanted(self.manifest.id, run.start, len(run))
        reply = await self._tools.rpc.call(peer, CHUNKS, wanted)
        data = memoryview(reply.data.data)
        size = sum(map(self.length, run))
        if len(data) != size:
            raise ProtocolViolation(f"{peer} sent {len(data)} bytes where {size} were asked for")
        await self._keep(peer, run, data)

    # ---- what came

    async def _keep(self, peer: PeerId, run: range, data: memoryview) -> None:
        write = partial(self._tools.store.write_run, self.manifest, run.start, len(run), data)
        try:
            await trio.to_thread.run_sync(write, limiter=self._tools.writers)
        except ProtocolViolation as violation:
            raise ProtocolViolation(f"{peer} sent bad bytes: {violation}") from None
        came = [number for number in run if number in self.picker.missing]
        self.picker.done(came)
        state, came_bytes = self.state, sum(map(self.length, came))
        state.done += came_bytes
        state.sources[peer] = state.sources.get(peer, 0) + came_bytes
        self._last_s = trio.current_time()
        fetched = state.done - (state.total - self.missing_bytes)
        state.bytes_per_s = fetched / max(self._last_s - self._began_s, 1e-3)
        self.tell()

    def _refused(self, peer: PeerId, run: range, failed: CallFailed) -> None:
        self._reasons[peer] = str(failed)
        if failed.code == "busy":
            wait_s = min(max(failed.retry_after_s or self._config.rest_s, 0.05), 30.0)
            self.picker.rest(peer, trio.current_time() + wait_s)
        else:
            self.picker.refuse(peer, run)

    def _bad(self, peer: PeerId, violation: BaseException) -> None:
        if peer in self.picker.bad:
            return
        logger.warning("%s is no source of %s any more: %s", peer, self.manifest.name, violation)
        self._reasons[peer] = str(violation)
        self.picker.drop(peer, bad=True)
        self._tools.dropped(
            Dropped(peer, self.manifest.name, self.manifest.id, str(violation)[:500], time.time())
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _into(buffer: memoryview, header: bytes, payload_bytes: int) -> memoryview:
    if payload_bytes != len(buffer):
        raise ProtocolViolation(f"{payload_bytes} bytes where {len(buffer)} were asked for")
    return buffer


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception inside, which is what ended the rest."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner
