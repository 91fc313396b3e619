"""Asking a home's router to forward a port: the small part of UPnP IGD that this takes (WANIPConnection:1 and :2).

Whatever answers in the home network is a stranger: sizes, times and where it may send us are bounded, and documents
with entities are refused. Parsing is pure. It knows neither reachability nor why a port is wanted.
Spec: UPnP IGD 1.0 and Device Architecture 1.1, https://openconnectivity.org/upnp-specs
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import trio

from p2p.compat.tcp import Endpoint

logger = logging.getLogger(__name__)

GROUP = ("239.255.255.250", 1900)
SERVICES = ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
ROOTS = ("InternetGatewayDevice:1", "InternetGatewayDevice:2")
BODY_BYTES_MAX = 256 << 10
SEARCH_S = 2.5
HTTP_S = 3.0
ANSWERS_MAX = 8
LEASE_S = 3600
PORTS_TRIED = 4
_PERMANENT_ONLY, _TAKEN = 725, 718


class UpnpFailed(Exception):
    """The router does not do it; the message says why. `code` is UPnP's own, where it gave one."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Gateway:
    """A router's service: where it takes orders, and of which kind it is. `local_ip` is ours as it sees us."""

    control: str
    service: str
    local_ip: str


@dataclass(frozen=True, slots=True)
class Forwarding:
    """A forwarded TCP port, and for how many seconds (0: until it is taken back)."""

    gateway: Gateway
    outer: Endpoint
    lease_s: int


# ---- pure: what is said and what it means


def search_message(target: str) -> bytes:
    """An SSDP question for a device type."""
    lines = [
        "M-SEARCH * HTTP/1.1",
        f"HOST: {GROUP[0]}:{GROUP[1]}",
        'MAN: "ssdp:discover"',
        "MX: 1",
        f"ST: urn:schemas-upnp-org:device:{target}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def location_of(answer: bytes, sender_ip: str) -> str:
    """Where a device describes itself. Raises UpnpFailed for any place but the sender's own, in a private network."""
    found = re.search(
        rb"^location:[ \t]*(http://[\x21-\x7e]{1,512})\s*$", answer, re.IGNORECASE | re.MULTILINE
    )
    if not answer.startswith(b"HTTP/1.1 200") or found is None:
        raise UpnpFailed("no answer to a search")
    url = found[1].decode()
    check_place(url, sender_ip)
    return url


def check_place(url: str, ip: str) -> None:
    """Raises UpnpFailed unless `url` leads to `ip`, and that is in a private network."""
    try:
        parts = urlsplit(url)
        same = parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "") == ipaddress.ip_address(
            ip
        )
        good = same and ipaddress.ip_address(ip).is_private and 0 < (parts.port or 80) < 65536
    except ValueError:
        good = False
    if not good:
        raise UpnpFailed(f"it sends us to {url[:80]!r}")


def service_of(description: bytes, url: str) -> tuple[str, str]:
    """(URL for orders, service type) in a device's description. Raises UpnpFailed."""
    base = ""
    for element in _document(description).iter():
        if _bare(element.tag) == "URLBase" and element.text:
            base = element.text.strip()
    for wanted in SERVICES:
        for element in _document(description).iter():
            if _bare(element.tag) != "service":
                continue
            inside = {_bare(child.tag): (child.text or "").strip() for child in element}
            kind = inside.get("serviceType", "")
            if kind == f"urn:schemas-upnp-org:service:{wanted}" and inside.get("controlURL"):
                return urljoin(base or url, inside["controlURL"]), kind
    raise UpnpFailed("it forwards no ports")


def order_body(service: str, action: str, arguments: Mapping[str, object]) -> bytes:
    """A SOAP call."""
    inside = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in arguments.items())
    return (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service}">{inside}</u:{action}></s:Body></s:Envelope>'
    ).encode()


def answer_of(status: int, body: bytes) -> dict[str, str]:
    """The values in a SOAP answer, by name. Raises UpnpFailed for a refusal."""
    values = {_bare(element.tag): (element.text or "").strip() for element in _document(body).iter()}
    if status != 200:
        code = values.get("errorCode", "")
        number = int(code) if code.isascii() and code.isdecimal() and len(code) < 6 else 0
        raise UpnpFailed(values.get("errorDescription", "")[:80] or f"status {status}", number)
    return values


def _document(data: bytes) -> ElementTree.Element:
    if len(data) > BODY_BYTES_MAX or b"<!DOCTYPE" in data.upper() or b"<!ENTITY" in data.upper():
        raise UpnpFailed("a document that is too large, or has entities")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        raise UpnpFailed("a document that is no XML") from None


def _bare(tag: object) -> str:
    return str(tag).rpartition("}")[2]


# ---- the shell


async def find_gateway() -> Gateway:
    """The first router that forwards ports. Raises UpnpFailed."""
    reason = "no router answers"
    for url, ip in await _search():
        try:
            status, body, local_ip = await _http("GET", url, b"", {})
            if status != 200:
                raise UpnpFailed(f"status {status}")
            control, service = service_of(body, url)
            check_place(control, ip)
            return Gateway(control, service, local_ip)
        except (UpnpFailed, OSError, ValueError, trio.TooSlowError) as failure:
            reason = str(failure) or type(failure).__name__
    raise UpnpFailed(reason)


async def _search() -> list[tuple[str, str]]:
    """(description, IP) of whatever answered."""
    found: dict[str, str] = {}
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        sock.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_MULTICAST_TTL, 2)
        try:
            for target in ROOTS:
                await sock.sendto(search_message(target), GROUP)
            with trio.move_on_after(SEARCH_S) as scope:
                while len(found) < ANSWERS_MAX:
                    data, sender = await sock.recvfrom(2048)
                    try:
                        found.setdefault(location_of(data, sender[0]), sender[0])
                        scope.deadline = min(scope.deadline, trio.current_time() + 0.3)
                    except UpnpFailed as failure:
                        logger.debug("%s answered a search: %s", sender[0], failure)
        except OSError as failure:
            logger.debug("no search for a router: %s", failure)
    return list(found.items())


async def forward(gateway: Gateway, inner_port: int, port: int) -> Forwarding:
    """Have the outer TCP `port`, or another where it is taken, forwarded to `inner_port` of this computer.

    Raises UpnpFailed, OSError, trio.TooSlowError."""
    said = await _order(gateway, "GetExternalIPAddress", {})
    try:
        outer_ip = ipaddress.ip_address(said.get("NewExternalIPAddress", ""))
    except ValueError:
        raise UpnpFailed("it knows no outer address of its own") from None
    if not outer_ip.is_global:
        raise UpnpFailed(f"it is behind another router itself ({outer_ip})")
    lease_s = LEASE_S
    for attempt in range(2 * PORTS_TRIED):
        try:
            await _order(gateway, "AddPortMapping", _wish(gateway, port, inner_port, lease_s))
            return Forwarding(gateway, (str(outer_ip), port), lease_s)
        except UpnpFailed as failure:
            if failure.code == _PERMANENT_ONLY and lease_s:
                lease_s = 0
            elif failure.code == _TAKEN and attempt < PORTS_TRIED:
                port = 1024 + (port + 7919) % 60_000
            else:
                raise
    raise UpnpFailed("every port is taken")


def _wish(gateway: Gateway, port: int, inner_port: int, lease_s: int) -> dict[str, object]:
    return {
        "NewRemoteHost": "",
        "NewExternalPort": port,
        "NewProtocol": "TCP",
        "NewInternalPort": inner_port,
        "NewInternalClient": gateway.local_ip,
        "NewEnabled": 1,
        "NewPortMappingDescription": "shoal",
        "NewLeaseDuration": lease_s,
    }


async def take_back(mapping: Forwarding) -> None:
    """End a forwarding. Raises UpnpFailed, OSError, trio.TooSlowError."""
    arguments = {"NewRemoteHost": "", "NewExternalPort": mapping.outer[1], "NewProtocol": "TCP"}
    await _order(mapping.gateway, "DeletePortMapping", arguments)


async def _order(gateway: Gateway, action: str, arguments: Mapping[str, object]) -> dict[str, str]:
    headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{gateway.service}#{action}"'}
    status, body, _ = await _http(
        "POST", gateway.control, order_body(gateway.service, action, arguments), headers
    )
    return answer_of(status, body)


async def _http(method: str, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes, str]:
    """(status, body, our own address as used). One request, the answer until its end, within limits."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"{method} {path} HTTP/1.0",
        f"Host: {parts.netloc}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    data = b""
    with trio.fail_after(HTTP_S):
        async with await trio.open_tcp_stream(parts.hostname or "", parts.port or 80) as stream:
            try:
                await stream.send_all(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
                while len(data) <= BODY_BYTES_MAX and not _whole(data):
                    piece = await stream.receive_some(65536)
                    if not piece:
                        break
                    data += piece
            except trio.BrokenResourceError as broken:
                raise UpnpFailed("it hung up") from broken
            local_ip = str(stream.socket.getsockname()[0])
    head, _, rest = data.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    if status is None or len(data) > BODY_BYTES_MAX:
        raise UpnpFailed("no answer of HTTP")
    return int(status[1]), rest, local_ip


def _whole(data: bytes) -> bool:
    """Whether all of a body whose length was told is there; some routers keep the connection open."""
    head, mark, rest = data.partition(b"\r\n\r\n")
    length = re.search(rb"^content-length:[ \t]*(\d{1,7})\s*$", head, re.IGNORECASE | re.MULTILINE)
    return bool(mark) and length is not None and len(rest) >= int(length[1])
