"""Identity, connections, calls, tensor links and blobs between the nodes of a mesh.

The only package that imports libp2p; nothing of libp2p shows in this face. Peers are plain
base58 strings, errors are those of `p2p.errors`. It does not know what a model or a plan is.
"""

from p2p import _bootstrap as _bootstrap  # first: libp2p may have to be found inside this package
from p2p.blobs import (
    BlobExchange,
    BlobStore,
    BlobUnavailable,
    Chunk,
    Dropped,
    ExchangeConfig,
    FetchState,
    FileEntry,
    Manifest,
    SourceChanged,
    StoreFault,
    build_manifest,
)
from p2p.certs import mesh_id_of
from p2p.errors import (
    CallFailed,
    DeadlineExceeded,
    EndOfChannel,
    IdentityError,
    InviteError,
    ListenError,
    LocalFault,
    P2pError,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
    ResourceLimit,
    RpcRefusal,
    Unreachable,
)
from p2p.host import ByteStream, Host, HostConfig, PeerEvent, open_host
from p2p.identity import Identity, PeerId, verify
from p2p.invite import Invite
from p2p.kad import Kad, KadConfig
from p2p.links import Link, LinkReport, Links, LinksConfig
from p2p.messages import pack_value, unpack_value
from p2p.reach import Reach, ReachConfig, ReachReport, RelayLimits, Said
from p2p.roster import Roster
from p2p.rpc import Rpc
from p2p.rpc_lane import Channel
from p2p.rpc_types import Call, Method, RpcConfig
from p2p.tensor import Tensor

__all__ = [
    "BlobExchange",
    "BlobStore",
    "BlobUnavailable",
    "ByteStream",
    "Call",
    "CallFailed",
    "Channel",
    "Chunk",
    "DeadlineExceeded",
    "Dropped",
    "EndOfChannel",
    "ExchangeConfig",
    "FetchState",
    "FileEntry",
    "Host",
    "HostConfig",
    "Identity",
    "IdentityError",
    "Invite",
    "InviteError",
    "Kad",
    "KadConfig",
    "Link",
    "LinkReport",
    "Links",
    "LinksConfig",
    "ListenError",
    "LocalFault",
    "Manifest",
    "Method",
    "P2pError",
    "PeerEvent",
    "PeerId",
    "PeerLost",
    "ProtocolViolation",
    "Reach",
    "ReachConfig",
    "ReachReport",
    "RelayLimits",
    "RemoteFault",
    "ResourceLimit",
    "Roster",
    "Rpc",
    "RpcConfig",
    "RpcRefusal",
    "Said",
    "SourceChanged",
    "StoreFault",
    "Tensor",
    "Unreachable",
    "build_manifest",
    "mesh_id_of",
    "open_host",
    "pack_value",
    "unpack_value",
    "verify",
]
