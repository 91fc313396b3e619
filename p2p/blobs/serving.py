"""Chunks for peers: what the store has, by calls and on links, within limits and the owner's upload budget.

Knows whom it serves and how much at once. A peer that reads too slowly, or asks for what cannot be, costs a link
or a refusal and nothing more. It does not fetch.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio

from p2p.blobs.budget import UploadBudget
from p2p.blobs.manifest import Manifest
from p2p.blobs.protocol import (
    CHUNKS,
    HAVE,
    LINK_RUN_BYTES_MAX,
    MANIFEST,
    RUN_BYTES_MAX,
    RUN_CHUNKS_MAX,
    SERVICE,
    Bytes,
    ChunksWanted,
    ExchangeConfig,
    Have,
    HaveWanted,
    ManifestWanted,
    Part,
    raw,
)
from p2p.blobs.store import BlobStore
from p2p.errors import LocalFault, PeerLost, ProtocolViolation, ResourceLimit, RpcRefusal
from p2p.identity import PeerId
from p2p.links import Link, Links
from p2p.messages import pack_value, unpack_value
from p2p.rpc import Rpc
from p2p.rpc_types import Call

logger = logging.getLogger(__name__)

_BUFFERS = 2
"""Of a link: one is sent while the other is read."""


class Serving:
    """Serves `store` from the moment it is made."""

    def __init__(
        self, rpc: Rpc, store: BlobStore, config: ExchangeConfig, budget: UploadBudget, links: Links | None
    ) -> None:
        self._store = store
        self._config = config
        self._budget = budget
        self._calls: Counter[PeerId] = Counter()
        self._links: Counter[PeerId] = Counter()
        self._readers = trio.CapacityLimiter(config.readers_max)
        rpc.serve(MANIFEST, self._serve_manifest)
        rpc.serve(HAVE, self._serve_have)
        rpc.serve(CHUNKS, self._serve_chunks)
        if links is not None:
            links.serve(SERVICE, self._serve_link)

    async def _serve_manifest(self, call: Call, request: ManifestWanted) -> Bytes:
        manifest = self._known(request.manifest_id)
        return raw(await trio.to_thread.run_sync(manifest.encode, limiter=self._readers))

    async def _serve_have(self, call: Call, request: HaveWanted) -> Have:
        self._check_budget()
        bits = self._store.bits(request.manifest_id)
        return Have(bits is not None, bits or b"")

    async def _serve_chunks(self, call: Call, request: ChunksWanted) -> Bytes:
        size = self._size(request)
        with _counted(self._calls, call.peer) as of_peer:
            if of_peer > self._config.served_per_peer_max or self._calls.total() > self._config.served_max:
                raise RpcRefusal("busy", "too many chunks are being served", self._config.busy_retry_after_s)
            into = memoryview(bytearray(size))
            await self._read(request, into)
            await self._budget.spend(size)
            return raw(into)

    # ---- links

    async def _serve_link(self, link: Link) -> None:
        """Answer what is asked on a link, in order, for as long as it lasts."""
        with _counted(self._links, link.peer) as of_peer:
            crowded = of_peer > self._config.served_per_peer_max or (
                self._links.total() > self._config.served_links_max
            )
            free: deque[bytearray] = deque(bytearray() for _ in range(_BUFFERS))
            freed = trio.lowlevel.ParkingLot()
            ready_in, ready_out = trio.open_memory_channel[tuple[Part, memoryview, bytearray | None]](
                _BUFFERS
            )

            async def send() -> None:
                async for part, payload, buffer in ready_out:
                    await self._send(link, part, payload)
                    if buffer is not None:
                        free.append(buffer)
                        freed.unpark()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while True:
                    header, _ = await link.receive(_no_payload)
                    wanted = unpack_value(ChunksWanted, header)
                    while not free:
                        await freed.park()
                    buffer = free.popleft()
                    try:
                        if crowded:
                            raise RpcRefusal("busy", "too many links", self._config.busy_retry_after_s)
                        size = self._size(wanted)
                        if size > LINK_RUN_BYTES_MAX and wanted.count > 1:
                            raise RpcRefusal(
                                "invalid", f"{size} bytes are more than one run on a link may have"
                            )
                        if len(buffer) < size:
                            buffer = bytearray(size)
                        payload = memoryview(buffer)[:size]
                        await self._read(wanted, payload)
                    except RpcRefusal as refusal:
                        free.append(buffer)
                        part = Part(
                            wanted.first, wanted.count,
                            refusal.code, refusal.message[:500], refusal.retry_after_s or 0.0,
                        )  # fmt: skip
                        await ready_in.send((part, memoryview(b""), None))
                    else:
                        await ready_in.send((Part(wanted.first, wanted.count), payload, buffer))

    async def _send(self, link: Link, part: Part, payload: memoryview) -> None:
        if payload:
            await self._budget.spend(len(payload))
        with trio.move_on_after(self._config.run_deadline_s) as scope:
            await link.send(pack_value(part), [payload] if payload else [])
        if scope.cancelled_caught:
            raise PeerLost(link.peer, f"{link.peer} did not take a part in {self._config.run_deadline_s:g} s")

    # ---- what is asked

    def _size(self, wanted: ChunksWanted) -> int:
        """Bytes of what is asked for. Raises RpcRefusal for what cannot be."""
        manifest = self._known(wanted.manifest_id)
        first, count = wanted.first, wanted.count
        self._check_budget()
        if not (1 <= count <= RUN_CHUNKS_MAX and 0 <= first <= manifest.chunk_count - count):
            raise RpcRefusal("invalid", f"chunks [{first}, {first + count}) of {manifest.chunk_count}")
        size = sum(manifest.chunk(number)[1].length for number in range(first, first + count))
        if size > RUN_BYTES_MAX:
            raise RpcRefusal("invalid", f"{size} bytes are more than one request may ask for")
        return size

    async def _read(self, wanted: ChunksWanted, into: memoryview) -> None:
        read = partial(self._store.read_run, wanted.manifest_id, wanted.first, wanted.count, into)
        try:
            await trio.to_thread.run_sync(read, limiter=self._readers)
        except (LocalFault, ResourceLimit) as problem:
            name = self._known(wanted.manifest_id).name
            logger.warning("cannot serve chunks of %s: %s", name, problem)
            raise RpcRefusal("unavailable", f"chunks of {name} cannot be read here") from None

    def _check_budget(self) -> None:
        if self._budget.bytes_per_s == 0:
            raise RpcRefusal("unavailable", "this node uploads nothing, by its owner's order")

    def _known(self, manifest_id: str) -> Manifest:
        manifest = self._store.manifest(manifest_id)
        if manifest is None:
            raise RpcRefusal("not_found", f"no manifest {manifest_id[:80]!r} here")
        return manifest


def _no_payload(header: bytes, payload_bytes: int) -> None:
    raise ProtocolViolation(f"a wish for chunks with a payload of {payload_bytes} bytes")


@contextmanager
def _counted(counts: Counter[PeerId], peer: PeerId) -> Iterator[int]:
    counts[peer] += 1
    try:
        yield counts[peer]
    finally:
        counts[peer] -= 1
        if not counts[peer]:
            del counts[peer]
