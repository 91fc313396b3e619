"""The errors of p2p, on the three axes that cross the whole project.

    P2pError
        RemoteFault                 the peer's doing: score it, close the stream, go on
            PeerLost                the connection died, or a heartbeat was missed
            ProtocolViolation       undecodable, oversized or out-of-order bytes
            CallFailed              the remote handler answered with an error
            DeadlineExceeded        the answer did not come in time
            Unreachable             no address of the peer could be connected
        ResourceLimit               shed load; `retry_after_s` says when to come back
        LocalFault                  this node's doing: its disk, its ports, its code
            IdentityError           the key file cannot be read, parsed or written
            ListenError             a listen address cannot be bound
        InviteError                 an invite that a person pasted is malformed
        EndOfChannel                not a fault: the other side has said all it had to say
        RpcRefusal                  raised by handlers, to become a CallFailed at the caller

`p2p.blobs.errors` adds BlobUnavailable (RemoteFault), SourceChanged and StoreFault (LocalFault).

It knows nothing of libp2p: adapters translate the library's exceptions into these.
"""

from __future__ import annotations

from collections.abc import Mapping


class P2pError(Exception):
    """Root of everything that p2p raises on purpose."""


class RemoteFault(P2pError):
    """The peer's doing. Never a reason to stop the node."""


class PeerLost(RemoteFault):
    """The connection to `peer` is gone (or was never there)."""

    def __init__(self, peer: str, message: str = "") -> None:
        super().__init__(message or f"lost the connection to {peer}")
        self.peer = peer


class ProtocolViolation(RemoteFault):
    """The peer sent bytes that the protocol does not allow."""


class CallFailed(RemoteFault):
    """The remote handler answered `code` (see RpcRefusal) with a plain `message`.

    `detail` holds what the handler wished to tell apart, such as the `peer` that it lost itself.
    """

    def __init__(
        self,
        code: str,
        message: str,
        peer: str,
        retry_after_s: float | None = None,
        detail: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{peer} answered {code}: {message}")
        self.code = code
        self.message = message
        self.peer = peer
        self.retry_after_s = retry_after_s
        self.detail = dict(detail or {})


class DeadlineExceeded(RemoteFault):
    """The peer did not answer within the deadline."""


class Unreachable(RemoteFault):
    """No address could be connected; `attempts` maps each address to its reason."""

    def __init__(self, attempts: Mapping[str, str]) -> None:
        self.attempts = dict(attempts)
        detail = "; ".join(f"{address}: {reason}" for address, reason in self.attempts.items())
        super().__init__(f"could not connect ({detail or 'no addresses were given'})")


class ResourceLimit(P2pError):
    """A limit of this node is reached. `retry_after_s` is a hint, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LocalFault(P2pError):
    """This node's doing: its disk, its ports or its code."""


class IdentityError(LocalFault):
    """The identity key cannot be read, parsed or written. One clear line."""


class ListenError(LocalFault):
    """A listen address cannot be bound. One clear line that names the port."""


class InviteError(P2pError):
    """An invite is malformed. The message says what is wrong with it."""


class EndOfChannel(P2pError):
    """The other side has ended its direction cleanly, and everything it sent was received."""


class RpcRefusal(P2pError):
    """Raised by a handler: the caller gets CallFailed with the same code, message, hint and detail.

    `code` is one of not_found, busy, invalid, unavailable, internal, denied.
    """

    def __init__(
        self,
        code: str,
        message: str,
        retry_after_s: float | None = None,
        detail: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.detail = dict(detail or {})
