"""Proof of membership: right after Noise, before any other protocol, both ends show the swarm key.

Noise has already proven both peer ids; each side then shows an HMAC over both ids and two fresh
nonces, so a proof serves one connection, one direction and one pair of peers, and a third party
cannot pass it on. In an open mesh (no swarm key) the mesh id alone is the key: it keeps meshes
apart and nothing more. Knows bytes and roles; who is in good standing is the roster's to say.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from p2p.certs import CHAIN_BYTES_MAX, KEY_ID_BYTES, Chain, decode_chain, encode_chain
from p2p.errors import ProtocolViolation
from p2p.identity import PeerId
from p2p.roster import NotAdmitted, Roster

NONCE_BYTES = 32
PROOF_BYTES = 32
_ACCEPTED = b"\x01"
_REFUSED = b"\x02"
_CHAIN, _TICKET = b"c", b"t"
_NO_KEY = bytes(KEY_ID_BYTES)
_KEYS_MAX = 8
_FRAME_BYTES_MAX = CHAIN_BYTES_MAX + 512
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

    async def check_as_listener(self, pipe: _Pipe, dialler: str) -> bytes:
        """Returns once the dialler's proof is good, with what the caller then passes to `accept`."""
        theirs = await _exactly(pipe, NONCE_BYTES)
        nonce = secrets.token_bytes(NONCE_BYTES)
        nonces = theirs + nonce
        await pipe.write(nonce + self.proof(b"listener", dialler, self.own_peer, nonces))
        expected = self.proof(b"dialler", dialler, self.own_peer, nonces)
        if not hmac.compare_digest(expected, await _exactly(pipe, PROOF_BYTES)):
            raise MembershipRefused("it does not hold this mesh's swarm key")
        return _ACCEPTED

    async def accept(self, pipe: _Pipe, dialler: str, answer: bytes) -> None:
        """Tell the dialler that it may go on."""
        await pipe.write(answer)


class CertifiedMembership:
    """The proof in a mesh that has a founding key: the swarm key first, then each side's certificates.

    Whoever holds an invite only is let in by the other side and gets its certificate here. Sides that have
    no swarm key in common (one was away while it changed) are known by their certificates alone.
    """

    def __init__(self, roster: Roster, clock_s: Callable[[], float] = time.time) -> None:
        self.roster = roster
        self.own_peer = str(roster.me)
        self._clock_s = clock_s

    @property
    def protocol(self) -> str:
        """Scoped by mesh; another number than that of meshes without a founding key."""
        return f"/shoal/{self.roster.mesh_id}/member/2"

    def _proof(self, key: bytes, role: bytes, dialler: str, listener: str, nonces: bytes) -> bytes:
        return Membership(self.roster.mesh_id, key, "").proof(role, dialler, listener, nonces)

    async def prove_as_dialler(self, pipe: _Pipe, listener: str) -> None:
        """Raises MembershipRefused."""
        keys = self.roster.accepted_keys(self._clock_s())
        nonce = secrets.token_bytes(NONCE_BYTES)
        offered = list(keys)[:_KEYS_MAX]
        await pipe.write(nonce + bytes([len(offered)]) + b"".join(offered))
        answer = await _exactly(pipe, NONCE_BYTES + KEY_ID_BYTES + PROOF_BYTES)
        key_id, shown = answer[NONCE_BYTES:-PROOF_BYTES], answer[-PROOF_BYTES:]
        nonces = nonce + answer[:NONCE_BYTES]
        mine = bytes(PROOF_BYTES)
        keyed = key_id != _NO_KEY
        if keyed:
            key = keys.get(key_id)
            if key is None:
                raise MembershipRefused("it does not hold this mesh's swarm key")
            if not hmac.compare_digest(self._proof(key, b"listener", self.own_peer, listener, nonces), shown):
                raise MembershipRefused("it does not hold this mesh's swarm key")
            mine = self._proof(key, b"dialler", self.own_peer, listener, nonces)
        await pipe.write(mine + self._shown(keyed))
        verdict = await _exactly(pipe, 1)
        if verdict != _ACCEPTED:
            reason = (await _frame(pipe)).decode("utf-8", "replace")[:200]
            self.roster.refused(PeerId(listener), reason)
            raise MembershipRefused(reason)
        issued = await _frame(pipe)
        await self._judge(pipe, await _frame(pipe), listener, keyed, issued)

    async def _judge(self, pipe: _Pipe, shown: bytes, listener: str, keyed: bool, issued: bytes) -> None:
        """The dialler's turn: what the listener gave it, and whether it believes the listener."""
        if issued and not self.roster.admitted(decode_chain_or_refuse(issued)):
            raise MembershipRefused("the certificate that it gave is not good")
        given = self._believe(shown, listener, keyed)
        self.roster.refused(PeerId(listener), "")
        if given:
            await pipe.write(_sized(given))

    async def check_as_listener(self, pipe: _Pipe, dialler: str) -> bytes:
        """As Membership; where it raises, the dialler was told why."""
        head = await _exactly(pipe, NONCE_BYTES + 1)
        count = min(head[NONCE_BYTES], _KEYS_MAX)
        offered = await _exactly(pipe, count * KEY_ID_BYTES)
        ids = [offered[k : k + KEY_ID_BYTES] for k in range(0, len(offered), KEY_ID_BYTES)]
        keys = self.roster.accepted_keys(self._clock_s())
        key_id = next((one for one in keys if one in ids), _NO_KEY)
        nonce = secrets.token_bytes(NONCE_BYTES)
        nonces = head[:NONCE_BYTES] + nonce
        key = keys.get(key_id)
        mine, wanted = bytes(PROOF_BYTES), bytes(PROOF_BYTES)
        if key is not None:
            mine = self._proof(key, b"listener", dialler, self.own_peer, nonces)
            wanted = self._proof(key, b"dialler", dialler, self.own_peer, nonces)
        await pipe.write(nonce + key_id + mine)
        if not hmac.compare_digest(wanted, await _exactly(pipe, PROOF_BYTES)):
            raise MembershipRefused("it does not hold this mesh's swarm key")
        try:
            given = self._believe(await _frame(pipe), dialler, key is not None)
        except MembershipRefused as refused:
            await pipe.write(_REFUSED + _sized(str(refused).encode()))
            raise
        return _ACCEPTED + _sized(given) + self._shown(key is not None)

    async def accept(self, pipe: _Pipe, dialler: str, answer: bytes) -> None:
        """Tell the dialler that it may go on; where this side had an invite only, the dialler lets it in."""
        invited = not self.roster.public and not self.roster.chain
        await pipe.write(answer)
        if invited and not self.roster.admitted(decode_chain_or_refuse(await _frame(pipe))):
            raise MembershipRefused("the certificate that it gave is not good")

    def _shown(self, keyed: bool) -> bytes:
        """What this side shows of itself: its chain, else (only to holders of the swarm key) its invite's ticket."""
        ticket = b"" if self.roster.chain or self.roster.public or not keyed else self.roster.ticket
        return _sized(_TICKET + ticket if ticket else _CHAIN + encode_chain(self.roster.chain))

    def _believe(self, shown: bytes, peer: str, keyed: bool) -> bytes:
        """What to give the other side (its new chain where it came by an invite). Raises MembershipRefused."""
        kind, body = shown[:1], shown[1:]
        if kind == _TICKET and keyed and not self.roster.public:
            try:
                return encode_chain(self.roster.admit(PeerId(peer), body, self._clock_s()))
            except NotAdmitted as error:
                raise MembershipRefused(str(error)) from None
        if kind != _CHAIN:
            raise MembershipRefused("it shows neither a certificate nor an invite")
        problem = self.roster.learn(PeerId(peer), decode_chain_or_refuse(body))
        if problem and not keyed:
            problem += "; the swarm key that it was invited with is not, or no longer, this mesh's"
        if problem:
            raise MembershipRefused(problem)
        return b""


def decode_chain_or_refuse(data: bytes) -> Chain:
    """The chain in `data`. Raises MembershipRefused."""
    try:
        return decode_chain(data)
    except ProtocolViolation as error:
        raise MembershipRefused(str(error)) from None


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


async def _frame(pipe: _Pipe) -> bytes:
    size = int.from_bytes(await _exactly(pipe, 2), "big")
    if size > _FRAME_BYTES_MAX:
        raise MembershipRefused(f"it sends {size} bytes as proof")
    return await _exactly(pipe, size)


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
