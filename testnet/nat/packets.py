"""IPv4 packets of TCP and UDP: who sent them to whom, and the same packets with other addresses.

Pure. It reads only what a translator of addresses must read; whatever it cannot read is no packet to it.
Checksums are corrected by RFC 1624, so that a damaged packet stays damaged.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

TCP, UDP = 6, 17
_CHECKSUM_AT = {TCP: 16, UDP: 6}
_L4_BYTES_MIN = {TCP: 20, UDP: 8}

Endpoint = tuple[str, int]
"""(dotted IPv4 address, port)."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Of one packet: its protocol (TCP or UDP) and both ends."""

    protocol: int
    source: Endpoint
    target: Endpoint


def flow_of(packet: bytes) -> Flow | None:
    """None for anything but a whole, unfragmented IPv4 packet of TCP or UDP."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    header = (packet[0] & 15) * 4
    protocol = packet[9]
    fragmented = int.from_bytes(packet[6:8], "big") & 0x3FFF
    if header < 20 or fragmented or protocol not in _L4_BYTES_MIN:
        return None
    if len(packet) < header + _L4_BYTES_MIN[protocol]:
        return None
    ports = packet[header : header + 4]
    return Flow(
        protocol,
        (socket.inet_ntoa(packet[12:16]), int.from_bytes(ports[:2], "big")),
        (socket.inet_ntoa(packet[16:20]), int.from_bytes(ports[2:], "big")),
    )


def target_ip(packet: bytes) -> str:
    """Where an IPv4 packet of any protocol goes; "" for anything else."""
    return socket.inet_ntoa(packet[16:20]) if len(packet) >= 20 and packet[0] >> 4 == 4 else ""


def rewritten(packet: bytes, *, source: Endpoint | None = None, target: Endpoint | None = None) -> bytes:
    """`packet`, for which `flow_of` gives a flow, from and to other ends."""
    header = (packet[0] & 15) * 4
    checksum_at = header + _CHECKSUM_AT[packet[9]]
    out = bytearray(packet)
    for end, ip_at, port_at in ((source, 12, header), (target, 16, header + 2)):
        if end is None:
            continue
        ip, port = socket.inet_aton(end[0]), end[1].to_bytes(2, "big")
        old_ip, old_port = bytes(out[ip_at : ip_at + 4]), bytes(out[port_at : port_at + 2])
        out[ip_at : ip_at + 4], out[port_at : port_at + 2] = ip, port
        _correct(out, 10, old_ip, ip)
        if packet[9] == TCP or any(packet[checksum_at : checksum_at + 2]):  # UDP may go without
            _correct(out, checksum_at, old_ip + old_port, ip + port)
    return bytes(out)


def _correct(packet: bytearray, at: int, old: bytes, new: bytes) -> None:
    """RFC 1624, equation 3: the checksum at `at` after the words `old` became `new`."""
    total = ~int.from_bytes(packet[at : at + 2], "big") & 0xFFFF
    for k in range(0, len(old), 2):
        total += (~int.from_bytes(old[k : k + 2], "big") & 0xFFFF) + int.from_bytes(new[k : k + 2], "big")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet[at : at + 2] = (~total & 0xFFFF).to_bytes(2, "big")
