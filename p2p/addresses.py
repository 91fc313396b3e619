"""Multiaddresses of this node and of others: which to announce, which can be dialled.

Knows interfaces and address text. It does not dial, and does not know NAT or relays.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

import ifaddr
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2p.identity import public_key_of

CIRCUIT = "/p2p-circuit"
_DIALLABLE = ("ip4", "ip6", "dns", "dns4", "dns6")


def announced(listening: Iterable[tuple[str, int]], interfaces: Sequence[str]) -> list[str]:
    """Addresses without peer id for sockets (ip, port): wildcards become `interfaces`, loopback last.

    Link-local IPv6 is left out: it means nothing without this machine's zone.
    """
    found: dict[str, bool] = {}
    for host, port in listening:
        bound = ipaddress.ip_address(host)
        hosts = interfaces if bound.is_unspecified else [host]
        for one in hosts:
            ip = ipaddress.ip_address(one)
            if ip.version == bound.version and not (ip.version == 6 and ip.is_link_local):
                found[f"/ip{ip.version}/{ip}/tcp/{port}"] = ip.is_loopback
    return sorted(found, key=found.__getitem__)


def interface_ips() -> list[str]:
    """The IP addresses of this machine's interfaces, loopback included even where none is up."""
    ips: dict[str, None] = {}
    for adapter in ifaddr.get_adapters():
        for address in adapter.ips:
            ip = address.ip[0] if isinstance(address.ip, tuple) else address.ip
            ips[str(ip).partition("%")[0]] = None
    ips.setdefault("127.0.0.1")
    return list(ips)


def dial_target(address: str) -> tuple[Multiaddr, str]:
    """(multiaddress, peer id) of a dialable /ip4|ip6|dns.../tcp/PORT/p2p/PEER. Raises ValueError.

    That of a peer behind a relay is RELAY/p2p-circuit/p2p/PEER, where RELAY is such an address itself.
    """
    text, separator, peer = address.rpartition("/p2p/")
    if not separator or public_key_of(peer) is None:
        raise ValueError("it does not end in /p2p/ and a peer id")
    if text.endswith(CIRCUIT):
        maddr, relay = dial_target(text.removesuffix(CIRCUIT))
        if relay == peer or CIRCUIT in str(maddr):
            raise ValueError("it leads to a relay behind a relay")
        return Multiaddr(text), peer
    try:
        maddr = Multiaddr(text)
        names = [protocol.name for protocol in maddr.protocols()]
    except (MultiaddrError, ValueError, TypeError):
        raise ValueError("it is not a multiaddress") from None
    if len(names) != 2 or names[0] not in _DIALLABLE or names[1] != "tcp":
        raise ValueError("it is not a TCP address")
    return maddr, peer
