"""Chunks between peers: serving what the store has, and fetching what is wanted from several peers at once.

The face of `serving` and `fetch`, and what this node knows of all its fetches: how far they are, and which sources sent
bad bytes. It does not know which peers should have something: `peers` says so, again and again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import trio

from p2p.blobs.budget import UploadBudget
from p2p.blobs.errors import BlobUnavailable
from p2p.blobs.fetch import Dropped, Fetch, FetchState, Progress, Tools, first_of
from p2p.blobs.manifest import Manifest
from p2p.blobs.protocol import MANIFEST, ExchangeConfig, ManifestWanted
from p2p.blobs.serving import Serving
from p2p.blobs.store import BlobStore, Keep
from p2p.errors import ProtocolViolation, RemoteFault, ResourceLimit
from p2p.identity import PeerId
from p2p.links import Links
from p2p.rpc import Rpc

logger = logging.getLogger(__name__)

Ranges = Mapping[str, Sequence[tuple[int, int]]]

_DROPPED_MAX = 32
_SHUNNED_MAX = 1024


class BlobExchange:
    """Serves `store` over `rpc`, and `links` where there are some, from the moment it is made."""

    def __init__(
        self, rpc: Rpc, store: BlobStore, config: ExchangeConfig | None = None, links: Links | None = None
    ) -> None:
        self.store = store
        self.config = config or ExchangeConfig()
        self.budget = UploadBudget()
        self.received_bytes = 0
        self.evicted_bytes = 0
        self.keep: Callable[[], Keep] | None = None
        """Which chunks stay when room is made for others; without it, all."""
        self._rpc = rpc
        self._me = rpc.host.peer_id
        self._links = links
        self._writers = trio.CapacityLimiter(self.config.readers_max)
        self._fetches: list[Fetch] = []
        self._dropped: deque[Dropped] = deque(maxlen=_DROPPED_MAX)
        self._shunned: OrderedDict[tuple[str, PeerId], tuple[float, str]] = OrderedDict()
        self._serving = Serving(rpc, store, self.config, self.budget, links)

    # ---- what is known

    def fetching(self) -> tuple[FetchState, ...]:
        """The fetches that are under way."""
        return tuple(fetch.state for fetch in self._fetches)

    def dropped(self) -> tuple[Dropped, ...]:
        """The latest sources that sent bad bytes, the newest last."""
        return tuple(self._dropped)

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
    ) -> FetchState:
        """Bring the chunks of `wanted` (file -> byte ranges [start, end)) to the store, and flush them to the disk.

        What is here already is not fetched again. `peers` is asked again every second. `progress(done, total)` counts
        bytes of whole chunks. Returns how it went. Raises BlobUnavailable when nothing came for `patience_s` seconds,
        ResourceLimit when the quota or the disk is full, LocalFault for ranges outside the manifest.
        """
        await trio.to_thread.run_sync(self.store.open, manifest)
        numbers = {
            number
            for name, ranges in wanted.items()
            for start, end in ranges
            for number in manifest.numbers(name, start, end)
        }
        tools = Tools(
            self._rpc,
            self._links,
            self.store,
            self.config,
            self._me,
            self._writers,
            self._drop,
            self._why_shunned,
        )
        fetch = Fetch(tools, manifest, numbers, peers, progress)
        if not fetch.picker.missing:
            fetch.tell()
            return fetch.state
        here_bytes = fetch.state.done
        self._fetches.append(fetch)
        try:
            await self.make_room(fetch.missing_bytes)
            await fetch.run()
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        finally:
            self._fetches.remove(fetch)
            self.received_bytes += fetch.state.done - here_bytes
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.store.sync, manifest.id)
        return fetch.state

    async def make_room(self, more_bytes: int) -> None:
        """Let go what nobody needs, where `more_bytes` would not fit else. Raises ResourceLimit where that is not
        enough, and then all stays."""
        store = self.store
        try:
            store.check_room(more_bytes)
        except ResourceLimit:
            if self.keep is None:
                raise
            keep = dict(self.keep())
            for fetch in self._fetches:
                kept = keep.get(fetch.manifest.id, ())
                keep[fetch.manifest.id] = None if kept is None else {*kept, *fetch.numbers}
            lacking = more_bytes - min(store.quota_bytes - store.used_bytes(), store.free_bytes())
            self.evicted_bytes += await trio.to_thread.run_sync(store.evict, lacking, keep)
            store.check_room(more_bytes)

    def _drop(self, dropped: Dropped) -> None:
        self._dropped.append(dropped)
        until_s = trio.current_time() + self.config.shunned_s
        self._shunned[dropped.manifest_id, dropped.peer] = (until_s, dropped.reason)
        while len(self._shunned) > _SHUNNED_MAX:
            self._shunned.popitem(last=False)

    def _why_shunned(self, manifest_id: str, peer: PeerId) -> str:
        until_s, reason = self._shunned.get((manifest_id, peer), (0.0, ""))
        return reason if trio.current_time() < until_s else ""
