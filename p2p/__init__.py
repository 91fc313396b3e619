"""Identity, connections, calls and blobs between the nodes of a mesh.

The only package that imports libp2p; nothing of libp2p shows in this face. Peers are plain
base58 strings, errors are those of `p2p.errors`. It does not know what a model or a plan is.
"""

from p2p import _bootstrap as _bootstrap  # first: libp2p may have to be found inside this package
from p2p.errors import (
    CallFailed,
    DeadlineExceeded,
    IdentityError,
    InviteError,
    ListenError,
    LocalFault,
    P2pError,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
    ResourceLimit,
    Unreachable,
)
from p2p.host import ByteStream, Host, HostConfig, PeerEvent, open_host
from p2p.identity import Identity, PeerId, verify
from p2p.invite import Invite

__all__ = [
    "ByteStream",
    "CallFailed",
    "DeadlineExceeded",
    "Host",
    "HostConfig",
    "Identity",
    "IdentityError",
    "Invite",
    "InviteError",
    "ListenError",
    "LocalFault",
    "P2pError",
    "PeerEvent",
    "PeerId",
    "PeerLost",
    "ProtocolViolation",
    "RemoteFault",
    "ResourceLimit",
    "Unreachable",
    "open_host",
    "verify",
]
