"""An invite: one line of text that lets a new node find a mesh and prove that it may enter.

Knows the text format (`shoal2-`, then url-safe base64 of a checksum and a compressed body; `shoal1-` for a
mesh without founding key) and
every way in which a pasted invite can be wrong. It does not know how to connect, nor the time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

from p2p.certs import mesh_id_of
from p2p.errors import InviteError
from p2p.identity import PeerId, peer_of_key, public_key_of

_PREFIX = "shoal2-"
_PREFIX_PLAIN = "shoal1-"
_CHECKSUM_BYTES = 6
_TEXT_CHARS_MAX = 8192
_TICKET_BYTES_MAX = 8448
_BODY_BYTES_MAX = 16384
_ADDRS_MAX = 32
_ADDR_CHARS_MAX = 256
SWARM_KEY_BYTES = 32
_MESH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"shoal(\d{1,4})-")


@dataclass(frozen=True, slots=True)
class Invite:
    """`swarm_key` (32 bytes) closes the mesh; None means it is open. `addrs` end in /p2p/PEER.

    `expires_at_s` is Unix time in seconds. `founder` is the mesh's founding key as a peer id and `ticket` what
    lets a device in (empty for a public mesh); a mesh of an earlier version has neither. Raises InviteError
    when a field is out of its limits.
    """

    mesh_id: str
    swarm_key: bytes | None
    addrs: tuple[str, ...]
    expires_at_s: float | None = None
    founder: PeerId | None = None
    ticket: bytes = b""

    def __post_init__(self) -> None:
        if not isinstance(self.mesh_id, str) or not _MESH_ID.fullmatch(self.mesh_id):
            raise InviteError(
                f"mesh id {self.mesh_id!r} is not 1 to 64 letters, digits, dots, dashes or underscores"
            )
        if self.swarm_key is not None and (
            not isinstance(self.swarm_key, bytes) or len(self.swarm_key) != SWARM_KEY_BYTES
        ):
            raise InviteError(f"the swarm key must be {SWARM_KEY_BYTES} bytes or absent")
        if len(self.addrs) > _ADDRS_MAX:
            raise InviteError(f"an invite holds at most {_ADDRS_MAX} addresses, got {len(self.addrs)}")
        for address in self.addrs:
            _check_addr(address)
        if self.expires_at_s is not None and not isinstance(self.expires_at_s, float | int):
            raise InviteError("the expiry is not a number of seconds")
        if self.founder is not None and (
            public_key_of(self.founder) is None or mesh_id_of(self.founder) != self.mesh_id
        ):
            raise InviteError("the founding key is not that of the mesh it names")
        if not isinstance(self.ticket, bytes) or len(self.ticket) > _TICKET_BYTES_MAX:
            raise InviteError(f"the ticket must be at most {_TICKET_BYTES_MAX} bytes")

    def expired(self, now_s: float) -> bool:
        """Whether the invite is past its time at Unix time `now_s`."""
        return self.expires_at_s is not None and now_s >= self.expires_at_s

    def encode(self) -> str:
        """One line of letters, digits, dashes and underscores."""
        fields = [self.mesh_id, self.swarm_key, list(self.addrs), self.expires_at_s]
        if self.founder is not None:
            fields += [public_key_of(self.founder), self.ticket]
        body = zlib.compress(msgpack.packb(fields, use_bin_type=True), 9)
        prefix = _PREFIX_PLAIN if self.founder is None else _PREFIX
        return prefix + base64.urlsafe_b64encode(_checksum(body) + body).decode("ascii").rstrip("=")

    @staticmethod
    def decode(text: str) -> Invite:
        """The invite in `text` (surrounding blanks and line breaks are forgiven).

        Raises InviteError that says what is wrong. Expiry is not checked here: see `expired`.
        """
        compact = "".join(text.split())
        if len(compact) > _TEXT_CHARS_MAX:
            raise InviteError(f"an invite has at most {_TEXT_CHARS_MAX} characters, this has {len(compact)}")
        prefix = next((one for one in (_PREFIX, _PREFIX_PLAIN) if compact.startswith(one)), None)
        if prefix is None:
            version = _VERSION.match(compact)
            if version:
                raise InviteError(
                    f"this invite is of version {version[1]}; this program reads versions 1 and 2, please update it"
                )
            raise InviteError(f"not an invite: it should start with {_PREFIX!r}")
        return _parse(_unwrap(compact[len(prefix) :]), founded=prefix == _PREFIX)


def _unwrap(encoded: str) -> bytes:
    """base64, then checksum, then bounded decompression."""
    damaged = InviteError("the invite is damaged (its checksum does not match): copy the whole line again")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    body = raw[_CHECKSUM_BYTES:]
    if len(raw) <= _CHECKSUM_BYTES or _checksum(body) != raw[:_CHECKSUM_BYTES]:
        raise damaged
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(body, _BODY_BYTES_MAX)
    except zlib.error:
        raise InviteError("the invite's body cannot be decompressed") from None
    if not inflater.eof:
        raise InviteError(f"the invite's body is incomplete or over {_BODY_BYTES_MAX} bytes")
    return plain


def _parse(body: bytes, *, founded: bool) -> Invite:
    try:
        fields: Any = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise InviteError("the invite's body is not readable") from None
    if not isinstance(fields, list) or (len(fields) < 6 if founded else len(fields) != 4):
        count = "six fields of version 2" if founded else "four fields of version 1"
        raise InviteError(f"the invite's body does not have the {count}")
    if not isinstance(fields[2], list):
        raise InviteError("the invite's addresses are not a list")
    if not founded:
        return Invite(fields[0], fields[1], tuple(fields[2]), fields[3])
    if not isinstance(fields[4], bytes) or len(fields[4]) != 32:
        raise InviteError("the founding key is not a key")
    return Invite(fields[0], fields[1], tuple(fields[2]), fields[3], peer_of_key(fields[4]), fields[5])


def _check_addr(address: object) -> None:
    if not isinstance(address, str) or len(address) > _ADDR_CHARS_MAX or not address.startswith("/"):
        raise InviteError(f"{str(address)[:80]!r} is not a multiaddress")
    _, separator, peer = address.rpartition("/p2p/")
    if not separator or public_key_of(peer) is None:
        raise InviteError(f"address {address!r} does not end in /p2p/ and a peer id")


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2s(body, digest_size=_CHECKSUM_BYTES, person=b"shoalinv").digest()
