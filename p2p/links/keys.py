"""Keys of one link: an ephemeral X25519 exchange, and what is derived from it.

The two public keys travel over the authenticated Rpc, inside Noise, so that each is bound to a libp2p identity as a
pinned certificate would be. Everything else follows by HKDF-SHA256: keys for records in each direction (a new one every
2**18 records, far below the limits of GCM), and for the proofs with which a socket shows that it belongs to the link.
A proof answers a fresh challenge, so that it is of use once. It knows nothing of sockets or messages.
"""

from __future__ import annotations

import hmac
import secrets
import struct

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from p2p.errors import ProtocolViolation

PUBLIC_BYTES = 32
SESSION_BYTES = 16
CHALLENGE_BYTES = 32
PROOF_BYTES = 32
EPOCH_RECORDS_LOG2 = 18
_KEY_BYTES = 16  # AES-128, the quicker one: TLS 1.3's mandatory suite is content with it


class Exchange:
    """Our half of the exchange. `finish` may be called once with the peer's public key."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def finish(self, public: bytes, context: bytes) -> bytes:
        """The secret that both ends share. Raises ProtocolViolation for a key that is none.

        `context` binds it to what both ends must agree on: identities, session, service.
        """
        if len(public) != PUBLIC_BYTES:
            raise ProtocolViolation(f"a public key of {len(public)} bytes")
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise ProtocolViolation("a public key of low order") from None
        return HKDF(hashes.SHA256(), 32, salt=b"shoal/links/1", info=context).derive(shared)


def context_of(session: bytes, service: str, opener: str, server: str, keys: tuple[bytes, bytes]) -> bytes:
    """What the secret is bound to; each part with its length, so that no two contexts collide."""
    parts = [session, service.encode(), opener.encode(), server.encode(), *keys]
    return b"".join(struct.pack("!I", len(part)) + part for part in parts)


def _expand(secret: bytes, label: bytes, count: int) -> bytes:
    return HKDFExpand(hashes.SHA256(), count, info=b"shoal/links/1 " + label).derive(secret)


class Cipher:
    """Keys of one direction: `data(seq)` for numbered records, `control` for the rest."""

    def __init__(self, secret: bytes, direction: bytes) -> None:
        self._secret = _expand(secret, b"direction " + direction, 32)
        self.control = AESGCM(_expand(self._secret, b"control", _KEY_BYTES))
        self._epoch = -1
        self._current = self.control

    def data(self, seq: int) -> AESGCM:
        epoch = seq >> EPOCH_RECORDS_LOG2
        if epoch != self._epoch:
            self._current = AESGCM(_expand(self._secret, b"data" + struct.pack("!Q", epoch), _KEY_BYTES))
            self._epoch = epoch
        return self._current


class LinkKeys:
    """All keys of a link, seen from one end. Never printed."""

    __slots__ = ("_proofs", "inward", "outward")

    def __init__(self, secret: bytes, *, opener: bool) -> None:
        mine, theirs = (b"opener", b"server") if opener else (b"server", b"opener")
        self.outward = Cipher(secret, mine)
        self.inward = Cipher(secret, theirs)
        self._proofs = _expand(secret, b"proofs", 32)

    def proof(self, label: bytes, challenge: bytes, transcript: bytes) -> bytes:
        return hmac.digest(self._proofs, label + b"\0" + challenge + transcript, "sha256")

    def proves(self, label: bytes, challenge: bytes, transcript: bytes, proof: bytes) -> bool:
        return hmac.compare_digest(self.proof(label, challenge, transcript), proof)


def new_session() -> bytes:
    return secrets.token_bytes(SESSION_BYTES)


def new_challenge() -> bytes:
    return secrets.token_bytes(CHALLENGE_BYTES)
