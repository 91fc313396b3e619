"""What lies on this node's disk for the mesh, what of it stays when room is needed, and what is said of it.

Stays: what this node added, what it serves or is about to serve, each model's small files, and whatever nobody else
would have. The limits (disk, upload) may change while the node runs. It fetches and evicts nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from node.atlas import Atlas
from node.hub import Hub
from node.library import Library, small_files
from p2p import BlobExchange, Manifest
from scheduler import node_of

Span = tuple[int, int]
BITS_PER_MEGABIT = 1e6


class Stock:
    """`atlas()` is the current view, `spans()` what is hosted or wanted here by manifest id, `dropped(id)` whether a
    model was taken back from the mesh."""

    def __init__(
        self,
        me: str,
        blobs: BlobExchange,
        library: Library,
        atlas: Callable[[], Atlas],
        spans: Callable[[], Mapping[str, Sequence[Span]]],
        dropped: Callable[[str], bool],
        root: Path,
    ) -> None:
        self._me = me
        self._blobs = blobs
        self._library = library
        self._atlas = atlas
        self._spans = spans
        self._dropped = dropped
        self.hub = Hub(root / "hub", blobs.store.check_room)
        blobs.keep = self.kept

    # -- limits ----------------------------------------------------------------------------------------------------

    @property
    def upload_mbps(self) -> float | None:
        """Mbit/s of models' pieces for others; None: no limit."""
        rate = self._blobs.budget.bytes_per_s
        return None if rate is None else rate * 8 / BITS_PER_MEGABIT

    def set_upload(self, mbps: float | None) -> None:
        """From now on, also for what waits to be sent. 0: nothing."""
        self._blobs.budget.set_rate(None if mbps is None else mbps * BITS_PER_MEGABIT / 8)

    async def set_disk(self, disk_bytes: int) -> None:
        """From now on; what nobody needs goes at once. Raises ResourceLimit where what is needed is more: the limit
        holds all the same for what would come."""
        self._blobs.store.set_quota(disk_bytes)
        await self._blobs.make_room(0)

    # -- what stays ------------------------------------------------------------------------------------------------

    def kept(self) -> dict[str, Collection[int] | None]:
        """By manifest id the chunks that stay, None for all; of what is not named nothing does."""
        atlas, spans = self._atlas(), self._spans()
        found: dict[str, Collection[int] | None] = {}
        models = {model.manifest_id: model for model in atlas.models.values()}
        adapters = {adapter.manifest_id: adapter for adapter in atlas.adapters.values()}
        for manifest in self._blobs.store.manifests():
            model, adapter = models.get(manifest.id), adapters.get(manifest.id)
            if self._dropped(manifest.id) and manifest.id not in spans:
                continue
            if manifest.publisher == self._me:
                found[manifest.id] = None
            elif adapter is not None:
                found[manifest.id] = None if adapter.base in spans else ()
            elif model is not None or manifest.id in spans:
                others = model is None or self._elsewhere(atlas, manifest, model.layers)
                found[manifest.id] = self._needed(manifest, spans.get(manifest.id, ())) if others else None
        return found

    def _elsewhere(self, atlas: Atlas, manifest: Manifest, layers: int) -> bool:
        """Whether the mesh has a model without this node: its publisher is there, or all layers have ready hosts."""
        if manifest.publisher in atlas.nodes:
            return True
        ready = [
            range(host.start, host.end)
            for name, host in atlas.live_hosts(manifest.id).items()
            if host.state == "ready" and node_of(name) != self._me
        ]
        return all(any(layer in span for span in ready) for layer in range(layers))

    def _needed(self, manifest: Manifest, spans: Sequence[Span]) -> Collection[int] | None:
        """The small files, and of the weights what the spans take; all where that cannot be told yet."""
        wanted = {name: list(ranges) for name, ranges in small_files(manifest).items()}
        files = self._library.known(manifest.id)
        if spans and files is None:
            return None
        for start, end in spans:
            if files is not None:
                for name, ranges in files.index.span_ranges(files.config, start, end).items():
                    wanted.setdefault(name, []).extend(ranges)
        return {
            number
            for name, ranges in wanted.items()
            for start, end in ranges
            for number in manifest.numbers(name, start, end)
        }

    # -- what is said ----------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """The part `blobs` of `/mesh`. Bytes, Mbit/s, MB/s (10**6 bytes); `at` in Unix seconds."""
        blobs, store = self._blobs, self._blobs.store
        mbps = self.upload_mbps
        return {
            "disk": {
                "used_bytes": store.used_bytes(),
                "limit_bytes": store.quota_bytes,
                "free_bytes": store.free_bytes(),
                "evicted_bytes": blobs.evicted_bytes,
            },
            "upload_mbps": None if mbps is None else round(mbps, 3),
            "sent_bytes": blobs.budget.sent_bytes,
            "received_bytes": blobs.received_bytes,
            "fetches": [
                {
                    "model": one.name,
                    "manifest": one.manifest_id,
                    "done_bytes": one.done,
                    "total_bytes": one.total,
                    "mb_per_s": round(one.bytes_per_s / 1e6, 3),
                    "sources": [
                        {"peer": peer, "bytes": count, "path": one.paths.get(peer, "")}
                        for peer, count in sorted(one.sources.items())
                    ],
                }
                for one in (*blobs.fetching(), *self.hub.fetching())
            ],
            "dropped_sources": [
                {
                    "peer": one.peer,
                    "model": one.name,
                    "manifest": one.manifest_id,
                    "reason": one.reason,
                    "at": round(one.at_s, 3),
                }
                for one in blobs.dropped()
            ],
        }
