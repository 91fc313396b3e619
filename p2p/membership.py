"""Proof of membership: right after Noise, before any other protocol, both ends show the swarm key.

Noise has already proven both peer ids; each side then shows an HMAC over both ids and two fresh
nonces, so a proof serves one connection, one direction and one pair of peers, and a third party
cannot pass it on. In an open mesh (no swarm key) the mesh id alone is the key: it keeps meshes
apart and nothing more. Knows bytes and roles; not who may be expelled, nor the host.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from typing import Protocol

NONCE_BYTES = 32
PROOF_BYTES = 32
_ACCEPTED = b"\x01"
_DOMAIN = b"shoal member v1"


class MembershipRefused(Exception):
    """The other end is not of this mesh; the message says how that showed."""


class _Pipe(Protocol):
    async def read(self, n: int | None = None) -> bytes: ...

    async def write(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Membership:
    """What this node knows: its own id, its mesh and the swarm key (None for an open mesh)."""

    mesh_id: str
    swarm_key: bytes | None
    own_peer: str

    @property
    def protocol(self) -> str:
        """Scoped by mesh, so that nodes of another mesh do not even speak it."""
        return f"/shoal/{self.mesh_id}/member/1"

    def proof(self, role: bytes, dialler: str, listener: str, nonces: bytes) -> bytes:
        """32 bytes: HMAC-SHA256 over role, both peer ids and both nonces (the dialler's first)."""
        secret = hmac.digest(_framed(self.mesh_id.encode(), self.swarm_key or b""), _DOMAIN, "sha256")
        return hmac.digest(secret, _framed(role, dialler.encode(), listener.encode(), nonces), "sha256")

    async def prove_as_dialler(self, pipe: _Pipe, listener: str) -> None:
        """The dialler speaks first and is the last to be believed. Raises MembershipRefused."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        await pipe.write(nonce)
        answer = await _exactly(pipe, NONCE_BYTES + PROOF_BYTES)
        nonces = nonce + answer[:NONCE_BYTES]
        expected = self.proof(b"listener", self.own_peer, listener, nonces)
        if not hmac.compare_digest(expected, answer[NONCE_BYTES:]):
            raise MembershipRefused("it does not hold this mesh's swarm key")
        await pipe.write(self.proof(b"dialler", self.own_peer, listener, nonces))
        if await _exactly(pipe, 1) != _ACCEPTED:
            raise MembershipRefused("it does not accept this node's swarm key")

    async def check_as_listener(self, pipe: _Pipe, dialler: str) -> None:
        """Returns once the dialler's proof is good; the caller then sends `accept`."""
        theirs = await _exactly(pipe, NONCE_BYTES)
        nonce = secrets.token_bytes(NONCE_BYTES)
        nonces = theirs + nonce
        await pipe.write(nonce + self.proof(b"listener", dialler, self.own_peer, nonces))
        expected = self.proof(b"dialler", dialler, self.own_peer, nonces)
        if not hmac.compare_digest(expected, await _exactly(pipe, PROOF_BYTES)):
            raise MembershipRefused("it does not hold this mesh's swarm key")

    async def accept(self, pipe: _Pipe) -> None:
        """Tell the dialler that it may go on."""
        await pipe.write(_ACCEPTED)


def _framed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


async def _exactly(pipe: _Pipe, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await pipe.read(count - len(data))
        if not piece:
            raise MembershipRefused("it hung up during the proof")
        data += piece
    return data
