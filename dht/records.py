"""A signed, sequenced, expiring record: the unit that the mesh view and the DHT are made of.

Knows the canonical bytes of a record (one encoding for each, big-endian, lengths first), its
limits, how it is signed and how two versions of one key are ordered. It does not know what the
values mean, what time it is, nor how records travel.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Any

from dht.errors import RecordInvalid, RecordRefused
from p2p import Identity, PeerId, verify

Key = tuple[str, str, PeerId]

VALUE_BYTES_MAX = 65_536
NAME_BYTES_MAX = 256
SEQ_MAX = 2**63 - 1
TTL_MAX_S = 7 * 86_400.0
SIGNATURE_BYTES = 64

_DOMAIN = "shoal/record/1"
_VERSION = 1
_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_SIGNER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,64}")
_TIME_MAX_S = 2.0**40
_HEAD = struct.Struct(">BBBHB")
_BODY = struct.Struct(">QddI")

RECORD_BYTES_MAX = _HEAD.size + 32 + NAME_BYTES_MAX + 64 + _BODY.size + VALUE_BYTES_MAX + SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class Record:
    """One version of the value under (kind, name, signer). Times are Unix seconds.

    A tombstone has `withdrawn` True and an empty value. Construction checks every limit but the
    signature and raises RecordRefused (`malformed`).
    """

    kind: str
    name: str
    signer: PeerId
    seq: int
    issued_at_s: float
    expires_at_s: float
    value: bytes
    signature: bytes
    withdrawn: bool = False

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise RecordRefused("malformed", problem)

    @property
    def key(self) -> Key:
        """What this is a version of: (kind, name, signer)."""
        return (self.kind, self.name, self.signer)

    def encode(self) -> bytes:
        """The one canonical encoding; at most RECORD_BYTES_MAX bytes."""
        return _unsigned(self) + self.signature

    def verify(self) -> bool:
        """Whether `signer` signed exactly this."""
        return verify(self.signer, _DOMAIN, _unsigned(self), self.signature)

    @staticmethod
    def decode(data: bytes) -> Record:
        """The record whose canonical encoding is `data`; anything else raises RecordRefused (`malformed`).

        The signature is not checked here: see `verify`.
        """
        try:
            return _decode(bytes(data))
        except (struct.error, UnicodeDecodeError) as error:
            raise RecordRefused("malformed", str(error)) from None


def sign_record(
    identity: Identity, kind: str, name: str, seq: int, value: bytes, now_s: float, ttl_s: float
) -> Record:
    """A record by `identity`, issued at `now_s` (Unix seconds), expiring `ttl_s` later.

    Raises RecordInvalid, which names the field and its limit.
    """
    return _sign(identity, (kind, name, seq, now_s, now_s + ttl_s, value, False))


def sign_tombstone(
    identity: Identity, kind: str, name: str, seq: int, now_s: float, expires_at_s: float
) -> Record:
    """A withdrawal that must stay known until `expires_at_s`: after what it withdraws has expired everywhere."""
    return _sign(identity, (kind, name, seq, now_s, expires_at_s, b"", True))


def _sign(identity: Identity, fields: tuple[str, str, int, float, float, bytes, bool]) -> Record:
    kind, name, seq, issued_at_s, expires_at_s, value, withdrawn = fields

    def build(signature: bytes) -> Record:
        return Record(
            kind=kind,
            name=name,
            signer=identity.peer_id,
            seq=seq,
            issued_at_s=float(issued_at_s),
            expires_at_s=float(expires_at_s),
            value=value,
            signature=signature,
            withdrawn=withdrawn,
        )

    try:
        return build(identity.sign(_DOMAIN, _unsigned(build(bytes(SIGNATURE_BYTES)))))
    except RecordRefused as error:
        raise RecordInvalid(f"cannot sign {kind!r} {name!r}: {error}") from None


def _problem(record: Record) -> str:
    """What is wrong with the fields, or an empty string."""
    return _text_problem(record) or _time_problem(record) or _bytes_problem(record)


def _text_problem(record: Record) -> str:
    if not isinstance(record.kind, str) or not _KIND.fullmatch(record.kind):
        return f"kind {record.kind!r} is not 1 to 32 of a-z, 0-9, dot, dash and underscore"
    if not isinstance(record.signer, str) or not _SIGNER.fullmatch(record.signer):
        return f"signer {record.signer!r} is not a peer id"
    if not isinstance(record.name, str) or not record.name.isprintable():
        return f"name {record.name!r} is not printable text"
    size = len(record.name.encode("utf-8"))
    if size > NAME_BYTES_MAX:
        return f"name has {size} bytes, at most {NAME_BYTES_MAX} are allowed"
    return ""


def _time_problem(record: Record) -> str:
    if not _is_int(record.seq) or not 0 <= record.seq <= SEQ_MAX:
        return f"seq {record.seq!r} is not an integer from 0 to 2**63 - 1"
    for field, value in (("issued_at_s", record.issued_at_s), ("expires_at_s", record.expires_at_s)):
        # Minus zero would be a second encoding of zero.
        if not isinstance(value, float) or not 0 <= value <= _TIME_MAX_S or math.copysign(1, value) < 0:
            return f"{field} {value!r} is not a time in seconds"
    if not 0 < record.expires_at_s - record.issued_at_s <= TTL_MAX_S:
        return f"it lives {record.expires_at_s - record.issued_at_s} s, allowed is up to {TTL_MAX_S}"
    return ""


def _bytes_problem(record: Record) -> str:
    if not isinstance(record.value, bytes) or len(record.value) > VALUE_BYTES_MAX:
        return f"value is not bytes of at most {VALUE_BYTES_MAX}"
    if not isinstance(record.signature, bytes) or len(record.signature) != SIGNATURE_BYTES:
        return f"signature is not {SIGNATURE_BYTES} bytes"
    if not isinstance(record.withdrawn, bool) or (record.withdrawn and record.value):
        return "a withdrawal carries no value"
    return ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unsigned(record: Record) -> bytes:
    kind, name, signer = record.kind.encode(), record.name.encode(), record.signer.encode()
    return b"".join(
        (
            _HEAD.pack(_VERSION, record.withdrawn, len(kind), len(name), len(signer)),
            kind,
            name,
            signer,
            _BODY.pack(record.seq, record.issued_at_s, record.expires_at_s, len(record.value)),
            record.value,
        )
    )


def _decode(data: bytes) -> Record:
    if len(data) > RECORD_BYTES_MAX:
        raise RecordRefused("malformed", f"{len(data)} bytes, at most {RECORD_BYTES_MAX} are allowed")
    version, withdrawn, kind_len, name_len, signer_len = _HEAD.unpack_from(data)
    if version != _VERSION or withdrawn > 1:
        raise RecordRefused(
            "malformed", f"version {version}, flags {withdrawn}: this reads version {_VERSION}"
        )
    name_at = _HEAD.size + kind_len
    signer_at = name_at + name_len
    body_at = signer_at + signer_len
    seq, issued_at_s, expires_at_s, value_len = _BODY.unpack_from(data, body_at)
    value_at = body_at + _BODY.size
    if len(data) != value_at + value_len + SIGNATURE_BYTES:
        raise RecordRefused("malformed", "its length is not what its header says")
    return Record(
        kind=data[_HEAD.size : name_at].decode("ascii"),
        name=data[name_at:signer_at].decode("utf-8"),
        signer=PeerId(data[signer_at:body_at].decode("ascii")),
        seq=seq,
        issued_at_s=issued_at_s,
        expires_at_s=expires_at_s,
        value=data[value_at : value_at + value_len],
        signature=data[value_at + value_len :],
        withdrawn=bool(withdrawn),
    )
