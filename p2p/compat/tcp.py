# mypy: disallow-subclassing-any=False
"""TCP for the host: listeners that fail loudly, and sockets that a dead peer cannot hold.

Faults of py-libp2p 0.8.1: a listener sets SO_REUSEPORT, so that a second node on the same port is
not refused but steals half the connections; a failed bind is logged and swallowed; listeners live in
trio system tasks, where one escaped exception ends the program. It knows sockets and
multiaddresses; not encryption. It can go when the library's TCPListener binds exclusively and raises.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IListener
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2p.errors import ListenError

logger = logging.getLogger(__name__)

_BACKLOG = 256


class TcpListener(IListener):
    """Sockets bound exclusively; connections are served in the swarm's own nursery."""

    def __init__(self, handler: Callable[[ReadWriteCloser], Awaitable[None]]) -> None:
        self._handler = handler
        self._listeners: list[trio.SocketListener] = []
        self._scope = trio.CancelScope()
        self.background_nursery: trio.Nursery | None = None

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and serve. Raises ListenError in one line that names the port."""
        _, host, port = listen_address(str(maddr))
        sock = await _bind(str(maddr), host, port)
        listener = trio.SocketListener(sock)
        self._listeners.append(listener)
        if self.background_nursery is None:
            raise ListenError(f"cannot listen on {maddr}: the host is not running")
        self.background_nursery.start_soon(self._serve, listener)

    async def _serve(self, listener: trio.SocketListener) -> None:
        with self._scope:
            await trio.serve_listeners(self._serve_one, [listener])

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        try:
            await self._handler(TrioTCPStream(stream))
        except Exception as error:  # noqa: BLE001 - one connection must never end the listener
            logger.debug("an inbound connection failed: %s: %s", type(error).__name__, error)

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(
            Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")
            for host, port in self.sockets()
        )

    def sockets(self) -> list[tuple[str, int]]:
        """(IP, port) of each bound socket."""
        names = (listener.socket.getsockname() for listener in self._listeners)
        return [(str(name[0]), int(name[1])) for name in names]

    async def close(self) -> None:
        self._scope.cancel()
        for listener in self._listeners:
            await listener.aclose()
        self._listeners.clear()


class MendedTcp(TCP):
    """Dials with the system's own resolver, and listens with the listener above.

    The library resolves /dns names with a resolver of its own that knows no hosts file, retries for
    many seconds, and logs each refused connection as an error.
    """

    async def dial(self, maddr: Multiaddr) -> RawConnection:
        """A connected socket. Raises OpenConnectionError; the deadline is the caller's."""
        name = next(protocol.name for protocol in maddr.protocols())
        host, port = str(maddr.value_for_protocol(name)), int(str(maddr.value_for_protocol("tcp")))
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise OpenConnectionError(f"cannot connect to {host} port {port}: {error}") from error
        return RawConnection(TrioTCPStream(stream), True)

    def create_listener(self, handler_function: Any) -> TcpListener:
        return TcpListener(handler_function)


def listen_address(address: str) -> tuple[Multiaddr, str, int]:
    """(multiaddress, IP, TCP port) of /ip4/A/tcp/P or /ip6/A/tcp/P. Raises ListenError."""
    try:
        maddr = Multiaddr(address)
        names = [protocol.name for protocol in maddr.protocols()]
        if len(names) != 2 or names[0] not in ("ip4", "ip6") or names[1] != "tcp":
            raise ValueError
        return maddr, str(maddr.value_for_protocol(names[0])), int(str(maddr.value_for_protocol("tcp")))
    except (MultiaddrError, ValueError):
        raise ListenError(
            f"cannot listen on {address!r}: expected a TCP address such as /ip4/0.0.0.0/tcp/4001"
        ) from None


async def _bind(address: str, host: str, port: int) -> trio.socket.SocketType:
    family = trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET
    sock: trio.socket.SocketType | None = None
    try:
        sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
        if os.name == "posix":
            # Lets a restarted node bind at once; on Windows it would let two nodes share the port.
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        if family == trio.socket.AF_INET6:
            sock.setsockopt(trio.socket.IPPROTO_IPV6, trio.socket.IPV6_V6ONLY, 1)
        await sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} is already in use"
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"port {port} is not permitted to this user"
        else:
            reason = f"port {port}: {error.strerror or error}"
        raise ListenError(f"cannot listen on {address}: {reason}") from error
    return sock
