"""Making paths: dial a peer's listener with several sockets, or open a libp2p stream; and which addresses are worth it.

Knows addresses and the dialler's side of the handshake. It does not decide when a path is made (`links`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence

import trio

from p2p.addresses import interface_ips
from p2p.errors import LocalFault, PeerLost, ProtocolViolation, Unreachable
from p2p.links.carriers import Carrier, SocketCarrier
from p2p.links.handshake import CHALLENGE_SIZE, Hello, challenge_of, introduce
from p2p.links.link import Link

_STAGGER_S = 0.05
Address = tuple[str, int]


def ips_of(addrs: Iterable[str]) -> list[str]:
    """The IP addresses in multiaddresses /ip4|ip6/IP/..., in order, each once."""
    found: dict[str, None] = {}
    for address in addrs:
        parts = address.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
            with contextlib.suppress(ValueError):
                found.setdefault(str(ipaddress.ip_address(parts[2])))
    return list(found)


def format_address(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def parse_address(text: str) -> Address:
    """(IP, port) of IP:PORT, [IP]:PORT, or a bare IP (port 0). Raises LocalFault."""
    ip, port = text, "0"
    if text.startswith("["):
        ip, _, port = text[1:].partition("]")
        port = port.removeprefix(":") or "0"
    elif text.count(":") == 1:
        ip, _, port = text.partition(":")
    try:
        number = int(port)
        if not 0 <= number < 1 << 16:
            raise ValueError
        return str(ipaddress.ip_address(ip)), number
    except ValueError:
        raise LocalFault(f"{text!r} is not an IP address with or without a port") from None


def worth_dialling(offered: Sequence[str], addrs_max: int) -> list[Address]:
    """The addresses of a peer that may lead to it, the likeliest first: loopback only if it is on this machine."""
    parsed: list[Address] = []
    for text in offered[:addrs_max]:
        with contextlib.suppress(LocalFault):
            ip, port = parse_address(text)
            if port and not ipaddress.ip_address(ip).is_multicast and (ip, port) not in parsed:
                parsed.append((ip, port))
    outer = [one for one in parsed if not ipaddress.ip_address(one[0]).is_loopback]
    inner = [one for one in parsed if ipaddress.ip_address(one[0]).is_loopback]
    mine = set(interface_ips())
    if not outer or any(ip in mine for ip, _ in outer):
        return inner + outer
    return outer


async def dial(
    link: Link, offered: Sequence[Address], generation: int, rtt_s: float | None
) -> tuple[list[Carrier], int]:
    """Sockets that the peer's listener took for the link, and the peer's position.

    One socket where the peer is near, going by the quicker of `rtt_s` and what the dialling itself took. Raises
    Unreachable. The deadline is the caller's.
    """
    config = link.config
    left = list(offered)
    attempts: dict[str, str] = {}
    while left:
        began_s = trio.current_time()
        carrier, challenge, address = await _first_to_answer(link, left, attempts)
        took_s = (
            trio.current_time() - began_s
        ) / 2  # a round trip to connect, half of one for the challenge, and us
        near = (
            ipaddress.ip_address(address[0]).is_loopback or min(took_s, rtt_s or took_s) < config.near_rtt_s
        )
        count = config.sockets_near if near else config.sockets
        carriers: list[Carrier] = [carrier]
        done = False
        try:
            positions = [await introduce(carrier, link.keys, _hello(link, generation, 0, count), challenge)]
            for index in range(1, count):
                carrier, challenge = await _reach(link, address)
                carriers.append(carrier)
                hello = _hello(link, generation, index, count)
                positions.append(await introduce(carrier, link.keys, hello, challenge))
            done = True
            return carriers, min(positions)
        except (PeerLost, ProtocolViolation) as problem:
            attempts[format_address(*address)] = str(problem)
            left.remove(address)
            generation += 1
        finally:
            if not done:
                for one in carriers:
                    one.close()
    raise Unreachable(attempts)


def _hello(link: Link, generation: int, index: int, count: int) -> Hello:
    return Hello(link.terms.session, generation, index, count, link.inbox.received)


async def _reach(link: Link, address: Address) -> tuple[SocketCarrier, bytes]:
    """A connected socket and the challenge of who listens there. Raises PeerLost, ProtocolViolation."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock: trio.socket.SocketType | None = None
    carrier: SocketCarrier | None = None
    done = False
    try:
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        await sock.connect(address)
        carrier = SocketCarrier(release(sock), link.peer)
        challenge = challenge_of(await carrier.receive_exactly(CHALLENGE_SIZE))
        done = True
        return carrier, challenge
    except OSError as error:
        raise PeerLost(link.peer, error.strerror or str(error)) from error
    finally:
        if not done:
            if sock is not None:
                sock.close()
            if carrier is not None:
                carrier.close()


def release(sock: trio.socket.SocketType) -> socket.socket:
    """The plain socket inside trio's one, which is then an empty shell."""
    fileno = sock.detach()
    return socket.socket(fileno=fileno)


async def _first_to_answer(
    link: Link, addresses: Sequence[Address], attempts: dict[str, str]
) -> tuple[SocketCarrier, bytes, Address]:
    """Race all addresses, each a moment after the one before."""
    found: list[tuple[SocketCarrier, bytes, Address]] = []
    failed = [trio.Event() for _ in addresses]

    async def attempt(index: int, scope: trio.CancelScope) -> None:
        if index:
            with trio.move_on_after(_STAGGER_S):
                await failed[index - 1].wait()
        address = addresses[index]
        try:
            carrier, challenge = await _reach(link, address)
        except (PeerLost, ProtocolViolation) as problem:
            attempts[format_address(*address)] = str(problem)
            failed[index].set()
            return
        if found:
            carrier.close()
        else:
            found.append((carrier, challenge, address))
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for index in range(len(addresses)):
            nursery.start_soon(attempt, index, nursery.cancel_scope)
    if not found:
        raise Unreachable(attempts)
    return found[0]
