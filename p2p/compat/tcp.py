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
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import trio
from libp2p.abc import IListener
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2p.errors import ListenError

logger = logging.getLogger(__name__)

_BACKLOG = 256
_READ_BYTES = 64 << 10

Endpoint = tuple[str, int]
"""(IP, port)."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a connection runs. `punched` is direct, too; of a relayed one `remote` is the relay's end."""

    kind: Literal["direct", "punched", "relayed"] = "direct"
    local: Endpoint | None = None
    remote: Endpoint | None = None
    relay: str = ""


class MendedTcpStream(ReadWriteCloser):
    """A connected socket, which it takes out of `stream`, with the way it runs.

    The library's TrioTCPStream knows no remote address of IPv6 connections, and costs two locks and a turn of the
    scheduler each time; `send_now` and `receive_into` cost none. One task reads and one writes.
    Can go when TrioTCPStream.get_remote_address takes names of four parts and its calls cost as little.
    """

    def __init__(self, stream: trio.SocketStream, kind: Literal["direct", "punched"] = "direct") -> None:
        self._sock = socket.socket(fileno=stream.socket.detach())
        self._sock.setblocking(False)
        self._more = True
        self.way = Way(kind, end_of(self._sock.getsockname), end_of(self._sock.getpeername))

    def get_remote_address(self) -> Endpoint | None:
        return self.way.remote

    async def read(self, n: int | None = None) -> bytes:
        buffer = bytearray(_READ_BYTES if n is None else n)
        return bytes(memoryview(buffer)[: await self.receive_into(memoryview(buffer))])

    async def receive_into(self, buffer: memoryview) -> int:
        """At least one byte; 0 at the end, also where this side has closed. Raises ConnectionClosedError."""
        if self._more:  # there may be more: try, but let the others have their turn
            await trio.lowlevel.checkpoint()
        while True:
            try:
                if not self._more:
                    self._more = True
                    await trio.lowlevel.wait_readable(self._sock)
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                self._more = False
            except (trio.ClosedResourceError, OSError, ValueError) as error:
                if self._sock.fileno() < 0:
                    return 0
                raise _broken(error) from error
            else:
                self._more = count == len(buffer)
                return count

    def send_now(self, data: memoryview) -> int:
        """How many of the bytes left without waiting. Raises ConnectionClosedError."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _broken(error) from error

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        await trio.lowlevel.checkpoint()
        while rest:
            sent = self.send_now(rest)
            rest = rest[sent:]
            if not sent:
                try:
                    await trio.lowlevel.wait_writable(self._sock)
                except (trio.ClosedResourceError, OSError, ValueError) as error:
                    raise _broken(error) from error

    async def close(self) -> None:
        self.close_now()
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


def _broken(error: Exception) -> ConnectionClosedError:
    return ConnectionClosedError(f"the socket is lost: {error or type(error).__name__}", transport="tcp")


def end_of(ask: Callable[[], Any]) -> Endpoint | None:
    """(IP, port) of a socket's end; None where it has none any more."""
    try:
        name = ask()
    except OSError:
        return None
    return str(name[0]).partition("%")[0], int(name[1])


class TcpListener(IListener):
    """Sockets bound exclusively; connections are served in the swarm's own nursery.

    `expected` are remote ends whose connections go to whoever waits for them instead: a punched hole may be answered by
    the listener where the other end's packet came first.
    """

    expected: dict[Endpoint, Callable[[trio.SocketStream], None]]

    def __init__(self, handler: Callable[[ReadWriteCloser], Awaitable[None]]) -> None:
        self._handler = handler
        self.expected = {}
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
        remote = end_of(stream.socket.getpeername)
        waiting = self.expected.get(remote) if remote is not None else None
        try:
            if waiting is not None:
                waiting(_taken_from(stream))
            else:
                await self._handler(MendedTcpStream(stream))
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
        return RawConnection(MendedTcpStream(stream), True)

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


def _taken_from(stream: trio.SocketStream) -> trio.SocketStream:
    """The same connection in another stream, since the listener closes its own when the handler returns."""
    plain = socket.socket(fileno=stream.socket.detach())
    return trio.SocketStream(trio.socket.from_stdlib_socket(plain))


def share_port(sock: trio.socket.SocketType) -> None:
    """Let sockets of this user that also ask for it use the same port, where the system knows how."""
    option = getattr(socket, "SO_REUSEPORT", None)
    if option is not None and os.name == "posix":
        sock.setsockopt(trio.socket.SOL_SOCKET, option, 1)


async def connect_from(source: Endpoint, target: Endpoint) -> trio.SocketStream:
    """A connection from a port that this node also listens on, which is what a router then shows to the outside.

    `source` is what the listener is bound to. Raises OSError, also where the system does not permit this. The deadline
    is the caller's.
    """
    family = trio.socket.AF_INET6 if ":" in target[0] else trio.socket.AF_INET
    sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    done = False
    try:
        if os.name == "posix":
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        share_port(sock)
        await sock.bind(source)
        await sock.connect(target)
        done = True
        return trio.SocketStream(sock)
    finally:
        if not done:
            sock.close()


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
        share_port(sock)  # only now: another node on this port is refused, this node's own dials are not
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
