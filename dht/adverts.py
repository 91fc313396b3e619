"""What members put into the DHT: a signed record of their addresses, and the key of their mesh.

Knows keys, what is valid under one and which of several is best. Pure. It judges no times: clocks
of home computers are too far apart, and a stale address only costs a dial.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dht.records import Record
from p2p import PeerId, RemoteFault, pack_value, unpack_value

ADDR_KIND = "addr"
ADDRS_MAX = 12
ADDR_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class AddrAdvert:
    """Multiaddresses, each ending in /p2p/SIGNER."""

    addrs: tuple[str, ...]


def write_addrs(addrs: Iterable[str]) -> bytes:
    """The value of an address record."""
    return pack_value(AddrAdvert(tuple(addrs)[:ADDRS_MAX]))


def read_addrs(record: Record) -> tuple[str, ...]:
    """The addresses in a record that are its signer's; none where there is anything else in it."""
    try:
        advert = unpack_value(AddrAdvert, record.value)
    except RemoteFault:
        return ()
    return own_addrs(record.signer, advert.addrs)


def own_addrs(peer: PeerId, addrs: Iterable[str]) -> tuple[str, ...]:
    """Those of `addrs` that name `peer`, without repetition and within limits."""
    fitting = (addr for addr in addrs if len(addr) <= ADDR_CHARS_MAX and addr.endswith(f"/p2p/{peer}"))
    return tuple(dict.fromkeys(fitting))[:ADDRS_MAX]


def advert_key(signer: PeerId) -> str:
    """Where a member's address record is: short enough for the DHT's look-ups."""
    return "a" + hashlib.blake2b(signer.encode(), digest_size=16).hexdigest()


def mesh_key(mesh_id: str) -> bytes:
    """What every member of a mesh provides: a sha2-256 multihash."""
    return b"\x12\x20" + hashlib.sha256(b"shoal mesh\x00" + mesh_id.encode()).digest()


def is_advert(key: str, value: bytes) -> bool:
    """Whether `value` is an address record (or its withdrawal) signed by the member whose `key` this is."""
    try:
        record = Record.decode(value)
    except RemoteFault:
        return False
    fits = record.kind == ADDR_KIND and not record.name and key == advert_key(record.signer)
    return fits and (record.withdrawn or bool(read_addrs(record))) and record.verify()


def newest_advert(key: str, values: Sequence[bytes]) -> int:
    """Index of the record with the greatest seq; a withdrawal wins a tie, then the greater bytes."""
    return max(range(len(values)), key=lambda index: _rank(values[index]))


def _rank(value: bytes) -> tuple[int, bool, bytes]:
    try:
        record = Record.decode(value)
    except RemoteFault:
        return (-1, False, value)
    return (record.seq, record.withdrawn, value)
