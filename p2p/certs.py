"""What membership is proven by: certificates, invites' tickets, expulsions and rotations, signed and bounded.

A mesh is named after its founding key. The founding key certifies a first device, a device those that it
lets in, so that a chain of certificates leads from the founding key to every member. Knows the bytes of each
document, its signatures and its limits; whether a chain still counts is the roster's to judge.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import msgpack

from p2p.errors import ProtocolViolation
from p2p.identity import Identity, PeerId, peer_of_key, public_key_of, verify

CHAIN_MAX = 24
CHAIN_BYTES_MAX = 8192
KEEP_MAX = 512
DOCUMENT_BYTES_MAX = 40_960
OVERLAP_MAX_S = 90 * 86400.0
INVITE_ID_BYTES = 16
KEY_ID_BYTES = 8
_SEQ_MAX = 2**31
_TIME_MAX_S = 2.0**40
_SIGNATURE_BYTES = 64
_VERSION = 1


def mesh_id_of(founder: PeerId) -> str:
    """The name of the mesh that this founding key founds: nobody can claim a mesh without its key."""
    return hashlib.blake2s(founder.encode(), digest_size=12, person=b"shoalmsh").hexdigest()


def key_id_of(swarm_key: bytes) -> bytes:
    """8 bytes that name a swarm key and tell nothing of it."""
    return hashlib.blake2s(swarm_key, digest_size=KEY_ID_BYTES, person=b"shoalkey").digest()


class _Signed(ABC):
    """Fields as a msgpack list, then a signature over the mesh's id and those bytes."""

    __slots__ = ()
    DOMAIN: ClassVar[str]

    @abstractmethod
    def _fields(self) -> list[Any]: ...

    def _unsigned(self, mesh_id: str) -> bytes:
        return _pack([mesh_id, *self._fields()])


@dataclass(frozen=True, slots=True)
class Cert(_Signed):
    """`issuer` lets `subject` into the mesh at `issued_at_s` (Unix seconds, by the issuer's clock).

    `invite` is the id of the invite that was redeemed (empty where there was none), `once` whether that
    invite serves one device only. A certificate does not expire: clocks cannot lock a member out.
    """

    DOMAIN: ClassVar[str] = "shoal/cert/1"

    subject: PeerId
    issuer: PeerId
    issued_at_s: float
    invite: bytes = b""
    once: bool = False
    signature: bytes = b""

    def _fields(self) -> list[Any]:
        return [
            _VERSION, _raw(self.subject), _raw(self.issuer), float(self.issued_at_s), self.invite, self.once,
        ]  # fmt: skip

    @classmethod
    def sign(
        cls, identity: Identity, mesh_id: str, subject: PeerId, now_s: float, *, invite: bytes = b"",
        once: bool = False,
    ) -> Cert:  # fmt: skip
        """A certificate by `identity`."""
        bare = cls(subject, identity.peer_id, float(now_s), invite, once)
        return replace(bare, signature=identity.sign(cls.DOMAIN, bare._unsigned(mesh_id)))

    def valid(self, mesh_id: str) -> bool:
        """Whether `issuer` signed this for the mesh."""
        return verify(self.issuer, self.DOMAIN, self._unsigned(mesh_id), self.signature)

    def wire(self) -> list[Any]:
        return [*self._fields(), self.signature]

    @classmethod
    def read(cls, fields: Any) -> Self:
        version, subject, issuer, issued_at_s, invite, once, signature = _list(fields, 7)
        _check(version == _VERSION, "the certificate's version")
        _check(isinstance(invite, bytes) and len(invite) in (0, INVITE_ID_BYTES), "the invite's id")
        _check(isinstance(once, bool) and (not once or bool(invite)), "the mark of single use")
        return cls(_peer(subject), _peer(issuer), _time(issued_at_s), invite, once, _signature(signature))


Chain = tuple[Cert, ...]


def encode_chain(chain: Chain) -> bytes:
    """At most CHAIN_BYTES_MAX bytes for at most CHAIN_MAX certificates."""
    return _pack([cert.wire() for cert in chain])


def decode_chain(data: bytes) -> Chain:
    """Raises ProtocolViolation for anything that is not a chain. Nothing is verified."""
    _check(len(data) <= CHAIN_BYTES_MAX, f"{len(data)} bytes of certificates")
    return _chain(_unpack(data))


def chain_problem(chain: Chain, mesh_id: str, founder: PeerId, peer: PeerId) -> str:
    """Why `chain` does not lead from `founder` to `peer`, or an empty text."""
    if not chain:
        return "it has no certificate of membership"
    if len(chain) > CHAIN_MAX:
        return f"its certificates are more than {CHAIN_MAX} deep"
    issuer = founder
    seen = {founder}
    for cert in chain:
        if cert.issuer != issuer or cert.subject in seen or not cert.valid(mesh_id):
            return "its certificates do not lead to this mesh's founding key"
        issuer = cert.subject
        seen.add(issuer)
    return "" if issuer == peer else "its certificate is another device's"


@dataclass(frozen=True, slots=True)
class Ticket(_Signed):
    """What an invite holds besides keys and addresses: `issuer` (with its own `chain`) lets a device in.

    `expires_at_s` is Unix time in seconds, infinity for never; `once` lets one device in and no second.
    """

    DOMAIN: ClassVar[str] = "shoal/ticket/1"

    issuer: PeerId
    id: bytes
    expires_at_s: float
    once: bool
    chain: Chain
    signature: bytes = b""

    def _fields(self) -> list[Any]:
        return [_VERSION, _raw(self.issuer), self.id, float(self.expires_at_s), self.once]

    @classmethod
    def sign(
        cls, identity: Identity, mesh_id: str, chain: Chain, invite: bytes, expires_at_s: float, once: bool
    ) -> Ticket:
        """A ticket by `identity`, whose own chain this is."""
        bare = cls(identity.peer_id, invite, float(expires_at_s), once, chain)
        return replace(bare, signature=identity.sign(cls.DOMAIN, bare._unsigned(mesh_id)))

    def valid(self, mesh_id: str) -> bool:
        """Whether `issuer` signed this for the mesh; the chain is not looked at."""
        return verify(self.issuer, self.DOMAIN, self._unsigned(mesh_id), self.signature)

    def encode(self) -> bytes:
        """At most CHAIN_BYTES_MAX + 256 bytes."""
        return _pack([*self._fields(), self.signature, [cert.wire() for cert in self.chain]])

    @classmethod
    def decode(cls, data: bytes) -> Ticket:
        """Raises ProtocolViolation for anything that is not a ticket. Nothing is verified."""
        _check(len(data) <= CHAIN_BYTES_MAX + 256, f"a ticket of {len(data)} bytes")
        version, issuer, invite, expires_at_s, once, signature, chain = _list(_unpack(data), 7)
        _check(version == _VERSION, "the ticket's version")
        _check(isinstance(invite, bytes) and len(invite) == INVITE_ID_BYTES, "the invite's id")
        _check(isinstance(once, bool), "the mark of single use")
        forever = expires_at_s == float("inf")
        expires_s = float("inf") if forever else _time(expires_at_s)
        return cls(_peer(issuer), invite, expires_s, once, _chain(chain), _signature(signature))


@dataclass(frozen=True, slots=True)
class Expulsion(_Signed):
    """`signer` puts `peer` out for good. `chain` is the peer's own, which shows that `signer` stands above it.

    Whoever came in through `peer` goes too, but for those in `keep`.
    """

    DOMAIN: ClassVar[str] = "shoal/expulsion/1"
    TAG: ClassVar[str] = "x"

    peer: PeerId
    signer: PeerId
    issued_at_s: float
    keep: tuple[PeerId, ...]
    chain: Chain
    signature: bytes = b""

    def _fields(self) -> list[Any]:
        keep = [_raw(peer) for peer in self.keep]
        return [_VERSION, _raw(self.peer), _raw(self.signer), float(self.issued_at_s), keep]

    @classmethod
    def sign(
        cls,
        identity: Identity,
        mesh_id: str,
        peer: PeerId,
        chain: Chain,
        keep: tuple[PeerId, ...],
        now_s: float,
    ) -> Expulsion:
        """An expulsion by `identity`. `chain` is that of `peer`; empty in a public mesh."""
        bare = cls(peer, identity.peer_id, float(now_s), tuple(sorted(keep)[:KEEP_MAX]), chain)
        return replace(bare, signature=identity.sign(cls.DOMAIN, bare._unsigned(mesh_id)))

    @property
    def depth(self) -> int:
        """How far below the founding key the signer stands: 0 for that key itself."""
        return next((k for k, cert in enumerate(self.chain) if cert.issuer == self.signer), 0)

    def problem(self, mesh_id: str, founder: PeerId, *, public: bool) -> str:
        """Why this may not be believed, or an empty text."""
        if self.peer in (founder, self.signer):
            return "nobody can expel the founding key or itself"
        above = [founder, *(cert.issuer for cert in self.chain)]
        if self.signer not in above:
            return "its signer did not let that member in"
        wrong = "" if public and not self.chain else chain_problem(self.chain, mesh_id, founder, self.peer)
        if wrong:
            return wrong
        good = verify(self.signer, self.DOMAIN, self._unsigned(mesh_id), self.signature)
        return "" if good else "its signature is not good"

    def encode(self) -> bytes:
        """At most DOCUMENT_BYTES_MAX bytes."""
        return _pack([self.TAG, *self._fields(), self.signature, [cert.wire() for cert in self.chain]])

    @classmethod
    def read(cls, fields: list[Any]) -> Expulsion:
        version, peer, signer, issued_at_s, keep, signature, chain = _list(fields, 7)
        _check(version == _VERSION, "the expulsion's version")
        _check(isinstance(keep, list) and len(keep) <= KEEP_MAX, "the list of whom to keep")
        kept = tuple(_peer(one) for one in keep)
        return cls(_peer(peer), _peer(signer), _time(issued_at_s), kept, _chain(chain), _signature(signature))


@dataclass(frozen=True, slots=True)
class Rotation(_Signed):
    """The founding key announces a new swarm key by its id; the one before it counts `overlap_s` longer."""

    DOMAIN: ClassVar[str] = "shoal/rotation/1"
    TAG: ClassVar[str] = "r"

    seq: int
    key_id: bytes
    issued_at_s: float
    overlap_s: float
    signature: bytes = b""

    def _fields(self) -> list[Any]:
        return [_VERSION, self.seq, self.key_id, float(self.issued_at_s), float(self.overlap_s)]

    @classmethod
    def sign(
        cls, founder: Identity, mesh_id: str, seq: int, key_id: bytes, now_s: float, overlap_s: float
    ) -> Rotation:
        """An announcement by the founding key."""
        bare = cls(seq, key_id, float(now_s), float(overlap_s))
        return replace(bare, signature=founder.sign(cls.DOMAIN, bare._unsigned(mesh_id)))

    def problem(self, mesh_id: str, founder: PeerId) -> str:
        """Why this may not be believed, or an empty text."""
        good = verify(founder, self.DOMAIN, self._unsigned(mesh_id), self.signature)
        return "" if good else "its signature is not the founding key's"

    def encode(self) -> bytes:
        """Under 200 bytes."""
        return _pack([self.TAG, *self._fields(), self.signature])

    @classmethod
    def read(cls, fields: list[Any]) -> Rotation:
        version, seq, key_id, issued_at_s, overlap_s, signature = _list(fields, 6)
        _check(version == _VERSION, "the rotation's version")
        _check(isinstance(seq, int) and not isinstance(seq, bool) and 0 < seq < _SEQ_MAX, "its number")
        _check(isinstance(key_id, bytes) and len(key_id) == KEY_ID_BYTES, "the key's id")
        overlap = _time(overlap_s)
        _check(overlap <= OVERLAP_MAX_S, "the time for which both keys count")
        return cls(seq, key_id, _time(issued_at_s), overlap, _signature(signature))


@dataclass(frozen=True, slots=True)
class Use:
    """A single-use invite was redeemed: the chain of whoever came in with it."""

    TAG: ClassVar[str] = "u"

    chain: Chain

    def encode(self) -> bytes:
        """At most CHAIN_BYTES_MAX + 8 bytes."""
        return _pack([self.TAG, [cert.wire() for cert in self.chain]])

    @classmethod
    def read(cls, fields: list[Any]) -> Use:
        (chain,) = _list(fields, 1)
        read = _chain(chain)
        _check(bool(read) and read[-1].once, "a use of an invite that serves many")
        return cls(read)


Document = Expulsion | Rotation | Use
_DOCUMENTS: dict[str, type[Expulsion] | type[Rotation] | type[Use]] = {
    one.TAG: one for one in (Expulsion, Rotation, Use)
}


def decode_document(data: bytes) -> Document:
    """Raises ProtocolViolation for anything that is not a document. Nothing is verified."""
    _check(len(data) <= DOCUMENT_BYTES_MAX, f"a document of {len(data)} bytes")
    fields = _unpack(data)
    _check(isinstance(fields, list) and bool(fields) and isinstance(fields[0], str), "a document's shape")
    kind = _DOCUMENTS.get(fields[0])
    if kind is None:
        raise ProtocolViolation(f"a document of the unknown kind {fields[0]!r:.20}")
    return kind.read(fields[1:])


def _pack(value: Any) -> bytes:
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise ProtocolViolation("a membership document is unreadable") from None


def _check(good: bool, what: str) -> None:
    if not good:
        raise ProtocolViolation(f"a membership document is malformed: {what}")


def _list(value: Any, count: int) -> list[Any]:
    """At least `count` items; what a later version appends is passed over."""
    _check(isinstance(value, list) and len(value) >= count, "its fields")
    out: list[Any] = value[:count]
    return out


def _chain(value: Any) -> Chain:
    _check(isinstance(value, list) and len(value) <= CHAIN_MAX, "its chain of certificates")
    return tuple(Cert.read(one) for one in value)


def _raw(peer: PeerId) -> bytes:
    key = public_key_of(peer)
    if key is None:
        raise ProtocolViolation(f"{peer!r:.80} is not a peer id")
    return key


def _peer(value: Any) -> PeerId:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ProtocolViolation("a membership document is malformed: a peer")
    return peer_of_key(value)


def _time(value: Any) -> float:
    _check(isinstance(value, float) and 0 <= value <= _TIME_MAX_S, "a time")
    return float(value)


def _signature(value: Any) -> bytes:
    _check(isinstance(value, bytes) and len(value) == _SIGNATURE_BYTES, "a signature")
    return bytes(value)
