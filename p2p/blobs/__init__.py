"""Model files between peers: signed manifests, a verified store, and the exchange of chunks.

Only `p2p`'s face is for others; this one is for p2p itself.
"""

from p2p.blobs.errors import BlobUnavailable, SourceChanged, StoreFault
from p2p.blobs.exchange import BlobExchange
from p2p.blobs.fetch import Dropped, FetchState
from p2p.blobs.manifest import Chunk, FileEntry, Manifest, build_manifest
from p2p.blobs.protocol import ExchangeConfig
from p2p.blobs.store import BlobStore

__all__ = [
    "BlobExchange",
    "BlobStore",
    "BlobUnavailable",
    "Chunk",
    "Dropped",
    "ExchangeConfig",
    "FetchState",
    "FileEntry",
    "Manifest",
    "SourceChanged",
    "StoreFault",
    "build_manifest",
]
