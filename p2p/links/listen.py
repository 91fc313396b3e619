"""The listener for direct paths: sockets bound where the host listens, and how many strangers may knock at once.

Knows ports and half-open handshakes. It does not know links.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio

from p2p.addresses import interface_ips
from p2p.errors import ListenError
from p2p.links.connect import format_address, parse_address
from p2p.links.types import LinksConfig

logger = logging.getLogger(__name__)

_BACKLOG = 128
OnSocket = Callable[[trio.socket.SocketType], Awaitable[None]]


class Listener:
    """`open` binds, `run` accepts until it is cancelled."""

    def __init__(self, config: LinksConfig, on_socket: OnSocket) -> None:
        self.refused = 0
        self._config = config
        self._on_socket = on_socket
        self._listeners: list[trio.SocketListener] = []
        self._bound: list[tuple[str, int]] = []
        self._offered: list[str] = []
        self._ips: set[str] = set()
        self._knocking: Counter[str] = Counter()

    async def open(self, host_ips: Sequence[str]) -> None:
        """Bind. Raises ListenError where a port that was asked for cannot be had; any other trouble means fewer
        addresses, and streams instead."""
        if not self._config.direct:
            return
        wanted = self._config.listen
        targets = [parse_address(one) for one in wanted] if wanted is not None else wildcards(host_ips)
        for ip, port in targets:
            try:
                listeners = await trio.open_tcp_listeners(port, host=ip, backlog=_BACKLOG)
            except OSError as error:
                if port or wanted is not None:
                    raise ListenError(
                        f"cannot listen on {format_address(ip, port)}: {_reason(error, port)}"
                    ) from error
                logger.warning("no direct links on %s: %s", ip, error.strerror or error)
                continue
            self._listeners.extend(listeners)
            for listener in listeners:
                self._bound.append((ip, listener.socket.getsockname()[1]))
        self.addrs()

    def addrs(self) -> list[str]:
        """IP:PORT for peers to dial, at the addresses that this computer has now: it may have moved."""
        ips = set(interface_ips())
        if ips != self._ips:
            self._ips = ips
            self._offered = [format_address(one, port) for ip, port in self._bound for one in _reached_at(ip)]
        return list(self._offered)

    async def run(self) -> None:
        """Accept until cancelled. An error of one socket never ends this."""
        if self._listeners:
            await trio.serve_listeners(self._serve, self._listeners)

    async def _serve(self, stream: trio.SocketStream) -> None:
        sock = stream.socket
        try:
            ip = str(sock.getpeername()[0])
        except OSError:
            sock.close()
            return
        if (
            self._knocking.total() >= self._config.handshakes_max
            or self._knocking[ip] >= self._config.handshakes_per_ip_max
        ):
            self.refused += 1
            sock.close()
            return
        self._knocking[ip] += 1
        try:
            await self._on_socket(sock)
        except Exception:  # what a stranger sets off must never end more than its socket
            logger.exception("a socket from %s failed here", ip)
            sock.close()
        finally:
            self._knocking[ip] -= 1
            if not self._knocking[ip]:
                del self._knocking[ip]

    def close(self) -> None:
        for listener in self._listeners:
            listener.socket.close()
        self._listeners.clear()
        self._bound.clear()
        self._offered.clear()


def _reached_at(bound: str) -> list[str]:
    """The addresses at which a socket bound to `bound` is reached; link-local ones mean nothing elsewhere."""
    ip = ipaddress.ip_address(bound)
    if not ip.is_unspecified:
        return [bound]
    found = map(ipaddress.ip_address, interface_ips())
    return [
        str(one)
        for one in found
        if one.version == ip.version and not (one.version == 6 and one.is_link_local)
    ]


def wildcards(host_ips: Sequence[str]) -> list[tuple[str, int]]:
    """Where to bind for the addresses of a host: loopback if it has no other, else all, for each version of IP."""
    targets: list[tuple[str, int]] = []
    for version, everywhere in ((4, "0.0.0.0"), (6, "::")):
        ips = [ip for ip in map(ipaddress.ip_address, host_ips) if ip.version == version]
        if len(ips) == 1:
            targets.append((str(ips[0]), 0))
        elif ips:
            targets.append((everywhere, 0))
    return targets


def _reason(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is already in use"
    return error.strerror or str(error)
