"""What peers say to one another about blobs: three calls, and the runs of chunks that travel on a link.

On a link of service "blobs" the fetcher sends `ChunksWanted` after `ChunksWanted` as headers without a payload, and
gets a `Part` for each, in order: the chunks as its payload, or why not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from p2p.blobs.manifest import CHUNK_BYTES_MAX, MANIFEST_BYTES_MAX
from p2p.errors import LocalFault
from p2p.rpc_types import Method
from p2p.tensor import Tensor

SERVICE = "blobs"
RUN_CHUNKS_MAX = 256
RUN_BYTES_MAX = 2 * CHUNK_BYTES_MAX
LINK_RUN_BYTES_MAX = 4 << 20
"""Of several chunks; a single one may be larger."""
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


@dataclass(frozen=True, slots=True)
class Part:
    """The answer on a link: `code` is "" where the payload is the chunks, else why there are none, as in a refused
    call."""

    first: int
    count: int
    code: str = ""
    message: str = ""
    retry_after_s: float = 0.0


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
    "blobs.chunks", ChunksWanted, Bytes, payload_bytes_max=RUN_BYTES_MAX, deadline_s=60.0, lane="bulk"
)


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """`requests_per_source` runs of at most `run_bytes_max` are asked of a peer at once, by calls; on a link
    `link_ahead` of at most `link_run_bytes_max`, with `link_window_bytes` under way and `buffers_max` buffers in all.
    `served_per_peer_max` and `served_max` calls are served, and `served_links_max` links. A source that sent bad bytes
    is not asked for the same model again for `shunned_s`. A fetch gives up `patience_s` after the last byte came."""

    requests_per_source: int = 6
    sources_max: int = 8
    run_bytes_max: int = 1 << 20
    link_ahead: int = 4
    link_run_bytes_max: int = 2 << 20
    link_window_bytes: int = 4 << 20
    buffers_max: int = 12
    served_per_peer_max: int = 16
    served_max: int = 64
    served_links_max: int = 16
    readers_max: int = 4
    busy_retry_after_s: float = 0.5
    refresh_s: float = 1.0
    stalled_s: float = 5.0
    run_deadline_s: float = 60.0
    rest_s: float = 2.0
    shunned_s: float = 300.0
    patience_s: float = 15.0

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise LocalFault(
                    f"ExchangeConfig.{one.name} must be positive, got {getattr(self, one.name)!r}"
                )
        for name, most in (("run_bytes_max", CHUNK_BYTES_MAX), ("link_run_bytes_max", LINK_RUN_BYTES_MAX)):
            if getattr(self, name) > most:
                raise LocalFault(f"ExchangeConfig.{name} must be at most {most}")
        if self.buffers_max < self.sources_max:
            raise LocalFault(f"ExchangeConfig.buffers_max must be at least sources_max, {self.sources_max}")


def raw(data: bytes | memoryview) -> Bytes:
    """Bytes as a message."""
    return Bytes(Tensor("uint8", (len(data),), data))
